//! Small indexes, good and bad, for the fuzzer to begin with.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used
)]

use harbour_image::{
    index::ViewKind,
    tree::{Content, Dir, Kind, Meta, Run, Time, Tree},
};

use crate::{
    support::{Builder, meta, noise, random::CAPABILITY},
    walk::mend,
};

/// Seeds by name, and whether `verify` has nothing against them.
pub fn seeds() -> Vec<(&'static str, Vec<u8>, bool)> {
    let every = every_kind().write(ViewKind::Layer).bytes;
    let big = big_directory().write(ViewKind::Image).bytes;
    let nid_at = |bytes: &[u8], name: &[u8]| {
        // The place in the root's entries of the number that `name` leads to.
        let index = harbour_image::index::Index::open(bytes).unwrap();
        let (nid, _) = index.lookup(&index.root().unwrap(), name).unwrap().unwrap();
        let raw = nid.0.to_le_bytes();
        (0..bytes.len() - 8)
            .find(|at| bytes[*at..*at + 8] == raw && bytes[*at + 11] == 0 && *at > 1152)
            .unwrap()
    };
    let changed = |bytes: &[u8], at: usize, with: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[at..at + with.len()].copy_from_slice(with);
        mend(&mut bytes);
        bytes
    };
    let root = 36 * 32;
    let word = |bytes: &[u8], number: usize| {
        u64::from_le_bytes(bytes[16 + 8 * number..24 + 8 * number].try_into().unwrap()) as usize
    };
    let (keys, segments, granules) = (word(&every, 10), word(&every, 12), word(&every, 14));
    let cycle = changed(&every, nid_at(&every, b"dir"), &36u64.to_le_bytes());
    vec![
        ("empty", Builder::new().write(ViewKind::Image).bytes, true),
        ("every-kind", every.clone(), true),
        ("big-directory", big.clone(), true),
        ("header-only", every[..1024].to_vec(), false),
        ("cycle", cycle, false),
        ("xattr-count", changed(&every, root + 2, &[0xff; 2]), false),
        ("inode-format", changed(&every, root, &[9]), false),
        (
            "directory-size",
            changed(&every, root + 8, &u64::MAX.to_le_bytes()),
            false,
        ),
        ("link-count", changed(&every, root + 44, &[77]), false),
        (
            "first-name",
            changed(&big, word(&big, 1) - 4096 + 8, &[1, 0]),
            false,
        ),
        (
            "key-order",
            changed(&every, keys, &u32::MAX.to_le_bytes()),
            false,
        ),
        (
            "large-files",
            changed(&every, 16 + 8 * 18, &0u64.to_le_bytes()),
            false,
        ),
        (
            "object-length",
            changed(&every, segments + 32, &u32::MAX.to_le_bytes()),
            false,
        ),
        (
            "pack-number",
            changed(&every, segments + 36, &u32::MAX.to_le_bytes()),
            false,
        ),
        ("granule-hash", changed(&every, granules, &[0; 32]), false),
        (
            "table-count",
            changed(&every, 16 + 8 * 11, &u64::MAX.to_le_bytes()),
            false,
        ),
    ]
}

/// One of everything, in a layer.
pub fn every_kind() -> Builder {
    let mut builder = Builder::new();
    let xattrs = |list: &[(&[u8], &[u8])]| Meta {
        mtime: Time {
            secs: -3,
            nanos: 500_000_000,
        },
        xattrs: list
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect(),
        ..meta(0o4755)
    };
    let dir = builder.dir(Tree::ROOT, b"dir");
    let opaque = Dir {
        opaque: true,
        implied: true,
        ..Dir::default()
    };
    let opaque = builder.add(
        dir,
        b"opaque",
        xattrs(&[(b"user.note", b"x")]),
        Kind::Dir(opaque),
    );
    let small = builder.file(opaque, b"small", b"content");
    builder.link(Tree::ROOT, b"link", small);
    builder.file(dir, b"granules", &noise(1, 40_000));
    let object = builder.store.put(&noise(2, 5000));
    let runs = vec![Run {
        offset: 8192,
        object,
        len: 5000,
    }];
    let sparse = Kind::File(Content {
        size: 100_000,
        runs,
    });
    builder.add(
        dir,
        b"sparse",
        xattrs(&[(b"security.capability", CAPABILITY)]),
        sparse,
    );
    for (name, kind) in [
        (&b"char"[..], Kind::Char(1, 3)),
        (b"block", Kind::Block(259, 1 << 19)),
        (b"fifo", Kind::Fifo),
        (b"socket", Kind::Socket),
        (b"symlink", Kind::Symlink((*b"../target").into())),
        (b"whiteout", Kind::Whiteout),
        (b"\xffname", Kind::File(Content::default())),
    ] {
        builder.add(
            Tree::ROOT,
            name,
            Meta {
                uid: 1000,
                gid: 70_000,
                ..meta(0o640)
            },
            kind,
        );
    }
    builder
}

/// A directory of two blocks and a symlink of one.
fn big_directory() -> Builder {
    let mut builder = Builder::new();
    let dir = builder.dir(Tree::ROOT, b"d");
    for number in 0..20u8 {
        builder.add(dir, &[b'a' + number; 250], meta(0o600), Kind::Fifo);
    }
    let target = Kind::Symlink(vec![b't'; 4095].into());
    builder.add(Tree::ROOT, b"long", meta(0o777), target);
    builder
}
