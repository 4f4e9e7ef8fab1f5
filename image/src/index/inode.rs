//! Reading inodes, symlinks and extended attributes.

use std::fmt;

use super::{
    Index, IndexBytes, IndexError,
    layout::{
        BLOCK, DataLayout, FIRST_INODE, FileType, INODE_LEN, SLOT, SYMLINK_MAX, XATTR_HEADER_LEN,
        array, decode_rdev, get_u16, get_u32, get_u64,
    },
    xattr,
};
use crate::tree::Time;

/// Number of a node: the place of its inode in the metadata, in units of 32 bytes. Below 2^40.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One node's attributes, and what is needed to reach its data without reading them again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub nid: Nid,
    /// Its type.
    pub file_type: FileType,
    /// Permission bits, at most 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes, for a directory of its stored entries.
    pub size: u64,
    /// Time of last modification.
    pub mtime: Time,
    /// Link count.
    pub nlink: u32,
    /// Major and minor number of a device; 0:0 for everything else.
    pub rdev: (u32, u32),
    /// Where a file's content begins in the EROFS file, in bytes; `None` for empty files and
    /// everything that is not a file.
    pub data_offset: Option<u64>,
    /// Whether it has extended attributes at all.
    pub has_xattrs: bool,
    pub(crate) layout: DataLayout,
    pub(crate) first_block: u32,
    pub(crate) xattr_len: u32,
}

impl Inode {
    /// Whether overlayfs reads this as "deleted here".
    pub fn is_whiteout(&self) -> bool {
        self.file_type == FileType::Char && self.rdev == (0, 0)
    }

    /// Offset of the inode in the index in bytes.
    pub(crate) const fn at(&self) -> u64 {
        self.nid.0 * SLOT
    }

    /// Where data of a directory or symlink stands that is not in whole blocks.
    pub(crate) const fn tail_at(&self) -> u64 {
        self.at() + INODE_LEN as u64 + self.xattr_len as u64
    }

    /// Where block `number` of a directory's or symlink's data stands, by EROFS's rule that the
    /// last block of an inline node is the one behind the inode. The caller has checked
    /// `number * BLOCK < size`.
    pub(crate) fn block_at(&self, number: u64) -> u64 {
        if self.layout == DataLayout::Inline && number + 1 == self.size.div_ceil(BLOCK) {
            self.tail_at()
        } else {
            (u64::from(self.first_block) + number) * BLOCK
        }
    }
}

/// One extended attribute: its full name and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Name with its namespace.
    pub name: Box<[u8]>,
    /// Value.
    pub value: Box<[u8]>,
}

impl<B: IndexBytes> Index<B> {
    /// The root directory.
    pub fn root(&self) -> Result<Inode, IndexError> {
        let inode = self.inode(self.header.root)?;
        let at = inode.at();
        match inode.file_type {
            FileType::Dir => Ok(inode),
            _ => Err(IndexError::Corrupt {
                at,
                what: "the root is not a directory",
            }),
        }
    }

    /// The node with this number. Numbers come from [`Index::root`], [`Index::lookup`] and
    /// [`Index::readdir`]; another number gives an error or a node that no directory names.
    pub fn inode(&self, nid: Nid) -> Result<Inode, IndexError> {
        let at = nid.0.checked_mul(SLOT).filter(|at| *at >= FIRST_INODE);
        let at = at.filter(|at| at.saturating_add(INODE_LEN as u64) <= self.header.meta_len);
        let at = at.ok_or(IndexError::OutOfRange {
            what: "node",
            number: nid.0,
        })?;
        let raw: [u8; INODE_LEN] = self.meta(at)?;
        let corrupt = |what| IndexError::Corrupt { at, what };

        let layout =
            DataLayout::from_format(get_u16(&raw, 0)).ok_or(corrupt("an unknown inode format"))?;
        let mode = get_u16(&raw, 4);
        let file_type = FileType::from_mode(mode).ok_or(corrupt("an unknown file type"))?;
        let (size, union) = (get_u64(&raw, 8), get_u32(&raw, 16));
        let xattr_len = match get_u16(&raw, 2) {
            0 => 0,
            count => XATTR_HEADER_LEN as u32 + 4 * (u32::from(count) - 1),
        };
        let nanos = get_u32(&raw, 40);
        if nanos >= 1_000_000_000 {
            return Err(corrupt("a billion nanoseconds"));
        }
        let mut inode = Inode {
            nid,
            file_type,
            mode: mode & 0o7777,
            uid: get_u32(&raw, 24),
            gid: get_u32(&raw, 28),
            size,
            mtime: Time {
                secs: get_u64(&raw, 32) as i64,
                nanos,
            },
            nlink: get_u32(&raw, 44),
            rdev: (0, 0),
            data_offset: None,
            has_xattrs: xattr_len > 0,
            layout,
            first_block: union,
            xattr_len,
        };
        match file_type {
            FileType::Char | FileType::Block => inode.rdev = decode_rdev(union),
            FileType::File if size > 0 => {
                inode.data_offset = Some(
                    self.check_data(union, size, layout)
                        .ok_or(corrupt("a file outside of the data region"))?,
                );
            }
            FileType::Dir | FileType::Symlink if size > self.header.meta_len => {
                return Err(corrupt("a directory or symlink longer than all metadata"));
            }
            _ => {}
        }
        Ok(inode)
    }

