//! What can be set about the file system. The session's options are in [`crate::session`].

use std::{path::PathBuf, time::Duration};

/// Settings of [`crate::Fs`]; the default is what a node runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Longest time that one operation may take before it answers EIO.
    pub deadline: Duration,
    /// Longest time that an operation may hold one of the threads that talk to the kernel; one
    /// that needs longer, or that needs more than a plain read of a known replica, goes on in a
    /// thread of its own (see [`Config::slow_threads`]).
    pub quick: Duration,
    /// Whether granules are checked against their digests. **Off is for measuring what checking
    /// costs and nothing else**: the kernel then caches whatever a donor's memory holds.
    pub verify: bool,
    /// Memory for granules of which a read took only a part, in bytes.
    pub edge_cache_bytes: usize,
    /// Memory for indexes of all views together, in bytes. Indexes of idle views are given up
    /// when it is passed; one index in use may pass it.
    pub index_cache_bytes: u64,
    /// Number of packs whose places are remembered.
    pub locations: usize,
    /// How much is copied out of memory of this host before it is checked, in bytes: small enough
    /// that the check finds it in the processor's cache.
    pub piece_bytes: usize,
    /// Most operations that wait for something slow at the same time.
    pub slow_threads: usize,
    /// Where the choice between equally good replicas begins: any number, different on each host so
    /// that they do not all begin with the same.
    pub seed: u64,
    /// Whether the rest of an index is fetched in the background once something of it was used.
    pub prefetch_indexes: bool,
    /// Where the file system will be mounted: engines take some links only when they are absolute.
    pub mountpoint: PathBuf,
    /// How long the kernel may keep names and attributes inside layers and images.
    pub content_ttl: Duration,
    /// How long it may keep those of directories that change with the catalogue, when it misses
    /// an explicit invalidation.
    pub control_ttl: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            quick: Duration::from_millis(200),
            verify: true,
            edge_cache_bytes: 8 << 20,
            index_cache_bytes: 256 << 20,
            locations: 1 << 16,
            piece_bytes: 256 << 10,
            slow_threads: 16,
            seed: 0x9e37_79b9_7f4a_7c15,
            prefetch_indexes: true,
            mountpoint: "/harbour".into(),
            content_ttl: Duration::from_secs(24 * 3600),
            control_ttl: Duration::from_secs(1),
        }
    }
}
