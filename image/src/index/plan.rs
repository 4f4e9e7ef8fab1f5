//! Where everything of a tree will stand: the first half of writing an index.
//!
//! Inodes follow each other from [`FIRST_INODE`] on: the root, then the children of one directory
//! after another, each directory's in the order of their names. A walk that lists a directory and
//! looks at each entry so reads neighbouring blocks, and each block once. A directory or symlink
//! that fits stands right behind its own inode; the others get whole blocks behind all inodes.

use std::ops::Bound::{Excluded, Unbounded};

use super::{
    Refusal, ViewKind, WriteError,
    layout::{
        BLOCK, BLOCK_LEN, DIRENT_LEN, FIRST_INODE, INODE_LEN, MAX_BLOCKS, SLOT, SYMLINK_MAX,
        encode_rdev,
    },
    xattr::{self, TooLong},
};
use crate::{
    object::OBJECT_MAX,
    tree::{Content, Dir, Kind, Node, NodeId, Tree},
};

/// Place of one node.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    /// Offset of the inode in the index in bytes; 0 for a node that no directory names.
    pub(crate) inode_at: u64,
    /// Link count: names of it, or 2 and the number of directories in it.
    pub(crate) links: u32,
    /// Directory that names it.
    pub(crate) parent: u32,
    /// First block of its data: absolute for directories and symlinks, from the start of the
    /// data region for files.
    pub(crate) first_block: u32,
    /// Length of its inline attributes in bytes.
    pub(crate) xattr_len: u32,
    /// Length of a directory's or symlink's data in bytes.
    pub(crate) size: u64,
    /// Whether that data stands behind the inode.
    pub(crate) inline: bool,
}

impl Place {
    pub(crate) const fn nid(&self) -> u64 {
        self.inode_at / SLOT
    }

    pub(crate) const fn tail_at(&self) -> u64 {
        self.inode_at + INODE_LEN as u64 + self.xattr_len as u64
    }
}

