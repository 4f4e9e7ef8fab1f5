//! What was read, from where, and how often it was wrong.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use harbour_image::object::PackId;
use harbour_pool::transport::TransportError;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;

use crate::{
    read::pace::Pace,
    source::{Catalogue, Pool},
};

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Donors whose numbers are kept; beyond it the table starts anew (the sums per transport stay).
const DONORS_MAX: usize = 1024;

/// What is known of one donor in one epoch.
#[derive(Debug)]
pub(crate) struct Donor {
    /// How its bytes travel.
    pub(crate) kind: String,
    /// Whether they are copied from memory of this host.
    pub(crate) local: bool,
    /// Bytes read over this kind of transport, of all donors.
    pub(crate) bytes: Arc<Counter>,
    /// How it has been answering.
    pub(crate) pace: Pace,
}

impl Donor {
    /// Takes in how a read of `len` bytes that began at `start` ended.
    pub(crate) fn note(&self, len: usize, start: Instant, outcome: &Result<(), TransportError>) {
        let now = Instant::now();
        let took = now.saturating_duration_since(start);
        match outcome {
            Ok(()) => self.pace.answered(len, took),
            Err(TransportError::Deadline) => self.pace.silent(took, now),
            // The donor answers: the place is wrong.
            Err(TransportError::OutOfBounds { .. }) => self.pace.cleared(),
            Err(_) => self.pace.failed(now),
        }
    }
}

/// All counters of a file system.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    donors: RwLock<HashMap<(u64, u64), Arc<Donor>>>,
    transports: Mutex<BTreeMap<String, Arc<Counter>>>,
    /// Answered reads.
    pub(crate) reads: Counter,
    /// Bytes in those answers.
    pub(crate) read_bytes: Counter,
    /// Granules that passed the check.
    pub(crate) verified: Counter,
    /// Stretches that did not.
    pub(crate) wrong: Counter,
    /// Refills asked for.
    pub(crate) refills: Counter,
    /// Reads that a second replica was asked for because the first was late.
    pub(crate) hedges: Counter,
    /// Those that the second one answered first.
    pub(crate) hedge_wins: Counter,
    /// Parts of granules answered from the memory of checked ones.
    pub(crate) edge_hits: Counter,
    /// Bytes put into the kernel's cache before it asked for them.
    pub(crate) ahead_bytes: Counter,
    /// Bytes of indexes read from metad's disk because the pool could not give them.
    pub(crate) index_fallback_bytes: Counter,
    /// Operations that went on in a slow thread.
    pub(crate) deferred: Counter,
}

impl Stats {
    /// The donor's entry, made at first sight of it and of how its bytes travel.
    pub(crate) fn donor(&self, pool: &dyn Pool, donor: u64, epoch: u64) -> Arc<Donor> {
        // Asked every time: a connection may be of another kind than was expected before it stood.
        let kind = pool.describe(donor);
        if let Some(known) = self.donors.read().get(&(donor, epoch))
            && known.kind == kind
        {
            return Arc::clone(known);
        }
        let bytes = Arc::clone(self.transports.lock().entry(kind.clone()).or_default());
        let local = matches!(kind.as_str(), "shm" | "local");
        let pace = Pace::default();
        let entry = Arc::new(Donor {
            kind,
            local,
            bytes,
            pace,
        });
        let mut donors = self.donors.write();
        if donors.len() >= DONORS_MAX {
            donors.clear();
        }
        donors.insert((donor, epoch), Arc::clone(&entry));
        entry
    }

    /// Donors that are set aside now.
    pub(crate) fn donors_aside(&self) -> usize {
        let now = Instant::now();
        let donors = self.donors.read();
        donors
            .values()
            .filter(|donor| donor.pace.is_aside(now))
            .count()
    }

    pub(crate) fn transports(&self) -> BTreeMap<String, u64> {
        self.transports
            .lock()
            .iter()
            .map(|(kind, bytes)| (kind.clone(), bytes.get()))
            .collect()
    }
}

/// Numbers of a file system at one moment, since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Generation of the catalogue that is shown.
    pub generation: u64,
    /// Bytes read from the pool, by transport.
    pub pool_bytes: BTreeMap<String, u64>,
    /// Bytes of indexes that came from metad's disk.
    pub index_fallback_bytes: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Bytes in those answers.
    pub read_bytes: u64,
    /// Granules of content that passed the check.
    pub granules_verified: u64,
    /// Stretches that did not pass, of content or index.
    pub wrong: u64,
    /// Parts of granules answered from checked ones held in memory.
    pub edge_hits: u64,
    /// Bytes put into the kernel's cache before it asked for them.
    pub ahead_bytes: u64,
    /// Refills asked for.
    pub refills: u64,
    /// Reads that a second replica was asked for because the first was late.
    pub hedges: u64,
    /// Those that the second one answered first.
    pub hedge_wins: u64,
    /// Donors that failed lately and are not asked for the moment.
    pub donors_aside: usize,
    /// Operations handed to slow threads.
    pub deferred: u64,
    /// Operations in slow threads now.
    pub slow_now: usize,
    /// Operations that ended with EIO.
    pub failed: u64,
    /// Operations refused with another error.
    pub refused: u64,
    /// Views whose index is open.
    pub open_views: usize,
    /// Memory that those indexes take, in bytes.
    pub index_bytes: u64,
}

/// Packs that were read since the catalogue was last told.
#[derive(Debug)]
pub(crate) struct Uses {
    pending: Mutex<(HashSet<PackId>, Instant)>,
}

impl Uses {
    /// Told at least this far apart, unless very many packs wait.
    const EVERY: Duration = Duration::from_secs(1);
    const MANY: usize = 4096;

    pub(crate) fn note(&self, catalogue: &dyn Catalogue, packs: &[PackId]) {
        // Whoever comes while another thread is at it is not worth a wait: this is best effort.
        let Some(mut pending) = self.pending.try_lock() else {
            return;
        };
        pending.0.extend(packs);
        if pending.1.elapsed() < Self::EVERY && pending.0.len() < Self::MANY {
            return;
        }
        pending.1 = Instant::now();
        let packs: Vec<PackId> = pending.0.drain().collect();
        drop(pending);
        catalogue.report_use(&packs);
    }

    /// Tells what is left.
    pub(crate) fn flush(&self, catalogue: &dyn Catalogue) {
        let packs: Vec<PackId> = self.pending.lock().0.drain().collect();
        if !packs.is_empty() {
            catalogue.report_use(&packs);
        }
    }
}

impl Default for Uses {
    fn default() -> Self {
        Self {
            pending: Mutex::new((HashSet::new(), Instant::now())),
        }
    }
}
