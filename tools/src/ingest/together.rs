//! Layers of one pull, divided with the other pulls of the cluster.
//!
//! A pull claims the layers that are missing, largest first, and no more at a time than it unpacks:
//! what it finds claimed it leaves to the holder, stands in line, and goes on to the next. So hosts that
//! pull one image at the same moment divide its layers by the time that each takes for what it has. A
//! layer is there for all when its holder commits it; when the holder fails, the first in line has it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use harbour_image::{digest::Digest, manifest::LayerDescriptor, source::Source};
use harbour_metad_client::v1;
use tokio::task::JoinSet;

use super::{
    IngestError,
    claims::{Claims, Said, TICK, layer_key},
    index_store, layer,
    lease::Pull,
    packer::Stored,
    pull::{PullOptions, find_layers},
};
use crate::progress::{LayerProgress, PullProgress};

/// A layer that is in the pool now.
pub(super) struct Arrived {
    /// Which.
    pub(super) diff_id: Digest,
    /// Its whole index file.
    pub(super) index: Arc<[u8]>,
    /// Sum of the sizes of its files.
    pub(super) unpacked_bytes: u64,
    /// Compressed bytes that this pull fetched for it; `None` when another pull did.
    pub(super) fetched_bytes: Option<u64>,
}

/// Has all of `missing` put into the pool, by this pull or by others. The first failure of a layer that
/// this pull has claimed ends it.
pub(super) async fn fetch(
    claims: &mut Claims,
    lease: &Pull,
    source: &Arc<Source>,
    mut missing: Vec<LayerDescriptor>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<Vec<Arrived>, IngestError> {
    // In the order of the manifest, which is the order of the bars.
    let layers = missing.iter().map(|descriptor| {
        let bar = Arc::new(Watched {
            bar: progress.layer(descriptor),
            counted: Mutex::new(None),
        });
        let layer = Layer {
            descriptor: descriptor.clone(),
            bar,
            state: State::New,
        };
        (layer_key(&descriptor.diff_id), layer)
    });
    let layers: HashMap<String, Layer> = layers.collect();
    missing.sort_by_key(|descriptor| std::cmp::Reverse(descriptor.size));
    let mut round = Round {
        claims,
        lease,
        source,
        options,
        queue: missing.iter().map(|m| layer_key(&m.diff_id)).collect(),
        layers,
        stored: Stored::default(),
        tasks: JoinSet::new(),
        arrived: Vec::new(),
    };
    let outcome = round.run().await;
    if outcome.is_err() {
        lease.stop();
        // What they say after being stopped is not the reason.
        while round.tasks.join_next().await.is_some() {}
    }
    outcome?;
    Ok(round.arrived)
}

/// How far a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not claimed.
    New,
    /// Claimed; metad has not answered.
    Asked,
    /// Another pull has it.
    InLine,
    /// This pull's, and to be begun.
    Held(u64),
    /// Being unpacked by this pull.
    Running(u64),
    /// In the pool.
    There,
}

struct Layer {
    descriptor: LayerDescriptor,
    bar: Arc<Watched>,
    state: State,
}

type Unpacked = (String, Result<layer::Staged, IngestError>);

struct Round<'a> {
    claims: &'a mut Claims,
    lease: &'a Pull,
    source: &'a Arc<Source>,
    options: &'a Arc<PullOptions>,
    /// Keys of layers that are not claimed, in the order in which they are to be.
    queue: VecDeque<String>,
    layers: HashMap<String, Layer>,
    stored: Stored,
    tasks: JoinSet<Unpacked>,
    arrived: Vec<Arrived>,
}

