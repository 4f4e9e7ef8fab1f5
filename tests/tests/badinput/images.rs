//! The hostile images.

use anyhow::Result;
use harbour_tests::layers::{Blob, Entry, Layout, digest, gzip, media, pad, record, tar};
use serde_json::json;

/// One image that must not get in.
pub struct Case {
    pub name: &'static str,
    /// Makes image `x` of a layout.
    pub build: fn(&mut Layout) -> Result<()>,
    /// What the message has to contain.
    pub says: &'static [&'static str],
    /// Exit code, where it is not all the same.
    pub code: Option<i32>,
    /// More flags of `pull`.
    pub flags: &'static [&'static str],
}

/// Bytes that neither compress nor repeat.
pub fn noise(len: usize) -> Vec<u8> {
    harbour_tests::layers::noise(1, len)
}

fn layer(layout: &mut Layout, entries: &[Entry]) -> Result<()> {
    layout.image("x", &[entries.to_vec()])
}

fn stream(layout: &mut Layout, tar: &[u8]) -> Result<()> {
    layout.blobs("x", &[Blob::gzip(tar)?])
}

/// A blob whose descriptor tells the truth about bytes that are no honest layer of that tar.
fn damaged(layout: &mut Layout, bytes: Vec<u8>, tar: &[u8]) -> Result<()> {
    layout.blobs("x", &[Blob::new(bytes, media::GZIP, digest(tar))])
}

fn plain() -> Vec<u8> {
    tar(&[Entry::file("plain", noise(100_000))])
}

const fn refused(
    name: &'static str,
    build: fn(&mut Layout) -> Result<()>,
    says: &'static [&'static str],
) -> Case {
    Case {
        name,
        build,
        says,
        code: Some(5),
        flags: &[],
    }
}

/// Any of the failing exit codes: what a source gives cannot always be told from what it lacks.
const fn failed(
    name: &'static str,
    build: fn(&mut Layout) -> Result<()>,
    says: &'static [&'static str],
) -> Case {
    Case {
        name,
        build,
        says,
        code: None,
        flags: &[],
    }
}

pub fn cases() -> Vec<Case> {
    let mut all = names();
    all.extend(streams());
    all.extend(documents());
    all
}

fn names() -> Vec<Case> {
    vec![
        refused(
            "dots before",
            |l| layer(l, &[Entry::file("../evil", "")]),
            &["..", "evil"],
        ),
        refused(
            "dots inside",
            |l| layer(l, &[Entry::file("a/../../evil", "")]),
            &["..", "evil"],
        ),
        refused(
            "absolute name",
            |l| layer(l, &[Entry::file("/etc/evil", "")]),
            &["/etc/evil", "absolute"],
        ),
        refused(
            "hard link out",
            |l| layer(l, &[Entry::hard("l", "../../etc/passwd")]),
            &["\"l\"", ".."],
        ),
        refused(
            "hard link to nothing",
            |l| layer(l, &[Entry::hard("l", "nothing-there")]),
            &["nothing-there"],
        ),
        refused(
            "hard link to itself",
            |l| layer(l, &[Entry::hard("self-l", "self-l")]),
            &["self-l"],
        ),
        refused(
            "hard links in a circle",
            |l| {
                layer(
                    l,
                    &[
                        Entry::hard("circle-a", "circle-b"),
                        Entry::hard("circle-b", "circle-a"),
                    ],
                )
            },
            &["circle-"],
        ),
        refused(
            "hard link to a directory",
            |l| layer(l, &[Entry::dir("some-dir"), Entry::hard("l", "some-dir")]),
            &["some-dir"],
        ),
        refused(
            "through a link out of the layer",
            |l| {
                layer(
                    l,
                    &[
                        Entry::symlink("out", "../../.."),
                        Entry::file("out/evil", ""),
                    ],
                )
            },
            &["out/evil"],
        ),
        refused(
            "through links in a circle",
            |l| {
                layer(
                    l,
                    &[
                        Entry::symlink("r1", "r2"),
                        Entry::symlink("r2", "r1"),
                        Entry::file("r1/evil", ""),
                    ],
                )
            },
            &["r1/evil"],
        ),
        refused(
            "NUL in a name",
            |l| stream(l, &with_path(b"a\0b")),
            &["NUL"],
        ),
        refused(
            "component of 300 bytes",
            |l| layer(l, &[Entry::file("n".repeat(300), "")]),
            &["300", "255"],
        ),
        refused(
            "name of 10,000 bytes",
            |l| layer(l, &[Entry::file("d/".repeat(5000), "")]),
            &["4096"],
        ),
        refused(
            "root as a file",
            |l| layer(l, &[Entry::file("./", "x")]),
            &["root"],
        ),
        refused(
            "whiteout of dots",
            |l| layer(l, &[Entry::file("a/.wh...", "")]),
            &[".wh."],
        ),
        refused(
            "unknown type",
            |l| {
                layer(
                    l,
                    &[Entry {
                        kind: b'Q',
                        ..Entry::file("label", "")
                    }],
                )
            },
            &["label"],
        ),
    ]
}

