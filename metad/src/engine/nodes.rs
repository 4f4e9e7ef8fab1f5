//! Nodes: what readers hold, have let go of, have read and have lost.

use std::sync::atomic::Ordering;

use harbour_metad_client::v1;

use super::{Effects, Engine, state::Node, state::State};
use crate::{
    error::{Error, Hash, hash, text},
    space::Place,
    store::{ExtentRow, PackRow, Sync, Tx},
};

/// Nodes that are known at a time.
const NODES_MAX: usize = 4096;
/// Numbers that one node may hold open.
const HELD_MAX: usize = 65_536;
/// Freed packs that one heartbeat answers with; with more the node forgets all.
const FREED_MAX: usize = 8192;
/// Packs in one report of use.
const USES_MAX: usize = 8192;

/// Extents on live donors that one node may have dropped by its reports at once.
const LOST_BURST: u64 = 256;
/// And how many more a second.
const LOST_PER_SECOND: u64 = 4;

/// How many replicas somebody may still call lost. A broken node sees every replica as wrong; it
/// must not empty the pool for all others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    thousandths: u64,
    at_ms: u64,
}

impl Budget {
    pub(super) fn full(now_ms: u64) -> Self {
        Self {
            thousandths: LOST_BURST * 1000,
            at_ms: now_ms,
        }
    }

    pub(super) fn spend(&mut self, now_ms: u64) -> bool {
        let more = now_ms
            .saturating_sub(self.at_ms)
            .saturating_mul(LOST_PER_SECOND);
        self.thousandths = self.thousandths.saturating_add(more).min(LOST_BURST * 1000);
        self.at_ms = now_ms;
        let enough = self.thousandths >= 1000;
        if enough {
            self.thousandths -= 1000;
        }
        enough
    }
}

impl Engine {
    /// Takes a node in. It has to forget all places that it may know from before.
    pub fn register_node(&self, request: &v1::RegisterNodeRequest) -> Result<v1::NodeLease, Error> {
        text(&request.name, 255, "a node's name")?;
        let now_ms = self.now_ms();
        let mut state = self.lock();
        if state.nodes.len() >= NODES_MAX {
            return Err(Error::Exhausted(format!(
                "{NODES_MAX} nodes are known, no more are allowed"
            )));
        }
        let id = state.issue();
        let node = Node {
            name: request.name.clone(),
            heard_ms: now_ms,
            expires_ms: now_ms + self.options.timing.node_lease_ms,
            acknowledged: 0,
            held: std::collections::HashSet::new(),
            used: std::collections::HashSet::new(),
            lost: Budget::full(now_ms),
        };
        state.nodes.insert(id, node);
        Ok(v1::NodeLease {
            forget_all: true,
            ..self.node_lease(id)
        })
    }

    fn node_lease(&self, node: u64) -> v1::NodeLease {
        v1::NodeLease {
            node,
            lease_ms: u32::try_from(self.options.timing.node_lease_ms).unwrap_or(u32::MAX),
            freed_generation: self.freed.load(Ordering::SeqCst),
            freed: Vec::new(),
            forget_all: false,
        }
    }

    /// Keeps a node's lease, and tells what was freed.
    pub fn node_heartbeat(&self, request: &v1::NodeHeartbeat) -> Result<v1::NodeLease, Error> {
        for (what, count) in [("held", request.held.len()), ("used", request.used.len())] {
            if count > HELD_MAX {
                return Err(Error::Invalid(format!(
                    "{count} numbers {what}, at most {HELD_MAX}"
                )));
            }
        }
        let now_ms = self.now_ms();
        let mut state = self.lock();
        // Under the lock nothing is being freed, so list and generation belong together.
        let mut lease = self.node_lease(request.node);
        let expires_ms = now_ms + self.options.timing.node_lease_ms;
        let Some(node) = state.nodes.get_mut(&request.node) else {
            return Err(Error::NotFound(format!(
                "node {:x} is not known: register again",
                request.node
            )));
        };
        node.heard_ms = now_ms;
        node.expires_ms = expires_ms;
        node.acknowledged = node
            .acknowledged
            .max(request.acknowledged_generation.min(lease.freed_generation));
        let acknowledged = node.acknowledged;
        let held = request.held.iter().copied().collect();
        let used = request.used.iter().copied().collect();
        let before = std::mem::replace(&mut node.held, held);
        let used_before = std::mem::replace(&mut node.used, used);
        if !before.is_subset(&node.held) || !used_before.is_subset(&node.used) {
            state.collect = true;
        }
        match state.freed_since(acknowledged, FREED_MAX) {
            Some(packs) => lease.freed = packs.iter().map(|digest| digest.to_vec()).collect(),
            None => lease.forget_all = true,
        }
        let freed = self.release(&mut state)?;
        drop(state);
        if freed > 0 {
            self.tell_space_freed();
        }
        Ok(lease)
    }

