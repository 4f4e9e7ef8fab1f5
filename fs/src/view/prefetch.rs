//! Fetches the rest of an index in the background once a view is in use, in large reads.

use std::{
    sync::{
        Arc, Weak,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use super::Opened;
use crate::{
    budget::Budget,
    read::{Missed, Outside},
};

/// Indexes that may wait their turn; one that finds no room is read as it is needed.
const QUEUE_MAX: usize = 64;
/// Granules of one read: 1 MiB.
const STEP: u64 = 64;
/// Time for one read; a pool that is slower than this has better things to do.
const PATIENCE: Duration = Duration::from_secs(2);

/// The thread that fetches.
pub(crate) struct Prefetch {
    queue: SyncSender<Weak<Opened>>,
}

impl Prefetch {
    /// Starts the thread. It ends when this is dropped.
    pub(crate) fn new(outside: Arc<Outside>) -> Self {
        let (queue, jobs) = sync_channel(QUEUE_MAX);
        let spawned = std::thread::Builder::new()
            .name("fs-prefetch".into())
            .spawn(move || work(&outside, &jobs));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to fetch indexes ahead");
        }
        Self { queue }
    }

    /// Asks for the rest of `opened`, unless too many wait.
    pub(crate) fn offer(&self, opened: &Arc<Opened>) {
        // A full queue is no loss: what is needed is fetched when it is needed.
        let _ = self.queue.try_send(Arc::downgrade(opened));
    }
}

fn work(outside: &Outside, jobs: &Receiver<Weak<Opened>>) {
    while let Ok(job) = jobs.recv() {
        let mut next = 0;
        // The view may be given up at any time; between reads nothing here keeps it.
        while let Some(opened) = job.upgrade() {
            let lazy = &opened.lazy;
            if next >= lazy.count() || lazy.count() * 16384 > outside.config.index_cache_bytes / 2 {
                break;
            }
            // Quick: no refill and no question to metad for the sake of a guess.
            let result = Budget::new(PATIENCE, true).run(|| lazy.load(outside, next, next + STEP));
            if let Err(missed) = result {
                if let Missed::Failed(why) = missed {
                    tracing::debug!(why, "index not fetched ahead");
                }
                break;
            }
            next += STEP;
        }
    }
}
