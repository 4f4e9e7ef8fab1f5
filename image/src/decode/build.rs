//! The tree under construction: entries are applied to it one after the other, with the outcome
//! that extracting them into an empty root would have.

use std::collections::BTreeMap;

use super::{
    DecodeLimits, Limit,
    error::{DecodeErrorKind as Kind, printable},
    layer::Fault,
    path::EntryPath,
    walk::Walk,
};
use crate::tree::{Dir, Kind as NodeKind, Meta, Node, NodeId, Run, Tree};

/// Memory that one name in a directory takes beside its bytes, roughly.
const NAME_COST: usize = 64;

/// A hard link whose target had not come when it did.
struct Pending {
    path: Box<[u8]>,
    target: EntryPath,
}

type Place = (NodeId, Box<[u8]>);

pub(super) struct Builder<'a> {
    limits: &'a DecodeLimits,
    tree: Tree,
    pending: BTreeMap<Place, Pending>,
    /// The directory found last, by its path: neighbours in a tar mostly share theirs.
    last: Option<(Vec<u8>, NodeId)>,
    /// Memory that names, nodes, attributes and runs take, roughly.
    bytes: u64,
}

/// Where a path leads.
enum Found {
    Node(NodeId),
    /// Nothing is there, but its directory is.
    Vacant(NodeId),
    Nowhere,
}

impl<'a> Builder<'a> {
    pub(super) fn new(limits: &'a DecodeLimits) -> Self {
        Self {
            limits,
            tree: Tree::new(),
            pending: BTreeMap::new(),
            last: None,
            bytes: 0,
        }
    }

