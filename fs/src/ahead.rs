//! Reading ahead of the kernel: content that will be asked for soon goes into its page cache before
//! it asks.
//!
//! A small file costs a round trip of 50 to 100 µs each, most of it for waking threads, and the
//! kernel reads ahead within a file only. Two things tell what comes next:
//! - **Windows.** Small files and metadata lie side by side in the head of an EROFS file, in the
//!   order of the layer. Reads that meet the same window of it twice (once in metadata) bring all
//!   of it.
//! - **Listings.** Who lists a directory and then reads a file of it will read its neighbours: `tar`,
//!   `cp -r`, an interpreter that looks for modules. The rest of the listing is brought, and after
//!   that whole listings as they end, for as long as one in a while that was left alone shows that
//!   files are still being read. `find` and `ls` never read, so nothing is brought for them.
//!
//! A thread of its own does the work: storing a page waits for a read of it that is under way, which
//! a thread that serves the kernel must never do. What cannot be had at once is left out: reading
//! ahead asks no one for a refill.

use std::{
    collections::HashMap,
    io,
    num::NonZeroUsize,
    sync::{
        Arc, OnceLock, Weak,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
};

use lru::LruCache;
use parking_lot::Mutex;

use crate::{
    inode::{Node, Part, Place},
    ops::Fs,
};

/// What is brought at once of an EROFS file's head, in bytes.
const WINDOW: u64 = 1 << 20;
/// A read of this many bytes is the kernel's own reading ahead.
const OWN_AHEAD: usize = 256 << 10;
/// Windows whose reads are counted.
const WINDOWS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// Reads of a window that bring it: the first time, and after it was brought and lost again.
const READS: [u32; 2] = [2, 8];
/// Longest file that is brought, in bytes; the kernel reads ahead in longer ones.
const FILE_MAX: u64 = 128 << 10;
/// Most that is brought of one listing at a time, in bytes.
const LISTING_BYTES: u64 = 4 << 20;
/// Directories whose listings are remembered, and the names in them all together.
const LISTINGS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
const LISTED_MAX: usize = 64 << 10;
/// Listings that are brought whole after one whose files were read.
const CREDIT: u32 = 16;
/// Files right behind the one that is read are left to the reader, which is under way.
const HEAD_START: usize = 2;
/// Jobs that wait; more are dropped.
const QUEUE: usize = 64;

/// Puts bytes into the kernel's page cache.
pub(crate) trait Store: Send + Sync {
    /// Stores `bytes` at `offset` of `node`, which the kernel may have forgotten meanwhile.
    fn store(&self, node: Node, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// One mount's reading ahead.
pub(crate) struct Ahead {
    jobs: SyncSender<Job>,
    windows: Mutex<LruCache<(u32, u64), u32>>,
    listings: Mutex<Listings>,
}

/// What to bring.
enum Job {
    /// A part of an EROFS file: offset and end in bytes.
    Span(Node, u64, u64),
    /// Whole files.
    Files(Vec<(Node, u64)>),
}

struct Listings {
    dirs: LruCache<Node, Listing>,
    /// Where a file was listed last: directory and place.
    places: HashMap<Node, (Node, usize)>,
    /// Names in all of them.
    names: usize,
    /// Listings that will be brought whole.
    credit: u32,
}

/// Small files of a directory in the order they were listed.
#[derive(Default)]
struct Listing {
    files: Vec<(Node, u64)>,
    /// Files before this one were brought or read.
    passed: usize,
}

impl Ahead {
    /// Starts the thread, which ends with the last handle. `store` is set once the mount is there.
    pub(crate) fn start(
        fs: Weak<Fs>,
        store: Arc<OnceLock<Box<dyn Store>>>,
    ) -> io::Result<Arc<Self>> {
        let (jobs, queue) = sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("fs-ahead".into())
            .spawn(move || work(&fs, &store, &queue))?;
        Ok(Arc::new(Self {
            jobs,
            windows: Mutex::new(LruCache::new(WINDOWS)),
            listings: Mutex::new(Listings::new()),
        }))
    }

    /// Hears of a read that was answered.
    pub(crate) fn was_read(&self, fs: &Fs, node: Node, offset: u64, len: usize) {
        match node.place() {
            Place::Erofs(number, Part::Head) if len > 0 && len < OWN_AHEAD => {
                self.head_read(fs, node, number, offset);
            }
            Place::View { .. } if offset == 0 && len > 0 => self.file_read(node),
            _ => {}
        }
    }

    fn head_read(&self, fs: &Fs, node: Node, number: u32, offset: u64) {
        let Some(header) = fs.header_if_open(number) else {
            return;
        };
        let window = offset / WINDOW;
        let mut windows = self.windows.lock();
        // Metadata is at hand, and all of it is likely to be looked at.
        let first = if offset < header.meta_len {
            READS[0] - 1
        } else {
            0
        };
        let reads = windows.get_or_insert_mut((number, window), || first);
        *reads += 1;
        let due = *reads == READS[0];
        if *reads >= READS[1] {
            *reads = READS[0] - 1;
        }
        drop(windows);
        if due {
            let start = window * WINDOW;
            self.send(Job::Span(
                node,
                start,
                (start + WINDOW).min(header.head_len()),
            ));
        }
    }

    fn file_read(&self, node: Node) {
        let mut listings = self.listings.lock();
        let Some(&(dir, place)) = listings.places.get(&node) else {
            return;
        };
        listings.credit = CREDIT;
        let Some(listing) = listings.dirs.get_mut(&dir) else {
            return;
        };
        if place < listing.passed {
            return;
        }
        let files = listing.take(place + 1 + HEAD_START);
        drop(listings);
        self.send(Job::Files(files));
    }

    /// Hears of entries that the kernel was given in a listing of `dir`: files with their lengths.
    /// `from` is where the listing began, 0 at the directory's start; an empty list is its end.
    pub(crate) fn was_listed(&self, dir: Node, from: u64, files: &[(Node, u64)], end: bool) {
        if !matches!(dir.place(), Place::View { .. }) {
            return;
        }
        let mut listings = self.listings.lock();
        if from == 0 {
            listings.forget(dir);
        }
        listings.add(dir, files);
        // Only now has the kernel taken in all that it was given before.
        if end && listings.credit > 0 {
            listings.credit -= 1;
            let listing = listings.dirs.get_mut(&dir);
            let files = listing.map(|listing| listing.take(0)).unwrap_or_default();
            drop(listings);
            self.send(Job::Files(files));
        }
    }

    fn send(&self, job: Job) {
        if matches!(&job, Job::Files(files) if files.is_empty()) {
            return;
        }
        // Whoever is this far behind is of no use.
        match self.jobs.try_send(job) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }
}

impl Listings {
    fn new() -> Self {
        Self {
            dirs: LruCache::new(LISTINGS),
            places: HashMap::new(),
            names: 0,
            credit: 0,
        }
    }

    fn add(&mut self, dir: Node, files: &[(Node, u64)]) {
        let small = |file: &&(Node, u64)| (1..=FILE_MAX).contains(&file.1);
        let count = files.iter().filter(small).count();
        if count == 0 {
            return;
        }
        let full = |this: &Self| {
            let another = !this.dirs.contains(&dir) && this.dirs.len() >= LISTINGS.get();
            another || this.names + count > LISTED_MAX
        };
        while full(self) {
            let Some(oldest) = self.dirs.peek_lru().map(|(oldest, _)| *oldest) else {
                break;
            };
            self.forget(oldest);
        }
        let listing = self.dirs.get_or_insert_mut(dir, Listing::default);
        for file in files.iter().filter(small) {
            self.places.insert(file.0, (dir, listing.files.len()));
            listing.files.push(*file);
        }
        self.names += count;
    }

    fn forget(&mut self, dir: Node) {
        let old = self.dirs.pop(&dir).unwrap_or_default();
        self.names -= old.files.len();
        for (node, _) in old.files {
            // A file with several names may have been listed elsewhere since.
            if self.places.get(&node).is_some_and(|place| place.0 == dir) {
                self.places.remove(&node);
            }
        }
    }
}

impl Listing {
    /// Files from `place` on, as many as may be brought at once.
    fn take(&mut self, place: usize) -> Vec<(Node, u64)> {
        let mut bytes = 0;
        let rest = self.files.get(place..).unwrap_or_default();
        let files: Vec<(Node, u64)> = rest
            .iter()
            .take_while(|(_, len)| {
                bytes += len;
                bytes <= LISTING_BYTES
            })
            .copied()
            .collect();
        self.passed = place + files.len();
        files
    }
}

fn work(fs: &Weak<Fs>, store: &OnceLock<Box<dyn Store>>, queue: &Receiver<Job>) {
    while let Ok(job) = queue.recv() {
        let (Some(fs), Some(store)) = (fs.upgrade(), store.get()) else {
            continue;
        };
        let bring = |node: Node, offset: u64, len: usize| {
            let Ok(data) = fs.quickly(|fs| fs.read(node, offset, len)) else {
                return;
            };
            match store.store(node, offset, &data) {
                Ok(()) => fs.count_ahead(data.len() as u64),
                Err(error) => tracing::debug!(%error, ?node, "the kernel did not take content"),
            }
        };
        match job {
            Job::Span(node, start, end) => {
                let mut at = start;
                while at < end {
                    let len = (end - at).min(OWN_AHEAD as u64);
                    bring(node, at, len as usize);
                    at += len;
                }
            }
            Job::Files(files) => {
                for (node, len) in files {
                    bring(node, 0, len as usize);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
