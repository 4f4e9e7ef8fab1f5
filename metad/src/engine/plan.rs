//! Replicas that are missing or too many: what packs of images have and should have.
//!
//! All packs are looked at together, on a reader's connection, at most once in [`LOOK_EVERY_MS`] and
//! only when something changed; what is then done for one pack looks at that pack again.

use std::collections::{HashSet, VecDeque};

use super::{
    Engine,
    copies::{COPIES_PER_DONOR, Copy},
    reserve::PACK_MAX,
    state::State,
};
use crate::{
    error::Error,
    space::{Ask, Book, Place},
    store::{CopyRow, ExtentRow, PackRow, Read, Standing, Sync},
};

/// Shortest time between two looks at all packs.
const LOOK_EVERY_MS: u64 = 1_000;
/// Longest, while some are short of replicas: room may have been made for them.
const LOOK_AGAIN_MS: u64 = 10_000;
/// Packs that are remembered from one look.
const QUEUE_MAX: usize = 4096;
/// Packs that lose replicas in one round.
const TRIM_MAX: usize = 64;
/// Packs in a row for which there is no room, after which no others are tried.
const NO_ROOM_MAX: usize = 16;
/// Reads within [`COOL_EVERY_MS`] or so that make a pack one that is read often.
const HOT_READS: u32 = 64;
/// Packs that may be read often at a time.
const HOT_MAX: usize = 1024;
/// How often earlier reads lose half their weight.
const COOL_EVERY_MS: u64 = 60_000;
/// Part of the pool that must be free for more replicas than wanted.
const HOT_FREE: u64 = 4;

/// What a look at all packs found.
#[derive(Debug, Default)]
pub(super) struct Standings {
    /// Replicas wanted, all packs together.
    pub(super) wanted: u64,
    pub(super) missing: u64,
    /// Packs with a replica and fewer than wanted.
    pub(super) short: u64,
    /// Packs with none.
    pub(super) lost: u64,
    /// Those that can be copied, the fewest replicas first, and how many they should have.
    queue: VecDeque<(u64, u32)>,
    /// Those with too many, and how many they should have.
    surplus: Vec<(u64, u32)>,
}

/// A replica with its donor's standing.
struct Replicas {
    live: Vec<ExtentRow>,
    staying: Vec<u64>,
    /// Donors that have it, live or not.
    all: Vec<u64>,
}

impl Engine {
    /// A round of looking and planning.
    pub(super) fn replicate(&self) -> Result<(), Error> {
        let now_ms = self.now_ms();
        let mut state = self.lock();
        self.allow(&mut state, now_ms);
        let copies = &state.copies;
        let since = copies.looked_ms.map(|at| now_ms.saturating_sub(at));
        let due = since.is_none_or(|since| {
            since >= LOOK_EVERY_MS && copies.look
                || since >= LOOK_AGAIN_MS && copies.standings.short > 0
        });
        if due {
            state.copies.look = false;
            state.copies.looked_ms = Some(now_ms);
            let hot = self.hot(&mut state);
            let open = state.space.open_donors().len();
            drop(state);
            let standings = self.store.read(|read| self.look(read, &hot, open))?;
            state = self.lock();
            state.copies.standings = standings;
        }
        self.trim(&mut state)?;
        self.plan_copies(&mut state)?;
        Ok(())
    }

    /// Lets more bytes be copied as time passes, and what was read long ago count less.
    fn allow(&self, state: &mut State, now_ms: u64) {
        let copies = &mut state.copies;
        let passed_ms = now_ms.saturating_sub(copies.allowed_ms).min(1_000);
        copies.allowed_ms = now_ms;
        let a_second = u64::from(self.options.rebalance_mib_s) << 20;
        // What was not used for a second is not saved up; one pack can always be paid for.
        let most = if a_second == 0 {
            0
        } else {
            a_second.max(u64::from(PACK_MAX))
        };
        copies.allowance = (copies.allowance + a_second * passed_ms / 1_000).min(most);
        if now_ms.saturating_sub(copies.cooled_ms) >= COOL_EVERY_MS {
            copies.cooled_ms = now_ms;
            // Packs that are not read often any more have a replica too many.
            copies.look |= self.options.hot_replicas > 0;
            state.space.cool();
            state.policy.cool();
        }
    }

