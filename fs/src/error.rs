//! What can go wrong in an operation. [`crate::errno`] says how each looks to a program.

use harbour_image::{digest::Digest, index::IndexError};

use crate::{inode::Node, source::SourceError};

/// Result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such name in this directory.
    #[error("no such name")]
    NotFound,
    /// The node was never there, or its layer or image left the catalogue before it was used.
    #[error("node {0:?} is not there any more")]
    Stale(Node),
    /// Something that only directories can.
    #[error("node {0:?} is not a directory")]
    NotDir(Node),
    /// Something that directories cannot.
    #[error("node {0:?} is a directory")]
    IsDir(Node),
    /// Something that only regular files can, or only symbolic links.
    #[error("node {0:?} is of another type")]
    WrongType(Node),
    /// A component of more than 255 bytes.
    #[error("name is {0} bytes long")]
    NameTooLong(usize),
    /// No extended attribute of this name.
    #[error("no such extended attribute")]
    NoAttribute,
    /// The caller's buffer is too small for the value.
    #[error("value is {0} bytes long, more than the buffer")]
    SmallBuffer(usize),
    /// Seeking for data or a hole from beyond the end.
    #[error("no data there")]
    NoData,
    /// A change was asked for.
    #[error("the mount is read-only")]
    ReadOnly,
    /// Needs more patience than [`crate::config::Config::quick`]: to be done again in a thread
    /// that may wait. Never reaches the kernel.
    #[error("needs time")]
    Later,
    /// The index of a view is wrong, or cannot be fetched (then its source tells what was tried).
    #[error("index of {view} cannot be used")]
    Index {
        /// Layer or image.
        view: String,
        /// Why.
        #[source]
        source: IndexError,
    },
    /// Bytes that nobody could give, or give rightly, before the deadline.
    #[error("{what} cannot be read: tried {}", if tried.is_empty() { "nothing" } else { tried })]
    Unreadable {
        /// View, file and range.
        what: String,
        /// Each thing that was tried and how it failed.
        tried: String,
    },
    /// The index places content where none can be.
    #[error("{what} is placed wrongly by its index: {reason}")]
    Misplaced {
        /// View and range.
        what: String,
        /// What does not fit.
        reason: &'static str,
    },
    /// A manifest or config cannot be had.
    #[error("document {digest} cannot be read")]
    Document {
        /// Its digest.
        digest: Digest,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// A manifest or config is not what its digest says.
    #[error("document {0} does not have this digest")]
    WrongDocument(Digest),
}
