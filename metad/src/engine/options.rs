//! What an engine is given.

use std::sync::Arc;

use crate::{
    clock::{Clock, SystemClock},
    failpoint::Failpoints,
    policy::{Lru, Policy},
};

/// Default of [`Options::rebalance_mib_s`]: a tenth of what one link of 10 Gbit/s carries.
pub const REBALANCE_MIB_S: u32 = 128;

/// Replicas of one pack at most, whoever asks.
pub const REPLICAS_MAX: u32 = 16;

/// Lengths of leases and waits, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A donor that was silent for this long is not told to readers.
    pub donor_lease_ms: u64,
    /// A donor that was silent for this long is forgotten with all that it held.
    pub donor_forget_ms: u64,
    /// A node that was silent for this long must not use what it knows of places.
    pub node_lease_ms: u64,
    /// A pull that was not renewed for this long is undone.
    pub pull_lease_ms: u64,
    /// A pull whose session of locks broke is undone when it is not heard of for this long.
    pub broken_ms: u64,
    /// A copy that a donor was told to make must be reported in this time, or it is planned anew.
    pub copy_lease_ms: u64,
    /// Leases found at start last this much longer.
    pub grace_ms: u64,
    /// Added where another host's clock must have run out before ours.
    pub margin_ms: u64,
    /// When this process did not run for this long, nobody's lease ran in that time.
    pub gap_ms: u64,
}

impl Timing {
    /// How long a writer that is not heard any more may still be writing.
    pub(super) fn longest_write_ms(&self) -> u64 {
        self.pull_lease_ms.max(self.copy_lease_ms)
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            donor_lease_ms: 5_000,
            donor_forget_ms: 600_000,
            node_lease_ms: 10_000,
            pull_lease_ms: 15_000,
            broken_ms: 2_000,
            copy_lease_ms: 15_000,
            grace_ms: 5_000,
            margin_ms: 1_000,
            gap_ms: 2_000,
        }
    }
}

/// What an engine is given.
#[derive(Debug)]
pub struct Options {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Leases and waits.
    pub timing: Timing,
    /// Armed failpoints.
    pub failpoints: Failpoints,
    /// Order of eviction.
    pub policy: Box<dyn Policy>,
    /// Replicas that are wanted of each pack of an image that asks for no number of its own; at
    /// least one, more only where donors allow.
    pub replicas: u32,
    /// Replicas that packs may have that are read often, one more than wanted; 0 for no such thing.
    pub hot_replicas: u32,
    /// MiB a second that are copied between donors, all together.
    pub rebalance_mib_s: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clock: Arc::new(SystemClock::new()),
            timing: Timing::default(),
            failpoints: Failpoints::none(),
            policy: Box::new(Lru::new()),
            replicas: 1,
            hot_replicas: 0,
            rebalance_mib_s: REBALANCE_MIB_S,
        }
    }
}