/// Places for all nodes of a tree.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) tree: &'a Tree,
    /// By node number.
    pub(crate) places: Vec<Place>,
    /// Nodes in the order of their inodes.
    pub(crate) order: Vec<u32>,
    pub(crate) meta_len: u64,
    pub(crate) data_len: u64,
    /// Where in the data region the large files begin.
    pub(crate) bulk_at: u64,
    pub(crate) dirs: u64,
    pub(crate) names: u64,
    pub(crate) dropped_xattrs: u64,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(tree: &'a Tree, kind: ViewKind) -> Result<Self, WriteError> {
        let mut plan = Self {
            tree,
            places: vec![Place::default(); tree.nodes.len()],
            order: Vec::with_capacity(tree.nodes.len()),
            meta_len: 0,
            data_len: 0,
            bulk_at: 0,
            dirs: 0,
            names: 0,
            dropped_xattrs: 0,
        };
        plan.walk(kind)?;
        plan.place_metadata(kind)?;
        plan.place_data()?;
        Ok(plan)
    }

    /// Finds the order of inodes and counts links; refuses what is not a tree.
    fn walk(&mut self, kind: ViewKind) -> Result<(), WriteError> {
        let tree = self.tree;
        if !matches!(
            tree.nodes.first(),
            Some(Node {
                kind: Kind::Dir(_),
                ..
            })
        ) {
            return Err(WriteError::NoRoot);
        }
        self.order.push(0);
        self.places[0].links = 2;
        let mut open = vec![0u32];
        let mut below = Vec::new();
        while let Some(parent) = open.pop() {
            let Kind::Dir(dir) = &tree.nodes[parent as usize].kind else {
                continue;
            };
            self.dirs += 1;
            if dir.opaque && kind == ViewKind::Image {
                return Err(self.refuse(parent, Refusal::MarkInImage));
            }
            self.names += dir.entries.len() as u64;
            for (name, NodeId(child)) in &dir.entries {
                let refuse = |why| Err(refusal(tree, parent, Some(name), why));
                if name.is_empty()
                    || name.len() > 255
                    || name.iter().any(|b| matches!(b, 0 | b'/'))
                    || matches!(&**name, b"." | b"..")
                {
                    return refuse(Refusal::Name);
                }
                let Some(place) = self.places.get_mut(*child as usize) else {
                    return refuse(Refusal::NoSuchNode(*child));
                };
                let first = place.links == 0;
                place.links = place.links.checked_add(1).ok_or(WriteError::TooLarge)?;
                if first {
                    self.order.push(*child);
                    place.parent = parent;
                }
                if matches!(tree.nodes[*child as usize].kind, Kind::Dir(_)) {
                    // A second name for a directory would be a cycle or two parents.
                    if !first {
                        return refuse(Refusal::DirTwice);
                    }
                    place.links = 2;
                    self.places[parent as usize].links += 1;
                    below.push(*child);
                }
            }
            open.extend(below.drain(..).rev());
        }
        Ok(())
    }

    /// Gives every inode its place, and blocks to directories and symlinks that are not inline.
    fn place_metadata(&mut self, kind: ViewKind) -> Result<(), WriteError> {
        let mut at = FIRST_INODE;
        let mut blocks: u64 = 0;
        for number in 0..self.order.len() {
            let id = self.order[number];
            let node = &self.tree.nodes[id as usize];
            let opaque = matches!(&node.kind, Kind::Dir(dir) if dir.opaque);
            let (xattr_len, dropped) = xattr::area_len(&node.meta.xattrs, opaque)
                .map_err(|why| self.refuse(id, Refusal::from(why)))?;
            self.dropped_xattrs += u64::from(dropped);
            let size = self.meta_size(id, kind)?;
            let head = INODE_LEN as u64 + u64::from(xattr_len);
            let spot = spot(at, head, size);
            let place = &mut self.places[id as usize];
            place.xattr_len = xattr_len;
            place.size = size;
            place.inode_at = spot.unwrap_or_else(|| spot_for_inode(at));
            place.inline = size > 0 && spot.is_some();
            at = place.inode_at + head + if place.inline { size } else { 0 };
            if size > 0 && !place.inline {
                place.first_block = u32::try_from(blocks).map_err(|_| WriteError::TooLarge)?;
                blocks += size.div_ceil(BLOCK);
            }
        }
        let first = at.div_ceil(BLOCK);
        if first + blocks > MAX_BLOCKS {
            return Err(WriteError::TooLarge);
        }
        self.meta_len = (first + blocks) * BLOCK;
        for place in &mut self.places {
            if place.size > 0 && !place.inline {
                place.first_block += first as u32;
            }
        }
        Ok(())
    }

    /// Length of what a node has in the metadata area beside its inode; checks the node on the way.
    fn meta_size(&self, id: u32, kind: ViewKind) -> Result<u64, WriteError> {
        let node = &self.tree.nodes[id as usize];
        if node.meta.mode > 0o7777 || node.meta.mtime.nanos >= 1_000_000_000 {
            return Err(self.refuse(id, Refusal::Meta));
        }
        match &node.kind {
            Kind::Dir(dir) => Ok(dir_size(dir)),
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > SYMLINK_MAX || target.contains(&0) {
                    return Err(self.refuse(id, Refusal::Target));
                }
                Ok(target.len() as u64)
            }
            Kind::Char(major, minor) | Kind::Block(major, minor) => {
                if encode_rdev(*major, *minor).is_none() {
                    return Err(self.refuse(
                        id,
                        Refusal::Device {
                            major: *major,
                            minor: *minor,
                        },
                    ));
                }
                // overlayfs reads this device as a whiteout, whoever made it.
                if kind == ViewKind::Image && matches!(node.kind, Kind::Char(0, 0)) {
                    return Err(self.refuse(id, Refusal::MarkInImage));
                }
                Ok(0)
            }
            Kind::Whiteout if kind == ViewKind::Image => Err(self.refuse(id, Refusal::MarkInImage)),
            Kind::File(_) | Kind::Fifo | Kind::Socket | Kind::Whiteout => Ok(0),
        }
    }

    /// Gives files their blocks in the data region: first those of one object, then the larger
    /// ones, each in the order of node numbers. Decode numbers nodes as the tar stream brings
    /// them, and packs are filled in that order too.
    fn place_data(&mut self) -> Result<(), WriteError> {
        let mut block = 0;
        let most = MAX_BLOCKS - self.meta_len / BLOCK;
        for bulk in [false, true] {
            if bulk {
                self.bulk_at = block * BLOCK;
            }
            for (_, content, place) in files(self.tree, &mut self.places, bulk) {
                place.first_block = u32::try_from(block).map_err(|_| WriteError::TooLarge)?;
                block += content.size.div_ceil(BLOCK);
                if block > most {
                    return Err(WriteError::TooLarge);
                }
            }
        }
        self.data_len = block * BLOCK;
        Ok(())
    }

    pub(crate) fn refuse(&self, id: u32, why: Refusal) -> WriteError {
        refusal(self.tree, id, None, why)
    }

    /// Nids of directories that no entry of the layer named, ascending.
    pub(crate) fn implied(&self) -> Vec<u64> {
        let mut nids: Vec<u64> = self
            .order
            .iter()
            .filter(
                |id| matches!(&self.tree.nodes[**id as usize].kind, Kind::Dir(dir) if dir.implied),
            )
            .map(|id| self.places[*id as usize].nid())
            .collect();
        nids.sort_unstable();
        nids
    }
}

