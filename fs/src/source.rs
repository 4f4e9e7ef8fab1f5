//! What the file system needs from outside, as traits: the catalogue, the pool, and the last
//! resort. `tools` implements them over metad's client, transports and the registry; tests in
//! memory.

use std::{sync::Arc, time::Instant};

use harbour_image::{digest::Digest, manifest::Compression, object::PackId};
use harbour_pool::transport::{Read, RegionId, TransportError};

/// An immutable view of the catalogue; replaced whole when it changes.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Grows with every change.
    pub generation: u64,
    /// Named images.
    pub images: Vec<ImageEntry>,
    /// Layers of those images, each once.
    pub layers: Vec<LayerEntry>,
}

/// One named image.
#[derive(Clone, Debug)]
pub struct ImageEntry {
    /// Host and port, as the first component under `images/`.
    pub registry: String,
    /// Path with slashes: several directories under `images/`.
    pub repository: String,
    /// Tag, or `sha256:…` for an image pulled by digest.
    pub tag: String,
    /// Manifest digest.
    pub manifest: Digest,
    /// Config digest.
    pub config: Digest,
    /// Layers from the bottom up.
    pub diff_ids: Vec<Digest>,
    /// Base of its inode numbers: below 2^24, never 0, never used again for another.
    pub number: u32,
    /// Merged index.
    pub index: IndexRef,
}

/// One layer.
#[derive(Clone, Debug)]
pub struct LayerEntry {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// As [`ImageEntry::number`], of the same sequence.
    pub number: u32,
    /// The layer's index.
    pub index: IndexRef,
    /// What it was seen as in registries, for engines that ask by the digest of a blob.
    pub blobs: Vec<BlobEntry>,
    /// Sum of the sizes of its files.
    pub unpacked_bytes: u64,
}

/// A layer as a registry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Their number.
    pub len: u64,
    /// How they are compressed.
    pub compression: Compression,
}

/// Where an index file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRef {
    /// BLAKE3 over `len` (`u64`, little endian) and the granule table: the table is checked against
    /// this, granules against the table (`harbour_image::index::seal`).
    pub digest: [u8; 32],
    /// Length in bytes without the granule table, which follows it.
    pub len: u64,
    /// Packs of 4 MiB (the last shorter) that hold index and granule table end to end.
    pub packs: Vec<PackId>,
}

/// One replica of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Donor by metad's number.
    pub donor: u64,
    /// Epoch that the location is true in.
    pub epoch: u64,
    /// Region of that donor.
    pub region: RegionId,
    /// Offset in the region in bytes.
    pub offset: u64,
    /// Length of the pack in bytes.
    pub len: u32,
}

/// Why something outside could not serve.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It does not exist (any more).
    #[error("{0} is not in the catalogue")]
    Gone(String),
    /// Not now: the other side is down or slow.
    #[error("{what} did not answer")]
    Unavailable {
        /// Who was asked what.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The deadline passed first.
    #[error("deadline passed while waiting for {0}")]
    Deadline(String),
}

/// The catalogue and the places of packs.
pub trait Catalogue: Send + Sync {
    /// The newest view known. Never blocks, never asks anybody.
    fn snapshot(&self) -> Arc<Snapshot>;

    /// A manifest or config by digest, unverified.
    fn document(&self, digest: &Digest, deadline: Instant) -> Result<Arc<[u8]>, SourceError>;

    /// Fills `into` from `offset` of the index file (granule table included) on metad's disk,
    /// unverified: for an index whose packs cannot be read.
    fn read_index(
        &self,
        index: &IndexRef,
        offset: u64,
        into: &mut [u8],
        deadline: Instant,
    ) -> Result<(), SourceError>;

    /// Replicas of each of `packs`, in order, best first; none when the pool has lost or evicted it.
    /// Answers from a cache where it can; `fresh` asks anew after a location proved wrong.
    fn locate(
        &self,
        packs: &[PackId],
        fresh: bool,
        deadline: Instant,
    ) -> Result<Vec<Vec<Extent>>, SourceError>;

    /// Tells that a replica gave wrong bytes or none. Does not block.
    fn report_lost(&self, pack: &PackId, extent: &Extent, why: &str);

    /// Tells that packs were read, for the policy. Does not block.
    fn report_use(&self, packs: &[PackId]);
}

/// One-sided reads from whichever donor.
pub trait Pool: Send + Sync {
    /// Reads a batch from one donor in one epoch, over the best transport to it.
    fn read(
        &self,
        donor: u64,
        epoch: u64,
        batch: &mut [Read<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError>;

    /// How the bytes from that donor travel, for `why`: "shm", "verbs", "tcp".
    fn describe(&self, donor: u64) -> String;

    /// Why they travel no faster way that might be there; `None` when there is nothing to say.
    fn remark(&self, donor: u64) -> Option<String>;
}

/// The rung before EIO: brings lost packs back from where the image came from.
pub trait Refill: Send + Sync {
    /// Blocks until `pack`, of the layer or image with this `number`, can be read again: from the
    /// pool, or from wherever [`Catalogue::locate`] says then. `listed` tells that the catalogue
    /// knows replicas, none of which could be read. Callers at the same time share one refill.
    fn refill(
        &self,
        number: u32,
        pack: &PackId,
        listed: bool,
        deadline: Instant,
    ) -> Result<(), SourceError>;
}