    /// Tells the policy what was read.
    pub fn report_use(&self, request: &v1::UseReport) -> Result<(), Error> {
        if request.packs.len() > USES_MAX {
            return Err(Error::Invalid(format!(
                "{} packs in one report, at most {USES_MAX}",
                request.packs.len()
            )));
        }
        let uses = self.store.read(|read| {
            let mut uses = Vec::with_capacity(request.packs.len());
            for used in &request.packs {
                let digest = hash(&used.pack, "a pack's name")?;
                if let Some(pack) = read.pack(&digest)? {
                    uses.push((pack, used.reads, read.locate(&digest)?));
                }
            }
            Ok(uses)
        })?;
        let mut state = self.lock();
        for (pack, reads, replicas) in uses {
            state.policy.hit(pack.id, reads);
            // Which replica was read is not told; in the long run all are.
            let each = u64::from(pack.len) * u64::from(reads) / replicas.len().max(1) as u64;
            for replica in replicas {
                state.space.served(replica.place.donor, each);
            }
            self.reads.fetch_add(u64::from(reads), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes a replica away that a node could not read or found wrong: at once when its donor is
    /// silent, else as far as the node's budget goes ([`LOST_BURST`], [`LOST_PER_SECOND`]); a
    /// report beyond that changes nothing. At once, because the refill that follows would
    /// otherwise be told that the pack is present.
    pub fn report_lost(&self, request: &v1::LostReport) -> Result<(), Error> {
        let digest = hash(&request.pack, "a pack's name")?;
        let told = request
            .extent
            .ok_or_else(|| Error::Invalid("the report names no extent".into()))?;
        let why: String = request
            .why
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        let now_ms = self.now_ms();
        let mut state = self.lock();
        let Some((pack, extent)) = find_replica(&state, &digest, &told)? else {
            return Ok(());
        };
        if state
            .donors
            .get(&told.donor)
            .is_some_and(|donor| donor.live)
        {
            let State { nodes, lost, .. } = &mut *state;
            let budget = nodes
                .get_mut(&request.node)
                .map_or(lost, |node| &mut node.lost);
            if !budget.spend(now_ms) {
                tracing::warn!(
                    node = request.node,
                    why,
                    "too many replicas reported lost, not believed"
                );
                return Ok(());
            }
        }
        tracing::warn!(
            pack = hex::encode(digest),
            donor = told.donor,
            node = request.node,
            why,
            "replica lost"
        );
        self.change(&mut state, Sync::Process, None, |tx, effects| {
            drop_replica(tx, effects, &pack, &extent)
        })
    }
}

/// The committed extent that a report means, if it is still one.
pub(super) fn find_replica(
    state: &State,
    digest: &Hash,
    told: &v1::Extent,
) -> Result<Option<(PackRow, ExtentRow)>, Error> {
    let epoch = state.donors.get(&told.donor).map(|donor| donor.epoch);
    if epoch != Some(told.epoch) {
        return Ok(None);
    }
    let read = state.writer.read();
    let Some(pack) = read.pack(digest)? else {
        return Ok(None);
    };
    let extents = read.extents_of_pack(pack.id)?;
    let extent = extents
        .into_iter()
        .find(|extent| extent.pull.is_none() && same_place(told, &extent.place));
    Ok(extent.map(|extent| (pack, extent)))
}

/// Whether a message means a place, whatever the epoch.
pub(super) fn same_place(told: &v1::Extent, place: &Place) -> bool {
    let told = Place {
        donor: told.donor,
        region: told.region,
        offset: told.offset,
        len: told.len,
    };
    told == *place
}

pub(super) fn drop_replica(
    tx: &Tx<'_>,
    effects: &mut Effects,
    pack: &PackRow,
    extent: &ExtentRow,
) -> Result<(), Error> {
    effects.free_committed(tx, pack, extent)?;
    if !tx
        .extents_of_pack(pack.id)?
        .iter()
        .any(|other| other.pull.is_none())
    {
        effects.removed.push(pack.id);
    }
    Ok(())
}
