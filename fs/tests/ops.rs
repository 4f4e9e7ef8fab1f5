//! Operations with no mount, against the trees that views were made from.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/support.rs"]
mod support;

use std::sync::atomic::Ordering;

use harbour_fs::{
    Config, Error, Node,
    inode::{Part, Place},
    ops::{Seek, XattrReply},
};
use harbour_image::{
    index::ViewKind,
    tree::{Dir, Kind, Meta, NodeId, Time, Tree},
};
use proptest::prelude::*;
use support::{
    model::{Model, meta, noise, sample},
    walk::{compare, find, list},
    world::World,
};

#[test]
fn every_operation_on_a_tree_with_one_of_everything() {
    let world = World::new();
    let mut layer_model = sample(ViewKind::Layer, 3000);
    let mut image_model = sample(ViewKind::Image, 10);
    let layer = world.layer(&mut layer_model, 1, &[1]);
    let mut image = world.image(
        ("registry:5000", "some/app", "v1"),
        &mut image_model,
        2,
        &[1],
    );
    image.diff_ids = vec![layer.diff_id];
    let name = format!("layers/{}", layer.diff_id.short());
    world.show(vec![image], vec![layer]);
    let fs = world.fs(Config::default());
    compare(&fs, find(&fs, &name).unwrap().node, &layer_model, true);
    let root = find(&fs, "images/registry:5000/some/app/v1/rootfs")
        .unwrap()
        .node;
    compare(&fs, root, &image_model, false);
    assert_eq!(fs.stats().wrong, 0);
    assert_eq!(fs.stats().failed, 0);
    assert_eq!(world.refills(), []);
}

#[test]
fn the_erofs_file_is_metadata_and_content_at_their_offsets() {
    let world = World::new();
    let mut model = sample(ViewKind::Layer, 10);
    let layer = world.layer(&mut model, 1, &[1]);
    let name = layer.diff_id.short();
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config::default());
    let file = find(&fs, &format!("erofs/{name}.erofs")).unwrap();
    assert_eq!(file.node.place(), Place::Erofs(1, Part::Whole));
    let written = model.write(ViewKind::Layer);
    let index = harbour_image::index::Index::open(&written.bytes[..written.len as usize]).unwrap();
    assert_eq!(file.size, index.header().erofs_len());

    let mut whole = vec![0; file.size as usize];
    let meta_len = index.header().meta_len as usize;
    index.read_meta(0, &mut whole[..meta_len]).unwrap();
    let mut todo = vec![(Tree::ROOT, index.root().unwrap())];
    while let Some((id, inode)) = todo.pop() {
        if let Kind::Dir(dir) = &model.tree.node(id).kind {
            for (name, child) in &dir.entries {
                let (nid, _) = index.lookup(&inode, name).unwrap().unwrap();
                todo.push((*child, index.inode(nid).unwrap()));
            }
        } else if let (Some(at), Some(content)) = (inode.data_offset, model.contents.get(&id)) {
            whole[at as usize..][..content.len()].copy_from_slice(content);
        }
    }
    for (offset, len) in [
        (0, whole.len()),
        (meta_len - 100, 5000),
        (0, 4096),
        (meta_len, 1 << 20),
        (meta_len + 12_288, 65_536),
    ] {
        let data = fs
            .patiently(|fs| fs.read(file.node, offset as u64, len))
            .unwrap();
        assert!(
            *data == whole[offset..whole.len().min(offset + len)],
            "{len} bytes at {offset}"
        );
    }
    assert!(
        fs.patiently(|fs| fs.read(file.node, file.size, 10))
            .unwrap()
            .is_empty()
    );
    assert!(matches!(fs.lookup(file.node, b"x"), Err(Error::NotDir(_))));

    // In two parts: the same bytes, but for a superblock that knows of the second.
    let head = find(&fs, &format!(".devices/{name}.head")).unwrap();
    let bulk = find(&fs, &format!(".devices/{name}.bulk")).unwrap();
    let cut = index.header().head_len() as usize;
    assert_eq!(
        (head.size, bulk.size),
        (cut as u64, (whole.len() - cut) as u64)
    );
    let read = |node, offset: usize, len| {
        let data = fs.patiently(|fs| fs.read(node, offset as u64, len));
        data.unwrap().to_vec()
    };
    assert!(read(bulk.node, 0, whole.len()) == whole[cut..]);
    assert!(read(bulk.node, 70_000, 5000) == whole[cut + 70_000..][..5000]);
    assert!(read(head.node, 4096, whole.len()) == whole[4096..cut]);
    let mut first: [u8; 4096] = whole[..4096].try_into().unwrap();
    harbour_image::index::split(index.header(), &mut first);
    assert_ne!(first[..], whole[..4096]);
    assert!(read(head.node, 0, 4096) == first);
    assert!(read(head.node, 1000, 200) == first[1000..1200]);
    assert!(read(head.node, 4000, 200) == [&first[4000..], &whole[4096..4200]].concat());
}

