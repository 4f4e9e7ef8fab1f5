//! What can go wrong with an index.

use super::Nid;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Empty, over 255 bytes, `.`, `..`, or with NUL or slash.
    #[error("is not a name for a directory entry")]
    Name,
    /// An entry that leads out of the tree's nodes.
    #[error("is node {0}, which the tree does not have")]
    NoSuchNode(u32),
    /// A directory with two names, or in itself.
    #[error("is a directory that has a name elsewhere")]
    DirTwice,
    /// Mode or nanoseconds out of range.
    #[error("has a mode above 7777 or a billion nanoseconds")]
    Meta,
    /// A symlink's target.
    #[error("is a symlink whose target is not 1 to 4095 bytes without NUL")]
    Target,
    /// Device numbers that EROFS and the kernel cannot hold.
    #[error("has device number {major}:{minor}, beyond 4095:1048575")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Extended attributes that are too long.
    #[error("has extended attributes that do not fit: {0}")]
    Xattrs(&'static str),
    /// A whiteout or opaque mark in an image.
    #[error("is a whiteout or opaque, which a merged image cannot have")]
    MarkInImage,
    /// Content runs that are unordered, overlapping, not aligned or outside of the file.
    #[error("has content that is not in order, in whole blocks and inside its size")]
    Runs,
    /// An object that the placement does not have, or has differently.
    #[error("has an object that cannot be: {0}")]
    Object(&'static str),
}
