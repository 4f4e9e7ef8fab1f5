//! Merging layers, against a model that applies them one after the other, and against overlayfs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "index_support/support.rs"]
mod support;

use std::collections::BTreeMap;

use harbour_image::{
    index::{Index, ViewKind, merge, verify, write},
    tree::{Content, Dir, Kind, Meta, Node, NodeId, ObjectKey, Tree},
};
use proptest::{collection::vec, prelude::*};
use support::{
    Builder, flat,
    kernel::{Comparison, fsck, mount_erofs, mount_overlay},
    materialise, meta, noise, objects, random,
};

/// A file system that layers are unpacked into, from the bottom up.
enum Model {
    Dir {
        meta: Meta,
        implied: bool,
        names: BTreeMap<Box<[u8]>, Model>,
    },
    Leaf {
        layer: usize,
        id: NodeId,
    },
}

impl Model {
    fn empty() -> Self {
        Self::Dir {
            meta: meta(0o755),
            implied: true,
            names: BTreeMap::new(),
        }
    }

    fn apply(&mut self, layer: usize, tree: &Tree, id: NodeId) {
        let Node {
            meta: new_meta,
            kind: Kind::Dir(dir),
        } = tree.node(id)
        else {
            panic!("a directory")
        };
        let Self::Dir {
            meta,
            implied,
            names,
        } = self
        else {
            panic!("a directory")
        };
        if dir.opaque {
            names.clear();
        }
        if *implied || !dir.implied {
            // What was only implied so far takes what it is given, implied or not.
            meta.clone_from(new_meta);
            *implied = dir.implied;
        }
        for (name, child) in &dir.entries {
            match &tree.node(*child).kind {
                Kind::Whiteout | Kind::Char(0, 0) => drop(names.remove(name)),
                Kind::Dir(_) => {
                    let there = names.entry(name.clone()).or_insert_with(Self::empty);
                    if matches!(there, Self::Leaf { .. }) {
                        *there = Self::empty();
                    }
                    there.apply(layer, tree, *child);
                }
                _ => drop(names.insert(name.clone(), Self::Leaf { layer, id: *child })),
            }
        }
    }

    /// The model as a tree whose objects are those of all layers' stores, one behind the other.
    fn tree(&self, layers: &[Builder]) -> Tree {
        let mut tree = Tree { nodes: Vec::new() };
        let mut known = BTreeMap::new();
        self.add(&mut tree, &mut known, layers);
        tree
    }

    fn add(
        &self,
        tree: &mut Tree,
        known: &mut BTreeMap<(usize, NodeId), NodeId>,
        layers: &[Builder],
    ) -> NodeId {
        let next = NodeId(tree.nodes.len() as u32);
        match self {
            Self::Leaf { layer, id } => *known.entry((*layer, *id)).or_insert_with(|| {
                let mut node = layers[*layer].tree.node(*id).clone();
                if let Kind::File(content) = &mut node.kind {
                    let base: usize = layers[..*layer]
                        .iter()
                        .map(|layer| layer.store.placement.objects.len())
                        .sum();
                    content
                        .runs
                        .iter_mut()
                        .for_each(|run| run.object.0 += base as u32);
                }
                tree.nodes.push(node);
                next
            }),
            Self::Dir {
                meta,
                implied,
                names,
            } => {
                let dir = Dir {
                    implied: *implied,
                    ..Dir::default()
                };
                tree.nodes.push(Node {
                    meta: meta.clone(),
                    kind: Kind::Dir(dir),
                });
                for (name, child) in names {
                    let child = child.add(tree, known, layers);
                    if let Kind::Dir(dir) = &mut tree.nodes[next.0 as usize].kind {
                        dir.entries.insert(name.clone(), child);
                    }
                }
                next
            }
        }
    }
}

/// The merged image of layers, by the code under test.
fn merged(layers: &[Builder]) -> (Tree, harbour_image::index::Placement) {
    let written: Vec<_> = layers
        .iter()
        .map(|layer| layer.write(ViewKind::Layer))
        .collect();
    let indexes: Vec<_> = written
        .iter()
        .map(|written| Index::open(&written.bytes[..]).unwrap())
        .collect();
    merge(&indexes).unwrap()
}

