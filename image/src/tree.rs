//! A layer, or a merged image, as a tree of nodes: what decode gives and what the index is
//! written from.

use std::collections::BTreeMap;

/// Place of a node in [`Tree::nodes`]. Hard links are several names of one `NodeId`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// A number that an [`ObjectSink`] gave for some content; its meaning is the sink's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey(pub u32);

/// Takes file content out of a stream while it is decoded, so that no file is ever held whole.
pub trait ObjectSink {
    /// What can go wrong when content is placed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Takes one object of 1 to [`crate::object::OBJECT_MAX`] bytes and names it. Equal content
    /// may get the same key or different ones.
    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, Self::Error>;
}

/// Seconds and nanoseconds since the epoch; `nanos` is below 10^9, also before 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// Nanoseconds after `secs`.
    pub nanos: u32,
}

/// What every node has, whatever its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with setuid, setgid and sticky: at most 0o7777. The type is in [`Kind`].
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification, the only time that images carry.
    pub mtime: Time,
    /// Extended attributes by full name (`security.capability`), as they are given to
    /// `setxattr(2)`. Never in `trusted.overlay.` or `user.overlay.`: those are [`Kind`]'s to tell.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
}

/// Content of a regular file: objects at increasing offsets, everything between them a hole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Length in bytes.
    pub size: u64,
    /// Sorted, not overlapping, inside `size`.
    pub runs: Vec<Run>,
}

/// One object's place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Offset in the file in bytes; a multiple of 4096.
    pub offset: u64,
    /// The object.
    pub object: ObjectKey,
    /// Its length in bytes.
    pub len: u32,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Dir(Dir),
    /// A regular file.
    File(Content),
    /// A symbolic link and its target, any bytes but NUL.
    Symlink(Box<[u8]>),
    /// A character device: major, minor.
    Char(u32, u32),
    /// A block device: major, minor.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// "This name is deleted here": overlayfs reads it as a character device 0:0. Never in a
    /// merged image.
    Whiteout,
}

/// A directory's names and marks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dir {
    /// Children by name; a name is 1 to 255 bytes with no NUL and no slash, never `.` or `..`.
    pub entries: BTreeMap<Box<[u8]>, NodeId>,
    /// Hides everything that lower layers have here (`.wh..wh..opq`). Never in a merged image.
    pub opaque: bool,
    /// No entry of the layer named this directory: it stands because something below it does, so
    /// a merge takes a lower layer's metadata for it where there is one.
    pub implied: bool,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Owner, mode, time, extended attributes.
    pub meta: Meta,
    /// Type and what belongs to it.
    pub kind: Kind,
}

/// A tree of nodes whose root is node 0, a directory. Nodes that no directory names are garbage
/// (an entry that a later one replaced) and are not written to an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// All nodes; [`NodeId`] is a place in here.
    pub nodes: Vec<Node>,
}

impl Tree {
    /// The root's place.
    pub const ROOT: NodeId = NodeId(0);

    /// An empty tree: a root of mode 0755 owned by root, implied until an entry names it.
    pub fn new() -> Self {
        let meta = Meta {
            mode: 0o755,
            ..Meta::default()
        };
        let dir = Dir {
            implied: true,
            ..Dir::default()
        };
        Self {
            nodes: vec![Node {
                meta,
                kind: Kind::Dir(dir),
            }],
        }
    }

    /// The node at `id`.
    ///
    /// # Panics
    /// When `id` is of another tree.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}
