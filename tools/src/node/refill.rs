//! Lost packs brought back while a reader waits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use harbour_fs::source::{Refill, SourceError};
use harbour_image::object::PackId;
use harbour_metad_client::{Client, Error as ClientError};
use tokio::runtime::Handle;

use super::spool::Spool;
use crate::{
    ingest::{
        IngestError,
        lease::Pull,
        pull::PullOptions,
        readthrough::{self, PASSES},
        refill,
    },
    link::Link,
    progress::{PullProgress, Silent},
};

/// Brings back what readers wait for: first onto this node's disk, where nothing that donors do can
/// delay it, then into the pool. Readers that want the same pack wait for the same pass.
pub struct Refiller {
    shop: Arc<Shop>,
    handle: Handle,
}

/// What passes need.
struct Shop {
    client: Client,
    link: Arc<Link>,
    spool: Arc<Spool>,
    options: Arc<PullOptions>,
    running: Mutex<Running>,
    changed: Condvar,
}

/// Whether metad lists replicas of a pack, none of which could be read.
type Listed = bool;

/// Packs asked for, and how each last attempt ended.
#[derive(Default)]
struct Running {
    wanted: BTreeMap<PackId, Listed>,
    /// How many readers wait for each pack.
    waiting: HashMap<PackId, usize>,
    outcomes: HashMap<PackId, (Instant, Result<(), String>)>,
    /// What stood in the way the last time, of failures that may pass.
    trouble: HashMap<PackId, String>,
    workers: usize,
    /// Packs that a worker has taken.
    taken: BTreeSet<PackId>,
    /// Packs that the pool has lost and is to get back.
    lost: BTreeSet<PackId>,
    returning: bool,
}

/// Lost packs that wait for the pool; those beyond come back with the rest of their layers, or when
/// they are read again.
const LOST_MAX: usize = 4096;

/// How long a reader waits for the pass that is under way before another one begins beside it.
const PATIENCE: Duration = Duration::from_millis(250);

/// Pause before another attempt after a failure that may pass.
const AGAIN: Duration = Duration::from_millis(200);

/// How long a failure is remembered, so that a thousand readers of one lost pack do not ask the
/// registry a thousand times.
const FAILURE_KEPT: Duration = Duration::from_secs(2);

/// Times that the pool is offered what it has lost, when it does not take it.
const RETURN_TRIES: u32 = 8;

/// Pause before the second of them, doubled each time.
const RETURN_PAUSE: Duration = Duration::from_millis(500);

impl Refiller {
    /// A refiller that fetches with `options`.
    pub fn new(
        client: Client,
        link: Arc<Link>,
        spool: Arc<Spool>,
        handle: Handle,
        options: Arc<PullOptions>,
    ) -> Self {
        let shop = Shop {
            client,
            link,
            spool,
            options,
            running: Mutex::default(),
            changed: Condvar::new(),
        };
        Self {
            shop: Arc::new(shop),
            handle,
        }
    }

    /// Starts a worker when one may be; it takes all packs that are wanted together. The first
    /// mostly brings what is wanted next from the same layer: `more` says that this took too long.
    fn kick(&self, running: &mut Running, more: bool) {
        let workers = if more { PASSES } else { 1 };
        if running.workers < workers && !running.wanted.is_empty() {
            running.workers += 1;
            self.handle.spawn(Arc::clone(&self.shop).work());
        }
    }
}

