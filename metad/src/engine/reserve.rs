//! Space for the packs of a pull.

use std::collections::HashSet;

use harbour_metad_client::{RESERVE_MAX, v1};

use super::{
    Around, Engine,
    donors::Tokens,
    evict::{Asked, Room, exhausted},
    state::State,
};
use crate::{
    error::{Error, Hash, hash},
    policy::Weight,
    space::{Book, Place, held},
    store::{ExtentRow, PackRow, Sync},
};

/// Largest pack in bytes.
pub(super) const PACK_MAX: u32 = 4 << 20;

/// Times that one call makes room and tries again.
const ROUNDS: usize = 8;

/// What came of asking for space.
#[derive(Debug)]
pub enum Reserving {
    /// Here it is.
    Done(v1::ReserveReply),
    /// Space was freed that readers have not let go of yet: ask again when
    /// [`Engine::watch_space`] changes.
    Wait,
}

/// What is to be done for one pack.
#[derive(Debug)]
enum Slot {
    /// The pool has it.
    Present(PackRow),
    /// This pull has space for it already: what it may use, and what it must not any more.
    Again(PackRow, Vec<ExtentRow>, Vec<ExtentRow>),
    /// It needs space.
    New {
        digest: Hash,
        len: u32,
        row: Option<PackRow>,
        stale: Vec<ExtentRow>,
        places: Vec<Place>,
    },
}

/// Reads a list of packs of bounded length, each once.
pub(super) fn wanted(packs: &[v1::PackWanted]) -> Result<Vec<(Hash, u32)>, Error> {
    if packs.len() > RESERVE_MAX {
        return Err(Error::Invalid(format!(
            "{} packs in one call, at most {RESERVE_MAX} are allowed",
            packs.len()
        )));
    }
    let mut seen = HashSet::new();
    packs
        .iter()
        .map(|pack| {
            let digest = hash(&pack.pack, "a pack's name")?;
            if pack.len == 0 || pack.len > PACK_MAX {
                return Err(Error::Invalid(format!(
                    "pack of {} bytes: 1 to {PACK_MAX} are allowed",
                    pack.len
                )));
            }
            if !seen.insert(digest) {
                return Err(Error::Invalid(format!(
                    "pack {} is named twice",
                    hex::encode(digest)
                )));
            }
            Ok((digest, pack.len))
        })
        .collect()
}

impl Engine {
    /// Space for packs, all or none. With `may_wait`, freed space that readers still know of is
    /// worth waiting for.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with figures when eviction cannot help.
    pub fn reserve(
        &self,
        request: &v1::ReserveRequest,
        may_wait: bool,
    ) -> Result<Reserving, Error> {
        let packs = wanted(&request.packs)?;
        let mut state = self.lock();
        for _ in 0..ROUNDS {
            let now_ms = self.now_ms();
            let pull = state.pull(request.pull.as_ref(), now_ms)?;
            let mut slots = self.slots(&state, pull, &packs)?;
            let bytes: u64 = slots.iter().map(Slot::wanted_bytes).sum();
            if self.place(&mut state, &mut slots)? {
                return self
                    .write_reservation(&mut state, pull, slots)
                    .map(Reserving::Done);
            }
            let keep: HashSet<u64> = slots.iter().filter_map(Slot::known).collect();
            let asked = Asked {
                bytes,
                packs: packs.len(),
            };
            match self.make_room(&mut state, asked, &keep, may_wait)? {
                Room::Made => {}
                Room::Later => return Ok(Reserving::Wait),
            }
        }
        if may_wait {
            Ok(Reserving::Wait)
        } else {
            Err(exhausted(
                &state,
                Asked {
                    bytes: 0,
                    packs: packs.len(),
                },
                0,
            ))
        }
    }

    fn slots(&self, state: &State, pull: u64, packs: &[(Hash, u32)]) -> Result<Vec<Slot>, Error> {
        let read = state.writer.read();
        let live = |extent: &ExtentRow| {
            state
                .donors
                .get(&extent.place.donor)
                .is_some_and(|donor| donor.live)
        };
        let mut slots = Vec::with_capacity(packs.len());
        for &(digest, len) in packs {
            let row = read.pack(&digest)?;
            if let Some(row) = row
                && row.len != len
            {
                return Err(Error::Invalid(format!(
                    "pack {} is {} bytes long, not {len}",
                    hex::encode(digest),
                    row.len
                )));
            }
            let Some(row) = row else {
                slots.push(Slot::New {
                    digest,
                    len,
                    row: None,
                    stale: Vec::new(),
                    places: Vec::new(),
                });
                continue;
            };
            if row.visible && read.live_replicas(row.id)? > 0 {
                slots.push(Slot::Present(row));
                continue;
            }
            let own = read
                .extents_of_pack(row.id)?
                .into_iter()
                .filter(|extent| extent.pull == Some(pull));
            let (usable, stale): (Vec<_>, Vec<_>) = own.partition(live);
            slots.push(if usable.is_empty() {
                Slot::New {
                    digest,
                    len,
                    row: Some(row),
                    stale,
                    places: Vec::new(),
                }
            } else {
                Slot::Again(row, usable, stale)
            });
        }
        Ok(slots)
    }

