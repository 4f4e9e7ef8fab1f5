//! Layers that are too large, cut off, or not what was promised, and neighbours that fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use harbour_image::{
    decode::{Compression, DecodeLimits, DecodeOptions, MemorySink, Remedy, decode_layer},
    digest::Digest,
};
use support::*;

#[test]
fn limits() {
    let limited = |limits: DecodeLimits| DecodeOptions {
        limits,
        ..options(Compression::None)
    };
    let default = DecodeLimits::default;
    let claims = |size: u64| {
        let text = format!("{size:011o}\0").into_bytes();
        Tar::new()
            .head(Head {
                patches: vec![(124, text)],
                ..Head::default()
            })
            .raw(b"short")
            .0
    };
    let sparse = Tar::new()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", b"9000000000000"),
                ("GNU.sparse.numblocks", b"0"),
            ],
        )
        .file("f", b"");
    let half = Tar::new()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", b"8000000000000"),
                ("GNU.sparse.numblocks", b"0"),
            ],
        )
        .file("f", b"");
    let three = Tar(half.0.repeat(3));
    let list: Vec<String> = (0..50).map(|i| format!("{},1", i * 2)).collect();
    let segments = Tar::new()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", b"100"),
                ("GNU.sparse.map", list.join(",").as_bytes()),
            ],
        )
        .file("f", &[1; 50]);
    let names = (0..100).fold(Tar::new(), |tar, i| tar.file(&format!("f{i}"), b""));
    let cases = [
        // A tar that claims 10^12 bytes: there are not as many, so it is cut.
        (
            claims(0o77777777777),
            default(),
            Remedy::Refetch,
            "the tar stream ends",
        ),
        (
            Tar::new()
                .pax(b'x', &[("size", b"1000000000000")])
                .file("f", b"")
                .0,
            default(),
            Remedy::Refetch,
            "in the middle of a file's data",
        ),
        (
            Tar::new()
                .pax(b'x', &[("size", b"10000000000000")])
                .file("f", b"")
                .0,
            default(),
            Remedy::RaiseLimit,
            "too many bytes of tar (limit 1099511627776)",
        ),
        (
            Tar::new()
                .head(Head {
                    flag: b'x',
                    size: 1 << 30,
                    ..Head::default()
                })
                .0,
            default(),
            Remedy::RaiseLimit,
            "extension headers are too long",
        ),
        (
            Tar::new()
                .head(Head {
                    flag: b'L',
                    size: 2 << 20,
                    magic: GNU,
                    ..Head::default()
                })
                .0,
            default(),
            Remedy::RaiseLimit,
            "extension headers are too long",
        ),
        (
            sparse.end(),
            default(),
            Remedy::RaiseLimit,
            "a file is too long",
        ),
        (
            three.end(),
            default(),
            Remedy::RaiseLimit,
            "all files together",
        ),
        (
            segments.end(),
            DecodeLimits {
                sparse_segments_max: 49,
                ..default()
            },
            Remedy::RaiseLimit,
            "sparse map",
        ),
        (
            names.clone().end(),
            DecodeLimits {
                entries_max: 99,
                ..default()
            },
            Remedy::RaiseLimit,
            "too many entries (limit 99)",
        ),
        (
            names.clone().end(),
            DecodeLimits {
                tree_bytes_max: 9_000,
                ..default()
            },
            Remedy::RaiseLimit,
            "too much memory",
        ),
        (
            names.end(),
            DecodeLimits {
                tar_bytes_max: 40_000,
                ..default()
            },
            Remedy::RaiseLimit,
            "bytes of tar",
        ),
        (
            Tar::new()
                .pax(b'x', &[("path", "d/".repeat(1000).as_bytes())])
                .file("", b"")
                .end(),
            DecodeLimits {
                entries_max: 500,
                ..default()
            },
            Remedy::RaiseLimit,
            "too many entries",
        ),
    ];
    for (tar, limits, remedy, message) in cases {
        refuse_with(&tar, &limited(limits), remedy, message);
    }
}

#[test]
fn diff_id_and_failing_neighbours() {
    let tar = Tar::new().file("f", b"x").end();
    let want = Digest::of(b"something else");
    let wrong = DecodeOptions {
        diff_id: Some(want),
        ..options(Compression::None)
    };
    let message = format!(
        "diff ID is {}, the image's configuration says {want}",
        Digest::of(&tar)
    );
    refuse_with(&tar, &wrong, Remedy::Refetch, &message);
    let right = DecodeOptions {
        diff_id: Some(Digest::of(&tar)),
        ..options(Compression::None)
    };
    decode_with(&tar, &right).unwrap();

    struct Broken(bool);
    impl std::io::Read for Broken {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            if std::mem::replace(&mut self.0, true) {
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            into[..BLOCK].copy_from_slice(
                &Head {
                    size: 5000,
                    ..Head::default()
                }
                .block(),
            );
            Ok(BLOCK)
        }
    }
    let error = decode_layer(
        Broken(false),
        &options(Compression::None),
        &mut MemorySink::new(),
    );
    let error = error.unwrap_err();
    assert_eq!(error.remedy(), Remedy::Retry);
    assert_eq!(
        error.to_string(),
        "layer test: reading the blob failed; try again"
    );
    assert!(std::error::Error::source(&error).is_some());

    let error = decode_layer(
        &Tar::new().file("f", b"content").end()[..],
        &options(Compression::None),
        &mut MemorySink::with_bytes_max(3),
    )
    .unwrap_err();
    assert_eq!(error.remedy(), Remedy::Sink);
    assert_eq!(error.entry(), Some("f"));
}

#[test]
fn truncated_anywhere() {
    let tar = Tar::new()
        .pax(b'x', &[("path", b"p")])
        .file("a", &[1; 700])
        .long(b'L', b"long")
        .file("b", &[2; 100])
        .end();
    let archive_end = tar.len() - 2 * BLOCK;
    // Where an entry begins with its first header, the end is as good as the archive's.
    let boundaries = [0, 2 * BLOCK + BLOCK + 2 * BLOCK, archive_end];
    for cut in 0..tar.len() {
        let result = decode(&tar[..cut]);
        let is_good = boundaries.contains(&cut) || cut == archive_end + BLOCK;
        match result {
            Ok(_) => assert!(is_good, "{cut}"),
            Err(error) => {
                assert!(!is_good, "{cut}: {error}");
                assert_eq!(error.remedy(), Remedy::Refetch, "{cut}: {error}");
            }
        }
    }
}
