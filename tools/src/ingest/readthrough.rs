//! Content that the pool cannot give, and cannot take either: read from where it came, onto this
//! node's disk, for whoever waits for it.
//!
//! A layer's stream has no way in but its beginning, so a pass that reads it takes more along than
//! what was asked for: whatever else of that layer cannot be read, while the spool has room.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use harbour_image::object::{ObjectId, PackId};
use harbour_metad_client::{Client, LOCATE_MAX, v1};

use super::{
    IngestError,
    home::Home,
    index_store, layer,
    pull::{PullOptions, join},
    refill::{self, Plan},
    reread,
};
use crate::{
    node::spool::{Filling, SLOTS, Spool},
    progress::{PullProgress as _, Silent},
};

/// Longest pass; what it had by then stays.
const PASS_MAX: Duration = Duration::from_secs(120);
/// Passes at the same time: who reads from a short layer must not wait for a long one.
pub const PASSES: usize = 3;
/// Packs of one pass: less than all passes together leave room for, so that what a pass brought
/// outlives the next one's start.
const PASS_PACKS: usize = SLOTS / (PASSES + 1);

/// Brings `packs` into the spool, as many as fit one pass, and tells `ready` of each as it is
/// whole. Gives those that were left for another pass.
pub async fn packs(
    client: &Client,
    spool: &Arc<Spool>,
    packs: &BTreeSet<PackId>,
    options: &Arc<PullOptions>,
    ready: impl Fn(PackId) + Send + Sync + Clone + 'static,
) -> Result<BTreeSet<PackId>, IngestError> {
    let deadline = Instant::now() + PASS_MAX;
    let mut wanted: BTreeSet<PackId> = packs.iter().copied().take(PASS_PACKS).collect();
    let left = packs.iter().copied().skip(PASS_PACKS).collect();
    let snapshot = client.snapshot().await?;
    for layer in &snapshot.layers {
        let of_layer = refill::packs_of(client, layer).await?;
        if of_layer.keys().any(|pack| packs.contains(pack)) {
            let more = alike(client, packs, of_layer.into_keys().collect()).await?;
            let room = PASS_PACKS.saturating_sub(wanted.len());
            wanted.extend(
                more.into_iter()
                    .filter(|pack| !packs.contains(pack))
                    .take(room),
            );
        }
    }
    let plan = Plan::new(client, &snapshot, &wanted).await?;
    for (id, bytes) in &plan.index_parts {
        if let Some(filling) = spool.fill(*id, bytes.len() as u32) {
            filling.write(0, bytes).map_err(failed)?;
            filling.keep();
        }
        ready(*id);
    }
    let indexes = Indexes::fetch(client, &plan.users).await?;
    let parts: BTreeSet<PackId> = plan.index_parts.iter().map(|(id, _)| *id).collect();
    let lens: BTreeMap<PackId, u32> = plan
        .lens
        .iter()
        .filter(|(id, _)| !parts.contains(id))
        .map(|(id, len)| (*id, *len))
        .collect();
    let missing = indexes.objects_of(&lens)?;
    let sources = refill::sources_of(&plan.users, &snapshot, None, options).await?;
    let (spool, limits) = (Arc::clone(spool), options.limits.clone());
    let task = tokio::task::spawn_blocking(move || {
        let home = InSpool::new(&spool, &lens, missing, deadline, &ready);
        for (source, descriptors) in sources {
            for descriptor in descriptors {
                let Some(index) = indexes.of(descriptor.diff_id.as_bytes()) else {
                    continue;
                };
                let bar = Silent.layer(&descriptor);
                reread::read_layer(&home, &source, &descriptor, index, &limits, bar.as_ref())?;
            }
        }
        Ok(())
    });
    join(task).await?;
    Ok(left)
}

/// Those of `candidates` that nobody could read either: they have no replica, or only at donors
/// that hold what could not be read.
async fn alike(
    client: &Client,
    unreadable: &BTreeSet<PackId>,
    candidates: Vec<PackId>,
) -> Result<Vec<PackId>, IngestError> {
    let mut replicas: HashMap<PackId, Vec<u64>> = HashMap::new();
    for part in candidates.chunks(LOCATE_MAX) {
        let request = v1::LocateRequest {
            packs: part.iter().map(|id| id.0.to_vec()).collect(),
        };
        let reply = client.locate(request).await?;
        for (id, found) in part.iter().zip(reply.packs) {
            replicas.insert(*id, found.extents.iter().map(|e| e.donor).collect());
        }
    }
    let bad: BTreeSet<u64> = unreadable
        .iter()
        .flat_map(|id| replicas.get(id).into_iter().flatten().copied())
        .collect();
    let lost = |id: &PackId| {
        replicas
            .get(id)
            .is_some_and(|at| at.iter().all(|d| bad.contains(d)))
    };
    Ok(candidates.into_iter().filter(lost).collect())
}

