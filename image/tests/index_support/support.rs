//! What the index tests share: a sink that keeps objects in memory, a builder for trees, a form of
//! trees that can be compared, and EROFS files mounted by the kernel.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used
)]

#[path = "kernel.rs"]
pub mod kernel;
#[path = "random.rs"]
pub mod random;

use std::collections::BTreeMap;

use harbour_image::{
    index::{Index, PackRef, Placement, ViewKind, What, Written, write},
    object::{OBJECT_MAX, PACK_MAX, PackId, hash_object},
    tree::{Content, Dir, Kind, Meta, Node, NodeId, ObjectKey, Run, Tree},
};

/// Objects in packs in memory.
#[derive(Default)]
pub struct Store {
    pub placement: Placement,
    /// Bytes of each pack of the placement.
    pub packs: Vec<Vec<u8>>,
}

impl Store {
    /// Places one object at the end of the last pack, or of a new one.
    pub fn put(&mut self, bytes: &[u8]) -> ObjectKey {
        let full = self
            .packs
            .last()
            .is_none_or(|pack| pack.len() + bytes.len() > PACK_MAX);
        if full {
            self.packs.push(Vec::new());
            self.placement.packs.push(PackRef {
                id: PackId([0; 32]),
                len: 0,
            });
        }
        let number = self.packs.len() - 1;
        let pack = &mut self.packs[number];
        let offset = pack.len() as u32;
        pack.extend_from_slice(bytes);
        // Not the real name of a pack, but one that content decides.
        self.placement.packs[number] = PackRef {
            id: PackId(*blake3::hash(pack).as_bytes()),
            len: pack.len() as u32,
        };
        self.placement
            .push(
                &hash_object(bytes),
                bytes.len() as u32,
                number as u32,
                offset,
            )
            .unwrap()
    }

    /// A file's content from its bytes, as decode would hand it over.
    pub fn content(&mut self, bytes: &[u8]) -> Content {
        let mut content = Content {
            size: bytes.len() as u64,
            runs: Vec::new(),
        };
        for (number, piece) in bytes.chunks(OBJECT_MAX).enumerate() {
            let object = self.put(piece);
            content.runs.push(Run {
                offset: (number * OBJECT_MAX) as u64,
                object,
                len: piece.len() as u32,
            });
        }
        content
    }

    pub fn object(&self, key: ObjectKey) -> &[u8] {
        let object = self.placement.objects[key.0 as usize];
        &self.packs[object.pack as usize][object.offset as usize..][..object.len as usize]
    }
}

/// A tree under construction.
#[derive(Default)]
pub struct Builder {
    pub tree: Tree,
    pub store: Store,
}

impl Builder {
    pub fn new() -> Self {
        let mut builder = Self::default();
        builder.dir_mut(Tree::ROOT).implied = false;
        builder
    }

    pub fn dir_mut(&mut self, id: NodeId) -> &mut Dir {
        match &mut self.tree.nodes[id.0 as usize].kind {
            Kind::Dir(dir) => dir,
            other => panic!("not a directory: {other:?}"),
        }
    }

    pub fn add(&mut self, parent: NodeId, name: &[u8], meta: Meta, kind: Kind) -> NodeId {
        let id = NodeId(self.tree.nodes.len() as u32);
        self.tree.nodes.push(Node { meta, kind });
        self.link(parent, name, id);
        id
    }

    pub fn link(&mut self, parent: NodeId, name: &[u8], id: NodeId) {
        self.dir_mut(parent).entries.insert(name.into(), id);
    }

    pub fn dir(&mut self, parent: NodeId, name: &[u8]) -> NodeId {
        self.add(parent, name, meta(0o755), Kind::Dir(Dir::default()))
    }

    pub fn file(&mut self, parent: NodeId, name: &[u8], bytes: &[u8]) -> NodeId {
        let content = self.store.content(bytes);
        self.add(parent, name, meta(0o644), Kind::File(content))
    }

