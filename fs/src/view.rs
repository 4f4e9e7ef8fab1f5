//! Views: the layers and images that the mount shows, each an index that is read as it is needed.
//!
//! A view outlives the catalogue's entry for as long as the kernel holds a node of it, so that a
//! container whose image was removed keeps its files. How often the kernel was given nodes of a
//! view is counted; the counts come back with FORGET.

mod lazy;
mod prefetch;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Instant,
};

use harbour_image::{
    digest::Digest,
    index::{Header, Index, IndexError, Nid, ReadError},
};
use parking_lot::{Mutex, RwLock};

pub(crate) use self::lazy::{Bytes, Lazy};
use self::prefetch::Prefetch;
use crate::{
    budget::Budget,
    error::{Error, Result},
    inode::Node,
    read::{Missed, Outside},
    source::{IndexRef, Snapshot},
};

/// What a view shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shows {
    /// One layer, with its whiteouts.
    Layer(Digest),
    /// A merged image: its manifest digest, and one of its names.
    Image {
        /// Manifest digest.
        manifest: Digest,
        /// `registry/repository:tag`.
        name: String,
    },
}

impl std::fmt::Display for Shows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Layer(diff_id) => write!(f, "layer {diff_id}"),
            Self::Image { manifest, name } => write!(f, "image {name} ({manifest})"),
        }
    }
}

/// One layer or image.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) number: u32,
    pub(crate) shows: Shows,
    pub(crate) index: IndexRef,
    /// Nodes that the kernel was given and has not forgotten, each as often as it was given.
    lookups: AtomicI64,
    /// Whether the catalogue still has it.
    listed: AtomicBool,
    opened: RwLock<Option<Arc<Opened>>>,
    opening: Mutex<()>,
    /// Milliseconds since [`Views::start`] of the last use.
    used: AtomicU64,
    /// Bytes of content that were read through it.
    pub(crate) read_bytes: AtomicU64,
}

/// The open index of a view.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) header: Header,
    pub(crate) root: Nid,
    lazy: Lazy,
}

impl Opened {
    /// The index, reading with the budget of the calling thread's operation.
    pub(crate) fn index<'a>(&'a self, outside: &'a Outside) -> Index<Bytes<'a>> {
        Index::with_header(
            self.header,
            Bytes {
                lazy: &self.lazy,
                outside,
            },
        )
    }
}

impl View {
    fn new(number: u32, shows: Shows, index: IndexRef) -> Self {
        Self {
            number,
            shows,
            index,
            lookups: AtomicI64::new(0),
            listed: AtomicBool::new(true),
            opened: RwLock::new(None),
            opening: Mutex::new(()),
            used: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
        }
    }

    /// Whether it is a layer, whose whiteouts and opaque marks are shown to overlayfs.
    pub(crate) const fn is_layer(&self) -> bool {
        matches!(self.shows, Shows::Layer(_))
    }

    /// The node with this nid; nids of a checked index always fit.
    pub(crate) fn node(&self, nid: Nid) -> Result<Node> {
        Node::in_view(self.number, nid.0).ok_or_else(|| {
            self.error(IndexError::OutOfRange {
                what: "node",
                number: nid.0,
            })
        })
    }

    /// What an error of the index reader means for an operation on this view.
    pub(crate) fn error(&self, error: IndexError) -> Error {
        if let IndexError::Read(ReadError::Failed { source, .. }) = &error
            && let Some(Missed::Later) = source.downcast_ref::<Missed>()
        {
            return Error::Later;
        }
        match error {
            IndexError::OutOfRange {
                what: "node",
                number,
            } => Node::in_view(self.number, number).map_or(Error::NotFound, Error::Stale),
            source => Error::Index {
                view: self.shows.to_string(),
                source,
            },
        }
    }

    /// Notes that the kernel was given a node of this view.
    pub(crate) fn given(&self) {
        self.lookups.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the kernel holds a node of it.
    pub(crate) fn is_held(&self) -> bool {
        self.lookups.load(Ordering::Relaxed) > 0
    }

    /// The header, if the index is open now.
    pub(crate) fn header_if_open(&self) -> Option<Header> {
        self.opened.read().as_ref().map(|opened| opened.header)
    }
}

/// All views.
pub(crate) struct Views {
    outside: Arc<Outside>,
    table: RwLock<HashMap<u32, Arc<View>>>,
    /// Bytes of all indexes in memory.
    memory: Arc<AtomicU64>,
    prefetch: Option<Prefetch>,
    start: Instant,
}

impl Views {
    pub(crate) fn new(outside: Arc<Outside>) -> Self {
        let prefetch = outside
            .config
            .prefetch_indexes
            .then(|| Prefetch::new(Arc::clone(&outside)));
        Self {
            outside,
            table: RwLock::default(),
            memory: Arc::default(),
            prefetch,
            start: Instant::now(),
        }
    }