/// Indexes of layers, by diff ID.
struct Indexes(HashMap<Vec<u8>, Arc<[u8]>>);

impl Indexes {
    async fn fetch(client: &Client, users: &[&v1::Layer]) -> Result<Self, IngestError> {
        let mut all = HashMap::new();
        for user in users {
            let name = layer::digest(&user.diff_id)?.to_string();
            let reference = user.index.clone().unwrap_or_default();
            let bytes = index_store::fetch_if_there(client, &reference, &name).await?;
            all.extend(bytes.map(|bytes| (user.diff_id.clone(), bytes)));
        }
        Ok(Self(all))
    }

    fn of(&self, diff_id: &[u8]) -> Option<Arc<[u8]>> {
        self.0.get(diff_id).cloned()
    }

    /// How many places of each pack these layers fill. A place is counted once, whichever layers
    /// have it.
    fn objects_of(
        &self,
        lens: &BTreeMap<PackId, u32>,
    ) -> Result<HashMap<PackId, BTreeSet<u32>>, IngestError> {
        let mut places: HashMap<PackId, BTreeSet<u32>> = HashMap::new();
        for (diff_id, bytes) in &self.0 {
            let name = layer::digest(diff_id)?.to_string();
            let index = layer::open_index(Arc::clone(bytes), &name)?;
            reread::each_object(&index, &name, |pack: PackId, offset: u32, _: ObjectId| {
                if lens.contains_key(&pack) {
                    places.entry(pack).or_default().insert(offset);
                }
            })?;
        }
        Ok(places)
    }
}

/// The spool, as a home for objects.
struct InSpool<'a> {
    state: Mutex<State<'a>>,
    deadline: Instant,
    ready: &'a (dyn Fn(PackId) + Send + Sync),
}

struct State<'a> {
    filling: HashMap<PackId, Filling<'a>>,
    /// Places of each pack that are not written yet.
    missing: HashMap<PackId, BTreeSet<u32>>,
}

impl<'a> InSpool<'a> {
    fn new(
        spool: &'a Spool,
        lens: &BTreeMap<PackId, u32>,
        missing: HashMap<PackId, BTreeSet<u32>>,
        deadline: Instant,
        ready: &'a (dyn Fn(PackId) + Send + Sync),
    ) -> Self {
        let mut filling = HashMap::new();
        for (id, len) in lens {
            match spool.fill(*id, *len) {
                Some(slot) => {
                    filling.insert(*id, slot);
                }
                // It is there from an earlier pass.
                None => ready(*id),
            }
        }
        Self {
            state: Mutex::new(State { filling, missing }),
            deadline,
            ready,
        }
    }
}

impl Home for InSpool<'_> {
    fn wants(&self, pack: &PackId) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.filling.contains_key(pack)
    }

    fn put(&self, pack: &PackId, offset: u32, bytes: &[u8]) -> Result<u64, IngestError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { filling, missing } = &mut *state;
        let Some(slot) = filling.get(pack) else {
            return Ok(0);
        };
        slot.write(offset, bytes).map_err(failed)?;
        if let Some(places) = missing.get_mut(pack) {
            places.remove(&offset);
        }
        Ok(bytes.len() as u64)
    }

    fn placed(&self, packs: &[PackId]) -> Result<bool, IngestError> {
        if Instant::now() >= self.deadline {
            return Err(IngestError::Limit(format!(
                "reading a layer through took longer than {} s",
                PASS_MAX.as_secs()
            )));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whole = Vec::new();
        for pack in packs {
            let State { filling, missing } = &mut *state;
            if missing.get(pack).is_none_or(BTreeSet::is_empty)
                && let Some(slot) = filling.remove(pack)
            {
                slot.keep();
                whole.push(*pack);
            }
        }
        let more = !state.filling.is_empty();
        drop(state);
        whole.into_iter().for_each(self.ready);
        Ok(more)
    }
}

fn failed(error: std::io::Error) -> IngestError {
    IngestError::Limit(format!("the spool of this node cannot be written: {error}"))
}
