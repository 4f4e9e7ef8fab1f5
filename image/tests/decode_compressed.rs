//! Blobs as registries send them: gzip and Zstandard, whole, in parts, cut, padded and hostile.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use std::io::{Read, Write};

use harbour_image::{
    decode::{Compression, DecodeLimits, DecodeOptions, Decoded, MemorySink, Remedy, decode_layer},
    digest::Digest,
};
use support::*;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(data, 1).unwrap()
}

/// A skippable frame, as `pzstd` and zstd:chunked write them.
fn skippable(data: &[u8]) -> Vec<u8> {
    [
        &[0x52, 0x2a, 0x4d, 0x18][..],
        &(data.len() as u32).to_le_bytes(),
        data,
    ]
    .concat()
}

/// Text and noise, some objects long.
fn sample() -> Vec<u8> {
    let noise: Vec<u8> = (0..1_500_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    (0..40)
        .fold(Tar::new().file("noise", &noise), |tar, i| {
            tar.file(&format!("f{i}"), &[i; 5000])
        })
        .end()
}

/// Gives at most three bytes at a time and counts them.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.0.len().min(into.len()).min(3);
        into[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        self.1 += count;
        Ok(count)
    }
}

#[track_caller]
fn good(tar: &[u8], blob: &[u8], compression: Compression) -> Decoded {
    let (decoded, sink) = decode_with(blob, &options(compression)).unwrap();
    assert_eq!(decoded.diff_id, Digest::of(tar));
    assert_eq!(decoded.stats.tar_bytes, tar.len() as u64);
    assert_eq!(lines(&decoded.tree, &sink), lines_of(tar));
    decoded
}

#[track_caller]
fn bad(blob: &[u8], compression: Compression, message: &str) {
    let error = decode_layer(blob, &options(compression), &mut MemorySink::new()).unwrap_err();
    assert!(
        error.to_string().contains(message),
        "want {message:?}, got {error}"
    );
    assert_eq!(error.remedy(), Remedy::Refetch);
}

#[test]
fn whole_and_in_parts() {
    let tar = sample();
    let parts: Vec<&[u8]> = tar.chunks(100_000).collect();
    let members: Vec<u8> = parts.iter().flat_map(|part| gzip(part)).collect();
    let frames: Vec<u8> = parts
        .iter()
        .flat_map(|part| [zstd(part), skippable(b"toc")].concat())
        .collect();
    good(&tar, &tar, Compression::None);
    good(&tar, &gzip(&tar), Compression::Gzip);
    good(&tar, &members, Compression::Gzip);
    good(
        &tar,
        &[gzip(b""), gzip(&tar), gzip(b"")].concat(),
        Compression::Gzip,
    );
    good(
        &tar,
        &[gzip(&tar), vec![0; 5000]].concat(),
        Compression::Gzip,
    );
    good(&tar, &zstd(&tar), Compression::Zstd);
    good(&tar, &frames, Compression::Zstd);
    good(
        &tar,
        &[skippable(b""), zstd(b""), zstd(&tar)].concat(),
        Compression::Zstd,
    );
    for (blob, compression) in [
        (members, Compression::Gzip),
        (frames, Compression::Zstd),
        (tar.clone(), Compression::None),
    ] {
        let mut reader = Trickle(&blob, 0);
        let decoded = decode_layer(&mut reader, &options(compression), &mut MemorySink::new());
        assert_eq!(decoded.unwrap().diff_id, Digest::of(&tar));
        assert_eq!(reader.1, blob.len());
    }
}

#[test]
fn optional_parts_of_a_gzip_header() {
    let tar = Tar::new().file("f", b"x").end();
    let plain = gzip(&tar);
    let with = |flags: u8, parts: &[u8]| {
        let mut blob = plain[..10].to_vec();
        blob[3] = flags;
        [&blob, parts, &plain[10..]].concat()
    };
    for blob in [
        with(1, b""),
        with(2, b"cc"),
        with(4, b"\x03\0abc"),
        with(4, b"\0\0"),
        with(8, b"name\0"),
        with(16, b"comment\0"),
        with(30, b"\x01\0aname\0comment\0cc"),
    ] {
        good(&tar, &blob, Compression::Gzip);
    }
    bad(&with(0x20, b""), Compression::Gzip, "reserved flags");
    bad(
        &with(8, &[b'n'; 100_000]),
        Compression::Gzip,
        "header is too long",
    );
}

