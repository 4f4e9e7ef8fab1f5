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
mod error;
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
pub use emit::split;
pub use error::{IndexError, ReadError, Refusal, WriteError};
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
#[allow(
    clippy::len_without_is_empty,
    reason = "nothing asks whether an index is empty"
)]
pub trait IndexBytes {
    /// Number of bytes there are, with or without the granule table.
    fn len(&self) -> u64;

    /// Fills `into` from `offset`; an error when any byte of it is not there.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError>;
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
            return Err(IndexError::Corrupt {
                at: offset,
                what: "something outside of the metadata",
            });
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
    fn entry<const N: usize>(
        &self,
        table: layout::Section,
        number: u64,
    ) -> Result<[u8; N], IndexError> {
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
        let from = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(len)?));
        match from {
            Some(from) => {
                into.copy_from_slice(from);
                Ok(())
            }
            None => Err(ReadError::PastEnd {
                offset,
                len: len as u64,
                end: <[u8]>::len(self) as u64,
            }),
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
