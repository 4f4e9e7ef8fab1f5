//! The kernel's EROFS and `fsck.erofs` judge what is written: every name, type, mode, owner, time,
//! size, link count, target, attribute, device number and byte. Needs root, erofs-utils and a
//! kernel that mounts EROFS from files (6.12).
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "index_support/support.rs"]
mod support;

use harbour_image::{
    index::ViewKind,
    object::OBJECT_MAX,
    tree::{Content, Dir, Kind, Meta, Run, Time, Tree},
};
use proptest::prelude::*;
use support::{Builder, kernel::judge, meta, noise, random};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_layers(steps in random::steps(60)) {
        judge(&random::build(&steps), ViewKind::Layer);
    }
}

#[test]
fn an_empty_tree() {
    judge(&Builder::new(), ViewKind::Image);
}

#[test]
fn every_kind_of_node() {
    let mut builder = Builder::new();
    let dev = builder.dir(Tree::ROOT, b"dev");
    for (name, kind) in [
        (&b"null"[..], Kind::Char(1, 3)),
        (b"far", Kind::Char(4095, (1 << 20) - 1)),
        (b"sda", Kind::Block(8, 256)),
        (b"pipe", Kind::Fifo),
        (b"socket", Kind::Socket),
        (b"deleted", Kind::Whiteout),
    ] {
        builder.add(dev, name, meta(0o666), kind);
    }
    builder.add(
        Tree::ROOT,
        b"opaque",
        meta(0o1777),
        Kind::Dir(Dir {
            opaque: true,
            ..Dir::default()
        }),
    );
    builder.add(
        Tree::ROOT,
        b"setuid",
        meta(0o6755),
        Kind::File(Content::default()),
    );
    judge(&builder, ViewKind::Layer);
}

#[test]
fn sizes_around_blocks_and_objects() {
    let mut builder = Builder::new();
    for len in [
        0,
        1,
        4095,
        4096,
        4097,
        8192,
        16_384,
        16_385,
        OBJECT_MAX - 1,
        OBJECT_MAX,
        OBJECT_MAX + 1,
    ] {
        builder.file(
            Tree::ROOT,
            format!("f{len}").as_bytes(),
            &noise(len as u64, len),
        );
    }
    judge(&builder, ViewKind::Image);
}

#[test]
fn holes_up_to_many_gigabytes() {
    let mut builder = Builder::new();
    let ends = builder.store.put(&noise(1, 5000));
    let middle = builder.store.put(&noise(2, 4096));
    let run = |offset, object, len| Run {
        offset,
        object,
        len,
    };
    let size = (5 << 30) + 5000;
    let runs = vec![
        run(0, ends, 5000),
        run(3 << 30, middle, 4096),
        run(5 << 30, ends, 5000),
    ];
    builder.add(
        Tree::ROOT,
        b"5g",
        meta(0o600),
        Kind::File(Content { size, runs }),
    );
    builder.add(
        Tree::ROOT,
        b"hole",
        meta(0o600),
        Kind::File(Content {
            size: (300 << 30) + 7,
            runs: Vec::new(),
        }),
    );
    builder.file(Tree::ROOT, b"zz after", b"still here");
    judge(&builder, ViewKind::Image);
}

#[test]
fn names_targets_and_order() {
    let mut builder = Builder::new();
    let mut names: Vec<Vec<u8>> = (60..=255).map(|len| vec![b'n'; len]).collect();
    // Names before, between and after `.` and `..`, and every byte that a name may have.
    names.extend([&b"!"[..], b"-", b".!", b".-", b"...", b"..a", b"/", b" "].map(<[u8]>::to_vec));
    names.extend((1..=255u8).map(|byte| vec![byte]));
    names.retain(|name| !matches!(&name[..], b"." | b".." | b"/"));
    for name in &names {
        builder.add(
            Tree::ROOT,
            name,
            meta(0o644),
            Kind::File(Content::default()),
        );
    }
    let links = builder.dir(Tree::ROOT, b"links to");
    // Around what still fits behind an inode (4096 - 64), and up to what a path may be.
    for len in [1, 59, 60, 3900, 4000, 4030, 4031, 4032, 4033, 4094, 4095] {
        let target = [&[b'x'; 3][..], &noise(len, 4096)]
            .concat()
            .iter()
            .map(|b| b | 1)
            .collect::<Vec<u8>>();
        let kind = Kind::Symlink(target[..len as usize].into());
        builder.add(links, format!("{len}").as_bytes(), meta(0o777), kind);
    }
    judge(&builder, ViewKind::Image);
}

