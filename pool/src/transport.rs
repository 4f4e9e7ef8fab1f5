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

/// What a donor says of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionInfo {
    /// Its number, unique within donor and epoch.
    pub id: RegionId,
    /// Its length in bytes.
    pub len: u64,
    /// Backed by huge pages (hugetlb).
    pub huge_pages: bool,
}

/// What a connection may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads only: what a mount needs.
    Read,
    /// Reads and writes: what an ingest or a refill needs.
    ReadWrite,
}

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TransportKind {
    /// Memory of this process: the reference that the contract suite was written against.
    Local,
    /// A donor's memfd, mapped.
    Shm,
    /// RDMA over ibverbs.
    Verbs,
    /// A donor's process, over the network.
    Tcp,
}

impl TransportKind {
    /// The word used in addresses and for people: `"local"`, `"shm"`, `"verbs"`, `"tcp"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Shm => "shm",
            Self::Verbs => "verbs",
            Self::Tcp => "tcp",
        }
    }
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A connection to the regions that one donor lends in one epoch.
///
/// Batches are pipelined inside and block outside. A batch either moves every byte or returns an
/// error, after which destinations are unspecified and nothing more is written to them. The bytes
/// are *not* verified here: memory that others write can change at any time, so callers check
/// digests on what was copied out.
///
/// What every implementation keeps, and `pool/tests/contract` checks:
/// - an empty batch succeeds, whatever the deadline and the state of the donor;
/// - otherwise a deadline that has passed gives [`TransportError::Deadline`] and moves nothing;
/// - a batch with one operation out of bounds gives [`TransportError::OutOfBounds`] for the first
///   such operation and moves nothing; an operation of no bytes is in bounds up to and including
///   the end of a region that exists;
/// - operations of one batch may overlap; writes of one batch take effect in their order;
/// - a read beside a write of the same bytes sees each byte old or new, in any mixture;
/// - once the donor is gone or in another epoch every batch but the empty one fails with
///   [`TransportError::Unreachable`] or [`TransportError::WrongEpoch`], and goes on failing. It may
///   take the connection a moment to notice: until then reads give what the memory holds.
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
    /// The peer broke the protocol or lied about what it lends, or does not let this process do
    /// what it asks for (write on a read-only connection, a wrong token): do not use it again.
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

/// Checks that `offset..+len` lies in a region of `region_len` bytes (`None`: there is no such
/// region) and gives the offset as an index. Sums cannot overflow.
pub(crate) fn bounds(
    region: RegionId,
    region_len: Option<u64>,
    offset: u64,
    len: usize,
) -> Result<usize, TransportError> {
    let len = len as u64;
    let inside = region_len.is_some_and(|end| offset <= end && len <= end - offset);
    match usize::try_from(offset) {
        Ok(start) if inside => Ok(start),
        _ => Err(TransportError::OutOfBounds {
            region,
            offset,
            len,
        }),
    }
}

/// Fails once `deadline` has passed.
pub(crate) fn in_time(deadline: Instant) -> Result<(), TransportError> {
    if Instant::now() < deadline {
        Ok(())
    } else {
        Err(TransportError::Deadline)
    }
}

/// An [`TransportError::Unreachable`] of `address`.
pub(crate) fn unreachable(address: impl Into<String>, source: std::io::Error) -> TransportError {
    TransportError::Unreachable {
        address: address.into(),
        source,
    }
}

/// A [`TransportError::Refused`] of `address`.
pub(crate) fn refused(address: impl Into<String>, reason: impl Into<String>) -> TransportError {
    TransportError::Refused {
        address: address.into(),
        reason: reason.into(),
    }
}
