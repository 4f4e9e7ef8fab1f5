//! Merging the indexes of an image's layers into the tree that a container sees.
//!
//! A directory of the result is made from the directories of that path in several layers, the
//! highest first, down to the first that is opaque or covers something that is not a directory.
//! For each name the highest layer that has it decides: a whiteout hides it, anything but a
//! directory is it, and a directory is merged in turn. This is how overlayfs looks things up; the
//! one difference is what tar leaves out: a directory that a layer only *implies* (it holds
//! something, but no entry named it) takes a lower layer's metadata, as it would have kept it when
//! layers were unpacked over each other.

use std::collections::{BTreeMap, btree_map};

use super::{
    FileType, Index, IndexBytes, IndexError, Placement,
    load::{At, Collector},
};
use crate::tree::{Dir, Kind, NodeId, Tree};

/// Why layers could not be merged.
#[derive(Debug, thiserror::Error)]
#[error("the index of layer {layer} could not be merged")]
pub struct MergeError {
    /// Which layer, counted from 0 at the bottom.
    pub layer: usize,
    /// What is wrong with its index.
    #[source]
    pub source: IndexError,
}

/// The tree of an image whose layers are given from the bottom up, and the places of what is left
/// of their content.
///
/// Files keep the order of their layers' data regions, lower layers first. Hard links of one layer
/// stay one node. Without layers the result is an empty tree.
pub fn merge<B: IndexBytes>(layers: &[Index<B>]) -> Result<(Tree, Placement), MergeError> {
    if layers.is_empty() {
        return Ok((Tree::new(), Placement::default()));
    }
    let mut collector = Collector::new(layers);
    walk(&mut collector, false)?;
    collector.finish()
}

/// What a name is, as far as layers have been looked at from the top down.
enum Name {
    /// Deleted.
    Hidden,
    /// Something that is not a directory.
    Leaf(At),
    /// A directory.
    Dir(DirStack),
}

/// The layers' directories that make one directory.
struct DirStack {
    /// Those whose names count, highest layer first.
    parts: Vec<At>,
    /// Where metadata comes from.
    meta: At,
    /// Whether `meta` is of a directory that its layer only implies.
    implied: bool,
    /// Whether the highest part is opaque.
    opaque: bool,
    /// Whether lower layers' names still count.
    names_open: bool,
    /// Whether lower layers' metadata can still count.
    meta_open: bool,
}

impl DirStack {
    fn new<B: IndexBytes>(collector: &Collector<'_, B>, at: At) -> Result<Self, MergeError> {
        let (opaque, implied) = (collector.is_opaque(at)?, collector.is_implied(at)?);
        let parts = vec![at];
        Ok(Self {
            parts,
            meta: at,
            implied,
            opaque,
            names_open: !opaque,
            meta_open: implied,
        })
    }

    /// Adds a lower layer's directory.
    fn add<B: IndexBytes>(
        &mut self,
        collector: &Collector<'_, B>,
        at: At,
    ) -> Result<(), MergeError> {
        if self.names_open {
            self.parts.push(at);
            self.names_open = !collector.is_opaque(at)?;
        }
        if self.meta_open {
            self.meta = at;
            self.implied = collector.is_implied(at)?;
            self.meta_open = self.implied;
        }
        Ok(())
    }

    /// A lower layer has something else here: what is below that does not count.
    const fn close(&mut self) {
        self.names_open = false;
        self.meta_open = false;
    }

    const fn is_open(&self) -> bool {
        self.names_open || self.meta_open
    }
}

/// Gathers the tree of all layers of `collector`, the last on top. With `keep_marks`, which is for
/// one layer, whiteouts and opaque marks are nodes and marks of the result.
pub(crate) fn walk<B: IndexBytes>(
    collector: &mut Collector<'_, B>,
    keep_marks: bool,
) -> Result<(), MergeError> {
    let top = collector.layer_count() - 1;
    let at = collector.root(top)?;
    let mut root = DirStack::new(collector, at)?;
    for layer in (0..top).rev() {
        let at = collector.root(layer)?;
        root.add(collector, at)?;
    }
    let mut open = vec![add_dir(collector, root, keep_marks)?];
    while let Some((id, parts)) = open.pop() {
        let mut entries = BTreeMap::new();
        for (name, found) in names(collector, &parts, keep_marks)? {
            let child = match found {
                Name::Hidden => continue,
                Name::Leaf(at) => collector.leaf(at)?,
                Name::Dir(stack) => {
                    let (child, parts) = add_dir(collector, stack, keep_marks)?;
                    open.push((child, parts));
                    child
                }
            };
            entries.insert(name, child);
        }
        if let Kind::Dir(dir) = &mut collector.nodes[id.0 as usize].kind {
            dir.entries = entries;
        }
    }
    Ok(())
}

fn add_dir<B: IndexBytes>(
    collector: &mut Collector<'_, B>,
    stack: DirStack,
    keep_marks: bool,
) -> Result<(NodeId, Vec<At>), MergeError> {
    let dir = Dir {
        opaque: keep_marks && stack.opaque,
        implied: stack.implied,
        ..Dir::default()
    };
    Ok((collector.add_dir(stack.meta, dir)?, stack.parts))
}

/// The names of a directory made of `parts`, and what each is.
fn names<B: IndexBytes>(
    collector: &mut Collector<'_, B>,
    parts: &[At],
    keep_marks: bool,
) -> Result<BTreeMap<Box<[u8]>, Name>, MergeError> {
    let mut names = BTreeMap::new();
    for part in parts {
        let layer = part.layer;
        let mut found = Vec::new();
        collector.entries(*part, |name, nid, file_type| {
            found.push((Box::<[u8]>::from(name), nid, file_type))
        })?;
        for pair in found.windows(2) {
            if pair[0].0 >= pair[1].0 {
                let what = "a directory whose names do not ascend";
                return Err(MergeError {
                    layer,
                    source: IndexError::Corrupt {
                        at: part.inode.at(),
                        what,
                    },
                });
            }
        }
        for (name, nid, file_type) in found {
            match names.entry(name) {
                btree_map::Entry::Vacant(slot) => {
                    let at = collector.inode(layer, nid, file_type)?;
                    slot.insert(match file_type {
                        FileType::Dir => Name::Dir(DirStack::new(collector, at)?),
                        _ if at.inode.is_whiteout() && !keep_marks => Name::Hidden,
                        _ => Name::Leaf(at),
                    });
                }
                btree_map::Entry::Occupied(mut slot) => {
                    if let Name::Dir(stack) = slot.get_mut()
                        && stack.is_open()
                    {
                        match file_type {
                            FileType::Dir => {
                                let at = collector.inode(layer, nid, file_type)?;
                                stack.add(collector, at)?;
                            }
                            _ => stack.close(),
                        }
                    }
                }
            }
        }
    }
    Ok(names)
}
