//! What is written is read back the same, by node, by name and by place in the data region.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "index_support/support.rs"]
mod support;

use std::ops::ControlFlow;

use harbour_image::{
    index::{
        BLOCK, FileType, Index, IndexError, Nid, Refusal, ViewKind, What, WriteError, load, seal,
        verify, write,
    },
    object::verify_granule,
    tree::{Content, Dir, Kind, NodeId, ObjectKey, Run, Tree},
};
use proptest::prelude::*;
use support::{Builder, flat, meta, noise, objects, random};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_tree_comes_back_equal(steps in random::steps(40)) {
        let builder = random::build(&steps);
        let written = builder.write(ViewKind::Layer);
        let index = Index::open(&written.bytes).unwrap();
        let report = verify(&index).unwrap();
        let (tree, placement) = load(&index).unwrap();
        prop_assert_eq!(flat(&tree, &placement), flat(&builder.tree, &builder.store.placement));

        // Written again it is the same tree, and from then on the same bytes.
        let second = write(&tree, &placement, ViewKind::Layer).unwrap();
        let (tree, placement) = load(&Index::open(&second.bytes).unwrap()).unwrap();
        let third = write(&tree, &placement, ViewKind::Layer).unwrap();
        prop_assert_eq!(second.digest, third.digest);
        prop_assert_eq!(report.content_len, written.stats.content_len);
        for (id, bytes) in objects(&builder.store) {
            for object in placement.objects.iter().filter(|object| object.id.0 == id) {
                let hashes = placement.granules_of(object).unwrap();
                for (number, granule) in bytes.chunks(16 << 10).enumerate() {
                    prop_assert!(verify_granule(
                        &object.id,
                        object.len,
                        hashes.get(number),
                        number,
                        granule
                    ));
                }
            }
        }
    }

    #[test]
    fn any_range_of_data_is_covered_exactly(steps in random::steps(30), from in 0.0..1.0f64, len in 0.0..1.0f64) {
        let builder = random::build(&steps);
        let written = builder.write(ViewKind::Layer);
        let index = Index::open(&written.bytes).unwrap();
        let header = *index.header();
        let start = header.meta_len + (header.data_len as f64 * from) as u64;
        let len = ((header.erofs_len() - start) as f64 * len) as u64;
        let all = index.segments(header.meta_len, header.data_len).unwrap();
        let byte_at = |segments: &[harbour_image::index::Segment], at: u64| {
            let segment = segments.iter().find(|segment| at >= segment.offset && at < segment.offset + segment.len);
            match segment.unwrap() {
                segment if segment.what == What::Hole => None,
                segment => match segment.what {
                    What::Object(part) => Some((part.id, u64::from(part.skip) + at - segment.offset)),
                    What::Hole => None,
                },
            }
        };
        let found = index.segments(start, len).unwrap();
        let mut at = start;
        for segment in &found {
            prop_assert_eq!(segment.offset, at);
            prop_assert!(segment.len > 0);
            for place in [at, at + segment.len / 2, at + segment.len - 1] {
                prop_assert_eq!(byte_at(&found, place), byte_at(&all, place));
            }
            at += segment.len;
        }
        prop_assert_eq!(at, start + len);
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes_and_another_another() {
    let build = |byte: u8| {
        let mut builder = Builder::new();
        let etc = builder.dir(Tree::ROOT, b"etc");
        builder.file(etc, b"hostname", &[byte; 10]);
        builder.write(ViewKind::Layer)
    };
    let (one, same, other) = (build(1), build(1), build(2));
    assert_eq!(one.bytes, same.bytes);
    assert_ne!(one.digest, other.digest);
    let uuid = |bytes: &[u8]| bytes[1024 + 48..1024 + 64].to_vec();
    assert_ne!(uuid(&one.bytes), uuid(&other.bytes));
    let (index, table) = one.bytes.split_at(one.len as usize);
    assert_eq!(table, seal::granule_table(index));
    assert!(seal::check_table(&one.digest, one.len, table));
}

#[test]
fn a_directory_of_100000_names_is_found_name_by_name_and_listed_from_any_place() {
    let mut builder = Builder::new();
    let big = builder.dir(Tree::ROOT, b"big");
    for number in 0..100_000u32 {
        let name = format!("{:x}-{number}", number.wrapping_mul(0x9e37_79b1));
        builder.add(big, name.as_bytes(), meta(0o600), Kind::Fifo);
    }
    let written = builder.write(ViewKind::Layer);
    let index = Index::open(&written.bytes).unwrap();
    verify(&index).unwrap();
    let (nid, _) = index
        .lookup(&index.root().unwrap(), b"big")
        .unwrap()
        .unwrap();
    let dir = index.inode(nid).unwrap();
    let mut cookie = 0;
    let mut names: Vec<Vec<u8>> = Vec::new();
    // In batches of odd length, as a kernel buffer would take them.
    loop {
        let mut batch = 0;
        let mut next = cookie;
        index
            .readdir(&dir, cookie, |entry| {
                if batch == 777 {
                    return ControlFlow::Break(());
                }
                batch += 1;
                names.push(entry.name.to_vec());
                next = entry.next_cookie;
                ControlFlow::Continue(())
            })
            .unwrap();
        if batch == 0 {
            break;
        }
        cookie = next;
    }
    assert_eq!(names.len(), 100_000);
    assert!(names.is_sorted());
    for name in names.iter().step_by(7) {
        let (nid, file_type) = index.lookup(&dir, name).unwrap().unwrap();
        assert_eq!(file_type, FileType::Fifo);
        assert_eq!(index.inode(nid).unwrap().mode, 0o600);
        for absent in [[name, &b"!"[..]].concat(), name[..name.len() - 1].to_vec()] {
            assert_eq!(index.lookup(&dir, &absent).unwrap(), None);
        }
    }
    assert_eq!(
        index.lookup(&dir, b".").unwrap(),
        Some((dir.nid, FileType::Dir))
    );
    assert_eq!(
        index.lookup(&dir, b"..").unwrap(),
        Some((index.root().unwrap().nid, FileType::Dir))
    );
    index
        .readdir(&dir, u64::MAX, |_| panic!("nothing is there"))
        .unwrap();
}

#[test]
fn inodes_of_one_directory_are_neighbours_and_data_follows_the_stream() {
    let mut builder = Builder::new();
    // Two directories whose files come interleaved and against the order of names.
    let (a, b) = (builder.dir(Tree::ROOT, b"a"), builder.dir(Tree::ROOT, b"b"));
    let mut stream = Vec::new();
    for number in (0..300u64).rev() {
        let parent = if number % 2 == 0 { a } else { b };
        let name = format!("{number:03}");
        builder.file(parent, name.as_bytes(), &noise(number, 5000));
        stream.push((if parent == a { b"a" } else { b"b" }, name));
    }
    let written = builder.write(ViewKind::Layer);
    let index = Index::open(&written.bytes).unwrap();
    let root = index.root().unwrap();
    let mut expected = index.header().meta_len;
    for (dir, name) in &stream {
        let (nid, _) = index.lookup(&root, *dir).unwrap().unwrap();
        let (nid, _) = index
            .lookup(&index.inode(nid).unwrap(), name.as_bytes())
            .unwrap()
            .unwrap();
        assert_eq!(index.inode(nid).unwrap().data_offset, Some(expected));
        expected += 2 * BLOCK;
    }
    for dir in [b"a", b"b"] {
        let (nid, _) = index.lookup(&root, dir).unwrap().unwrap();
        let mut last: Option<u64> = None;
        index
            .readdir(&index.inode(nid).unwrap(), 0, |entry| {
                assert!(
                    last.is_none_or(|last| entry.nid.0 == last + 2),
                    "{last:?} {}",
                    entry.nid
                );
                last = Some(entry.nid.0);
                ControlFlow::Continue(())
            })
            .unwrap();
    }
}

#[test]
fn content_of_many_objects_and_what_is_shared_or_unused() {
    let mut builder = Builder::new();
    let big = noise(1, (2 << 20) + 50_000);
    builder.store.put(b"an object that no file needs");
    builder.store.packs.push(Vec::new());
    builder
        .store
        .placement
        .packs
        .push(builder.store.placement.packs[0]);
    let unused = builder.store.placement.packs.len();
    builder.file(Tree::ROOT, b"one", &big);
    builder.file(Tree::ROOT, b"two", &big);
    let garbage = builder.file(Tree::ROOT, b"gone", &noise(2, 100_000));
    builder.dir_mut(Tree::ROOT).entries.remove(&b"gone"[..]);
    assert!(garbage.0 > 0 && unused > 1);
    let written = builder.write(ViewKind::Layer);
    assert_eq!(written.stats.segments, 6);
    // 64 hashes for each MiB and 4 for the rest, once for both files.
    assert_eq!(written.stats.granules, 64 + 64 + 4);
    let index = Index::open(&written.bytes).unwrap();
    verify(&index).unwrap();
    let (nid, _) = index
        .lookup(&index.root().unwrap(), b"two")
        .unwrap()
        .unwrap();
    let start = index.inode(nid).unwrap().data_offset.unwrap();
    let segments = index.segments(start + (1 << 20) + 20_000, 40_000).unwrap();
    let [
        harbour_image::index::Segment {
            len: 40_000,
            what: What::Object(part),
            ..
        },
    ] = segments[..]
    else {
        panic!("{segments:?}")
    };
    assert_eq!((part.skip, part.object_len), (20_000, 1 << 20));
    let hashes = index
        .granule_hashes(part.granules, part.granule_count())
        .unwrap();
    let granule = &big[(1 << 20) + (16 << 10)..][..16 << 10];
    assert!(verify_granule(
        &part.id,
        part.object_len,
        hashes.get(1),
        1,
        granule
    ));
    assert!(matches!(
        index.granule_hashes(131, 2),
        Err(IndexError::OutOfRange { .. })
    ));
    assert!(matches!(
        index.pack(index.pack_count()),
        Err(IndexError::OutOfRange { .. })
    ));
    assert!(matches!(
        index.segments(0, 1),
        Err(IndexError::OutOfRange { .. })
    ));
    assert!(matches!(
        index.segments(start, u64::MAX),
        Err(IndexError::OutOfRange { .. })
    ));
}

/// A change to a good tree, and the path and reason that writing it is to be refused with.
type Bad = (
    &'static str,
    Box<dyn Fn(&mut Builder)>,
    &'static str,
    fn(&Refusal) -> bool,
);

fn bad_trees() -> Vec<Bad> {
    let node = |kind: Kind| {
        move |b: &mut Builder| {
            b.add(NodeId(1), b"x", meta(0o644), kind.clone());
        }
    };
    let named = |name: &'static [u8]| {
        move |b: &mut Builder| {
            b.add(NodeId(1), name, meta(0), Kind::Fifo);
        }
    };
    let run = |offset, len, size| {
        move |b: &mut Builder| {
            let object = b.store.put(&vec![1; 5000]);
            let content = Content {
                size,
                runs: vec![Run {
                    offset,
                    object,
                    len,
                }],
            };
            b.add(NodeId(1), b"x", meta(0), Kind::File(content));
        }
    };
    vec![
        ("empty name", Box::new(named(b"")), "/d/", |why| {
            *why == Refusal::Name
        }),
        ("dot", Box::new(named(b".")), "/d/.", |why| {
            *why == Refusal::Name
        }),
        ("dots", Box::new(named(b"..")), "/d/..", |why| {
            *why == Refusal::Name
        }),
        ("slash", Box::new(named(b"a/b")), "/d/a/b", |why| {
            *why == Refusal::Name
        }),
        ("nul", Box::new(named(b"a\0b")), "/d/a\\x00b", |why| {
            *why == Refusal::Name
        }),
        (
            "cycle",
            Box::new(|b| b.link(NodeId(1), b"x", NodeId(1))),
            "/d/x",
            |why| *why == Refusal::DirTwice,
        ),
        (
            "root below",
            Box::new(|b| b.link(NodeId(1), b"x", NodeId(0))),
            "/d/x",
            |why| *why == Refusal::DirTwice,
        ),
        (
            "no node",
            Box::new(|b| b.link(NodeId(1), b"x", NodeId(99))),
            "/d/x",
            |why| *why == Refusal::NoSuchNode(99),
        ),
        (
            "no target",
            Box::new(node(Kind::Symlink(Box::default()))),
            "/d/x",
            |why| *why == Refusal::Target,
        ),
        (
            "long target",
            Box::new(node(Kind::Symlink(vec![b'a'; 4096].into()))),
            "/d/x",
            |why| *why == Refusal::Target,
        ),
        (
            "device",
            Box::new(node(Kind::Char(4096, 0))),
            "/d/x",
            |why| matches!(why, Refusal::Device { .. }),
        ),
        (
            "mode",
            Box::new(|b| b.tree.nodes[1].meta.mode = 0o10000),
            "/d",
            |why| *why == Refusal::Meta,
        ),
        ("unaligned", Box::new(run(1, 5000, 9000)), "/d/x", |why| {
            *why == Refusal::Runs
        }),
        (
            "past the end",
            Box::new(run(0, 5000, 4999)),
            "/d/x",
            |why| *why == Refusal::Runs,
        ),
        (
            "other length",
            Box::new(run(0, 4999, 9000)),
            "/d/x",
            |why| matches!(why, Refusal::Object(_)),
        ),
        (
            "no object",
            Box::new(node(Kind::File(Content {
                size: 1,
                runs: vec![Run {
                    offset: 0,
                    object: ObjectKey(9),
                    len: 1,
                }],
            }))),
            "/d/x",
            |why| matches!(why, Refusal::Object(_)),
        ),
    ]
}