#[test]
fn wrong_kinds_and_unknown_nodes_have_their_errors() {
    let world = World::new();
    let mut model = sample(ViewKind::Layer, 0);
    let layer = world.layer(&mut model, 1, &[1]);
    let root = format!("layers/{}", layer.diff_id.short());
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config::default());
    let at = |path: &str| find(&fs, &format!("{root}/{path}")).unwrap().node;
    let (file, dir, link) = (at("usr/bin/f1"), at("usr"), at("link"));
    assert!(matches!(
        fs.patiently(|fs| fs.read(dir, 0, 1)),
        Err(Error::IsDir(_))
    ));
    assert!(matches!(
        fs.patiently(|fs| fs.read(link, 0, 1)),
        Err(Error::WrongType(_))
    ));
    assert!(matches!(
        fs.patiently(|fs| fs.readlink(file)),
        Err(Error::WrongType(_))
    ));
    assert!(matches!(list(&fs, file, false, 1), Err(Error::NotDir(_))));
    assert!(matches!(
        fs.patiently(|fs| fs.lookup(file, b"x")),
        Err(Error::NotDir(_))
    ));
    assert!(matches!(
        fs.lookup(dir, &[b'x'; 256]),
        Err(Error::NameTooLong(256))
    ));
    assert!(matches!(
        fs.patiently(|fs| fs.getxattr(file, b"user.none", 0)),
        Err(Error::NoAttribute)
    ));
    assert!(matches!(
        fs.access(file, harbour_fs::ops::Access { write: true }),
        Err(Error::ReadOnly)
    ));
    fs.access(at("null"), harbour_fs::ops::Access { write: true })
        .unwrap();
    assert!(matches!(fs.open(true), Err(Error::ReadOnly)));
    assert!(matches!(fs.refuse_change::<()>(), Err(Error::ReadOnly)));
    let gone = Node::in_view(99, 36).unwrap();
    assert!(matches!(
        fs.patiently(|fs| fs.getattr(gone)),
        Err(Error::Stale(_))
    ));
    assert!(matches!(
        fs.patiently(|fs| fs.getattr(Node::erofs(99, Part::Whole))),
        Err(Error::Stale(_))
    ));
    for nid in [0, 1, 1 << 30, (1 << 40) - 1] {
        // A number that no directory names: an error or some node, never a panic.
        let _ = fs.patiently(|fs| fs.getattr(Node::in_view(1, nid).unwrap()));
    }
    assert!(matches!(
        fs.getattr(Node::from_raw(12345)),
        Err(Error::Stale(_))
    ));
}