    pub fn write(&self, kind: ViewKind) -> Written {
        write(&self.tree, &self.store.placement, kind).unwrap()
    }
}

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        ..Meta::default()
    }
}

/// Bytes that differ from place to place and from `seed` to `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

/// A tree in a form that does not depend on the numbers of nodes and objects: path by path, with
/// the first path of each node in place of its number, and objects by name.
pub type Flat = BTreeMap<Vec<u8>, FlatNode>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatNode {
    pub meta: Meta,
    pub kind: FlatKind,
    /// The first path, in order of paths, that names the same node.
    pub same_as: Vec<u8>,
    pub links: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlatKind {
    Dir {
        opaque: bool,
        implied: bool,
    },
    File {
        size: u64,
        runs: Vec<(u64, [u8; 32])>,
    },
    Other(Kind),
}

pub fn flat(tree: &Tree, placement: &Placement) -> Flat {
    let mut flat = Flat::new();
    let mut paths = vec![(Vec::new(), Tree::ROOT)];
    let mut ids = BTreeMap::new();
    while let Some((path, id)) = paths.pop() {
        let node = tree.node(id);
        let mut links = 0;
        let kind = match &node.kind {
            Kind::Dir(dir) => {
                links = 2;
                for (name, child) in &dir.entries {
                    links += u32::from(matches!(tree.node(*child).kind, Kind::Dir(_)));
                    paths.push(([&path[..], b"/", name].concat(), *child));
                }
                FlatKind::Dir {
                    opaque: dir.opaque,
                    implied: dir.implied,
                }
            }
            Kind::File(content) => {
                let name = |run: &Run| (run.offset, placement.objects[run.object.0 as usize].id.0);
                FlatKind::File {
                    size: content.size,
                    runs: content.runs.iter().map(name).collect(),
                }
            }
            // overlayfs knows no difference, and the index none either.
            Kind::Char(0, 0) => FlatKind::Other(Kind::Whiteout),
            other => FlatKind::Other(other.clone()),
        };
        flat.insert(
            path.clone(),
            FlatNode {
                meta: node.meta.clone(),
                kind,
                same_as: Vec::new(),
                links,
            },
        );
        ids.insert(path, id);
    }
    let mut firsts: BTreeMap<NodeId, (Vec<u8>, u32)> = BTreeMap::new();
    for (path, id) in &ids {
        firsts.entry(*id).or_insert_with(|| (path.clone(), 0)).1 += 1;
    }
    for (path, node) in &mut flat {
        let (first, links) = &firsts[&ids[path]];
        node.same_as.clone_from(first);
        if !matches!(node.kind, FlatKind::Dir { .. }) {
            node.links = *links;
        }
    }
    flat
}

/// The content of every object by name, for placements that came back from an index.
pub fn objects(store: &Store) -> BTreeMap<[u8; 32], &[u8]> {
    let keys = 0..store.placement.objects.len() as u32;
    keys.map(|key| {
        (
            store.placement.objects[key as usize].id.0,
            store.object(ObjectKey(key)),
        )
    })
    .collect()
}

/// The EROFS file of an index, as a node would serve it: metadata from the index, and content
/// through the object map.
pub fn materialise(written: &Written, objects: &BTreeMap<[u8; 32], &[u8]>, path: &std::path::Path) {
    use std::os::unix::fs::FileExt;
    let index = Index::open(&written.bytes).unwrap();
    let header = *index.header();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(header.erofs_len()).unwrap();
    let mut metadata = vec![0; header.meta_len as usize];
    index.read_meta(0, &mut metadata).unwrap();
    file.write_all_at(&metadata, 0).unwrap();
    for segment in index.segments(header.meta_len, header.data_len).unwrap() {
        if let What::Object(part) = segment.what {
            let bytes = &objects[&part.id.0][part.skip as usize..][..segment.len as usize];
            file.write_all_at(bytes, segment.offset).unwrap();
        }
    }
}
