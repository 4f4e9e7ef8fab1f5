//! Copies of packs between donors: who is told to make them, and what becomes of them.
//!
//! A copy is planned by [`super::plan`] or [`super::rebalance`]: its space is reserved and written
//! down. The donor that is to hold it is told with its next lease, makes it, and reports. Told or
//! not, one that is not reported in time ends, and its space waits as that of a late writer does.

use std::collections::{BTreeMap, HashMap};

use harbour_metad_client::v1;
use prost::Message;

use super::{
    Effects, Engine,
    catalogue::extent,
    collect::collect,
    donors::Tokens,
    nodes::{drop_replica, find_replica},
    plan::Standings,
    state::State,
};
use crate::{
    error::{Error, hash},
    space::Place,
    store::{CopyRow, ExtentRow, Sync, Tx},
};

/// Copies that one donor makes at a time.
pub(super) const COPIES_PER_DONOR: usize = 16;
/// Objects that a task lists; a donor asks for those of a pack that has more.
const OBJECTS_LISTED: u32 = 512;
/// Objects in one answer to [`Engine::list_objects`].
const OBJECTS_PAGE: u32 = 8192;
/// Bytes of tasks in one answer: half a frame.
const TASKS_BYTES: usize = 512 << 10;
/// Outcomes in one report.
const OUTCOMES_MAX: usize = 256;
/// Wrong sources in one outcome.
const BAD_MAX: usize = 16;
/// When more is to be copied, a donor asks again after this time.
const ASK_AGAIN_MS: u32 = 200;
/// Packs that are left alone for a while because a copy failed.
const FAILED_MAX: usize = 4096;
/// And for how long at first; twice as long after each failure.
const FAILED_MS: u64 = 2_000;
/// And at most.
const FAILED_MOST_MS: u64 = 300_000;

/// A copy under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) row: CopyRow,
    /// The donor whose replica goes when this one is there: a move.
    pub(super) moved_from: Option<u64>,
    /// The donor that is to make it knows of it.
    pub(super) told: bool,
    pub(super) expires_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Failure {
    times: u32,
    until_ms: u64,
}

/// All copies, what is left to be copied, and figures since the start.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) under_way: BTreeMap<u64, Copy>,
    failed: HashMap<u64, Failure>,
    /// What the last look at all packs found.
    pub(super) standings: Standings,
    /// Something changed since.
    pub(super) look: bool,
    pub(super) looked_ms: Option<u64>,
    /// Moving packs until the load is even.
    pub(super) rebalancing: bool,
    /// More is to be copied than may be under way.
    pub(super) behind: bool,
    /// Bytes that may be copied now.
    pub(super) allowance: u64,
    pub(super) allowed_ms: u64,
    pub(super) cooled_ms: u64,
    pub(super) done: u64,
    pub(super) failures: u64,
    pub(super) bytes: u64,
    pub(super) moved_bytes: u64,
}

impl Copies {
    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            under_way: BTreeMap::new(),
            failed: HashMap::new(),
            standings: Standings::default(),
            look: true,
            looked_ms: None,
            rebalancing: false,
            behind: false,
            allowance: 0,
            allowed_ms: now_ms,
            cooled_ms: now_ms,
            done: 0,
            failures: 0,
            bytes: 0,
            moved_bytes: 0,
        }
    }

    /// Replicas came or went, or donors did.
    pub(super) fn look_again(&mut self) {
        self.look = true;
    }

    pub(super) fn catch_up(&mut self, missed_ms: u64) {
        self.under_way
            .values_mut()
            .for_each(|copy| copy.expires_ms += missed_ms);
        self.allowed_ms += missed_ms;
    }

    /// Copies that a donor is to make.
    pub(super) fn tasks_of(&self, donor: u64) -> Vec<u64> {
        let copies = self.under_way.values();
        copies
            .filter(|copy| copy.row.place.donor == donor)
            .map(|copy| copy.row.id)
            .collect()
    }

    /// How many those are.
    pub(super) fn of_donor(&self, donor: u64) -> usize {
        self.tasks_of(donor).len()
    }

    /// Whether a copy of a pack is under way.
    pub(super) fn of_pack(&self, pack: u64) -> bool {
        self.under_way.values().any(|copy| copy.row.pack == pack)
    }

    /// Whether copies of a pack failed a moment ago.
    pub(super) fn set_aside(&self, pack: u64, now_ms: u64) -> bool {
        let failure = self.failed.get(&pack);
        failure.is_some_and(|failure| failure.until_ms > now_ms)
    }

    fn note(&mut self, copy: &Copy, ok: bool, now_ms: u64) {
        if ok {
            self.failed.remove(&copy.row.pack);
            self.done += 1;
            self.bytes += u64::from(copy.row.place.len);
            if copy.moved_from.is_some() {
                self.moved_bytes += u64::from(copy.row.place.len);
            }
            return;
        }
        self.failures += 1;
        if self.failed.len() >= FAILED_MAX {
            self.failed.retain(|_, failure| failure.until_ms > now_ms);
        }
        if self.failed.len() >= FAILED_MAX {
            return;
        }
        let failure = self.failed.entry(copy.row.pack).or_insert(Failure {
            times: 0,
            until_ms: 0,
        });
        let wait = FAILED_MS.saturating_mul(1 << failure.times.min(16));
        failure.until_ms = now_ms + wait.min(FAILED_MOST_MS);
        failure.times += 1;
    }
}

