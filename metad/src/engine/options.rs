//! What an engine is given.

use std::sync::Arc;

use crate::{
    clock::{Clock, SystemClock},
    failpoint::Failpoints,
    policy::{Lru, Policy},
};

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
    /// Leases found at start last this much longer.
    pub grace_ms: u64,
    /// Added where another host's clock must have run out before ours.
    pub margin_ms: u64,
    /// When this process did not run for this long, nobody's lease ran in that time.
    pub gap_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            donor_lease_ms: 5_000,
            donor_forget_ms: 600_000,
            node_lease_ms: 10_000,
            pull_lease_ms: 15_000,
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
    /// Replicas of each pack that are wanted; at least one, more only where donors allow.
    pub replicas: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clock: Arc::new(SystemClock::new()),
            timing: Timing::default(),
            failpoints: Failpoints::none(),
            policy: Box::new(Lru::new()),
            replicas: 1,
        }
    }
}
