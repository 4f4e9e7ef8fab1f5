//! Layers as values, how random ones are made, and what a stack of them means.

use std::collections::{BTreeMap, BTreeSet};

use harbour_tests::layers::Entry;
use proptest::{collection::vec, prelude::*};

/// A path: components from the top.
pub type Path = Vec<Vec<u8>>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// Of a directory that nothing names.
    pub fn implied() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// `None`: only implied by something below it.
    Dir {
        meta: Option<Meta>,
        opaque: bool,
    },
    /// Length and seed of the content, and a number that hard links share.
    File {
        meta: Meta,
        len: usize,
        seed: u8,
        inode: usize,
    },
    Symlink {
        meta: Meta,
        target: Vec<u8>,
    },
    Fifo {
        meta: Meta,
    },
    Device {
        meta: Meta,
        numbers: (u32, u32),
    },
    Whiteout,
}

/// One layer: every path in it, parents included.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    pub nodes: BTreeMap<Path, Node>,
    /// Entries stand in the archive with children before parents.
    pub upside_down: bool,
}

/// Something to do to a path of a layer in the making; what cannot be done is left out.
#[derive(Clone, Debug)]
enum Op {
    Put(Path, Node),
    Opaque(Path),
    /// A hard link at the path to the file that the number picks.
    Link(Path, usize),
}

pub fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed)
        .collect()
}

pub fn stacks() -> impl Strategy<Value = Vec<Layer>> {
    vec(layer(), 1..=5)
}

fn layer() -> impl Strategy<Value = Layer> {
    (vec(op(), 1..25), any::<bool>()).prop_map(|(ops, upside_down)| {
        let mut layer = Layer {
            upside_down,
            ..Layer::default()
        };
        ops.into_iter()
            .enumerate()
            .for_each(|(n, op)| layer.apply(n, op));
        layer
    })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::sample::select(vec![&b"a"[..], b"b", b"c", b"d"]).prop_map(<[u8]>::to_vec),
        1 => Just(b"\xff\xfe no UTF-8".to_vec()),
        1 => Just(vec![b'n'; 251]),
    ]
}

fn meta() -> impl Strategy<Value = Meta> {
    let xattrs = prop_oneof![
        4 => Just(Vec::new()),
        1 => vec(any::<u8>(), 1..40).prop_map(|value| vec![(b"trusted.t".to_vec(), value)]),
    ];
    (
        0..0o10000_u32,
        0..70_000_u32,
        0..3_u32,
        (0..4_000_000_000_i64, 0..1_000_000_000_u32),
        xattrs,
    )
        .prop_map(|(mode, uid, gid, mtime, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        })
}

fn op() -> impl Strategy<Value = Op> {
    let path = || vec(name(), 1..=3);
    let len = prop_oneof![
        0..50_usize,
        4090..4100_usize,
        16_380..16_390_usize,
        Just(70_000),
        Just(1_048_577)
    ];
    let numbers = (1..4096_u32, 0..70_000_u32);
    prop_oneof![
        4 => (path(), meta()).prop_map(|(p, m)| Op::Put(p, Node::Dir { meta: Some(m), opaque: false })),
        5 => (path(), meta(), len, any::<u8>())
            .prop_map(|(p, meta, len, seed)| Op::Put(p, Node::File { meta, len, seed, inode: 0 })),
        2 => (path(), meta(), path())
            .prop_map(|(p, meta, t)| Op::Put(p, Node::Symlink { meta, target: t.join(&b'/') })),
        1 => (path(), meta()).prop_map(|(p, meta)| Op::Put(p, Node::Fifo { meta })),
        1 => (path(), meta(), numbers).prop_map(|(p, meta, numbers)| Op::Put(p, Node::Device { meta, numbers })),
        4 => path().prop_map(|p| Op::Put(p, Node::Whiteout)),
        2 => path().prop_map(Op::Opaque),
        2 => (path(), any::<usize>()).prop_map(|(p, n)| Op::Link(p, n)),
    ]
}

impl Layer {
    fn apply(&mut self, number: usize, op: Op) {
        match op {
            Op::Put(path, node) => {
                let node = match node {
                    Node::File {
                        meta, len, seed, ..
                    } => Node::File {
                        meta,
                        len,
                        seed,
                        inode: number,
                    },
                    other => other,
                };
                if self.free(&path) {
                    self.parents(&path);
                    self.nodes.insert(path, node);
                }
            }
            Op::Opaque(path) => {
                if self.free(&path) {
                    self.parents(&path);
                    self.nodes.insert(
                        path.clone(),
                        Node::Dir {
                            meta: None,
                            opaque: true,
                        },
                    );
                }
                if let Some(Node::Dir { opaque, .. }) = self.nodes.get_mut(&path) {
                    *opaque = true;
                }
            }
            Op::Link(path, pick) => {
                let files: Vec<_> = self
                    .nodes
                    .values()
                    .filter(|n| matches!(n, Node::File { .. }))
                    .cloned()
                    .collect();
                if !files.is_empty() && self.free(&path) {
                    self.parents(&path);
                    self.nodes.insert(path, files[pick % files.len()].clone());
                }
            }
        }
    }

