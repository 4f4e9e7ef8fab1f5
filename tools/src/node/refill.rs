//! Lost packs brought back while a reader waits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Condvar, Mutex, PoisonError, atomic::AtomicBool},
    time::Instant,
};

use harbour_fs::source::{Refill, SourceError};
use harbour_image::object::PackId;
use harbour_metad_client::{Client, Error as ClientError};
use tokio::runtime::Handle;

use super::spool::Spool;
use crate::{
    ingest::{IngestError, lease::Pull, pull::PullOptions, readthrough, refill},
    link::Link,
    progress::{PullProgress, Silent},
};

/// Refills one after another; readers that want the same pack wait for the same refill.
pub struct Refiller {
    client: Client,
    link: Arc<Link>,
    spool: Arc<Spool>,
    handle: Handle,
    options: Arc<PullOptions>,
    running: Arc<(Mutex<Running>, Condvar)>,
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
    working: bool,
    /// Packs that the worker has taken.
    taken: BTreeSet<PackId>,
}

/// Pause before another attempt after a failure that may pass: a donor that is started again needs
/// its predecessor's lease to run out first.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

/// How long a failure is remembered, so that a thousand readers of one lost pack do not ask the
/// registry a thousand times.
const FAILURE_KEPT: std::time::Duration = std::time::Duration::from_secs(2);

impl Refiller {
    /// A refiller that fetches with `options`.
    pub fn new(
        client: Client,
        link: Arc<Link>,
        spool: Arc<Spool>,
        handle: Handle,
        options: Arc<PullOptions>,
    ) -> Self {
        Self {
            client,
            link,
            spool,
            handle,
            options,
            running: Arc::default(),
        }
    }

    /// Starts the worker when there is none; it takes all packs that are wanted together.
    fn kick(&self, running: &mut Running) {
        if running.working || running.wanted.is_empty() {
            return;
        }
        running.working = true;
        let (client, link, options) = (
            self.client.clone(),
            Arc::clone(&self.link),
            Arc::clone(&self.options),
        );
        let (spool, shared) = (Arc::clone(&self.spool), Arc::clone(&self.running));
        self.handle.spawn(async move {
            loop {
                let packs = {
                    let mut running = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                    running.taken.clear();
                    if running.wanted.is_empty() {
                        running.working = false;
                        return;
                    }
                    let wanted = std::mem::take(&mut running.wanted);
                    running.taken = wanted.keys().copied().collect();
                    wanted
                };
                let ready = {
                    let shared = Arc::clone(&shared);
                    move |pack| tell(&shared, [pack], &Ok(()))
                };
                let outcome = bring_back(&client, &link, &spool, &packs, &options, ready).await;
                let transient = outcome.as_ref().is_err_and(IngestError::is_transient);
                let outcome = outcome.map_err(|error| chain(&error));
                match &outcome {
                    Err(error) if transient => {
                        tracing::debug!(
                            packs = packs.len(),
                            error,
                            "lost content could not be brought back yet"
                        );
                    }
                    Err(error) => {
                        tracing::warn!(
                            packs = packs.len(),
                            error,
                            "lost content could not be brought back"
                        );
                    }
                    Ok(_) => {}
                }
                if transient {
                    tokio::time::sleep(AGAIN).await;
                    let mut running = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                    running.taken.clear();
                    // For as long as somebody waits: each reader's own deadline is the end of it.
                    let wanted: Vec<_> = packs
                        .into_iter()
                        .filter(|(pack, _)| running.waiting.contains_key(pack))
                        .collect();
                    running.wanted.extend(wanted);
                    continue;
                }
                match outcome {
                    // What did not fit this pass is for the next.
                    Ok(left) => {
                        let done = packs.keys().copied().filter(|pack| !left.contains(pack));
                        tell(&shared, done, &Ok(()));
                        let mut running = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                        running
                            .wanted
                            .extend(left.into_iter().map(|pack| (pack, true)));
                    }
                    Err(error) => tell(&shared, packs.into_keys(), &Err(error)),
                }
            }
        });
    }
}

