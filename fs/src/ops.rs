//! Operations in our own types: what the adapter asks for, and tests without a mount.
//!
//! Each takes a node number and gives a value or an [`Error`]. All run within the budget of the
//! calling thread: [`Fs::quickly`] and [`Fs::patiently`] set it.

mod attrs;
mod content;
mod control;
mod names;
mod status;
mod stores;
mod xattrs;

use std::{
    num::NonZeroUsize,
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harbour_image::{digest::Digest, index::Header, object::PackId, tree::Time};
use lru::LruCache;
use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};

pub use self::{
    attrs::{Access, Space},
    content::Seek,
    names::{Entry, Found},
    xattrs::XattrReply,
};
use crate::{
    budget::Budget,
    config::Config,
    control::{Changes, Control},
    errno::Errors,
    error::{Error, Result},
    inode::Node,
    read::Outside,
    slow::Slow,
    source::{Catalogue, Pool, Refill},
    stats::Report,
    view::{Opened, View, Views},
};

/// Manifests and configs that are kept.
const DOCUMENTS: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// The file system, with no mount: share it, and hand it to [`crate::session::mount`].
pub struct Fs {
    outside: Arc<Outside>,
    views: Views,
    control: RwLock<Arc<Control>>,
    /// Taken while [`Self::control`] is made anew.
    refreshing: Mutex<()>,
    /// What the kernel was not told yet.
    changes: Mutex<Changes>,
    documents: Mutex<LruCache<Digest, Arc<[u8]>>>,
    pages: Mutex<status::Pages>,
    lists: stores::Lists,
    errors: Errors,
    slow: Slow,
    this: OnceLock<Weak<Self>>,
    started: Time,
}

impl Fs {
    /// A file system that shows what `catalogue` has.
    pub fn new(
        config: Config,
        catalogue: Arc<dyn Catalogue>,
        pool: Arc<dyn Pool>,
        refill: Arc<dyn Refill>,
    ) -> Arc<Self> {
        let slow = Slow::new(config.slow_threads);
        let outside = Arc::new(Outside::new(config, catalogue, pool, refill));
        let fs = Arc::new(Self {
            views: Views::new(Arc::clone(&outside)),
            outside,
            control: RwLock::default(),
            refreshing: Mutex::new(()),
            changes: Mutex::default(),
            documents: Mutex::new(LruCache::new(DOCUMENTS)),
            pages: Mutex::default(),
            lists: stores::Lists::default(),
            errors: Errors::default(),
            slow,
            this: OnceLock::new(),
            started: now(),
        });
        // Set once, here.
        let _ = fs.this.set(Arc::downgrade(&fs));
        fs.refresh(true);
        fs
    }

    /// Takes over the newest snapshot and gives what the kernel must drop for it: to be handed to
    /// [`crate::session::Mounted::invalidate`].
    pub fn snapshot_changed(&self) -> Changes {
        self.refresh(true);
        std::mem::take(&mut *self.changes.lock())
    }

    /// Numbers of layers and images that the kernel holds nodes of.
    pub fn held(&self) -> Vec<u32> {
        self.views.held()
    }

    /// Drops remembered places of packs whose space was freed. A read that is under way may still
    /// use one; what it gets does not pass the check then, and it goes on to the next rung.
    pub fn freed(&self, packs: &[PackId]) {
        self.outside.locations.forget(packs);
    }

    /// Drops all remembered places of packs: when too many were freed to name them, or when the
    /// lease of this node has run out.
    pub fn forget_locations(&self) {
        self.outside.locations.forget_all();
    }

    /// Counters and state.
    pub fn stats(&self) -> Report {
        let stats = &self.outside.stats;
        let (open_views, index_bytes) = self.views.open_now();
        Report {
            generation: self.control.read().generation,
            pool_bytes: stats.transports(),
            index_fallback_bytes: stats.index_fallback_bytes.get(),
            reads: stats.reads.get(),
            read_bytes: stats.read_bytes.get(),
            granules_verified: stats.verified.get(),
            wrong: stats.wrong.get(),
            edge_hits: stats.edge_hits.get(),
            ahead_bytes: stats.ahead_bytes.get(),
            refills: stats.refills.get(),
            hedges: stats.hedges.get(),
            hedge_wins: stats.hedge_wins.get(),
            donors_aside: stats.donors_aside(),
            deferred: stats.deferred.get(),
            slow_now: self.slow.busy(),
            failed: self.errors.failed(),
            refused: self.errors.refused(),
            open_views,
            index_bytes,
        }
    }