    /// Whether nothing stands at `path` and nothing but directories above it.
    fn free(&self, path: &Path) -> bool {
        let above = (1..path.len()).all(|n| match self.nodes.get(&path[..n]) {
            None | Some(Node::Dir { .. }) => true,
            Some(_) => false,
        });
        above && !self.nodes.contains_key(path)
    }

    fn parents(&mut self, path: &Path) {
        for n in 1..path.len() {
            self.nodes.entry(path[..n].to_vec()).or_insert(Node::Dir {
                meta: None,
                opaque: false,
            });
        }
    }

    /// Directories that no entry names, as the comparer writes paths; the root is one.
    pub fn implied(&self) -> BTreeSet<Vec<u8>> {
        let dirs = self
            .nodes
            .iter()
            .filter(|(_, n)| matches!(n, Node::Dir { meta: None, .. }));
        dirs.map(|(p, _)| p.join(&b'/'))
            .chain([Vec::new()])
            .collect()
    }

    /// The layer as entries of an archive.
    pub fn entries(&self) -> Vec<Entry> {
        let mut first: BTreeMap<usize, Path> = BTreeMap::new();
        let mut all = Vec::new();
        let mut links = Vec::new();
        for (path, node) in &self.nodes {
            let name = path.join(&b'/');
            let sibling = |last: Vec<u8>| [&path[..path.len() - 1], &[last]].concat().join(&b'/');
            match node {
                Node::Dir { meta, opaque } => {
                    all.extend(meta.as_ref().map(|m| with(m, Entry::dir(name.clone()))));
                    all.extend(
                        opaque.then(|| Entry::file([&name[..], b"/.wh..wh..opq"].concat(), "")),
                    );
                }
                Node::File {
                    meta,
                    len,
                    seed,
                    inode,
                } => match first.get(inode) {
                    Some(target) => links.push(with(meta, Entry::hard(name, target.join(&b'/')))),
                    None => {
                        first.insert(*inode, path.clone());
                        all.push(with(meta, Entry::file(name, content(*len, *seed))));
                    }
                },
                Node::Symlink { meta, target } => {
                    all.push(with(meta, Entry::symlink(name, target.clone())))
                }
                Node::Fifo { meta } => all.push(with(
                    meta,
                    Entry {
                        kind: b'6',
                        ..Entry::file(name, "")
                    },
                )),
                Node::Device { meta, numbers } => {
                    all.push(with(
                        meta,
                        Entry {
                            kind: b'3',
                            device: *numbers,
                            ..Entry::file(name, "")
                        },
                    ));
                }
                Node::Whiteout => {
                    let last = path.last().cloned().unwrap_or_default();
                    all.push(Entry::file(sibling([&b".wh."[..], &last].concat()), ""));
                }
            }
        }
        if self.upside_down {
            all.reverse();
        }
        // A link names what stands before it.
        all.extend(links);
        all
    }
}

fn with(meta: &Meta, entry: Entry) -> Entry {
    let Meta {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    } = meta.clone();
    Entry {
        mode: if entry.kind == b'2' { 0o777 } else { mode },
        uid,
        gid,
        mtime,
        xattrs,
        ..entry
    }
}

/// What a stack shows: every path, no whiteout, no directory without metadata; files of different
/// layers never share an inode number.
pub fn merge(stack: &[Layer]) -> BTreeMap<Path, Node> {
    let mut merged: BTreeMap<Path, Node> = BTreeMap::new();
    for (depth, layer) in stack.iter().enumerate() {
        // Marks speak of the layers below, so they come before anything this layer brings.
        for (path, node) in &layer.nodes {
            match node {
                Node::Dir { opaque, .. } => {
                    if *opaque || !matches!(merged.get(path), Some(Node::Dir { .. })) {
                        remove_below(&mut merged, path);
                    }
                }
                _ => {
                    remove_below(&mut merged, path);
                    merged.remove(path);
                }
            }
        }
        for (path, node) in &layer.nodes {
            let shown = match node {
                Node::Whiteout => continue,
                Node::Dir { meta: None, .. } => match merged.get(path) {
                    Some(Node::Dir { .. }) => continue,
                    _ => Node::Dir {
                        meta: Some(Meta::implied()),
                        opaque: false,
                    },
                },
                Node::Dir { meta, .. } => Node::Dir {
                    meta: meta.clone(),
                    opaque: false,
                },
                Node::File {
                    meta,
                    len,
                    seed,
                    inode,
                } => Node::File {
                    meta: meta.clone(),
                    len: *len,
                    seed: *seed,
                    inode: depth * 1000 + inode,
                },
                other => other.clone(),
            };
            merged.insert(path.clone(), shown);
        }
    }
    merged
}

fn remove_below(nodes: &mut BTreeMap<Path, Node>, path: &Path) {
    nodes.retain(|p, _| p.len() <= path.len() || p[..path.len()] != path[..]);
}
