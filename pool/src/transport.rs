//! The Transport contract: one-sided reads and writes of memory that a donor lends.

use std::time::Instant;

/// One region of one donor, for as long as its epoch lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// A read of `into.len()` bytes at `offset` of `region`.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where to read.
    pub region: RegionId,
    /// Offset in the region in bytes.
    pub offset: u64,
    /// Private memory of the caller. What it holds after an error is not specified.
    pub into: &'a mut [u8],
}

/// A write of `from.len()` bytes at `offset` of `region`.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// Where to write.
    pub region: RegionId,
    /// Offset in the region in bytes.
    pub offset: u64,
    /// The bytes.
    pub from: &'a [u8],
}

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TransportKind {
    /// Memory of this process: the reference that the contract suite was written against.
    Local,
    /// A donor's memfd, mapped.
    Shm,
}

/// A connection to the regions that one donor lends in one epoch.
///
/// Batches are pipelined inside and block outside. A batch either moves every byte or returns an
/// error, after which destinations are unspecified and nothing more is written to them. The bytes
/// are *not* verified here: memory that others write can change at any time, so callers check
/// digests on what was copied out.
///
/// There are no default methods: a wrapper that forgets a hook does not compile.
pub trait Transport: Send + Sync + std::fmt::Debug {
    /// Reads all of `batch` before `deadline`. An empty batch succeeds.
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError>;

    /// Writes all of `batch` before `deadline`. An empty batch succeeds. When it returns, a read
    /// that starts later by any peer sees the bytes.
    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError>;

    /// The epoch that this connection was made for.
    fn epoch(&self) -> u64;

    /// How the bytes travel.
    fn kind(&self) -> TransportKind;
}

/// What went wrong, by what the caller should do about it.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Not inside a region that the donor lends: the caller's location is wrong or stale.
    #[error("region {region:?} has no bytes {offset}..+{len}")]
    OutOfBounds {
        /// Region that was named.
        region: RegionId,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The donor lives in another epoch: ask metad where the bytes are now.
    #[error("donor is in epoch {actual}, wanted {wanted}")]
    WrongEpoch {
        /// Epoch that the caller's location was made in.
        wanted: u64,
        /// Epoch that the donor answers with.
        actual: u64,
    },
    /// The donor is gone or cannot be reached: try another replica, and this one later.
    #[error("donor at {address} cannot be reached")]
    Unreachable {
        /// Address that was tried.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The peer broke the protocol or lied about what it lends: do not use it again.
    #[error("donor at {address} refused: {reason}")]
    Refused {
        /// Address of the peer.
        address: String,
        /// What it did.
        reason: String,
    },
    /// The deadline passed first.
    #[error("deadline passed")]
    Deadline,
}