impl Round<'_> {
    async fn run(&mut self) -> Result<(), IngestError> {
        let mut tick = tokio::time::interval(TICK);
        loop {
            self.claim_more().await?;
            self.begin().await?;
            if self.arrived.len() == self.layers.len() {
                return Ok(());
            }
            tokio::select! {
                said = self.claims.next() => self.hear(said?).await?,
                Some(done) = self.tasks.join_next() => {
                    let (key, outcome) = done.map_err(|e| IngestError::Bug(e.to_string()))?;
                    self.commit(key, outcome?).await?;
                }
                _ = tick.tick() => {
                    self.claims.tick().await?;
                    self.report();
                }
            }
        }
    }

    fn count(&self, is: impl Fn(State) -> bool) -> usize {
        self.layers.values().filter(|layer| is(layer.state)).count()
    }

    /// Claims as many more as this pull could unpack at the same time.
    async fn claim_more(&mut self) -> Result<(), IngestError> {
        let jobs = self.options.jobs.max(1);
        let mine = |state| matches!(state, State::Asked | State::Held(_) | State::Running(_));
        while self.count(mine) < jobs
            && let Some(key) = self.queue.pop_front()
        {
            self.set(&key, State::Asked);
            self.claims.claim(key).await?;
        }
        Ok(())
    }

    /// Begins what is held, [`PullOptions::jobs`] at a time.
    async fn begin(&mut self) -> Result<(), IngestError> {
        while self.tasks.len() < self.options.jobs.max(1) {
            let held = self.layers.iter().find_map(|(key, layer)| {
                let State::Held(fence) = layer.state else {
                    return None;
                };
                Some((key.clone(), fence, layer.descriptor.diff_id))
            });
            let Some((key, fence, diff_id)) = held else {
                return Ok(());
            };
            // Whoever held it before may have committed it between our look and our claim.
            if self.take(&key, diff_id).await? {
                self.claims.release(&key).await?;
            } else {
                self.set(&key, State::Running(fence));
                self.spawn(key);
            }
        }
        Ok(())
    }

    fn spawn(&mut self, key: String) {
        let Some(layer) = self.layers.get(&key) else {
            return;
        };
        let (descriptor, bar) = (layer.descriptor.clone(), Arc::clone(&layer.bar));
        let (lease, source, options, stored) = (
            self.lease.clone(),
            Arc::clone(self.source),
            Arc::clone(self.options),
            Arc::clone(&self.stored),
        );
        self.tasks.spawn_blocking(move || {
            let limits = &options.limits;
            let outcome = layer::ingest(&lease, &source, &descriptor, limits, stored, bar.as_ref());
            if let Err(error) = &outcome {
                bar.failed(error);
            }
            (key, outcome)
        });
    }

    async fn hear(&mut self, said: Said) -> Result<(), IngestError> {
        match said {
            Said::InLine { key } => self.set(&key, State::InLine),
            Said::Held { key, fence } => {
                let state = self.layers.get(&key).map(|layer| layer.state);
                // A session that was opened again says what is known.
                if matches!(state, Some(State::Asked | State::InLine)) {
                    self.set(&key, State::Held(fence));
                }
            }
            Said::Elsewhere(at) => {
                if let Some(layer) = self.layers.get(&at.key)
                    && matches!(layer.state, State::Asked | State::InLine)
                {
                    layer.bar.elsewhere(&at.host, at.done_bytes, at.total_bytes);
                }
            }
            Said::Committed { key } => {
                let Some(diff_id) = self.layers.get(&key).map(|l| l.descriptor.diff_id) else {
                    return Ok(());
                };
                // One that was lost again since is claimed again.
                if !self.take(&key, diff_id).await? {
                    self.set(&key, State::New);
                    self.queue.push_back(key);
                }
            }
        }
        Ok(())
    }

    /// Takes a layer that another pull has committed; tells whether there is one.
    async fn take(&mut self, key: &str, diff_id: Digest) -> Result<bool, IngestError> {
        let (known, _) = find_layers(self.lease, &[diff_id].into()).await?;
        let Some(found) = known.get(&diff_id) else {
            return Ok(false);
        };
        let reference = found.index.clone().unwrap_or_default();
        let name = diff_id.to_string();
        let index = index_store::fetch(self.lease.client(), &reference, &name).await?;
        self.arrive(key, index, found.unpacked_bytes, false);
        Ok(true)
    }

    /// Makes a layer that this pull has staged visible to all.
    async fn commit(&mut self, key: String, staged: layer::Staged) -> Result<(), IngestError> {
        let Some(State::Running(fence)) = self.layers.get(&key).map(|layer| layer.state) else {
            return Err(IngestError::Bug(format!("{key} was unpacked unasked")));
        };
        let request = v1::CommitLayerRequest {
            pull: Some(self.lease.reference()),
            diff_id: staged.layer.diff_id.clone(),
            fence,
        };
        let client = self.lease.client();
        let commit = || client.commit_layer(request.clone());
        self.lease.ask(commit).await?;
        self.lease.step("pull.layer_committed");
        self.claims.forget(&key);
        self.arrive(&key, staged.index, staged.layer.unpacked_bytes, true);
        Ok(())
    }

    fn arrive(&mut self, key: &str, index: Arc<[u8]>, unpacked_bytes: u64, own: bool) {
        self.set(key, State::There);
        let Some(Layer {
            descriptor, bar, ..
        }) = self.layers.get(key)
        else {
            return;
        };
        if !own {
            bar.arrived();
        }
        self.arrived.push(Arrived {
            diff_id: descriptor.diff_id,
            index,
            unpacked_bytes,
            fetched_bytes: own.then_some(descriptor.size),
        });
    }

    /// Tells others how far this pull is with what it holds.
    fn report(&mut self) {
        for (key, layer) in &self.layers {
            if !matches!(layer.state, State::Running(_)) {
                continue;
            }
            if let Some((done, total)) = layer.bar.count() {
                self.claims.report(key, done, total);
            }
        }
    }

    fn set(&mut self, key: &str, state: State) {
        if let Some(layer) = self.layers.get_mut(key) {
            layer.state = state;
        }
    }
}

/// A layer's bar, whose count others are told too.
struct Watched {
    bar: Arc<dyn LayerProgress>,
    counted: Mutex<Option<(Arc<AtomicU64>, u64)>>,
}

impl Watched {
    /// Compressed bytes that have come, and all.
    fn count(&self) -> Option<(u64, u64)> {
        let counted = self.counted.lock();
        let counted = counted.unwrap_or_else(PoisonError::into_inner);
        let (done, total) = counted.as_ref()?;
        Some((done.load(Ordering::Relaxed), *total))
    }
}

impl LayerProgress for Watched {
    fn started(&self, total: u64, done: Arc<AtomicU64>) {
        let counted = Some((Arc::clone(&done), total));
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner) = counted;
        self.bar.started(total, done);
    }

    fn indexing(&self) {
        self.bar.indexing();
    }

    fn done(&self, new_bytes: u64) {
        self.bar.done(new_bytes);
    }

    fn elsewhere(&self, host: &str, done: u64, total: u64) {
        self.bar.elsewhere(host, done, total);
    }

    fn arrived(&self) {
        self.bar.arrived();
    }

    fn failed(&self, error: &IngestError) {
        self.bar.failed(error);
    }
}