    /// The directory at `path`, with what is missing on the way made as implied directories.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<NodeId, Kind> {
        if let Some((last, id)) = &self.last
            && last == path
        {
            return Ok(*id);
        }
        let mut walk = Walk::new(path);
        while let Some(name) = walk.next_name()? {
            match self.child(walk.here(), walk.bytes(name)) {
                Some(id) => match &self.tree.node(id).kind {
                    NodeKind::Dir(_) => walk.down(name, id)?,
                    NodeKind::Symlink(target) => walk.follow(name, target)?,
                    // The name was deleted and made anew, so nothing of lower layers is left.
                    NodeKind::Whiteout => {
                        let dir = Dir {
                            opaque: true,
                            ..Dir::default()
                        };
                        let id =
                            self.add_dir(walk.here(), walk.bytes(name), implied_meta(), dir)?;
                        walk.down(name, id)?;
                    }
                    _ => return Err(walk.not_a_directory(name)),
                },
                None if self.is_pending(walk.here(), walk.bytes(name)) => {
                    return Err(walk.not_a_directory(name));
                }
                None => {
                    let dir = Dir {
                        implied: true,
                        ..Dir::default()
                    };
                    let id = self.add_dir(walk.here(), walk.bytes(name), implied_meta(), dir)?;
                    walk.down(name, id)?;
                }
            }
        }
        let id = walk.here();
        self.last = Some((path.to_vec(), id));
        Ok(id)
    }

    pub(super) fn set_root(&mut self, meta: Meta) -> Result<(), Kind> {
        self.set_dir_meta(Tree::ROOT, meta)
    }

    /// A directory entry: over a directory it changes metadata, over anything else it replaces.
    pub(super) fn dir(&mut self, parent: NodeId, name: &[u8], meta: Meta) -> Result<(), Kind> {
        let there = self.child(parent, name);
        if let Some(id) = there
            && matches!(self.tree.node(id).kind, NodeKind::Dir(_))
        {
            return self.set_dir_meta(id, meta);
        }
        // Whatever stood there, a whiteout or a file, had hidden what lower layers have.
        let opaque = there.is_some() || self.is_pending(parent, name);
        self.add_dir(
            parent,
            name,
            meta,
            Dir {
                opaque,
                ..Dir::default()
            },
        )?;
        Ok(())
    }

    /// Any other entry but a hard link: replaces what is there, a directory with all below it.
    pub(super) fn node(&mut self, parent: NodeId, name: &[u8], node: Node) -> Result<(), Kind> {
        let id = self.add(node)?;
        self.set(parent, name, id)
    }

    /// `.wh.NAME`: speaks of lower layers only, so what this layer has under the name stays,
    /// whichever came first.
    pub(super) fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<(), Kind> {
        let parent = self.directory(parent)?;
        match self.child(parent, name) {
            Some(id) => {
                if let NodeKind::Dir(dir) = &mut self.node_mut(id).kind {
                    dir.opaque = true;
                    // The lower layer's metadata is gone with it.
                    dir.implied = false;
                }
                Ok(())
            }
            None if self.is_pending(parent, name) => Ok(()),
            None => {
                let node = Node {
                    meta: Meta::default(),
                    kind: NodeKind::Whiteout,
                };
                self.node(parent, name, node)
            }
        }
    }

    /// `.wh..wh..opq` in the directory at `path`.
    pub(super) fn set_opaque(&mut self, path: &[u8]) -> Result<(), Kind> {
        let id = self.directory(path)?;
        if let NodeKind::Dir(dir) = &mut self.node_mut(id).kind {
            dir.opaque = true;
        }
        Ok(())
    }

    /// A hard link: one more name of the target's node, now or, if the target is not there yet,
    /// at the end.
    pub(super) fn hard_link(
        &mut self,
        parent: NodeId,
        path: &EntryPath,
        target: &EntryPath,
    ) -> Result<(), Kind> {
        if let Found::Node(id) = self.find(target)? {
            self.check_linkable(id, target)?;
            return self.set(parent, path.name(), id);
        }
        self.count_bytes(path.as_bytes().len() + target.as_bytes().len() + 2 * NAME_COST)?;
        self.forget(parent, path.name());
        let pending = Pending {
            path: path.as_bytes().into(),
            target: target.clone(),
        };
        self.pending.insert((parent, path.name().into()), pending);
        Ok(())
    }

    /// Resolves the hard links that came before their targets.
    pub(super) fn finish(mut self) -> Result<Tree, Fault> {
        while let Some(first) = self.pending.pop_first() {
            let mut chain = vec![first];
            let id = loop {
                // A link may lead to a link that waits as well; each is followed once.
                let Some((_, link)) = chain.last() else {
                    break Tree::ROOT;
                };
                let fault = |kind| Fault::at(&link.path, kind);
                let target = || printable(link.target.as_bytes());
                match self.find(&link.target).map_err(fault)? {
                    Found::Node(id) => {
                        self.check_linkable(id, &link.target).map_err(fault)?;
                        break id;
                    }
                    Found::Nowhere => {
                        return Err(fault(Kind::HardLinkMissing { target: target() }));
                    }
                    Found::Vacant(dir) => {
                        let place = (dir, link.target.name().into());
                        match self.pending.remove_entry(&place) {
                            Some(next) => chain.push(next),
                            None if chain.iter().any(|(seen, _)| *seen == place) => {
                                return Err(fault(Kind::HardLinkCycle { target: target() }));
                            }
                            None => {
                                return Err(fault(Kind::HardLinkMissing { target: target() }));
                            }
                        }
                    }
                }
            };
            for ((parent, name), link) in chain {
                self.set(parent, &name, id)
                    .map_err(|kind| Fault::at(&link.path, kind))?;
            }
        }
        Ok(self.tree)
    }

    fn check_linkable(&self, id: NodeId, target: &EntryPath) -> Result<(), Kind> {
        match self.tree.node(id).kind {
            NodeKind::Dir(_) => Err(Kind::HardLinkToDirectory {
                target: printable(target.as_bytes()),
            }),
            _ => Ok(()),
        }
    }

    /// What stands at `path`, whose last component is not followed if it is a symbolic link.
    fn find(&self, path: &EntryPath) -> Result<Found, Kind> {
        let mut walk = Walk::new(path.parent());
        while let Some(name) = walk.next_name()? {
            let Some(id) = self.child(walk.here(), walk.bytes(name)) else {
                return Ok(Found::Nowhere);
            };
            match &self.tree.node(id).kind {
                NodeKind::Dir(_) => walk.down(name, id)?,
                NodeKind::Symlink(target) => walk.follow(name, target)?,
                _ => return Ok(Found::Nowhere),
            }
        }
        if path.is_root() {
            return Ok(Found::Node(Tree::ROOT));
        }
        match self.child(walk.here(), path.name()) {
            Some(id) if self.tree.node(id).kind != NodeKind::Whiteout => Ok(Found::Node(id)),
            _ => Ok(Found::Vacant(walk.here())),
        }
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.tree.node(dir).kind {
            NodeKind::Dir(dir) => dir.entries.get(name).copied(),
            _ => None,
        }
    }

    fn is_pending(&self, dir: NodeId, name: &[u8]) -> bool {
        !self.pending.is_empty() && self.pending.contains_key(&(dir, name.into()))
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.tree.nodes[id.0 as usize]
    }

    fn set_dir_meta(&mut self, id: NodeId, meta: Meta) -> Result<(), Kind> {
        self.count_bytes(xattr_bytes(&meta))?;
        let node = self.node_mut(id);
        node.meta = meta;
        if let NodeKind::Dir(dir) = &mut node.kind {
            dir.implied = false;
        }
        Ok(())
    }

    fn add_dir(
        &mut self,
        parent: NodeId,
        name: &[u8],
        meta: Meta,
        dir: Dir,
    ) -> Result<NodeId, Kind> {
        let id = self.add(Node {
            meta,
            kind: NodeKind::Dir(dir),
        })?;
        self.set(parent, name, id)?;
        Ok(id)
    }

    fn add(&mut self, node: Node) -> Result<NodeId, Kind> {
        let own = match &node.kind {
            NodeKind::File(content) => content.runs.len() * size_of::<Run>(),
            NodeKind::Symlink(target) => target.len(),
            _ => 0,
        };
        self.count_bytes(size_of::<Node>() + own + xattr_bytes(&node.meta))?;
        let max = self.limits.entries_max;
        match u32::try_from(self.tree.nodes.len()) {
            // Implied directories are nodes, too, and one entry can make two thousand of them.
            Ok(id) if u64::from(id) <= max => {
                self.tree.nodes.push(node);
                Ok(NodeId(id))
            }
            _ => Err(Kind::limit(Limit::Entries, max)),
        }
    }

    /// Names `id`; what had the name before, or waited for it, has it no longer.
    fn set(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), Kind> {
        self.count_bytes(name.len() + NAME_COST)?;
        self.forget(parent, name);
        if let NodeKind::Dir(dir) = &mut self.node_mut(parent).kind {
            dir.entries.insert(name.into(), id);
        }
        Ok(())
    }

    fn forget(&mut self, parent: NodeId, name: &[u8]) {
        if !self.pending.is_empty() {
            self.pending.remove(&(parent, name.into()));
        }
        let NodeKind::Dir(dir) = &mut self.node_mut(parent).kind else {
            return;
        };
        if let Some(old) = dir.entries.remove(name)
            && matches!(
                self.tree.node(old).kind,
                NodeKind::Dir(_) | NodeKind::Symlink(_)
            )
        {
            // The path that was remembered may have led through it.
            self.last = None;
        }
    }

    fn count_bytes(&mut self, bytes: usize) -> Result<(), Kind> {
        self.bytes += bytes as u64;
        if self.bytes > self.limits.tree_bytes_max {
            return Err(Kind::limit(Limit::TreeBytes, self.limits.tree_bytes_max));
        }
        Ok(())
    }
}

fn xattr_bytes(meta: &Meta) -> usize {
    meta.xattrs
        .iter()
        .map(|(name, value)| name.len() + value.len() + NAME_COST)
        .sum()
}

/// Of a directory that no entry names.
fn implied_meta() -> Meta {
    Meta {
        mode: 0o755,
        ..Meta::default()
    }
}
