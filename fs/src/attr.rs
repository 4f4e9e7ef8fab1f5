//! Attributes of nodes in our own terms.

use harbour_image::{
    index::{FileType, Inode},
    tree::Time,
};

use crate::{
    error::Result,
    inode::{Node, Part},
    view::{Opened, View},
};

/// Block size that programs are told to read with, in bytes. Also that of EROFS.
pub(crate) const BLOCK: u32 = 4096;

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Number of the node, `st_ino` too.
    pub node: Node,
    /// Type.
    pub kind: FileType,
    /// Permission bits, at most 0o7777.
    pub perm: u16,
    /// Link count.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Length in bytes.
    pub size: u64,
    /// Time of last modification; access and change time are the same.
    pub mtime: Time,
}

impl Attr {
    /// Space in units of 512 bytes. Whole blocks of the length, as EROFS counts: both doors show
    /// the same.
    pub const fn blocks(&self) -> u64 {
        self.size
            .div_ceil(BLOCK as u64)
            .saturating_mul(BLOCK as u64 / 512)
    }

    /// Device number in the kernel's 32 bits: minor's low 8, major's 12, minor's high 12.
    pub const fn rdev_bits(&self) -> u32 {
        let (major, minor) = self.rdev;
        (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
    }

    pub(crate) fn of_inode(view: &View, inode: &Inode) -> Result<Self> {
        Ok(Self {
            node: view.node(inode.nid)?,
            kind: inode.file_type,
            perm: inode.mode,
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            size: inode.size,
            mtime: inode.mtime,
        })
    }

    pub(crate) const fn of_erofs(view: &View, part: Part, opened: &Opened, mtime: Time) -> Self {
        let node = Node::erofs(view.number, part);
        let (_, len) = part.span(&opened.header);
        Self::ours(node, FileType::File, 0o444, len, mtime)
    }

    /// A node that belongs to nobody's image.
    pub(crate) const fn ours(
        node: Node,
        kind: FileType,
        perm: u16,
        size: u64,
        mtime: Time,
    ) -> Self {
        Self {
            node,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: (0, 0),
            size,
            mtime,
        }
    }
}
