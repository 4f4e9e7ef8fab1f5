//! From indexes back to a tree: what [`load`] and [`super::merge()`] share.

use std::{collections::HashMap, ops::ControlFlow};

use super::{
    FileType, Index, IndexBytes, IndexError, Inode, MergeError, Nid, ObjectPart, PlacedObject,
    Placement, What, layout::INODE_LEN, merge::walk, xattr::OPAQUE,
};
use crate::{
    object::{ObjectId, PackId},
    tree::{Content, Dir, Kind, Meta, Node, NodeId, ObjectKey, Run, Tree},
};

/// The tree and placement that an index was written from, whiteouts and marks included.
///
/// Nodes come in another order and objects of equal content share a key, but to [`super::write`]
/// both say the same.
pub fn load<B: IndexBytes>(index: &Index<B>) -> Result<(Tree, Placement), IndexError> {
    let mut collector = Collector::new(std::slice::from_ref(index));
    walk(&mut collector, true)
        .and_then(|()| collector.finish())
        .map_err(|error| error.source)
}

/// One layer's part in a directory or a name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) layer: usize,
    pub(crate) inode: Inode,
}

/// Nodes gathered from layers, numbered as they were found.
pub(crate) struct Collector<'a, B> {
    layers: &'a [Index<B>],
    budgets: Vec<Budget>,
    pub(crate) nodes: Vec<Node>,
    /// Layer and place in its data region, for files that have content.
    data: Vec<Option<(usize, u64)>>,
    /// Nodes that are not directories, by layer and number: hard links stay one node.
    known: HashMap<(usize, Nid), NodeId>,
}

/// What may still be read of a layer. Everything in an index stands in one place only, so more
/// than its length means that it leads in circles.
struct Budget {
    meta: u64,
    runs: u64,
}

impl<'a, B: IndexBytes> Collector<'a, B> {
    pub(crate) fn new(layers: &'a [Index<B>]) -> Self {
        let budget = |index: &Index<B>| Budget {
            meta: index.header.meta_len,
            runs: index.header.keys.count,
        };
        Self {
            layers,
            budgets: layers.iter().map(budget).collect(),
            nodes: Vec::new(),
            data: Vec::new(),
            known: HashMap::new(),
        }
    }

    pub(crate) const fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// The root of a layer.
    pub(crate) fn root(&mut self, layer: usize) -> Result<At, MergeError> {
        let inode = self.layers[layer]
            .root()
            .map_err(|source| MergeError { layer, source })?;
        self.charge(layer, &inode)?;
        Ok(At { layer, inode })
    }

    /// A node that a directory entry of `layer` names, of the type that the entry gave.
    pub(crate) fn inode(
        &mut self,
        layer: usize,
        nid: Nid,
        file_type: FileType,
    ) -> Result<At, MergeError> {
        let wrap = |source| MergeError { layer, source };
        let inode = self.layers[layer].inode(nid).map_err(wrap)?;
        if inode.file_type != file_type {
            let what = "a node of another type than its directory entry";
            return Err(wrap(IndexError::Corrupt {
                at: inode.at(),
                what,
            }));
        }
        if file_type == FileType::Dir {
            self.charge(layer, &inode)?;
        }
        Ok(At { layer, inode })
    }

    pub(crate) fn is_opaque(&self, at: At) -> Result<bool, MergeError> {
        self.layers[at.layer]
            .is_opaque(&at.inode)
            .map_err(|source| MergeError {
                layer: at.layer,
                source,
            })
    }

    pub(crate) fn is_implied(&self, at: At) -> Result<bool, MergeError> {
        self.layers[at.layer]
            .is_implied(at.inode.nid)
            .map_err(|source| MergeError {
                layer: at.layer,
                source,
            })
    }

    /// All names of one layer's directory.
    pub(crate) fn entries(
        &self,
        at: At,
        mut visit: impl FnMut(&[u8], Nid, FileType),
    ) -> Result<(), MergeError> {
        self.layers[at.layer]
            .readdir(&at.inode, 0, |entry| {
                visit(entry.name, entry.nid, entry.file_type);
                ControlFlow::Continue(())
            })
            .map_err(|source| MergeError {
                layer: at.layer,
                source,
            })
    }

    /// Adds a directory with the metadata of `at` and no names yet.
    pub(crate) fn add_dir(&mut self, at: At, dir: Dir) -> Result<NodeId, MergeError> {
        let meta = self.meta(at).map_err(|source| MergeError {
            layer: at.layer,
            source,
        })?;
        self.add(
            at.layer,
            Node {
                meta,
                kind: Kind::Dir(dir),
            },
            None,
        )
    }

    /// The node for something that is not a directory, added when it is new.
    pub(crate) fn leaf(&mut self, at: At) -> Result<NodeId, MergeError> {
        let At { layer, inode } = at;
        if let Some(known) = self.known.get(&(layer, inode.nid)) {
            return Ok(*known);
        }
        self.charge(layer, &inode)?;
        let wrap = |source| MergeError { layer, source };
        let meta = self.meta(at).map_err(wrap)?;
        let (major, minor) = inode.rdev;
        let kind = match inode.file_type {
            FileType::File => Kind::File(Content {
                size: inode.size,
                runs: Vec::new(),
            }),
            FileType::Symlink => {
                Kind::Symlink(self.layers[layer].readlink(&inode).map_err(wrap)?.into())
            }
            FileType::Char if inode.is_whiteout() => Kind::Whiteout,
            FileType::Char => Kind::Char(major, minor),
            FileType::Block => Kind::Block(major, minor),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Dir => return Err(wrap(IndexError::NotADirectory { nid: inode.nid })),
        };
        let id = self.add(layer, Node { meta, kind }, inode.data_offset)?;
        self.known.insert((layer, inode.nid), id);
        Ok(id)
    }