#[test]
fn what_cannot_be_in_an_index_is_refused_by_path() {
    for (what, change, want_path, want) in bad_trees() {
        let mut builder = Builder::new();
        assert_eq!(builder.dir(Tree::ROOT, b"d"), NodeId(1));
        change(&mut builder);
        match write(&builder.tree, &builder.store.placement, ViewKind::Layer) {
            Err(WriteError::Refused { path, why }) => {
                assert!(want(&why), "{what}: {why:?}");
                assert_eq!(path, want_path, "{what}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    let mut builder = Builder::new();
    builder.add(Tree::ROOT, b"w", meta(0), Kind::Whiteout);
    builder.add(
        Tree::ROOT,
        b"o",
        meta(0),
        Kind::Dir(Dir {
            opaque: true,
            ..Dir::default()
        }),
    );
    for (name, _) in builder.dir_mut(Tree::ROOT).entries.clone() {
        let mut one = Builder {
            tree: builder.tree.clone(),
            ..Builder::default()
        };
        one.dir_mut(Tree::ROOT)
            .entries
            .retain(|other, _| *other == name);
        let refused = write(&one.tree, &one.store.placement, ViewKind::Image);
        assert!(
            matches!(
                refused,
                Err(WriteError::Refused {
                    why: Refusal::MarkInImage,
                    ..
                })
            ),
            "{refused:?}"
        );
    }
    let huge = Content {
        size: 17 << 40,
        runs: Vec::new(),
    };
    builder.add(Tree::ROOT, b"huge", meta(0), Kind::File(huge));
    assert!(matches!(
        write(&builder.tree, &builder.store.placement, ViewKind::Layer),
        Err(WriteError::TooLarge)
    ));
    let empty = Tree { nodes: Vec::new() };
    assert!(matches!(
        write(&empty, &builder.store.placement, ViewKind::Layer),
        Err(WriteError::NoRoot)
    ));
}

#[test]
fn opening_refuses_what_is_not_an_index_of_this_version() {
    let written = Builder::new().write(ViewKind::Layer);
    let good = written.bytes;
    let open = |bytes: &[u8]| Index::open(bytes).map(|_| ());
    assert!(open(&good).is_ok());
    assert!(
        open(&good[..written.len as usize]).is_ok(),
        "without its granule table"
    );
    for cut in [0, 7, 1023, 1024, 4095, written.len as usize - 1] {
        assert!(open(&good[..cut]).is_err(), "cut to {cut}");
    }
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        open(&bytes).unwrap_err().to_string()
    };
    assert!(with(0, b'X').contains("not an index"));
    assert!(with(8, 1).contains("version 1"));
    assert!(with(8, 3).contains("version 3"));
    assert!(with(16, 0xff).contains("checksum"));
    let index = Index::open(&good).unwrap();
    for nid in [0, 1, 35, u64::MAX, u64::MAX / 32] {
        assert!(index.inode(Nid(nid)).is_err(), "nid {nid}");
    }
}

#[test]
fn large_files_lie_behind_all_others() {
    let mut builder = Builder::new();
    let sizes = [3 << 20, 10, 1 << 20, (1 << 20) + 1, 0, 70_000];
    for (number, size) in sizes.into_iter().enumerate() {
        builder.file(
            Tree::ROOT,
            format!("{number}").as_bytes(),
            &noise(number as u64, size),
        );
    }
    let written = builder.write(ViewKind::Layer);
    let index = Index::open(written.bytes).unwrap();
    verify(&index).unwrap();
    let header = index.header();
    assert_eq!(header.bulk_at, 4096 + (1 << 20) + 18 * 4096);
    let root = index.root().unwrap();
    let mut last = 0;
    // Small ones in their order, then the large ones in theirs.
    for number in [1, 2, 5, 0, 3] {
        let name = format!("{number}");
        let (nid, _) = index.lookup(&root, name.as_bytes()).unwrap().unwrap();
        let inode = index.inode(nid).unwrap();
        let start = inode.data_offset.unwrap();
        assert!(start > last, "file {number}");
        assert_eq!(start >= header.head_len(), inode.size > 1 << 20);
        last = start;
    }
}