    /// Takes over what the catalogue has now. Views that it has no more stay while they are held.
    pub(crate) fn update(&self, snapshot: &Snapshot) {
        let layers = snapshot
            .layers
            .iter()
            .map(|layer| (layer.number, Shows::Layer(layer.diff_id), &layer.index));
        let images = snapshot.images.iter().map(|image| {
            let name = format!("{}/{}:{}", image.registry, image.repository, image.tag);
            (
                image.number,
                Shows::Image {
                    manifest: image.manifest,
                    name,
                },
                &image.index,
            )
        });
        let mut table = self.table.write();
        for view in table.values() {
            view.listed.store(false, Ordering::Relaxed);
        }
        for (number, shows, index) in layers.chain(images) {
            if Node::in_view(number, 0).is_none() {
                tracing::error!(number, %shows, "the catalogue gave a number that no view can have");
                continue;
            }
            table
                .entry(number)
                .or_insert_with(|| Arc::new(View::new(number, shows, index.clone())))
                .listed
                .store(true, Ordering::Relaxed);
        }
        table.retain(|_, view| view.listed.load(Ordering::Relaxed) || view.is_held());
    }

    /// The view with this number.
    pub(crate) fn get(&self, number: u32) -> Option<Arc<View>> {
        self.table.read().get(&number).cloned()
    }

    /// The view's index, opened now if it is not open. Costs the granule table and one granule.
    pub(crate) fn open(&self, view: &Arc<View>) -> Result<Arc<Opened>> {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        view.used.store(now, Ordering::Relaxed);
        if let Some(opened) = view.opened.read().as_ref() {
            let opened = Arc::clone(opened);
            self.trim(view.number);
            return Ok(opened);
        }
        let budget = Budget::current();
        let Some(_turn) = view.opening.try_lock_until(budget.deadline) else {
            if budget.quick {
                return Err(Error::Later);
            }
            let what = format!("index of {}", view.shows);
            return Err(Error::Unreadable {
                what,
                tried: "waiting for another thread that opens it".into(),
            });
        };
        if let Some(opened) = view.opened.read().as_ref() {
            return Ok(Arc::clone(opened));
        }
        let lazy = Lazy::new(view.number, view.index.clone(), Arc::clone(&self.memory));
        let bytes = Bytes {
            lazy: &lazy,
            outside: &self.outside,
        };
        let index = Index::open(bytes).map_err(|error| view.error(error))?;
        let header = *index.header();
        let root = index.root().map_err(|error| view.error(error))?.nid;
        let opened = Arc::new(Opened { header, root, lazy });
        *view.opened.write() = Some(Arc::clone(&opened));
        if let Some(prefetch) = &self.prefetch {
            prefetch.offer(&opened);
        }
        Ok(opened)
    }

    /// Gives up indexes of views that were not used for longest while there are too many.
    fn trim(&self, but: u32) {
        let limit = self.outside.config.index_cache_bytes;
        if self.memory.load(Ordering::Relaxed) <= limit {
            return;
        }
        let mut open: Vec<Arc<View>> = self
            .table
            .read()
            .values()
            .filter(|view| view.opened.read().is_some())
            .cloned()
            .collect();
        open.sort_by_key(|view| view.used.load(Ordering::Relaxed));
        for view in open.iter().filter(|view| view.number != but) {
            if self.memory.load(Ordering::Relaxed) <= limit {
                break;
            }
            tracing::debug!(view = view.number, "index given up for want of memory");
            // Operations that use it hold it by themselves.
            let _ = view.opened.write().take();
        }
    }

    /// Takes back `count` of the nodes given of the view with this number.
    pub(crate) fn forget(&self, number: u32, count: u64) {
        let Some(view) = self.get(number) else { return };
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let left = view
            .lookups
            .fetch_sub(count, Ordering::Relaxed)
            .saturating_sub(count);
        if left <= 0 && !view.listed.load(Ordering::Relaxed) {
            self.table
                .write()
                .retain(|_, view| view.listed.load(Ordering::Relaxed) || view.is_held());
        }
    }

    /// Numbers of views that the kernel holds nodes of, ascending.
    pub(crate) fn held(&self) -> Vec<u32> {
        let mut held: Vec<u32> = self
            .table
            .read()
            .values()
            .filter(|view| view.is_held())
            .map(|view| view.number)
            .collect();
        held.sort_unstable();
        held
    }

    /// All views, by number.
    pub(crate) fn all(&self) -> Vec<Arc<View>> {
        let mut all: Vec<Arc<View>> = self.table.read().values().cloned().collect();
        all.sort_by_key(|view| view.number);
        all
    }

    /// Number of open indexes and the memory that they take, in bytes.
    pub(crate) fn open_now(&self) -> (usize, u64) {
        let open = self
            .table
            .read()
            .values()
            .filter(|view| view.opened.read().is_some())
            .count();
        (open, self.memory.load(Ordering::Relaxed))
    }
}