    /// Name of the view with this number under `layers/` or, with `.erofs`, under `erofs/`.
    pub fn view_name(&self, number: u32) -> Option<String> {
        self.control.read().name(number).map(ToOwned::to_owned)
    }

    /// Runs `operation` for as long as a thread that serves the kernel may be held; an error
    /// [`Error::Later`] asks for [`Self::patiently`].
    pub fn quickly<T>(&self, operation: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let config = &self.outside.config;
        Budget::new(config.quick.min(config.deadline), true).run(|| operation(self))
    }

    /// Runs `operation` until its deadline.
    pub fn patiently<T>(&self, operation: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        Budget::new(self.outside.config.deadline, false).run(|| operation(self))
    }

    /// Runs `job`, which waits for something, in a thread that may wait.
    pub(crate) fn later(&self, job: impl FnOnce(&Self) + Send + 'static) {
        self.outside.stats.deferred.add(1);
        let Some(this) = self.this.get().and_then(Weak::upgrade) else {
            return job(self);
        };
        self.slow.run(move || job(&this));
    }

    /// The number that the kernel is told for `error`, counted and logged.
    pub(crate) fn report(&self, name: &'static str, node: Node, error: &Error) -> Errno {
        self.errors.report(name, node, error)
    }

    /// Settings.
    pub(crate) fn config(&self) -> &Config {
        &self.outside.config
    }

    /// The control directories, of the newest snapshot.
    fn control(&self) -> Arc<Control> {
        self.refresh(false);
        Arc::clone(&self.control.read())
    }

    /// Makes the control directories anew if the catalogue has changed. Unless `wait`, leaves it
    /// to another thread that is at it.
    fn refresh(&self, wait: bool) {
        let snapshot = self.outside.catalogue.snapshot();
        if self.control.read().generation == snapshot.generation
            && self.control.read().node(1).is_some()
        {
            return;
        }
        let _turn = if wait {
            Some(self.refreshing.lock())
        } else if let Some(turn) = self.refreshing.try_lock() {
            Some(turn)
        } else {
            return;
        };
        let before = Arc::clone(&self.control.read());
        if before.generation > snapshot.generation {
            return;
        }
        let first = before.node(1).is_none();
        let after = {
            let now = if first { self.started } else { now() };
            before.next(&snapshot, &self.config().mountpoint, now)
        };
        self.views.update(&snapshot);
        if !first {
            self.changes
                .lock()
                .extend(Changes::between(&before, &after));
        }
        *self.control.write() = Arc::new(after);
    }

    /// The header of a view that is open now.
    pub(crate) fn header_if_open(&self, number: u32) -> Option<Header> {
        self.views.get(number)?.header_if_open()
    }

    /// Counts bytes that went into the kernel's cache before it asked for them.
    pub(crate) fn count_ahead(&self, bytes: u64) {
        self.outside.stats.ahead_bytes.add(bytes);
    }

    /// Everything outside.
    pub(crate) fn outside(&self) -> &Outside {
        &self.outside
    }

    /// A view and its open index.
    pub(crate) fn view(&self, number: u32, node: Node) -> Result<(Arc<View>, Arc<Opened>)> {
        let view = self.views.get(number).ok_or(Error::Stale(node))?;
        let opened = self.views.open(&view)?;
        Ok((view, opened))
    }

    /// Lifetime of names and attributes in control directories.
    fn control_ttl(&self) -> Duration {
        self.outside.config.control_ttl
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.slow.close();
        self.outside.uses.flush(self.outside.catalogue.as_ref());
    }
}

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fs")
            .field("config", &self.outside.config)
            .finish_non_exhaustive()
    }
}

fn now() -> Time {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Time {
        secs: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos(),
    }
}

/// When a page was made, for pages that age.
type Made = Instant;