#[test]
fn damaged() {
    let tar = sample();
    let (gz, zst) = (gzip(&tar), zstd(&tar));
    let patched = |blob: &[u8], at: usize| {
        let mut blob = blob.to_vec();
        blob[at] ^= 0x55;
        blob
    };
    bad(
        b"",
        Compression::Gzip,
        "the stream ends in the middle of a member",
    );
    bad(
        b"",
        Compression::Zstd,
        "the stream ends in the middle of a frame",
    );
    bad(&tar, Compression::Gzip, "this is not gzip");
    bad(&tar, Compression::Zstd, "bad zstd stream");
    bad(&gz, Compression::None, "no tar header at byte 0");
    bad(
        &patched(&gz, gz.len() - 8),
        Compression::Gzip,
        "checksum is wrong",
    );
    bad(
        &patched(&gz, gz.len() - 1),
        Compression::Gzip,
        "length is wrong",
    );
    bad(
        &patched(&gz, 2),
        Compression::Gzip,
        "not compressed with deflate",
    );
    bad(
        &[&gz[..], b"x"].concat(),
        Compression::Gzip,
        "neither a member nor zeros follows",
    );
    bad(
        &[&gz[..], &[0; 99], b"x"].concat(),
        Compression::Gzip,
        "other than zeros follows",
    );
    bad(
        &[&gz[..], &[0; 99], &gz].concat(),
        Compression::Gzip,
        "other than zeros follows",
    );
    bad(
        &[&zst[..], b"trailing"].concat(),
        Compression::Zstd,
        "bad zstd stream",
    );
    for cut in [1, 5, 10, 11, 500, gz.len() - 9, gz.len() - 8, gz.len() - 1] {
        bad(
            &gz[..cut],
            Compression::Gzip,
            "the stream ends in the middle of a member",
        );
    }
    for cut in [1, 4, 7, 500, zst.len() - 3, zst.len() - 1] {
        bad(
            &zst[..cut],
            Compression::Zstd,
            "the stream ends in the middle of a frame",
        );
    }
}

#[test]
fn bombs() {
    let limits = DecodeLimits {
        ratio_max: 100,
        ratio_free_bytes: 1 << 20,
        ..Default::default()
    };
    let zeros = vec![0; 30 << 20];
    let tar = Tar::new().file("f", &zeros).end();
    let refuse = |blob: &[u8], compression, limits: &DecodeLimits, message: &str| {
        let options = DecodeOptions {
            limits: limits.clone(),
            ..options(compression)
        };
        let error = decode_layer(blob, &options, &mut MemorySink::new()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.remedy(), Remedy::RaiseLimit);
    };
    for (blob, compression) in [
        (gzip(&tar), Compression::Gzip),
        (zstd(&tar), Compression::Zstd),
    ] {
        refuse(&blob, compression, &limits, "layer test, entry \"f\": ");
        refuse(&blob, compression, &limits, "looks like a compression bomb");
        let options = options(compression);
        decode_layer(&blob[..], &options, &mut MemorySink::new()).unwrap();
    }
    // Sparse segments of one byte that would each take a page.
    let count = 2000;
    let map: Vec<String> = (0..count)
        .map(|i| format!("{},1", (i + 1) * 20_000 - 1))
        .collect();
    let size = (count * 20_000).to_string();
    let tar = Tar::new()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.map", map.join(",").as_bytes()),
            ],
        )
        .file("f", &vec![1; count])
        .end();
    refuse(
        &tar,
        Compression::None,
        &limits_of_ratio(20),
        "compression bomb",
    );

    // A frame that asks for a window of 2 GiB.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(&tar).unwrap();
    bad(
        &encoder.finish().unwrap(),
        Compression::Zstd,
        "bad zstd stream",
    );
}

fn limits_of_ratio(ratio_max: u64) -> DecodeLimits {
    DecodeLimits {
        ratio_max,
        ratio_free_bytes: 1 << 20,
        ..Default::default()
    }
}

#[test]
fn compression_is_told_by_the_first_bytes() {
    let tar = sample();
    assert_eq!(Compression::detect(&tar), Compression::None);
    assert_eq!(Compression::detect(&gzip(&tar)), Compression::Gzip);
    assert_eq!(Compression::detect(&zstd(&tar)), Compression::Zstd);
    assert_eq!(Compression::detect(&skippable(b"x")), Compression::Zstd);
    assert_eq!(Compression::detect(b""), Compression::None);
}