fn check_against_model(layers: &[Builder]) {
    let (tree, placement) = merged(layers);
    let mut model = Model::empty();
    for (number, layer) in layers.iter().enumerate() {
        model.apply(number, &layer.tree, Tree::ROOT);
    }
    let mut all = support::Store::default();
    for layer in layers {
        all.placement.objects.extend(&layer.store.placement.objects);
    }
    assert_eq!(
        flat(&tree, &placement),
        flat(&model.tree(layers), &all.placement)
    );
    let written = write(&tree, &placement, ViewKind::Image).unwrap();
    verify(&Index::open(&written.bytes).unwrap()).unwrap();
    // Only content that is still named is placed.
    assert_eq!(written.stats.packs as usize, placement.packs.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn as_layers_applied_in_memory(layers in vec(random::steps(25), 1..6)) {
        let layers: Vec<_> = layers.iter().map(|steps| random::build(steps)).collect();
        check_against_model(&layers);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn as_overlayfs_shows_them(layers in vec(random::steps(30), 1..5)) {
        let mut layers: Vec<_> = layers.iter().map(|steps| random::build(steps)).collect();
        // overlayfs knows no implied directories: it takes the highest as it is.
        layers.iter_mut().for_each(random::name_all_dirs);
        check_against_overlay(&layers);
    }
}

fn check_against_overlay(layers: &[Builder]) {
    let dir = tempfile::tempdir().unwrap();
    let mut mounts = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let file = dir.path().join(format!("{number}.erofs"));
        materialise(&layer.write(ViewKind::Layer), &objects(&layer.store), &file);
        mounts.push(mount_erofs(&file, &dir.path().join(format!("l{number}"))));
    }
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let mut lowers: Vec<_> = mounts
        .iter()
        .rev()
        .map(|mounted| mounted.path.clone())
        .collect();
    lowers.push(empty);
    let overlay = mount_overlay(&lowers, &dir.path().join("overlay"));

    let (tree, placement) = merged(layers);
    let all: BTreeMap<_, _> = layers
        .iter()
        .flat_map(|layer| objects(&layer.store))
        .collect();
    let object = |key: ObjectKey| all[&placement.objects[key.0 as usize].id.0];
    Comparison {
        tree: &tree,
        object: &object,
        overlay: true,
    }
    .run(&overlay.path);
    drop(overlay);
    drop(mounts);

    // And the merged image itself, exactly.
    let file = dir.path().join("image.erofs");
    materialise(
        &write(&tree, &placement, ViewKind::Image).unwrap(),
        &all,
        &file,
    );
    fsck(&file);
    let mounted = mount_erofs(&file, &dir.path().join("image"));
    Comparison {
        tree: &tree,
        object: &object,
        overlay: false,
    }
    .run(&mounted.path);
}

fn path<'a>(tree: &'a Tree, path: &[&[u8]]) -> Option<&'a Node> {
    let mut node = tree.node(Tree::ROOT);
    for name in path {
        let Kind::Dir(dir) = &node.kind else {
            return None;
        };
        node = tree.node(*dir.entries.get(*name)?);
    }
    Some(node)
}

#[test]
fn opaque_and_implied_keeps_the_lower_directory_but_not_its_names() {
    let (mut low, mut high) = (Builder::new(), Builder::new());
    let d = low.add(Tree::ROOT, b"d", meta(0o700), Kind::Dir(Dir::default()));
    low.file(d, b"old", b"old");
    let dir = Dir {
        opaque: true,
        implied: true,
        ..Dir::default()
    };
    let d = high.add(Tree::ROOT, b"d", meta(0o755), Kind::Dir(dir));
    high.file(d, b"new", b"new");
    let layers = [low, high];
    check_against_model(&layers);
    let (tree, _) = merged(&layers);
    assert_eq!(path(&tree, &[b"d"]).unwrap().meta.mode, 0o700);
    assert!(path(&tree, &[b"d", b"old"]).is_none());
    assert!(path(&tree, &[b"d", b"new"]).is_some());
}