/// Notes how it went with these packs, for whoever waits.
fn tell(
    shared: &(Mutex<Running>, Condvar),
    packs: impl IntoIterator<Item = PackId>,
    outcome: &Result<(), String>,
) {
    let mut running = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let Running {
        outcomes, taken, ..
    } = &mut *running;
    outcomes.retain(|_, (at, _)| at.elapsed() < FAILURE_KEPT);
    for pack in packs {
        // Whoever asks from here on asks for another attempt.
        taken.remove(&pack);
        outcomes.insert(pack, (now, outcome.clone()));
    }
    shared.1.notify_all();
}

impl Refill for Refiller {
    fn refill(
        &self,
        _number: u32,
        pack: &PackId,
        listed: bool,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let (lock, changed) = &*self.running;
        let asked = Instant::now();
        let mut running = lock.lock().unwrap_or_else(PoisonError::into_inner);
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
            self.kick(&mut running);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(SourceError::Deadline(format!(
                    "pack {pack:?} to be fetched again"
                )));
            }
            running = changed
                .wait_timeout(running, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        if let Some(count) = running.waiting.get_mut(pack) {
            *count -= 1;
            if *count == 0 {
                running.waiting.remove(pack);
            }
        }
        outcome
    }
}

/// Brings packs back: into the pool where it has lost them and has room, else into the spool. Gives
/// those that are left for another pass.
async fn bring_back(
    client: &Client,
    link: &Arc<Link>,
    spool: &Arc<Spool>,
    wanted: &BTreeMap<PackId, Listed>,
    options: &Arc<PullOptions>,
    ready: impl Fn(PackId) + Send + Sync + Clone + 'static,
) -> Result<BTreeSet<PackId>, IngestError> {
    // What metad lists and nobody can read has no place to be put until metad gives it up: a donor
    // that is frozen may hold its lease for a while yet.
    let (listed, lost): (BTreeSet<PackId>, BTreeSet<PackId>) = {
        let part = |listed: bool| wanted.iter().filter(move |(_, l)| **l == listed);
        (
            part(true).map(|(pack, _)| *pack).collect(),
            part(false).map(|(pack, _)| *pack).collect(),
        )
    };
    let mut left = BTreeSet::new();
    if !listed.is_empty() {
        tracing::info!(
            packs = listed.len(),
            "donors do not give what they hold; reading it from the source"
        );
        left = readthrough::packs(client, spool, &listed, options, ready.clone()).await?;
    }
    if lost.is_empty() {
        return Ok(left);
    }
    match into_pool(client, link, lost.clone(), options).await {
        Err(
            error @ (IngestError::Metad(ClientError::Exhausted { .. }) | IngestError::Pool { .. }),
        ) => {
            tracing::info!(
                error = chain(&error),
                packs = lost.len(),
                "the pool takes nothing; reading through"
            );
            left.extend(readthrough::packs(client, spool, &lost, options, ready).await?);
            Ok(left)
        }
        other => other.map(|()| left),
    }
}

async fn into_pool(
    client: &Client,
    link: &Arc<Link>,
    packs: BTreeSet<PackId>,
    options: &Arc<PullOptions>,
) -> Result<(), IngestError> {
    let what = format!("refill of {} packs", packs.len());
    let stopped = Arc::new(AtomicBool::new(false));
    let lease = Pull::begin(
        client.clone(),
        Arc::clone(link),
        &what,
        0,
        stopped,
        options.failpoints.clone(),
    )
    .await?;
    let progress: Arc<dyn PullProgress> = Arc::new(Silent);
    match refill::packs(&lease, packs, options, &progress).await {
        Ok(brought) if !brought.is_empty() => {
            tracing::info!(count = brought.len(), "lost packs were fetched again");
            Ok(())
        }
        other => {
            lease.stop();
            lease.abort().await;
            other.map(|_| ())
        }
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
