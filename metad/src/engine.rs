//! What the daemon knows and decides, with no sockets and no clock of its own.
//!
//! # Locking
//! [`Engine`] keeps everything that changes behind one lock: the writing connection, the free map,
//! leases, the policy. An operation takes the lock, decides, writes one transaction, and only when
//! that has committed changes what is in memory ([`effects`]). So memory never runs ahead of the
//! store, and a crash loses only what is rebuilt at start. Questions of readers (snapshot, locate,
//! documents, indexes) do not take the lock: they use the store's read-only connections.
//!
//! # The path of a pull
//! [`Engine::begin`], then for each layer [`Engine::find_objects`], [`Engine::reserve`],
//! [`Engine::begin_index`] and [`Engine::begin_layer`], and, under a claim on it,
//! [`Engine::commit_layer`]; at the end [`Engine::commit`] or [`Engine::commit_name`]. Each step
//! is in the store before it is answered. A pull that stops anywhere is undone by
//! [`Engine::abort`] or, when its lease ends, by [`Engine::tick`].
//!
//! # Freed space
//! A committed extent that goes is put into quarantine with a new *freeing generation*; nodes hear
//! of it with their next heartbeat and acknowledge it, and when all have, or their leases ended,
//! the space is free. After a restart the nodes are not known, so quarantine then lasts at least a
//! node's lease and a margin. Space of a pull that expired was known to nobody but its writer, who
//! may be late: it waits another lease of a pull. So does the space of a copy that a donor was told
//! to make and did not report.
//!
//! # Replicas
//! [`Engine::tick`] looks what packs of images have and should have ([`plan`]) and what donors hold
//! ([`rebalance`]), and plans copies; the donor that is to hold a copy is told with its lease
//! ([`copies`]) and reports. At a start all copies are planned anew.

mod audit;
mod catalogue;
mod collect;
mod commit;
mod commit_layer;
mod copies;
mod donors;
mod effects;
mod evict;
mod find;
mod locks;
mod nodes;
mod options;
mod plan;
mod pulls;
mod rebalance;
mod reserve;
mod resize;
mod stage;
mod state;
mod status;
mod tick;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::watch;

pub use catalogue::PAGE_BYTES;
pub use locks::{Ask, Heard, Session, Wish};
pub use options::{Options, REBALANCE_MIB_S, REPLICAS_MAX, Timing};
pub use reserve::Reserving;
pub use stage::{IndexUpload, LayerUpload};

use crate::{
    clock::Clock,
    error::Error,
    failpoint::Failpoints,
    space::{Book, Space},
    store::{Counter, Store, Sync},
};
use effects::Effects;
use state::State;

/// Names of the failpoints around a transaction.
#[derive(Clone, Copy, Debug)]
struct Around(&'static str, &'static str);

/// What an engine was given, but for the policy, which is behind the lock.
#[derive(Debug)]
struct Settings {
    clock: Arc<dyn Clock>,
    timing: Timing,
    failpoints: Failpoints,
    replicas: u32,
    hot_replicas: u32,
    rebalance_mib_s: u32,
}

/// The daemon without its sockets.
#[derive(Debug)]
pub struct Engine {
    store: Store,
    state: Mutex<State>,
    options: Settings,
    /// Newest generation of the catalogue.
    changed: watch::Sender<u64>,
    /// Told whenever space became free.
    space_freed: watch::Sender<u64>,
    /// Newest generation of freed space that is in the store.
    freed: AtomicU64,
    /// Reads of packs that nodes reported since the start.
    reads: AtomicU64,
    /// Packs that were asked for since the start and had no replica.
    misses: AtomicU64,
    /// Held by an audit: one at a time, because each reads every row.
    auditing: Mutex<()>,
}

impl Engine {
    /// Opens the state in `folder`. Leases of pulls and donors that it finds go on, longer by a
    /// grace.
    ///
    /// # Errors
    /// [`Error::Refused`] when another process has it, a newer version wrote it, or its books
    /// cannot be.
    pub fn open(folder: &Path, options: Options) -> Result<Arc<Self>, Error> {
        let (store, mut writer) = Store::open(folder)?;
        let boot = writer.transaction(Sync::Full, |tx| {
            tx.quarantine_copies()?;
            tx.bump(Counter::Boot, 1)
        })?;
        let Options {
            clock,
            timing,
            failpoints,
            policy,
            replicas,
            hot_replicas,
            rebalance_mib_s,
        } = options;
        let options = Settings {
            clock,
            timing,
            failpoints,
            replicas: replicas.clamp(1, REPLICAS_MAX),
            hot_replicas: hot_replicas.min(REPLICAS_MAX),
            rebalance_mib_s,
        };
        let now_ms = options.clock.now_ms();
        let read = writer.read();
        let (generation, freed) = (
            read.counter(Counter::Generation)?,
            read.counter(Counter::Freed)?,
        );
        let mut state = State::new(writer, policy, boot, freed, now_ms);
        state.load(&options.timing)?;
        let engine = Self {
            store,
            state: Mutex::new(state),
            options,
            changed: watch::Sender::new(generation),
            space_freed: watch::Sender::new(0),
            freed: AtomicU64::new(freed),
            reads: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            auditing: Mutex::new(()),
        };
        // Nothing is collected before the first tick: a daemon that comes up quickly is worth more.

        Ok(Arc::new(engine))
    }