#[test]
fn what_a_file_or_whiteout_covered_does_not_come_back() {
    let (mut low, mut middle, mut high) = (Builder::new(), Builder::new(), Builder::new());
    for name in [b"file", b"gone"] {
        let d = low.add(Tree::ROOT, name, meta(0o700), Kind::Dir(Dir::default()));
        low.file(d, b"old", b"old");
        let d = high.add(
            Tree::ROOT,
            name,
            meta(0o750),
            Kind::Dir(Dir {
                implied: true,
                ..Dir::default()
            }),
        );
        high.file(d, b"new", b"new");
    }
    middle.file(Tree::ROOT, b"file", b"not a directory");
    middle.add(Tree::ROOT, b"gone", meta(0), Kind::Whiteout);
    let layers = [low, middle, high];
    check_against_model(&layers);
    let (tree, placement) = merged(&layers);
    for name in [&b"file"[..], b"gone"] {
        assert_eq!(path(&tree, &[name]).unwrap().meta.mode, 0o750);
        assert!(path(&tree, &[name, b"old"]).is_none());
        assert!(path(&tree, &[name, b"new"]).is_some());
    }
    assert_eq!(
        placement.objects.len(),
        1,
        "content that nothing names any more is dropped"
    );
}

#[test]
fn hard_links_whose_names_are_partly_hidden_count_what_is_left() {
    let (mut low, mut high) = (Builder::new(), Builder::new());
    let file = low.file(Tree::ROOT, b"a", b"shared");
    low.link(Tree::ROOT, b"b", file);
    low.link(Tree::ROOT, b"c", file);
    high.add(Tree::ROOT, b"b", meta(0), Kind::Whiteout);
    let (tree, placement) = merged(&[low, high]);
    let flat = flat(&tree, &placement);
    assert_eq!(flat[&b"/a"[..]].links, 2);
    assert_eq!(flat[&b"/c"[..]].same_as, b"/a");
    let written = write(&tree, &placement, ViewKind::Image).unwrap();
    let index = Index::open(&written.bytes).unwrap();
    let (nid, _) = index.lookup(&index.root().unwrap(), b"c").unwrap().unwrap();
    assert_eq!(index.inode(nid).unwrap().nlink, 2);
}

#[test]
fn data_keeps_the_order_of_layers_and_streams_and_equal_objects_are_one() {
    let (mut low, mut high) = (Builder::new(), Builder::new());
    for number in [3u64, 1, 2] {
        low.file(
            Tree::ROOT,
            format!("low{number}").as_bytes(),
            &noise(number, 6000),
        );
        high.file(
            Tree::ROOT,
            format!("high{number}").as_bytes(),
            &noise(number, 6000),
        );
    }
    let (tree, placement) = merged(&[low, high]);
    assert_eq!(placement.objects.len(), 3);
    let written = write(&tree, &placement, ViewKind::Image).unwrap();
    let index = Index::open(&written.bytes).unwrap();
    let root = index.root().unwrap();
    let offsets: Vec<_> = ["low3", "low1", "low2", "high3", "high1", "high2"]
        .iter()
        .map(|name| {
            index
                .inode(index.lookup(&root, name.as_bytes()).unwrap().unwrap().0)
                .unwrap()
                .data_offset
        })
        .collect();
    assert!(
        offsets.is_sorted() && offsets[0] == Some(index.header().meta_len),
        "{offsets:?}"
    );
}

#[test]
fn nothing_merged_is_an_empty_tree_and_one_layer_is_itself() {
    let (tree, _) = merge::<Vec<u8>>(&[]).unwrap();
    assert_eq!(tree, Tree::new());
    let mut layer = Builder::new();
    layer.add(
        Tree::ROOT,
        b"f",
        meta(0o644),
        Kind::File(Content::default()),
    );
    let (tree, placement) = merged(std::slice::from_ref(&layer));
    assert_eq!(
        flat(&tree, &placement),
        flat(&layer.tree, &layer.store.placement)
    );
}