    /// Packs that are read so often that one more replica is worth its memory.
    fn hot(&self, state: &mut State) -> HashSet<u64> {
        let books = state.space.open_books();
        if self.options.hot_replicas == 0 || books.free < books.lent / HOT_FREE {
            return HashSet::new();
        }
        let hot = state.policy.hot(HOT_READS, HOT_MAX);
        hot.into_iter().collect()
    }

    fn look(
        &self,
        read: &Read<'_>,
        hot: &HashSet<u64>,
        open_donors: usize,
    ) -> Result<Standings, Error> {
        let mut found = Standings::default();
        let mut short: Vec<(u32, u64, u32)> = Vec::new();
        read.for_each_standing(self.options.replicas, |standing| {
            let Standing {
                pack,
                want,
                live,
                staying,
            } = standing;
            found.wanted += u64::from(want);
            found.missing += u64::from(want.saturating_sub(staying));
            found.lost += u64::from(live == 0);
            found.short += u64::from(live > 0 && staying < want);
            let mut want = want;
            if hot.contains(&pack) && want < self.options.hot_replicas {
                want += 1;
            }
            if live > 0 && staying < want && (staying as usize) < open_donors {
                short.push((staying, pack, want));
            } else if live > want && found.surplus.len() < QUEUE_MAX {
                found.surplus.push((pack, want));
            }
        })?;
        short.sort_unstable();
        short.truncate(QUEUE_MAX);
        found.queue = short.iter().map(|(_, pack, want)| (*pack, *want)).collect();
        Ok(found)
    }

    /// Takes replicas away that are more than wanted: after a donor came back, after a copy off a
    /// donor that leaves, after an image wants fewer.
    fn trim(&self, state: &mut State) -> Result<(), Error> {
        let mut dropped: Vec<(PackRow, ExtentRow)> = Vec::new();
        for _ in 0..TRIM_MAX {
            let Some((pack, want)) = state.copies.standings.surplus.pop() else {
                break;
            };
            let read = state.writer.read();
            let Some(row) = read.pack_of(pack)? else {
                continue;
            };
            let found = replicas(state, &read, pack)?;
            let spare = found.live.len().saturating_sub(want.max(1) as usize);
            if spare == 0 || state.copies.of_pack(pack) {
                continue;
            }
            let mut order = found.live;
            order.sort_by_cached_key(|extent| {
                superfluous(state, extent.place.donor, &found.staying)
            });
            dropped.extend(
                order
                    .into_iter()
                    .rev()
                    .take(spare)
                    .map(|extent| (row, extent)),
            );
        }
        if dropped.is_empty() {
            return Ok(());
        }
        self.change(state, Sync::Process, None, |tx, effects| {
            dropped
                .iter()
                .try_for_each(|(pack, extent)| effects.free_committed(tx, pack, extent))
        })
    }

    /// Plans copies as far as they may be under way: first what is missing, then what evens the
    /// load.
    pub(super) fn plan_copies(&self, state: &mut State) -> Result<(), Error> {
        state.copies.behind = false;
        let mut planned = Vec::new();
        let outcome = self
            .plan_missing(state, &mut planned)
            .and_then(|()| self.plan_moves(state, &mut planned));
        let outcome = outcome.and_then(|()| self.write_copies(state, &planned));
        if outcome.is_err() {
            for copy in &planned {
                state.space.free(&copy.row.place, Book::Reserved);
            }
        }
        outcome
    }