impl Shop {
    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings back what is wanted until nothing is.
    async fn work(self: Arc<Self>) {
        loop {
            let packs = {
                let mut running = self.lock();
                if running.wanted.is_empty() {
                    running.workers -= 1;
                    return;
                }
                let packs = std::mem::take(&mut running.wanted);
                running.taken.extend(packs.keys());
                packs
            };
            if !self.pass(packs).await {
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// One pass over the sources of `packs`; `false` when it failed in a way that may pass.
    async fn pass(self: &Arc<Self>, packs: BTreeMap<PackId, Listed>) -> bool {
        let ready = {
            let shop = Arc::clone(self);
            move |pack| shop.tell([pack], &Ok(()))
        };
        let ids = packs.keys().copied().collect();
        let outcome =
            readthrough::packs(&self.client, &self.spool, &ids, &self.options, ready).await;
        match outcome {
            Ok(left) => {
                let done = packs.keys().copied().filter(|pack| !left.contains(pack));
                self.tell(done, &Ok(()));
                let mut running = self.lock();
                for (pack, listed) in packs {
                    if left.contains(&pack) {
                        // What did not fit this pass is for the next.
                        running.taken.remove(&pack);
                        running.wanted.insert(pack, listed);
                    } else if !listed && running.lost.len() < LOST_MAX {
                        running.lost.insert(pack);
                    }
                }
                if !running.lost.is_empty() && !running.returning {
                    running.returning = true;
                    tokio::spawn(Arc::clone(self).give_back());
                }
                true
            }
            Err(error) if error.is_transient() => {
                let error = chain(&error);
                let mut running = self.lock();
                if running.trouble.values().any(|known| *known == error) {
                    tracing::debug!(packs = packs.len(), error, "lost content is not back yet");
                } else {
                    tracing::warn!(packs = packs.len(), error, "lost content is not back yet");
                }
                for (pack, listed) in packs {
                    running.taken.remove(&pack);
                    // For as long as somebody waits: each reader's own deadline is the end of it.
                    if running.waiting.contains_key(&pack) {
                        running.trouble.insert(pack, error.clone());
                        running.wanted.insert(pack, listed);
                    }
                }
                false
            }
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(
                    packs = packs.len(),
                    error,
                    "lost content could not be brought back"
                );
                self.tell(packs.into_keys(), &Err(error));
                true
            }
        }
    }

    /// Puts into the pool what it has lost, until it has it or does not take it.
    async fn give_back(self: Arc<Self>) {
        let (mut tries, mut pause) = (0, RETURN_PAUSE);
        loop {
            let packs = {
                let mut running = self.lock();
                if running.lost.is_empty() {
                    running.returning = false;
                    return;
                }
                running.lost.clone()
            };
            let Err(error) = self.put_back(&packs).await else {
                self.lock().lost.retain(|pack| !packs.contains(pack));
                continue;
            };
            tries += 1;
            let full = matches!(error, IngestError::Metad(ClientError::Exhausted { .. }));
            let last = full || tries >= RETURN_TRIES || !error.is_transient();
            let error = chain(&error);
            tracing::info!(packs = packs.len(), error, last, "the pool takes nothing");
            if last {
                // Whoever reads them when they are no longer here asks for them again.
                self.lock().lost.retain(|pack| !packs.contains(pack));
            } else {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
        }
    }

    async fn put_back(&self, packs: &BTreeSet<PackId>) -> Result<(), IngestError> {
        let lease = Pull::begin(
            self.client.clone(),
            Arc::clone(&self.link),
            &format!("refill of {} packs", packs.len()),
            0,
            Arc::new(AtomicBool::new(false)),
            self.options.failpoints.clone(),
        )
        .await?;
        let progress: Arc<dyn PullProgress> = Arc::new(Silent);
        let brought =
            refill::packs(&lease, packs.clone(), &self.spool, &self.options, &progress).await;
        match brought {
            Ok(brought) if !brought.is_empty() => {
                tracing::info!(
                    count = brought.len(),
                    "packs that were lost are in the pool again"
                );
                Ok(())
            }
            other => {
                lease.stop();
                lease.abort().await;
                other.map(drop)
            }
        }
    }

    /// Notes how it went with these packs, for whoever waits.
    fn tell(&self, packs: impl IntoIterator<Item = PackId>, outcome: &Result<(), String>) {
        let mut running = self.lock();
        let now = Instant::now();
        let Running {
            wanted,
            outcomes,
            trouble,
            taken,
            ..
        } = &mut *running;
        outcomes.retain(|_, (at, _)| at.elapsed() < FAILURE_KEPT);
        for pack in packs {
            // Whoever asks from here on asks for another attempt.
            taken.remove(&pack);
            wanted.remove(&pack);
            trouble.remove(&pack);
            outcomes.insert(pack, (now, outcome.clone()));
        }
        self.changed.notify_all();
    }
}

impl Refill for Refiller {
    fn refill(
        &self,
        _number: u32,
        pack: &PackId,
        listed: bool,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        if self.shop.spool.find(pack).is_some() {
            return Ok(());
        }
        let asked = Instant::now();
        let mut running = self.shop.lock();
        *running.waiting.entry(*pack).or_default() += 1;
        let outcome = loop {
            let recent = running.outcomes.get(pack).filter(|(at, outcome)| {
                *at >= asked || (outcome.is_err() && at.elapsed() < FAILURE_KEPT)
            });
            if let Some((_, outcome)) = recent {
                break outcome.clone().map_err(|why| SourceError::Unavailable {
                    what: format!("the source of pack {pack:?}"),
                    source: why.into(),
                });
            }
            if !running.taken.contains(pack) {
                *running.wanted.entry(*pack).or_default() |= listed;
            }
            let waited = asked.elapsed();
            self.kick(&mut running, waited >= PATIENCE);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let trouble = running.trouble.get(pack);
                let trouble = trouble.map_or(String::new(), |why| format!(" ({why})"));
                break Err(SourceError::Deadline(format!(
                    "pack {pack:?} to be fetched again{trouble}"
                )));
            }
            running = self
                .shop
                .changed
                .wait_timeout(running, left.min(PATIENCE))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        if let Some(count) = running.waiting.get_mut(pack) {
            *count -= 1;
            if *count == 0 {
                running.waiting.remove(pack);
                // Kept no longer than somebody waits for it.
                running.trouble.remove(pack);
            }
        }
        outcome
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