    fn add(&mut self, layer: usize, node: Node, data: Option<u64>) -> Result<NodeId, MergeError> {
        let id = u32::try_from(self.nodes.len()).map_err(|_| MergeError {
            layer,
            source: IndexError::OutOfRange {
                what: "node",
                number: u64::from(u32::MAX),
            },
        })?;
        self.nodes.push(node);
        self.data.push(data.map(|offset| (layer, offset)));
        Ok(NodeId(id))
    }

    fn meta(&self, at: At) -> Result<Meta, IndexError> {
        let At { layer, inode } = at;
        let mut meta = Meta {
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            ..Meta::default()
        };
        for xattr in self.layers[layer].xattrs(&inode)? {
            // The mark is the directory's kind, not its metadata.
            if *xattr.name != *OPAQUE.0 {
                meta.xattrs.insert(xattr.name, xattr.value);
            }
        }
        Ok(meta)
    }

    /// Counts what reading `inode` and all that belongs to it in the metadata takes.
    fn charge(&mut self, layer: usize, inode: &Inode) -> Result<(), MergeError> {
        let own = match inode.file_type {
            FileType::Dir | FileType::Symlink => inode.size,
            _ => 0,
        };
        let bytes = INODE_LEN as u64 + u64::from(inode.xattr_len);
        let budget = &mut self.budgets[layer];
        match budget
            .meta
            .checked_sub(bytes)
            .and_then(|left| left.checked_sub(own))
        {
            Some(left) => budget.meta = left,
            None => {
                let source = IndexError::Corrupt {
                    at: inode.at(),
                    what: "metadata that is used twice",
                };
                return Err(MergeError { layer, source });
            }
        }
        Ok(())
    }

    /// Numbers nodes anew, so that files stand in the order of their data, bottom layer first, and
    /// reads the content of those that are still there.
    pub(crate) fn finish(mut self) -> Result<(Tree, Placement), MergeError> {
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        // Stable, and `None` comes first: the root stays node 0.
        order.sort_by_key(|number| self.data[*number]);
        let mut numbers = vec![NodeId(0); order.len()];
        for (new, old) in order.iter().enumerate() {
            numbers[*old] = NodeId(new as u32);
        }
        let mut contents = Contents::default();
        let mut nodes = Vec::with_capacity(order.len());
        for old in order {
            let hollow = Node {
                meta: Meta::default(),
                kind: Kind::Fifo,
            };
            let mut node = std::mem::replace(&mut self.nodes[old], hollow);
            match &mut node.kind {
                Kind::Dir(dir) => dir
                    .entries
                    .values_mut()
                    .for_each(|id| *id = numbers[id.0 as usize]),
                Kind::File(content) => {
                    if let Some((layer, offset)) = self.data[old] {
                        let runs = &mut self.budgets[layer].runs;
                        contents
                            .read(&self.layers[layer], offset, content, runs)
                            .map_err(|source| MergeError { layer, source })?;
                    }
                }
                _ => {}
            }
            nodes.push(node);
        }
        Ok((Tree { nodes }, contents.placement))
    }
}

/// Objects and packs gathered, each once.
#[derive(Default)]
struct Contents {
    placement: Placement,
    objects: HashMap<ObjectId, ObjectKey>,
    packs: HashMap<PackId, u32>,
}

impl Contents {
    fn read<B: IndexBytes>(
        &mut self,
        index: &Index<B>,
        offset: u64,
        content: &mut Content,
        left: &mut u64,
    ) -> Result<(), IndexError> {
        let segments = index.segments(offset, content.size)?;
        content.runs.reserve_exact(segments.len());
        for segment in segments {
            let What::Object(part) = segment.what else {
                continue;
            };
            let corrupt = |what| IndexError::Corrupt {
                at: segment.offset,
                what,
            };
            if part.skip != 0 || segment.len != u64::from(part.object_len) {
                return Err(corrupt("an object that is not wholly in its file"));
            }
            *left = left
                .checked_sub(1)
                .ok_or(corrupt("content that two files share"))?;
            let object = self.object(index, &part)?;
            content.runs.push(Run {
                offset: segment.offset - offset,
                object,
                len: part.object_len,
            });
        }
        Ok(())
    }

    fn object<B: IndexBytes>(
        &mut self,
        index: &Index<B>,
        part: &ObjectPart,
    ) -> Result<ObjectKey, IndexError> {
        if let Some(key) = self.objects.get(&part.id) {
            if self.placement.objects[key.0 as usize].len == part.object_len {
                return Ok(*key);
            }
            return Err(IndexError::Corrupt {
                at: 0,
                what: "one object with two lengths",
            });
        }
        let too_many = IndexError::OutOfRange {
            what: "object",
            number: u64::from(u32::MAX),
        };
        let (Ok(next), Ok(first_granule)) = (
            u32::try_from(self.placement.objects.len()),
            u32::try_from(self.placement.granules.len()),
        ) else {
            return Err(too_many);
        };
        let hashes = match part.granule_count() {
            0 => Vec::new(),
            count => index.granule_hashes(part.granules, count)?,
        };
        self.placement.granules.extend_from_slice(&hashes);
        let packs = &mut self.placement.packs;
        let pack = *self.packs.entry(part.pack.id).or_insert_with(|| {
            packs.push(part.pack);
            // There are no more packs than objects, which were counted above.
            packs.len() as u32 - 1
        });
        let (id, len, offset) = (part.id, part.object_len, part.pack_offset);
        self.placement.objects.push(PlacedObject {
            id,
            len,
            pack,
            offset,
            first_granule,
        });
        self.objects.insert(id, ObjectKey(next));
        Ok(ObjectKey(next))
    }
}
