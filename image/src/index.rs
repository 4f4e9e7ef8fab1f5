//! The index: one flat file that describes a layer or a merged image.
//!
//! It has two halves. The first is an EROFS metadata image that the kernel, `fsck.erofs` and
//! `dump.erofs` read as it is; its files lie in a *virtual data region* that nobody stores. The
//! second, the *object map*, says which object fills which part of that region and in which pack
//! it is. `image/FORMAT.md` has every byte.
//!
//! The path of one index: [`write`] makes it from a [`crate::tree::Tree`] and a [`Placement`];
//! [`Index`] reads it through [`IndexBytes`], which may fetch and check 16 KiB granules as they
//! are asked for ([`seal`]); [`merge()`] makes an image's tree from its layers' indexes, to be
//! written again. [`verify()`] looks at every byte, for tests and suspicion.
//!
//! Reading trusts nothing: each offset and length is checked against the header, which is checked
//! against the length of the bytes, so that any bytes at all give an answer or an [`IndexError`].

mod dir;
mod emit;
mod inode;
mod layout;
mod load;
mod map;
pub mod merge;
mod placement;
mod plan;
pub mod seal;
mod segments;
pub mod verify;
mod write;
mod xattr;

use std::sync::Arc;

pub use dir::DirEntry;
pub use inode::{Inode, Nid, Xattr};
pub use layout::{BLOCK, FileType, Header, ViewKind};
pub use load::load;
pub use merge::{MergeError, merge};
pub use placement::{PackRef, PlacedObject, Placement, granule_count};
pub use segments::{ObjectPart, Segment, What};
pub use verify::{Report, verify};
pub use write::{Stats, Written, write};

/// Bytes of an index, from wherever they come. A structure may lie anywhere: an implementation
/// that fetches granules copies across their borders.
#[allow(clippy::len_without_is_empty, reason = "nothing asks whether an index is empty")]
pub trait IndexBytes {
    /// Number of bytes there are, with or without the granule table.
    fn len(&self) -> u64;

    /// Fills `into` from `offset`; an error when any byte of it is not there.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError>;
}

/// Why bytes of an index could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The index is shorter.
    #[error("{len} bytes at {offset} are past the end of the index at {end}")]
    PastEnd {
        /// Where reading was to begin, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Where the index ends.
        end: u64,
    },
    /// Fetching or checking them failed.
    #[error("could not read {len} bytes at {offset} of the index")]
    Failed {
        /// Where reading was to begin, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why an index cannot be read further.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The bytes did not come.
    #[error("an index could not be read")]
    Read(#[from] ReadError),
    /// It does not begin as one.
    #[error("not an index: the first bytes are others")]
    NotAnIndex,
    /// Written by another release.
    #[error("index of version {found}; this release reads version 1")]
    Version {
        /// What the header says.
        found: u32,
    },
    /// Its header contradicts itself.
    #[error("index with a wrong header: {0}")]
    Header(&'static str),
    /// Something in it cannot be.
    #[error("index is corrupt at {at}: {what}")]
    Corrupt {
        /// Where it was found: an offset in the index in bytes.
        at: u64,
        /// What was found.
        what: &'static str,
    },
    /// An operation on directories got something else.
    #[error("node {nid} is not a directory")]
    NotADirectory {
        /// The node.
        nid: Nid,
    },
    /// The caller asked for something that this index does not have.
    #[error("{what} {number} is not in the index")]
    OutOfRange {
        /// What was asked for.
        what: &'static str,
        /// Its number or offset.
        number: u64,
    },
}

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Something in the tree cannot be in an index.
    #[error("{path} {why}")]
    Refused {
        /// Where, from the root, with bytes that are not printable escaped.
        path: String,
        /// What is wrong with it.
        why: Refusal,
    },
    /// Node 0 is not a directory.
    #[error("the tree has no root")]
    NoRoot,
    /// More than 16 TiB of data region and metadata, or more than 2^32 of something counted.
    #[error("the tree is larger than an index can describe (16 TiB, 2^32 objects)")]
    TooLarge,
}

/// What is wrong with a node or an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Empty, over 255 bytes, `.`, `..`, or with NUL or slash.
    Name,
    /// An entry that leads out of the tree's nodes.
    NoSuchNode(u32),
    /// A directory with two names, or in itself.
    DirTwice,
    /// Mode or nanoseconds out of range.
    Meta,
    /// A symlink's target.
    Target,
    /// Device numbers that EROFS and the kernel cannot hold.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Extended attributes that are too long.
    Xattrs(&'static str),
    /// A whiteout or opaque mark in an image.
    MarkInImage,
    /// Content runs that are unordered, overlapping, not aligned or outside of the file.
    Runs,
    /// An object that the placement does not have, or has differently.
    Object(&'static str),
}

/// An index, open for reading. Copying the header is all that opening does, so an `Index` can be
/// made anew for each operation ([`Index::with_header`]), for instance around bytes that know the
/// operation's deadline.
#[derive(Clone, Debug)]
pub struct Index<B> {
    header: Header,
    bytes: B,
}

impl<B: IndexBytes> Index<B> {
    /// Reads and checks the header. Costs the same for every size of index.
    pub fn open(bytes: B) -> Result<Self, IndexError> {
        let mut raw = [0; layout::HEADER_LEN];
        if bytes.len() < raw.len() as u64 {
            return Err(IndexError::NotAnIndex);
        }
        bytes.read_at(0, &mut raw)?;
        let header = Header::decode(&raw)?;
        if header.len > bytes.len() {
            return Err(IndexError::Header("longer than the bytes there are"));
        }
        Ok(Self { header, bytes })
    }

    /// An index whose header was read before, by [`Index::open`] on the same bytes.
    pub const fn with_header(header: Header, bytes: B) -> Self {
        Self { header, bytes }
    }

    /// Lengths and counts.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The bytes below.
    pub const fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Reads from the front of the EROFS file: its metadata, with our header in its boot area.
    /// `offset + into.len()` is at most [`Header::meta_len`]; what follows is the data region.
    pub fn read_meta(&self, offset: u64, into: &mut [u8]) -> Result<(), IndexError> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.header.meta_len) {
            return Err(IndexError::Corrupt { at: offset, what: "something outside of the metadata" });
        }
        Ok(self.bytes.read_at(offset, into)?)
    }

    /// Reads `N` bytes of the metadata.
    fn meta<const N: usize>(&self, offset: u64) -> Result<[u8; N], IndexError> {
        let mut out = [0; N];
        self.read_meta(offset, &mut out)?;
        Ok(out)
    }

    /// Reads entry `number` of a table, which the caller knows it to have.
    fn entry<const N: usize>(&self, table: layout::Section, number: u64) -> Result<[u8; N], IndexError> {
        debug_assert!(number < table.count);
        let mut out = [0; N];
        self.bytes.read_at(table.at + number * N as u64, &mut out)?;
        Ok(out)
    }
}

impl IndexBytes for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let len = into.len();
        let from = usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(len)?));
        match from {
            Some(from) => {
                into.copy_from_slice(from);
                Ok(())
            }
            None => Err(ReadError::PastEnd { offset, len: len as u64, end: <[u8]>::len(self) as u64 }),
        }
    }
}

impl IndexBytes for Vec<u8> {
    fn len(&self) -> u64 {
        IndexBytes::len(self.as_slice())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        self.as_slice().read_at(offset, into)
    }
}

impl<T: IndexBytes + ?Sized> IndexBytes for &T {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        (**self).read_at(offset, into)
    }
}

impl<T: IndexBytes + ?Sized> IndexBytes for Arc<T> {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        (**self).read_at(offset, into)
    }
}
