//! Making room: victims by policy, and quarantine until readers have let go.

use std::collections::HashSet;

use super::{Around, Engine, state::State};
use crate::{
    error::Error,
    space::Book,
    store::{Counter, ExtentRow, Read, Sync},
};

/// What making room came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Something is free that was not: try again at once.
    Made,
    /// Something will be free when readers have let go of it.
    Later,
}

/// What space is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) bytes: u64,
    pub(super) packs: usize,
}

/// Bytes that a pack has on these donors.
fn bytes_on(read: &Read<'_>, pack: u64, donors: &HashSet<u64>) -> Result<u64, Error> {
    let extents = read.extents_of_pack(pack)?;
    let there = extents
        .iter()
        .filter(|extent| extent.pull.is_none() && donors.contains(&extent.place.donor));
    Ok(there.map(|extent| extent.place.held_bytes()).sum())
}

/// The error of a pool that cannot take so much more.
pub(super) fn exhausted(state: &State, Asked { bytes, packs }: Asked, evictable: u64) -> Error {
    let books = state.space.open_books();
    Error::Exhausted(format!(
        "no room for {bytes} bytes in {packs} packs: live donors lend {} bytes, {} free, {} used \
         (of which {evictable} could be evicted), {} reserved by pulls, {} waiting for readers; lend more, \
         remove images, or pull fewer at a time",
        books.lent, books.free, books.used, books.reserved, books.quarantined
    ))
}

impl Engine {
    /// Evicts for a request, never a pack of `keep` or one that a pull holds on to.
    pub(super) fn make_room(
        &self,
        state: &mut State,
        asked: Asked,
        keep: &HashSet<u64>,
        may_wait: bool,
    ) -> Result<Room, Error> {
        // What readers have let go of meanwhile costs nobody anything.
        if self.release(state)? > 0 {
            return Ok(Room::Made);
        }
        let books = state.space.open_books();
        let short = asked.bytes.saturating_sub(books.free + books.quarantined);
        if short == 0 && books.quarantined > 0 {
            return if may_wait {
                Ok(Room::Later)
            } else {
                Err(exhausted(state, asked, 0))
            };
        }
        // With enough bytes free in all and no hole that fits, as much again is given up.
        let need = if short > 0 { short } else { asked.bytes };
        let open = state.space.open_donors().into_iter().collect();
        let (victims, evictable) = self.victims(state, need, keep, &open)?;
        if victims.is_empty() || (short > 0 && evictable < short) {
            return Err(exhausted(state, asked, evictable));
        }
        self.evict(state, &victims, &HashSet::new())?;
        if self.release(state)? > 0 {
            return Ok(Room::Made);
        }
        if may_wait {
            Ok(Room::Later)
        } else {
            Err(exhausted(state, asked, 0))
        }
    }

    /// Makes room on these donors, where there is nobody else for one more replica: packs that have
    /// others lose the one that lies there, the others go whole.
    pub(super) fn make_room_on(
        &self,
        state: &mut State,
        asked: Asked,
        keep: &HashSet<u64>,
        full: &HashSet<u64>,
    ) -> Result<(), Error> {
        let books = |id: &u64| state.space.donor_books(*id).unwrap_or_default();
        let waits: u64 = full.iter().map(|id| books(id).quarantined).sum();
        let short = asked.bytes.saturating_sub(waits);
        if short == 0 {
            return Ok(());
        }
        let (victims, _) = self.victims(state, short, keep, full)?;
        self.evict(state, &victims, full)?;
        self.release(state).map(drop)
    }

    /// Victims that give at least `need` bytes on these donors, if there are such, and their bytes.
    /// Packs of what nodes hold open are taken only when the others do not suffice.
    fn victims(
        &self,
        state: &mut State,
        need: u64,
        keep: &HashSet<u64>,
        donors: &HashSet<u64>,
    ) -> Result<(Vec<u64>, u64), Error> {
        let State {
            policy,
            writer,
            nodes,
            ..
        } = state;
        let read = writer.read();
        let numbers: HashSet<u32> = nodes
            .values()
            .flat_map(|node| node.held.iter().copied())
            .collect();
        let open = read.packs_of_numbers(&numbers)?;
        let mut failed = None;
        let mut chosen: Vec<u64> = Vec::new();
        let mut sum = 0;
        for spare_open in [true, false] {
            let taken: HashSet<u64> = chosen.iter().copied().collect();
            let mut spared = |pack: u64| {
                if taken.contains(&pack)
                    || keep.contains(&pack)
                    || (spare_open && open.contains(&pack))
                {
                    return true;
                }
                let useless = read
                    .pinned(pack)
                    .and_then(|pinned| Ok(pinned || bytes_on(&read, pack, donors)? == 0));
                useless.unwrap_or_else(|error| {
                    failed = Some(error);
                    true
                })
            };
            let more = policy.victims(need - sum, &mut spared);
            if let Some(error) = failed {
                return Err(error);
            }
            for pack in more {
                // The policy counts one replica of each, and more than one may go.
                if sum >= need {
                    break;
                }
                sum += bytes_on(&read, pack, donors)?;
                chosen.push(pack);
            }
            if sum >= need {
                break;
            }
        }
        Ok((chosen, sum))
    }

    /// Takes packs away, or, of those with another replica elsewhere, only what lies on the donors in
    /// `only`.
    fn evict(&self, state: &mut State, victims: &[u64], only: &HashSet<u64>) -> Result<(), Error> {
        if victims.is_empty() {
            return Ok(());
        }
        let around = Around("evict.before", "evict.after");
        self.change(state, Sync::Process, Some(around), |tx, effects| {
            for id in victims {
                let Some(pack) = tx.pack_of(*id)? else {
                    continue;
                };
                let mut gone = tx.extents_of_pack(*id)?;
                gone.retain(|extent| extent.pull.is_none());
                let stays = |extent: &ExtentRow| !only.contains(&extent.place.donor);
                let thinned = !only.is_empty() && tx.live_elsewhere(*id, only)?;
                if thinned {
                    gone.retain(|extent| !stays(extent));
                } else {
                    effects.removed.push(*id);
                }
                for extent in &gone {
                    effects.free_committed(tx, &pack, extent)?;
                }
            }
            tx.bump(Counter::Evictions, victims.len() as u64).map(drop)
        })?;
        tracing::debug!(packs = victims.len(), "evicted");
        Ok(())
    }

    /// Lets space out of quarantine that no reader can know of any more; gives the bytes.
    pub(super) fn release(&self, state: &mut State) -> Result<u64, Error> {
        let now_ms = self.now_ms();
        let acknowledged = state
            .nodes
            .values()
            .map(|node| node.acknowledged)
            .min()
            .unwrap_or(u64::MAX);
        let ready = |held: &super::state::Held| {
            held.not_before_ms <= now_ms && held.row.generation <= acknowledged
        };
        if !state.quarantine.iter().any(ready) {
            return Ok(0);
        }
        let (out, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut state.quarantine)
            .into_iter()
            .partition(ready);
        state.quarantine = kept;
        let around = Around("release.before", "release.after");
        let deleted = self.change(state, Sync::Process, Some(around), |tx, effects| {
            for held in &out {
                tx.delete_quarantine(held.row.id)?;
                effects.freed.push((held.row.place, Book::Quarantined));
            }
            Ok(())
        });
        if let Err(error) = deleted {
            state.quarantine.extend(out);
            return Err(error);
        }
        Ok(out.iter().map(|held| held.row.place.held_bytes()).sum())
    }
}