#[test]
fn holes_are_found_by_seeking_and_cost_no_read() {
    let world = World::new();
    let mut model = sample(ViewKind::Layer, 0);
    let layer = world.layer(&mut model, 1, &[1]);
    let root = format!("layers/{}", layer.diff_id.short());
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config {
        prefetch_indexes: false,
        ..Config::default()
    });
    let sparse = find(&fs, &format!("{root}/sparse")).unwrap().node;
    let seek = |offset, seek| fs.patiently(|fs| fs.lseek(sparse, offset, seek));
    assert_eq!(seek(0, Seek::Data).unwrap(), 0);
    assert_eq!(seek(0, Seek::Hole).unwrap(), 8192);
    assert_eq!(seek(9000, Seek::Data).unwrap(), 147_456);
    assert_eq!(seek(9000, Seek::Hole).unwrap(), 9000);
    assert_eq!(seek(147_456, Seek::Hole).unwrap(), 200_704);
    assert!(matches!(seek(250_000, Seek::Data), Err(Error::NoData)));
    assert!(matches!(seek(300_000, Seek::Hole), Err(Error::NoData)));
    let hole = find(&fs, &format!("{root}/all hole")).unwrap().node;
    let before = fs.stats().granules_verified;
    let data = fs.patiently(|fs| fs.read(hole, 0, 1 << 20)).unwrap();
    assert!(data.iter().all(|byte| *byte == 0) && data.len() == 1 << 20);
    assert_eq!(fs.stats().granules_verified, before);
    assert!(matches!(
        fs.patiently(|fs| fs.lseek(hole, 0, Seek::Data)),
        Err(Error::NoData)
    ));
}

#[test]
fn small_reads_of_a_granule_fetch_it_twice_at_most() {
    let world = World::new();
    let mut model = Model::new(4 << 20);
    model.file(Tree::ROOT, b"file", meta(0o644), noise(3, 1 << 20), false);
    let layer = world.layer(&mut model, 1, &[1]);
    let path = format!("layers/{}/file", layer.diff_id.short());
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config::default());
    let file = find(&fs, &path).unwrap().node;
    let read = |offset| drop(fs.patiently(|fs| fs.read(file, offset, 4096)).unwrap());
    read(65_536);
    read(65_536 + 4096);
    let before = fs.stats();
    for offset in [65_536 + 8192, 65_536 + 12_288, 65_536] {
        read(offset);
    }
    let after = fs.stats();
    assert_eq!(after.edge_hits - before.edge_hits, 3);
    assert_eq!(after.granules_verified, before.granules_verified);
}

#[test]
fn a_large_read_over_small_files_is_one_batch() {
    let world = World::new();
    let mut model = Model::new(4 << 20);
    for seed in 1..200 {
        model.file(
            Tree::ROOT,
            format!("{seed:03}").as_bytes(),
            meta(0o644),
            noise(seed, 100 + seed as usize * 97),
            false,
        );
    }
    let layer = world.layer(&mut model, 1, &[100]);
    let name = layer.diff_id.short();
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config {
        prefetch_indexes: false,
        ..Config::default()
    });
    let file = find(&fs, &format!("erofs/{name}.erofs")).unwrap();
    let read = |offset| {
        drop(
            fs.patiently(|fs| fs.read(file.node, offset, 1 << 20))
                .unwrap(),
        )
    };
    // Once for the index.
    read(file.size - (1 << 20));
    let counts = || {
        (
            world.batches.load(Ordering::Relaxed),
            world.bytes.load(Ordering::Relaxed),
        )
    };
    let before = counts();
    read(file.size - (1 << 20));
    let after = counts();
    assert_eq!(after.0 - before.0, 1);
    assert!(after.1 - before.1 > 900_000, "{before:?} {after:?}");

    let first = find(&fs, &format!("layers/{name}/001")).unwrap();
    let why = fs.patiently(|fs| fs.why(first.node)).unwrap();
    assert_eq!(
        (
            why.objects,
            why.packs,
            why.packs_missing,
            why.view,
            why.size
        ),
        (1, 1, 0, 1, 197)
    );
    assert_eq!(
        (why.donors[0].donor, why.donors[0].transport.as_str()),
        (100, "far")
    );
    let by_path = fs
        .patiently(|fs| fs.why_path(format!("/layers/{name}/001").as_ref()))
        .unwrap();
    assert_eq!(by_path.nid, why.nid);
    let by_name = fs
        .patiently(|fs| fs.getxattr(first.node, b"user.harbour.why", 65536))
        .unwrap();
    let XattrReply::Value(json) = by_name else {
        panic!("no value")
    };
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["packs"], 1);
}