impl Engine {
    /// A donor's lease, with the copies that it is to make.
    pub(super) fn donor_lease(&self, state: &mut State, id: u64) -> Result<v1::DonorLease, Error> {
        let now_ms = self.now_ms();
        let mut lease = v1::DonorLease {
            id,
            lease_ms: u32::try_from(self.options.timing.donor_lease_ms).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let waiting: Vec<Copy> = state
            .copies
            .under_way
            .values()
            .filter(|copy| copy.row.place.donor == id && !copy.told)
            .copied()
            .collect();
        let (mut bytes, mut lost, mut left) = (0, Vec::new(), false);
        for copy in waiting {
            let Some(task) = self.task(state, &copy)? else {
                lost.push(copy.row.id);
                continue;
            };
            bytes += task.encoded_len() + 8;
            if bytes > TASKS_BYTES && !lease.tasks.is_empty() {
                left = true;
                break;
            }
            if let Some(copy) = state.copies.under_way.get_mut(&copy.row.id) {
                copy.told = true;
                let timing = &self.options.timing;
                copy.expires_ms = now_ms + timing.copy_lease_ms + timing.margin_ms;
            }
            lease.tasks.push(task);
        }
        self.end_copies(state, &lost)?;
        if left || state.copies.behind {
            lease.ask_again_ms = ASK_AGAIN_MS;
        }
        if state.donors.get(&id).is_some_and(|donor| donor.draining) {
            lease.draining = true;
            let only = state.writer.read().only_on(id)?;
            lease.left_bytes = only.iter().map(Place::held_bytes).sum();
            let under_way = state.copies.under_way.values();
            let coming: u64 = under_way.map(|copy| copy.row.place.held_bytes()).sum();
            lease.stuck_bytes = lease
                .left_bytes
                .saturating_sub(state.space.spare_bytes() + coming);
        }
        Ok(lease)
    }

    /// A copy as its maker is told of it; `None` when there is nothing left to copy from.
    fn task(&self, state: &State, copy: &Copy) -> Result<Option<v1::CopyTask>, Error> {
        let read = state.writer.read();
        let Some(pack) = read.pack_of(copy.row.pack)? else {
            return Ok(None);
        };
        let to = &copy.row.place;
        let Some(own) = read.donor(to.donor)? else {
            return Ok(None);
        };
        let mut donors = vec![super::donors::message(own.clone(), Tokens::Both)];
        let mut from = Vec::new();
        for replica in read.locate(&pack.digest)? {
            if let Some(donor) = read.donor(replica.place.donor)? {
                from.push(extent(&replica.place, replica.epoch));
                donors.push(super::donors::message(donor, Tokens::Read));
            }
        }
        if from.is_empty() {
            return Ok(None);
        }
        let objects = read.objects_of_pack(pack.id, 0, OBJECTS_LISTED)?;
        Ok(Some(v1::CopyTask {
            task: copy.row.id,
            pack: pack.digest.to_vec(),
            len: pack.len,
            from,
            to: Some(extent(to, own.epoch)),
            objects: objects.iter().map(object).collect(),
            object_count: read.object_count(pack.id)?,
            donors,
            lease_ms: u32::try_from(self.options.timing.copy_lease_ms).unwrap_or(u32::MAX),
        }))
    }

    /// Objects of a pack, for a task that does not list them all.
    pub fn list_objects(
        &self,
        request: &v1::ListObjectsRequest,
    ) -> Result<v1::ListObjectsReply, Error> {
        let digest = hash(&request.pack, "a pack's name")?;
        self.store.read(|read| {
            let pack = read.pack(&digest)?.ok_or_else(|| {
                Error::NotFound(format!("no layer knows a pack {}", hex::encode(digest)))
            })?;
            let objects = read.objects_of_pack(pack.id, request.from, OBJECTS_PAGE)?;
            Ok(v1::ListObjectsReply {
                last: objects.len() < OBJECTS_PAGE as usize,
                objects: objects.iter().map(object).collect(),
            })
        })
    }

    /// Takes in what became of copies, and tells of more.
    pub fn copied(&self, request: &v1::CopiedReport) -> Result<v1::DonorLease, Error> {
        if request.outcomes.len() > OUTCOMES_MAX {
            return Err(Error::Invalid(format!(
                "{} outcomes in one report, at most {OUTCOMES_MAX}",
                request.outcomes.len()
            )));
        }
        let donor = request.donor.unwrap_or_default();
        let now_ms = self.now_ms();
        let mut state = self.lock();
        self.hear_donor(&mut state, &donor)?;
        let mut ended: BTreeMap<u64, (Copy, bool)> = BTreeMap::new();
        for outcome in &request.outcomes {
            // One that expired, or whose region was retired, is nobody's any more.
            let known = state.copies.under_way.get(&outcome.task).copied();
            let Some(copy) = known.filter(|copy| copy.row.place.donor == donor.id) else {
                continue;
            };
            if !outcome.ok {
                let why: String = outcome.why.chars().filter(|c| !c.is_control()).collect();
                let why: String = why.chars().take(200).collect();
                tracing::warn!(task = outcome.task, donor = donor.id, why, "a copy failed");
                self.bad_sources(&mut state, &copy, outcome, now_ms)?;
            }
            ended.insert(outcome.task, (copy, outcome.ok));
        }
        if !ended.is_empty() {
            let reach = self.reach(&state);
            self.change(&mut state, Sync::Process, None, |tx, effects| {
                for (copy, ok) in ended.values() {
                    if *ok {
                        self.commit_copy(tx, effects, copy)?;
                    } else {
                        effects.drop_copy(tx, &copy.row, None)?;
                    }
                }
                let packs = ended.values().map(|(copy, _)| copy.row.pack).collect();
                collect(tx, effects, &reach, packs).map(drop)
            })?;
            for (copy, ok) in ended.values() {
                state.copies.note(copy, *ok, now_ms);
            }
            self.plan_copies(&mut state)?;
        }
        let freed = self.release(&mut state)?;
        let lease = self.donor_lease(&mut state, donor.id);
        drop(state);
        if freed > 0 {
            self.tell_space_freed();
        }
        lease
    }

    /// The copy is a replica from now on; what it was to take the place of goes, unless a replica
    /// was lost meanwhile. A pull or refill may have written the pack to the same donor while the copy
    /// was made: one of the two is enough there.
    fn commit_copy(&self, tx: &Tx<'_>, effects: &mut Effects, copy: &Copy) -> Result<(), Error> {
        let there = tx.extents_of_pack(copy.row.pack)?;
        let same_donor = |extent: &&ExtentRow| {
            extent.pull.is_none() && extent.place.donor == copy.row.place.donor
        };
        if there.iter().any(|extent| same_donor(&extent)) {
            return effects.drop_copy(tx, &copy.row, None);
        }
        effects.commit_copy(tx, &copy.row)?;
        let (Some(from), Some(pack)) = (copy.moved_from, tx.pack_of(copy.row.pack)?) else {
            return Ok(());
        };
        let want = tx.wanted_replicas(pack.id, self.options.replicas)?.max(1);
        let extents = tx.extents_of_pack(pack.id)?;
        let old = extents
            .iter()
            .find(|extent| extent.pull.is_none() && extent.place.donor == from);
        match old {
            Some(old) if tx.live_replicas(pack.id)? > want => {
                effects.free_committed(tx, &pack, old)
            }
            _ => Ok(()),
        }
    }

    /// Drops replicas that a maker of copies found wrong, as far as it is believed.
    fn bad_sources(
        &self,
        state: &mut State,
        copy: &Copy,
        outcome: &v1::CopyOutcome,
        now_ms: u64,
    ) -> Result<(), Error> {
        let Some(pack) = state.writer.read().pack_of(copy.row.pack)? else {
            return Ok(());
        };
        for bad in outcome.bad.iter().take(BAD_MAX) {
            let Some((pack, extent)) = find_replica(state, &pack.digest, bad)? else {
                continue;
            };
            let maker = state.donors.get_mut(&copy.row.place.donor);
            if !maker.is_some_and(|maker| maker.lost.spend(now_ms)) {
                return Ok(());
            }
            self.change(state, Sync::Process, None, |tx, effects| {
                drop_replica(tx, effects, &pack, &extent)
            })?;
        }
        Ok(())
    }

    /// Ends copies that will not be made, or not in time.
    pub(super) fn end_copies(&self, state: &mut State, tasks: &[u64]) -> Result<(), Error> {
        let under_way = &state.copies.under_way;
        let ended: Vec<Copy> = tasks
            .iter()
            .filter_map(|task| under_way.get(task).copied())
            .collect();
        if ended.is_empty() {
            return Ok(());
        }
        let now_ms = self.now_ms();
        let late = now_ms + self.options.timing.longest_write_ms();
        let reach = self.reach(state);
        self.change(state, Sync::Process, None, |tx, effects| {
            for copy in &ended {
                effects.drop_copy(tx, &copy.row, copy.told.then_some(late))?;
            }
            let packs = ended.iter().map(|copy| copy.row.pack).collect();
            collect(tx, effects, &reach, packs).map(drop)
        })?;
        for copy in &ended {
            state.copies.note(copy, false, now_ms);
        }
        state.copies.look_again();
        Ok(())
    }

    /// Ends copies that were not reported in time.
    pub(super) fn expire_copies(&self, state: &mut State, now_ms: u64) -> Result<(), Error> {
        let under_way = state.copies.under_way.values();
        let expired: Vec<u64> = under_way
            .filter(|copy| copy.expires_ms <= now_ms)
            .map(|copy| copy.row.id)
            .collect();
        self.end_copies(state, &expired)
    }
}

fn object(row: &crate::store::ObjectRow) -> v1::PackObject {
    v1::PackObject {
        object: row.digest.to_vec(),
        offset: row.offset,
        len: row.len,
    }
}