/// Files that are named and not empty and of one object (or, with `bulk`, larger), in the order of
/// the data region.
pub(crate) fn files<P>(
    tree: &Tree,
    places: impl IntoIterator<Item = P>,
    bulk: bool,
) -> impl Iterator<Item = (u32, &Content, P)>
where
    P: std::borrow::Borrow<Place>,
{
    tree.nodes
        .iter()
        .zip(places)
        .zip(0..)
        .filter_map(move |((node, place), id)| match &node.kind {
            Kind::File(content)
                if content.size > 0
                    && (content.size > OBJECT_MAX as u64) == bulk
                    && place.borrow().links > 0 =>
            {
                Some((id, content, place))
            }
            _ => None,
        })
}

/// A directory's entries as they are stored: sorted by bytes, `.` and `..` at their places.
pub(crate) fn dir_entries(
    dir: &Dir,
    own: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = (&[u8], NodeId)> {
    let (dot, dots): (&'static [u8], &'static [u8]) = (b".", b"..");
    let range = |bounds| {
        dir.entries
            .range::<[u8], _>(bounds)
            .map(|(name, id)| (&**name, *id))
    };
    range((Unbounded, Excluded(dot)))
        .chain([(dot, own)])
        .chain(range((Excluded(dot), Excluded(dots))))
        .chain([(dots, parent)])
        .chain(range((Excluded(dots), Unbounded)))
}

/// Length of a directory's data: whole blocks, and what the last one uses.
fn dir_size(dir: &Dir) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for (name, _) in dir_entries(dir, NodeId(0), NodeId(0)) {
        let len = DIRENT_LEN + name.len();
        if used + len > BLOCK_LEN {
            blocks += 1;
            used = 0;
        }
        used += len;
    }
    blocks * BLOCK + used as u64
}

/// Where an inode of `head` bytes (attributes included) can stand at or after `at` so that `tail`
/// bytes behind it stay in one block; `None` when they cannot.
fn spot(at: u64, head: u64, tail: u64) -> Option<u64> {
    let here = spot_for_inode(at);
    let fits = |start: u64| tail < BLOCK && (start + head) % BLOCK + tail <= BLOCK;
    if tail == 0 || fits(here) {
        return Some(here);
    }
    let next = at.next_multiple_of(BLOCK);
    fits(next).then_some(next)
}

/// The next slot at or after `at` in which an inode does not cross a block.
fn spot_for_inode(at: u64) -> u64 {
    let start = at.next_multiple_of(SLOT);
    if start % BLOCK + INODE_LEN as u64 > BLOCK {
        start.next_multiple_of(BLOCK)
    } else {
        start
    }
}

/// The error for `node`, or for the entry `name` of the directory `node`.
fn refusal(tree: &Tree, node: u32, name: Option<&[u8]>, why: Refusal) -> WriteError {
    let mut path = path_of(tree, node).unwrap_or_else(|| format!("node {node}"));
    if let Some(name) = name {
        path = format!("{}/{}", path.trim_end_matches('/'), name.escape_ascii());
    }
    WriteError::Refused { path, why }
}

/// A path of `node`. Only for messages: it walks the tree.
fn path_of(tree: &Tree, node: u32) -> Option<String> {
    // The tree may be what is wrong with it: look at each directory once.
    let mut parent: Vec<Option<(u32, &[u8])>> = vec![None; tree.nodes.len()];
    let mut open = vec![0u32];
    while let Some(id) = open.pop() {
        let Some(Node {
            kind: Kind::Dir(dir),
            ..
        }) = tree.nodes.get(id as usize)
        else {
            continue;
        };
        for (name, NodeId(child)) in &dir.entries {
            if let Some(slot @ None) = parent.get_mut(*child as usize)
                && *child != 0
            {
                *slot = Some((id, name));
                open.push(*child);
            }
        }
    }
    let (mut at, mut parts) = (node, Vec::new());
    while at != 0 {
        let (up, name) = (*parent.get(at as usize)?)?;
        parts.push(name.escape_ascii().to_string());
        at = up;
    }
    parts.reverse();
    Some(format!("/{}", parts.join("/")))
}

impl From<TooLong> for Refusal {
    fn from(why: TooLong) -> Self {
        match why {
            TooLong::Name => Self::Xattrs("a name is longer than 255 bytes"),
            TooLong::Value => Self::Xattrs("a value is longer than 65535 bytes"),
            TooLong::All => Self::Xattrs("together they are longer than 256 KiB"),
        }
    }
}