/// A recipe for one more node.
#[derive(Clone, Debug)]
enum Step {
    Dir { opaque: bool },
    File { seed: u64, len: usize, sparse: bool },
    Symlink(Vec<u8>),
    Char(u32, u32),
    Fifo,
    Whiteout,
    Hardlink(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![
        0usize..100,
        4000usize..4200,
        16_000usize..17_000,
        0usize..200_000,
        1_000_000usize..1_100_000
    ];
    prop_oneof![
        3 => any::<bool>().prop_map(|opaque| Step::Dir { opaque }),
        5 => (1u64.., len, any::<bool>()).prop_map(|(seed, len, sparse)| Step::File { seed, len, sparse }),
        1 => prop::collection::vec(1u8.., 1..300).prop_map(Step::Symlink),
        1 => (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| Step::Char(major, minor)),
        1 => Just(Step::Fifo),
        1 => Just(Step::Whiteout),
        1 => any::<usize>().prop_map(Step::Hardlink),
    ]
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let xattrs = prop::collection::btree_map(
        "user\\.[a-z]{1,20}".prop_map(|name| name.into_bytes().into_boxed_slice()),
        prop::collection::vec(any::<u8>(), 0..100).prop_map(Vec::into_boxed_slice),
        0..3,
    );
    (
        0u16..0o10000,
        any::<u32>(),
        any::<u32>(),
        -(1i64 << 40)..1 << 40,
        0u32..1_000_000_000,
        xattrs,
    )
        .prop_map(|(mode, uid, gid, secs, nanos, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: Time { secs, nanos },
            xattrs,
        })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(
        any::<u8>().prop_filter("no NUL, no slash", |byte| !matches!(byte, 0 | b'/')),
        1..40,
    )
    .prop_filter("not a dot", |name| name != b"." && name != b"..")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_is_shown_as_it_is(
        steps in prop::collection::vec((any::<usize>(), name(), any_meta(), step()), 0..60),
        pack_max in prop_oneof![Just(20_000usize), Just(4 << 20)],
    ) {
        let mut model = Model::new(pack_max);
        let mut dirs = vec![Tree::ROOT];
        let mut leaves: Vec<NodeId> = Vec::new();
        for (place, name, meta, step) in steps {
            let dir = dirs[place % dirs.len()];
            let Kind::Dir(entries) = &model.tree.node(dir).kind else { unreachable!() };
            if entries.entries.contains_key(&name[..]) {
                continue;
            }
            match step {
                Step::Dir { opaque } => {
                    let kind = Kind::Dir(Dir { opaque, ..Dir::default() });
                    dirs.push(model.add(dir, &name, meta, kind));
                }
                Step::File { seed, len, sparse } => {
                    let mut content = noise(seed, len);
                    let (from, to) = (len / 3, len / 3 * 2);
                    if sparse {
                        content[from..to].fill(0);
                    }
                    leaves.push(model.file(dir, &name, meta, content, sparse));
                }
                Step::Symlink(target) => leaves.push(model.add(dir, &name, meta, Kind::Symlink(target.into()))),
                Step::Char(major, minor) => {
                    leaves.push(model.add(dir, &name, meta, Kind::Char(major, minor)));
                }
                Step::Fifo => leaves.push(model.add(dir, &name, meta, Kind::Fifo)),
                Step::Whiteout => drop(model.add(dir, &name, Meta::default(), Kind::Whiteout)),
                Step::Hardlink(which) if !leaves.is_empty() => {
                    model.link(dir, &name, leaves[which % leaves.len()]);
                }
                Step::Hardlink(_) => {}
            }
        }
        let world = World::new();
        let layer = world.layer(&mut model, 5, &[1, 100]);
        let path = format!("layers/{}", layer.diff_id.short());
        world.show(vec![], vec![layer]);
        let fs = world.fs(Config::default());
        compare(&fs, find(&fs, &path).unwrap().node, &model, true);
        prop_assert_eq!(fs.stats().wrong, 0);
    }
}