#[test]
fn hard_links_across_directories() {
    let mut builder = Builder::new();
    let (a, b) = (builder.dir(Tree::ROOT, b"a"), builder.dir(Tree::ROOT, b"b"));
    let file = builder.file(b, b"file", b"one node");
    let fifo = builder.add(b, b"fifo", meta(0o600), Kind::Fifo);
    for number in 0..70 {
        builder.link(a, format!("link{number}").as_bytes(), file);
        builder.link(Tree::ROOT, format!("fifo{number}").as_bytes(), fifo);
    }
    judge(&builder, ViewKind::Image);
}

#[test]
fn times_before_1970_and_after_2106() {
    let mut builder = Builder::new();
    for (number, secs) in [
        -1,
        -62_135_596_800,
        i64::from(i32::MIN),
        1 << 32,
        253_402_300_799,
    ]
    .into_iter()
    .enumerate()
    {
        let mtime = Time {
            secs,
            nanos: 999_999_999,
        };
        let meta = Meta {
            mtime,
            ..meta(0o644)
        };
        builder.add(
            Tree::ROOT,
            &[b'a' + number as u8],
            meta,
            Kind::File(Content::default()),
        );
    }
    judge(&builder, ViewKind::Image);
}

#[test]
fn attributes_and_acls() {
    // user::rw-, user:1000:r--, group::r--, mask::r--, other::r-- as setxattr takes it.
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\
        \x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let mut builder = Builder::new();
    let with = |xattrs: &[(&[u8], &[u8])]| Meta {
        xattrs: xattrs
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect(),
        ..meta(0o644)
    };
    let file = || Kind::File(Content::default());
    let acls = with(&[
        (b"system.posix_acl_access", acl),
        (b"system.posix_acl_default", acl),
    ]);
    builder.add(Tree::ROOT, b"acls", acls, Kind::Dir(Dir::default()));
    builder.add(
        Tree::ROOT,
        b"acl",
        with(&[(b"system.posix_acl_access", acl)]),
        file(),
    );
    builder.add(
        Tree::ROOT,
        b"ping",
        with(&[(b"security.capability", random::CAPABILITY)]),
        file(),
    );
    let long = noise(1, 65_535);
    let name = [b"user.".to_vec(), vec![b'n'; 250]].concat();
    builder.add(
        Tree::ROOT,
        b"long",
        with(&[
            (&name, &long),
            (b"trusted.x", &long[..9000]),
            (b"user.0", b""),
        ]),
        file(),
    );
    let kind = Kind::Dir(Dir {
        opaque: true,
        ..Dir::default()
    });
    let dir = builder.add(
        Tree::ROOT,
        b"dir",
        with(&[(b"user.a", &noise(2, 4000)), (b"security.x", b"y")]),
        kind,
    );
    for number in 0..100u64 {
        let value = noise(number, number as usize * 13);
        builder.add(
            dir,
            format!("{number}").as_bytes(),
            with(&[(b"user.v", &value)]),
            file(),
        );
    }
    judge(&builder, ViewKind::Layer);
}

#[test]
fn a_directory_of_100000_names() {
    let mut builder = Builder::new();
    let big = builder.dir(Tree::ROOT, b"big");
    for number in 0..100_000u32 {
        let name = format!("{:x}-{number}", number.wrapping_mul(0x9e37_79b1));
        builder.add(
            big,
            name.as_bytes(),
            meta(0o600),
            Kind::File(Content::default()),
        );
    }
    judge(&builder, ViewKind::Layer);
}

#[test]
fn directories_of_every_length_near_a_block() {
    // Data of 4000 to 4200 bytes: inline, pushed to a fresh block, in a block, in two blocks.
    let mut builder = Builder::new();
    for extra in 0..200usize {
        let dir = builder.dir(Tree::ROOT, format!("d{extra}").as_bytes());
        for number in 0..14u8 {
            builder.add(dir, &[b'a' + number; 255], meta(0o600), Kind::Fifo);
        }
        builder.add(dir, &vec![b'z'; 1 + extra], meta(0o600), Kind::Fifo);
    }
    judge(&builder, ViewKind::Layer);
}

#[test]
fn a_chain_of_2000_directories() {
    let mut builder = Builder::new();
    let mut at = Tree::ROOT;
    for _ in 0..1900 {
        at = builder.dir(at, b"d");
    }
    builder.file(at, b"bottom", b"here");
    judge(&builder, ViewKind::Image);
}