    fn check_data(&self, first_block: u32, size: u64, layout: DataLayout) -> Option<u64> {
        let offset = u64::from(first_block) * BLOCK;
        let end = offset.checked_add(size)?;
        let inside = offset >= self.header.meta_len && end <= self.header.erofs_len();
        (inside && layout == DataLayout::Plain).then_some(offset)
    }

    /// Where a symlink leads. An error for anything that is not one.
    pub fn readlink(&self, inode: &Inode) -> Result<Vec<u8>, IndexError> {
        let corrupt = |what| IndexError::Corrupt {
            at: inode.at(),
            what,
        };
        if inode.file_type != FileType::Symlink {
            return Err(IndexError::OutOfRange {
                what: "symlink",
                number: inode.nid.0,
            });
        }
        if inode.size == 0 || inode.size > SYMLINK_MAX as u64 {
            return Err(corrupt("a symlink of no or too great length"));
        }
        let mut target = vec![0; inode.size as usize];
        self.read_meta(inode.block_at(0), &mut target)?;
        Ok(target)
    }

    /// All extended attributes, in the order of the index: the opaque mark first, then by name.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, IndexError> {
        let mut found = Vec::new();
        self.each_xattr(inode, |(prefix, rest, value)| {
            found.push(Xattr {
                name: [prefix, rest].concat().into(),
                value: value.into(),
            });
            true
        })?;
        Ok(found)
    }

    /// The value of the extended attribute `name`, if the node has it.
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        let mut found = None;
        self.each_xattr(inode, |(prefix, rest, value)| {
            if name.strip_prefix(prefix) == Some(rest) {
                found = Some(value.to_vec());
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// Whether a directory hides everything below it.
    pub fn is_opaque(&self, inode: &Inode) -> Result<bool, IndexError> {
        let (name, yes) = xattr::OPAQUE;
        Ok(inode.file_type == FileType::Dir && self.xattr(inode, name)?.as_deref() == Some(yes))
    }

    /// Calls `visit` for each attribute until it says `false`.
    pub(crate) fn each_xattr(
        &self,
        inode: &Inode,
        mut visit: impl FnMut(xattr::Entry<'_>) -> bool,
    ) -> Result<(), IndexError> {
        if !inode.has_xattrs {
            return Ok(());
        }
        let at = inode.at() + INODE_LEN as u64;
        let len = inode.xattr_len as usize;
        let corrupt = |what| IndexError::Corrupt { at, what };
        // Most nodes that have any have one short attribute: no allocation for those.
        let mut short = [0; 256];
        let mut long = Vec::new();
        let area = match short.get_mut(..len) {
            Some(area) => area,
            None if at + len as u64 > self.header.meta_len => {
                return Err(corrupt("attributes outside of the metadata"));
            }
            None => {
                long.resize(len, 0);
                &mut long[..]
            }
        };
        self.read_meta(at, area)?;
        for entry in xattr::entries(area) {
            if !visit(entry.map_err(corrupt)?) {
                break;
            }
        }
        Ok(())
    }

    /// Whether no entry of the layer named this directory, so that a lower layer's metadata is to
    /// be taken for it.
    pub fn is_implied(&self, nid: Nid) -> Result<bool, IndexError> {
        let table = self.header.implied;
        let (mut low, mut high) = (0, table.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let found = u64::from_le_bytes(array(&self.entry::<8>(table, middle)?, 0));
            match found.cmp(&nid.0) {
                std::cmp::Ordering::Equal => return Ok(true),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(false)
    }
}