    /// Generations of the catalogue as they come; a slow watcher sees the newest only.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Changes whenever space became free, for those who wait in [`Engine::reserve`].
    pub fn watch_space(&self) -> watch::Receiver<u64> {
        self.space_freed.subscribe()
    }

    /// Lengths of leases and waits.
    pub fn timing(&self) -> &Timing {
        &self.options.timing
    }

    fn now_ms(&self) -> u64 {
        self.options.clock.now_ms()
    }

    /// The state, with leases moved on when this process did not run for a while.
    fn lock(&self) -> parking_lot::MutexGuard<'_, State> {
        let mut state = self.state.lock();
        state.catch_up(self.now_ms(), self.options.timing.gap_ms);
        state
    }

    /// Runs one transaction, and what follows from it in memory once it has committed.
    fn change<T>(
        &self,
        state: &mut State,
        sync: Sync,
        around: Option<Around>,
        work: impl FnOnce(&crate::store::Tx<'_>, &mut Effects) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut effects = Effects::default();
        if let Some(Around(before, _)) = around {
            self.options.failpoints.hit(before);
        }
        let value = state.writer.transaction(sync, |tx| {
            let value = work(tx, &mut effects)?;
            effects.seal(tx)?;
            Ok(value)
        })?;
        if let Some(Around(_, after)) = around {
            self.options.failpoints.hit(after);
        }
        if let Some(freed) = effects.freed_generation() {
            self.freed.store(freed, Ordering::SeqCst);
        }
        let generation = effects.generation();
        let files = state.apply(effects);
        if let Some(generation) = generation {
            self.changed.send_replace(generation);
        }
        if !files.is_empty() {
            self.options.failpoints.hit("collect.files");
            self.store.files().delete(&files);
        }
        Ok(value)
    }

    fn tell_space_freed(&self) {
        self.space_freed.send_modify(|count| *count += 1);
    }
}

impl State {
    /// Builds the free map, the leases and the policy's order from the store.
    fn load(&mut self, timing: &Timing) -> Result<(), Error> {
        let read = self.writer.read();
        let (donors, quarantine, pulls) = (read.donors()?, read.quarantine()?, read.pulls()?);
        let mut space = Space::new();
        for donor in &donors {
            space.add_donor(
                donor.id,
                donor.regions.iter().map(|region| (region.id, region.len)),
            );
            space.set_open(donor.id, donor.live && !donor.draining);
            space.set_domain(donor.id, &donor.domain);
        }
        let impossible = |e: crate::space::Conflict| {
            Error::Refused(format!("the database is inconsistent: {e}"))
        };
        let mut committed = Vec::new();
        read.for_each_extent(|extent| {
            let book = if extent.pull.is_some() {
                Book::Reserved
            } else {
                Book::Used
            };
            space.claim(&extent.place, book).map_err(impossible)?;
            if book == Book::Used {
                committed.push((extent.pack, extent.place.held_bytes()));
            }
            Ok(())
        })?;
        for row in &quarantine {
            space
                .claim(&row.place, Book::Quarantined)
                .map_err(impossible)?;
        }
        self.space = space;
        for (pack, bytes) in committed {
            self.policy
                .inserted(pack, crate::policy::Weight { bytes, cost: bytes });
        }
        donors
            .into_iter()
            .for_each(|donor| self.load_donor(donor, timing));
        self.load_locks(pulls, timing)?;
        let unknown_until = self.started_ms
            + timing.longest_write_ms().max(timing.node_lease_ms)
            + timing.margin_ms;
        if !self.first_boot() {
            self.nodes_unknown_until_ms = self.started_ms + timing.node_lease_ms + timing.margin_ms;
        }
        quarantine
            .into_iter()
            .for_each(|row| self.hold(row, unknown_until));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