    fn plan_missing(&self, state: &mut State, planned: &mut Vec<Copy>) -> Result<(), Error> {
        let now_ms = self.now_ms();
        let mut no_room = 0;
        while let Some((pack, want)) = state.copies.standings.queue.pop_front() {
            if state.copies.of_pack(pack) || state.copies.set_aside(pack, now_ms) {
                continue;
            }
            let busy = busy(state, planned);
            let idle = |id: &u64| !busy.contains(id);
            if state.copies.allowance < u64::from(PACK_MAX)
                || !state.space.open_donors().iter().any(idle)
            {
                state.copies.standings.queue.push_front((pack, want));
                state.copies.behind = true;
                return Ok(());
            }
            let read = state.writer.read();
            let Some(row) = read.pack_of(pack)? else {
                continue;
            };
            let found = replicas(state, &read, pack)?;
            if found.live.is_empty() || found.staying.len() >= want as usize {
                continue;
            }
            let avoid: Vec<u64> = found.all.iter().chain(&busy).copied().collect();
            let place = state.space.reserve(Ask {
                len: row.len,
                holders: &found.staying,
                avoid: &avoid,
                headroom: true,
            });
            match place {
                Some(place) => planned.push(self.planned(state, pack, place, None)),
                None if busy.is_empty() => {
                    no_room += 1;
                    if no_room >= NO_ROOM_MAX {
                        state.copies.standings.queue.clear();
                    }
                }
                None => state.copies.behind = true,
            }
        }
        Ok(())
    }

    /// A copy that is paid for and not yet written down.
    pub(super) fn planned(
        &self,
        state: &mut State,
        pack: u64,
        place: Place,
        moved_from: Option<u64>,
    ) -> Copy {
        let copies = &mut state.copies;
        copies.allowance = copies.allowance.saturating_sub(place.held_bytes());
        let row = CopyRow {
            id: state.issue(),
            pack,
            place,
        };
        Copy {
            row,
            moved_from,
            told: false,
            expires_ms: self.now_ms() + self.options.timing.copy_lease_ms,
        }
    }

    fn write_copies(&self, state: &mut State, planned: &[Copy]) -> Result<(), Error> {
        if planned.is_empty() {
            return Ok(());
        }
        self.change(state, Sync::Process, None, |tx, _| {
            planned.iter().try_for_each(|copy| tx.add_copy(&copy.row))
        })?;
        let under_way = &mut state.copies.under_way;
        under_way.extend(planned.iter().map(|copy| (copy.row.id, *copy)));
        tracing::debug!(copies = planned.len(), "planned");
        Ok(())
    }
}

/// Donors that make as many copies as they may.
pub(super) fn busy(state: &State, planned: &[Copy]) -> Vec<u64> {
    let open = state.space.open_donors().into_iter();
    open.filter(|id| {
        let more = planned.iter().filter(|copy| copy.row.place.donor == *id);
        state.copies.of_donor(*id) + more.count() >= COPIES_PER_DONOR
    })
    .collect()
}

fn replicas(state: &State, read: &Read<'_>, pack: u64) -> Result<Replicas, Error> {
    let committed = read.extents_of_pack(pack)?.into_iter();
    let committed: Vec<ExtentRow> = committed.filter(|extent| extent.pull.is_none()).collect();
    let donor = |extent: &ExtentRow| state.donors.get(&extent.place.donor);
    let live = committed
        .iter()
        .filter(|extent| donor(extent).is_some_and(|donor| donor.live));
    let staying = live
        .clone()
        .filter(|extent| donor(extent).is_some_and(|donor| !donor.draining));
    Ok(Replicas {
        staying: staying.map(|extent| extent.place.donor).collect(),
        live: live.copied().collect(),
        all: committed.iter().map(|extent| extent.place.donor).collect(),
    })
}

/// How little a replica is worth beside the others: on a donor that leaves, in a failure domain
/// with another, on a donor that is full.
fn superfluous(state: &State, donor: u64, staying: &[u64]) -> (bool, bool, u64) {
    let leaves = state.donors.get(&donor).is_some_and(|donor| donor.draining);
    let others: Vec<u64> = staying.iter().copied().filter(|id| *id != donor).collect();
    let books = state.space.donor_books(donor).unwrap_or_default();
    let used_ppm = books.used.saturating_mul(1_000_000) / books.lent.max(1);
    (leaves, state.space.shares_domain(donor, &others), used_ppm)
}