/// One empty file whose name stands in a PAX header as it is.
fn with_path(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    extended(&mut out, &[(b"path", path)]);
    Entry::file("short", "").write(&mut out);
    out.resize(out.len() + 1024, 0);
    out
}

/// A PAX header with these records.
fn extended(out: &mut Vec<u8>, records: &[(&[u8], &[u8])]) {
    let mut pax = Vec::new();
    records
        .iter()
        .for_each(|(key, value)| record(&mut pax, key, value));
    let size = Some(pax.len() as u64);
    Entry {
        kind: b'x',
        claimed: size,
        ..Entry::file("PaxHeaders/x", "")
    }
    .write(out);
    pad(out, &pax);
}

fn streams() -> Vec<Case> {
    let limit = |mut case: Case, flags| {
        case.flags = flags;
        case
    };
    vec![
        refused(
            "truncated gzip",
            |l| {
                let whole = gzip(&plain())?;
                damaged(l, whole[..whole.len() / 2].to_vec(), &plain())
            },
            &["gzip"],
        ),
        refused(
            "garbage after gzip",
            |l| damaged(l, [gzip(&plain())?, noise(1000)].concat(), &plain()),
            &["gzip"],
        ),
        refused(
            "no gzip at all",
            |l| damaged(l, noise(10_000), &plain()),
            &["gzip"],
        ),
        refused(
            "empty blob",
            |l| damaged(l, Vec::new(), &plain()),
            &["gzip"],
        ),
        refused("truncated tar", |l| stream(l, &plain()[..60_000]), &["tar"]),
        refused(
            "tar without its end",
            |l| stream(l, &[plain()[..512].to_vec(), vec![7; 700]].concat()),
            &["tar"],
        ),
        refused("noise as tar", |l| stream(l, &noise(5120)), &["tar"]),
        refused(
            "a claim of 10^12 bytes",
            |l| {
                layer(
                    l,
                    &[Entry {
                        claimed: Some(1_000_000_000_000),
                        ..Entry::file("claims", "few")
                    }],
                )
            },
            &["claims"],
        ),
        refused(
            "a claim of 2^63 bytes",
            |l| {
                layer(
                    l,
                    &[Entry {
                        claimed: Some(1 << 63),
                        ..Entry::file("claims", "few")
                    }],
                )
            },
            &["claims"],
        ),
        refused(
            "a bomb of zeros",
            |l| stream(l, &tar(&[Entry::file("zeros", vec![0; 300_000_000])])),
            &["bomb"],
        ),
        limit(
            refused(
                "more than --max-unpacked",
                |l| layer(l, &[Entry::file("f", noise(3_000_000))]),
                &["limit"],
            ),
            &["--max-unpacked", "1MiB"],
        ),
        limit(
            refused(
                "more than --max-entries",
                |l| {
                    layer(
                        l,
                        &(0..2000)
                            .map(|n| Entry::file(format!("f{n}"), ""))
                            .collect::<Vec<_>>(),
                    )
                },
                &["entries", "1000"],
            ),
            &["--max-entries", "1000"],
        ),
        refused(
            "PAX records of two MiB",
            |l| {
                let xattrs = vec![(b"user.x".to_vec(), vec![b'x'; 2 << 20])];
                layer(
                    l,
                    &[Entry {
                        xattrs,
                        ..Entry::file("padded", "")
                    }],
                )
            },
            &["limit"],
        ),
        refused(
            "an attribute that no kernel takes",
            |l| {
                let xattrs = vec![(b"user.x".to_vec(), vec![b'x'; 70_000])];
                layer(
                    l,
                    &[Entry {
                        xattrs,
                        ..Entry::file("attributed", "")
                    }],
                )
            },
            &["attributed", "user.x"],
        ),
        refused(
            "another diff ID",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        diff_id: digest(b"other"),
                        ..blob
                    }],
                )
            },
            &["diff ID", "sha256:"],
        ),
        failed(
            "another blob",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        bytes: gzip(&tar(&[Entry::file("other", "")]))?,
                        ..blob
                    }],
                )
            },
            &["sha256:"],
        ),
        failed(
            "a blob with one bit turned",
            |l| {
                let mut blob = Blob::gzip(&plain())?;
                let middle = blob.bytes.len() / 2;
                blob.bytes[middle] ^= 4;
                l.blobs("x", &[blob])
            },
            &["sha256:"],
        ),
        failed(
            "a blob larger than its descriptor says",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        size: blob.size - 10,
                        ..blob
                    }],
                )
            },
            &["sha256:"],
        ),
        failed(
            "a blob smaller than its descriptor says",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        size: blob.size + 10,
                        ..blob
                    }],
                )
            },
            &["sha256:"],
        ),
        refused(
            "gzip that is called zstd",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        media_type: media::ZSTD.into(),
                        ..blob
                    }],
                )
            },
            &["zstd"],
        ),
        refused(
            "a good layer below a bad one",
            |l| {
                l.image(
                    "x",
                    &[
                        vec![Entry::file("good", noise(2_000_000))],
                        vec![Entry::hard("bad", "missing-file")],
                    ],
                )
            },
            &["missing-file"],
        ),
        refused("sparse map that overlaps", sparse_overlap, &["sparse"]),
    ]
}