    /// Finds places for all new packs; when one does not fit, none keeps any.
    fn place(&self, state: &mut State, slots: &mut [Slot]) -> Result<bool, Error> {
        for at in 0..slots.len() {
            let Slot::New {
                digest,
                len,
                row,
                places,
                ..
            } = &mut slots[at]
            else {
                continue;
            };
            let weight = Weight {
                bytes: held(*len),
                cost: u64::from(*len),
            };
            if !state.policy.admits(row.map_or(0, |row| row.id), weight) {
                let refused = format!(
                    "the policy {} keeps pack {} out",
                    state.policy.name(),
                    hex::encode(digest)
                );
                give_up(state, slots);
                return Err(Error::Exhausted(refused));
            }
            let mut avoid = Vec::new();
            for _ in 0..self.options.replicas.max(1) {
                // More replicas than donors have room for is not worth failing a pull.
                let Some(place) = state.space.reserve(*len, &avoid) else {
                    break;
                };
                avoid.push(place.donor);
                places.push(place);
            }
            if places.is_empty() {
                give_up(state, slots);
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write_reservation(
        &self,
        state: &mut State,
        pull: u64,
        mut slots: Vec<Slot>,
    ) -> Result<v1::ReserveReply, Error> {
        // A writer that lost a donor may still be writing to it.
        let late = Some(self.now_ms() + self.options.timing.pull_lease_ms);
        let around = Around("reserve.before", "reserve.after");
        let written = self.change(state, Sync::Process, Some(around), |tx, effects| {
            for slot in &slots {
                let (pack, stale, places) = match slot {
                    Slot::Present(row) => (row.id, &[][..], &[][..]),
                    Slot::Again(row, _, stale) => (row.id, &stale[..], &[][..]),
                    Slot::New {
                        digest,
                        len,
                        row,
                        stale,
                        places,
                    } => {
                        let id = match row {
                            Some(row) => row.id,
                            None => tx.add_pack(digest, *len)?,
                        };
                        (id, &stale[..], &places[..])
                    }
                };
                tx.pin(pull, pack)?;
                for extent in stale {
                    effects.free_reserved(tx, extent, late)?;
                }
                for place in places {
                    tx.reserve_extent(pull, pack, place)?;
                }
            }
            Ok(())
        });
        if let Err(error) = written {
            give_up(state, &mut slots);
            return Err(error);
        }
        self.reservation(state, &slots)
    }

    fn reservation(&self, state: &State, slots: &[Slot]) -> Result<v1::ReserveReply, Error> {
        let mut donors = HashSet::new();
        let mut packs = Vec::with_capacity(slots.len());
        for slot in slots {
            let places: Vec<Place> = match slot {
                Slot::Present(_) => Vec::new(),
                Slot::Again(_, usable, _) => usable.iter().map(|extent| extent.place).collect(),
                Slot::New { places, .. } => places.clone(),
            };
            donors.extend(places.iter().map(|place| place.donor));
            let extents = places.iter().map(|place| {
                let epoch = state
                    .donors
                    .get(&place.donor)
                    .map_or(0, |donor| donor.epoch);
                super::catalogue::extent(place, epoch)
            });
            packs.push(v1::Reserved {
                present: matches!(slot, Slot::Present(_)),
                extents: extents.collect(),
            });
        }
        let donors =
            self.donor_messages(state, &state.writer.read(), Some(&donors), Tokens::Both)?;
        Ok(v1::ReserveReply { packs, donors })
    }
}

impl Slot {
    fn wanted_bytes(&self) -> u64 {
        match self {
            Self::New { len, .. } => held(*len),
            _ => 0,
        }
    }

    fn known(&self) -> Option<u64> {
        match self {
            Self::Present(row) | Self::Again(row, ..) => Some(row.id),
            Self::New { row, .. } => row.map(|row| row.id),
        }
    }
}

/// Gives places back that were found and not written down.
fn give_up(state: &mut State, slots: &mut [Slot]) {
    for slot in slots {
        if let Slot::New { places, .. } = slot {
            places
                .drain(..)
                .for_each(|place| state.space.free(&place, Book::Reserved));
        }
    }
}