/// A GNU 0.1 sparse map whose pieces lie over each other.
fn sparse_overlap(layout: &mut Layout) -> Result<()> {
    let mut out = Vec::new();
    extended(
        &mut out,
        &[
            (b"GNU.sparse.major", b"0"),
            (b"GNU.sparse.minor", b"1"),
            (b"GNU.sparse.name", b"holes"),
            (b"GNU.sparse.size", b"100000"),
            (b"GNU.sparse.numblocks", b"2"),
            (b"GNU.sparse.map", b"0,512,100,512"),
        ],
    );
    Entry::file("GNUSparseFile.0/holes", noise(1024)).write(&mut out);
    out.resize(out.len() + 1024, 0);
    stream(layout, &out)
}

fn documents() -> Vec<Case> {
    vec![
        failed(
            "manifest that is no JSON",
            |l| l.manifest("x", b"\xff\xfe no JSON"),
            &["JSON"],
        ),
        failed("empty manifest", |l| l.manifest("x", b""), &["manifest"]),
        failed(
            "manifest of another kind",
            |l| l.manifest("x", b"{\"schemaVersion\":2}"),
            &["layers"],
        ),
        failed(
            "schema 1",
            |l| l.manifest("x", b"{\"schemaVersion\":1,\"fsLayers\":[]}"),
            &["schemaVersion"],
        ),
        failed(
            "manifest of 100 MiB",
            |l| l.manifest("x", &vec![b' '; 100 << 20]),
            &["bytes"],
        ),
        failed(
            "manifest that nests for ever",
            |l| l.manifest("x", &b"[".repeat(1 << 20)),
            &["manifest"],
        ),
        failed(
            "config that is no JSON",
            |l| l.documents("x", b"{", &[Blob::gzip(&plain())?]),
            &["config"],
        ),
        failed(
            "config without rootfs",
            |l| l.documents("x", b"{\"os\":\"linux\"}", &[Blob::gzip(&plain())?]),
            &["rootfs"],
        ),
        failed("more layers than diff IDs", more_layers, &["diff ID"]),
        failed(
            "a media type that nobody knows",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        media_type: "application/vnd.example.layer+rar".into(),
                        ..blob
                    }],
                )
            },
            &["application/vnd.example.layer+rar"],
        ),
        failed(
            "an encrypted layer",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        media_type: format!("{}+encrypted", media::GZIP),
                        ..blob
                    }],
                )
            },
            &["encrypted"],
        ),
        failed(
            "a digest that leaves the layout",
            |l| {
                let blob = Blob::gzip(&plain())?;
                l.blobs(
                    "x",
                    &[Blob {
                        digest: "sha256:../../../../etc/passwd".into(),
                        ..blob
                    }],
                )
            },
            &["digest"],
        ),
        failed("a blob that is not there", missing_blob, &["sha256"]),
    ]
}

fn more_layers(layout: &mut Layout) -> Result<()> {
    let config = json!({
        "architecture": harbour_tests::layers::architecture(), "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [digest(&plain())] },
    });
    let blob = Blob::gzip(&plain())?;
    layout.documents("x", config.to_string().as_bytes(), &[blob.clone(), blob])
}

fn missing_blob(layout: &mut Layout) -> Result<()> {
    let blob = Blob::gzip(&plain())?;
    let layers =
        json!([{ "mediaType": blob.media_type, "digest": blob.digest, "size": blob.size }]);
    let config = digest(b"never stored");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media::MANIFEST, "layers": layers,
        "config": { "mediaType": media::CONFIG, "digest": config, "size": 12 },
    });
    layout.manifest("x", manifest.to_string().as_bytes())
}
