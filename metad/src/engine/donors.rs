//! Donors: who lends what, and for how long that is believed.

use std::collections::{HashMap, HashSet};

use harbour_metad_client::v1;

use super::{
    Effects, Engine,
    nodes::Budget,
    resize::{checked_regions, region_row, retire},
    state::DonorLease,
    state::State,
};
use crate::{
    error::{Error, text},
    space::{ALIGN, Book, Place},
    store::{DonorRow, ExtentRow, RegionRow, Sync, Tx},
};

/// Donors that are known at a time. With the bounds below, a list of all fits a frame.
const DONORS_MAX: usize = 256;
/// Regions of one donor.
pub(super) const REGIONS_MAX: usize = 64;
/// Addresses of one donor.
const ADDRESSES_MAX: usize = 8;
/// Length of a region in bytes: what an address of a reader can span.
pub(super) const REGION_BYTES_MAX: u64 = 1 << 48;
/// Epochs are random numbers below this, and not 0.
const EPOCH_END: u64 = 1 << 63;

/// Length of a region's token.
pub(super) const TOKEN_BYTES: usize = 32;

/// Which tokens go with a donor's regions: only who is to read or write there gets any.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tokens {
    /// A list for people.
    None,
    /// To read packs.
    Read,
    /// To write packs, and read them.
    Both,
}

/// What the store knows of a donor, as the wire has it.
pub(super) fn message(row: DonorRow, tokens: Tokens) -> v1::Donor {
    let region = |row: RegionRow| v1::Region {
        id: row.id,
        len: row.len,
        huge_pages: row.huge,
        read_token: match tokens {
            Tokens::None => Vec::new(),
            Tokens::Read | Tokens::Both => row.read_token,
        },
        write_token: match tokens {
            Tokens::None | Tokens::Read => Vec::new(),
            Tokens::Both => row.write_token,
        },
    };
    v1::Donor {
        id: row.id,
        name: row.name,
        epoch: row.epoch,
        addresses: row.addresses,
        regions: row.regions.into_iter().map(region).collect(),
        used_bytes: 0,
        live: row.live,
        heard_ms_ago: 0,
        failure_domain: row.domain,
        draining: row.draining,
        free_bytes: 0,
    }
}

fn checked(donor: &v1::Donor) -> Result<DonorRow, Error> {
    let named = |what: String| Error::Invalid(format!("donor {:?}: {what}", donor.name));
    text(&donor.name, 255, "a donor's name")?;
    if donor.name.is_empty() {
        return Err(named("a donor needs a name".into()));
    }
    if donor.addresses.is_empty() || donor.addresses.len() > ADDRESSES_MAX {
        return Err(named(format!(
            "{} addresses, 1 to {ADDRESSES_MAX} are allowed",
            donor.addresses.len()
        )));
    }
    for address in &donor.addresses {
        text(address, 255, "an address")?;
    }
    text(&donor.failure_domain, 255, "a failure domain")?;
    if donor.epoch == 0 || donor.epoch >= EPOCH_END {
        return Err(named(format!(
            "epoch {:x}: a random number from 1 to 2^63 is wanted",
            donor.epoch
        )));
    }
    let regions: Vec<_> = donor.regions.iter().map(region_row).collect();
    checked_regions(&donor.name, &regions)?;
    Ok(DonorRow {
        id: 0,
        name: donor.name.clone(),
        epoch: donor.epoch,
        addresses: donor.addresses.clone(),
        live: true,
        domain: donor.failure_domain.clone(),
        draining: false,
        regions_seen: donor
            .regions
            .iter()
            .map(|region| u64::from(region.id) + 1)
            .max()
            .unwrap_or(0),
        regions,
    })
}

impl Engine {
    /// Takes a donor in. The same name and epoch keeps its extents, another epoch drops them, once
    /// the lease of the one that had the name is over or the caller knows it to be dead.
    pub fn register_donor(
        &self,
        request: &v1::RegisterDonorRequest,
    ) -> Result<v1::DonorLease, Error> {
        let donor = request
            .donor
            .as_ref()
            .ok_or_else(|| Error::Invalid("the request has no donor".into()))?;
        let mut row = checked(donor)?;
        let now_ms = self.now_ms();
        let mut state = self.lock();
        let known = state.writer.read().donor_named(&row.name)?;
        if known.is_none() && state.donors.len() >= DONORS_MAX {
            return Err(Error::Exhausted(format!(
                "{DONORS_MAX} donors are known, no more are allowed"
            )));
        }
        row.id = known.as_ref().map_or(0, |known| known.id);
        let kept = known.as_ref().filter(|known| known.epoch == row.epoch);
        let same = kept.is_some();
        let mut gone = Vec::new();
        if let Some(kept) = kept {
            gone = self.check_kept(&state, kept, &mut row)?;
        } else if let Some(lease) = state.donors.get(&row.id)
            && lease.heard
            && lease.expires_ms > now_ms
            && lease.epoch != request.replaces_epoch
        {
            return Err(Error::Refused(format!(
                "a donor named {:?} is alive in epoch {:x}: give this one another name, or wait until that \
                 one was silent for {} ms",
                row.name, lease.epoch, self.options.timing.donor_lease_ms
            )));
        }
        let id = self.change(&mut state, Sync::Process, None, |tx, effects| {
            if !same && row.id != 0 {
                drop_extents(tx, effects, row.id)?;
            }
            for (region, waiting) in &gone {
                retire(tx, effects, row.id, *region, waiting)?;
            }
            effects.touch();
            tx.put_donor(&row)
        })?;
        row.id = id;
        if !same {
            state.quarantine.retain(|held| held.row.place.donor != id);
            state.drop_copies_of(id);
        }
        self.rebuild(&mut state, &row)?;
        state.space.set_open(id, !row.draining);
        state.space.set_domain(id, &row.domain);
        let lease = DonorLease {
            name: row.name,
            epoch: row.epoch,
            heard_ms: now_ms,
            expires_ms: now_ms + self.options.timing.donor_lease_ms,
            live: true,
            heard: true,
            draining: row.draining,
            lost: Budget::full(now_ms),
        };
        state.donors.insert(id, lease);
        let lease = self.donor_lease(&mut state, id);
        drop(state);
        self.tell_space_freed();
        lease
    }

    /// What a donor of a known epoch says must go with what is known: a region keeps its length where
    /// something lies, and is never lent again once it was retired. Gives the regions that it does
    /// not lend any more, with what waits in them: it may have retired them while this daemon was
    /// away.
    fn check_kept(
        &self,
        state: &State,
        kept: &DonorRow,
        row: &mut DonorRow,
    ) -> Result<Vec<(u32, Vec<Place>)>, Error> {
        let lens: HashMap<u32, u64> = row.regions.iter().map(|r| (r.id, r.len)).collect();
        let known: HashSet<u32> = kept.regions.iter().map(|region| region.id).collect();
        let again = |id: &&u32| !known.contains(*id) && u64::from(**id) < kept.regions_seen;
        if let Some(id) = lens.keys().find(again) {
            return Err(Error::Refused(format!(
                "donor {:?} lends region {id} again, which it had retired: ids grow within an epoch",
                row.name
            )));
        }
        let extents = state.writer.read().extents_of_donor(row.id)?;
        let places = state.places_of(row.id, &extents);
        for place in places {
            let Some(len) = lens.get(&place.region) else {
                continue;
            };
            let len = len - len % ALIGN;
            if place.offset + place.held_bytes() > len {
                return Err(Error::Refused(format!(
                    "donor {:?} lends {len} bytes of region {} now, but a pack lies at {}+{}: \
                     take a new epoch when memory was lost",
                    row.name, place.region, place.offset, place.len
                )));
            }
        }
        row.draining = kept.draining;
        row.regions_seen = row.regions_seen.max(kept.regions_seen);
        let gone = known.into_iter().filter(|id| !lens.contains_key(id));
        Ok(gone
            .map(|region| (region, state.waiting_in(row.id, region)))
            .collect())
    }

    /// Builds a donor's free map from what the store has.
    pub(super) fn rebuild(&self, state: &mut State, row: &DonorRow) -> Result<(), Error> {
        let extents = state.writer.read().extents_of_donor(row.id)?;
        state.space.add_donor(
            row.id,
            row.regions.iter().map(|region| (region.id, region.len)),
        );
        let claims = extents.iter().map(|extent: &ExtentRow| {
            (
                extent.place,
                if extent.pull.is_some() {
                    Book::Reserved
                } else {
                    Book::Used
                },
            )
        });
        let waiting = state
            .quarantine
            .iter()
            .filter(|held| held.row.place.donor == row.id);
        let waiting = waiting.map(|held| (held.row.place, Book::Quarantined));
        let copies = state.copies.under_way.values();
        let copies = copies.filter(|copy| copy.row.place.donor == row.id);
        let copies = copies.map(|copy| (copy.row.place, Book::Reserved));
        for (place, book) in claims.chain(waiting).chain(copies) {
            if let Err(conflict) = state.space.claim(&place, book) {
                return Err(Error::Refused(format!(
                    "the database is inconsistent: {conflict}"
                )));
            }
        }
        Ok(())
    }

    /// Keeps a donor's lease.
    pub fn donor_heartbeat(&self, request: &v1::DonorHeartbeat) -> Result<v1::DonorLease, Error> {
        let donor = request.donor.unwrap_or_default();
        let mut state = self.lock();
        self.hear_donor(&mut state, &donor)?;
        self.donor_lease(&mut state, donor.id)
    }

    /// A donor spoke, in whatever call.
    pub(super) fn hear_donor(&self, state: &mut State, donor: &v1::DonorRef) -> Result<(), Error> {
        let now_ms = self.now_ms();
        let Some(lease) = state
            .donors
            .get_mut(&donor.id)
            .filter(|lease| lease.epoch == donor.epoch)
        else {
            return Err(Error::NotFound(format!(
                "donor {} in epoch {:x} is not known: register again",
                donor.id, donor.epoch
            )));
        };
        lease.heard_ms = now_ms;
        lease.heard = true;
        lease.expires_ms = now_ms + self.options.timing.donor_lease_ms;
        if !lease.live {
            self.set_live(state, donor.id, true)?;
        }
        Ok(())
    }

    /// Tells readers of a donor, or not any more.
    pub(super) fn set_live(&self, state: &mut State, id: u64, live: bool) -> Result<(), Error> {
        self.change(state, Sync::Process, None, |tx, effects| {
            effects.touch();
            tx.set_donor_live(id, live)
        })?;
        let mut draining = false;
        if let Some(lease) = state.donors.get_mut(&id) {
            tracing::info!(donor = id, name = lease.name, live, "donor");
            lease.live = live;
            draining = lease.draining;
        }
        state.space.set_open(id, live && !draining);
        if live {
            return Ok(());
        }
        // What a silent donor was to copy is planned anew, for others.
        let tasks: Vec<u64> = state.copies.tasks_of(id);
        self.end_copies(state, &tasks)
    }

    /// Takes a donor out. One that is not known has nothing, which is no error.
    pub fn donor_leave(&self, request: &v1::DonorRef) -> Result<(), Error> {
        let mut state = self.lock();
        if state
            .donors
            .get(&request.id)
            .is_some_and(|lease| lease.epoch == request.epoch)
        {
            self.forget_donor(&mut state, request.id)?;
        }
        Ok(())
    }

    /// Forgets a donor and everything that lay with it.
    pub(super) fn forget_donor(&self, state: &mut State, id: u64) -> Result<(), Error> {
        self.change(state, Sync::Process, None, |tx, effects| {
            drop_extents(tx, effects, id)?;
            effects.touch();
            tx.delete_donor(id)
        })?;
        state.quarantine.retain(|held| held.row.place.donor != id);
        state.drop_copies_of(id);
        state.space.remove_donor(id);
        if let Some(lease) = state.donors.remove(&id) {
            tracing::info!(
                donor = id,
                name = lease.name,
                "donor is gone with all that it held"
            );
        }
        Ok(())
    }

    /// All donors, and the books over them.
    pub fn list_donors(&self) -> Result<v1::ListDonorsReply, Error> {
        let state = self.lock();
        let donors = self.donor_messages(&state, &state.writer.read(), None, Tokens::None)?;
        let books = state.space.books();
        Ok(v1::ListDonorsReply {
            donors,
            lent_bytes: books.lent,
            used_bytes: books.used,
            reserved_bytes: books.reserved,
            quarantined_bytes: books.quarantined,
        })
    }
}

/// Takes away all that lies with a donor. Its memory of that epoch is never written again, so
/// nothing has to wait; readers are told all the same.
fn drop_extents(tx: &Tx<'_>, effects: &mut Effects, donor: u64) -> Result<(), Error> {
    let extents = tx.extents_of_donor(donor)?;
    if !extents.is_empty() {
        effects.freeing(tx)?;
    }
    tx.empty_donor(donor)?;
    forget(tx, effects, &extents)
}

/// Readers and the policy hear of replicas that went without waiting for anyone.
pub(super) fn forget(
    tx: &Tx<'_>,
    effects: &mut Effects,
    extents: &[ExtentRow],
) -> Result<(), Error> {
    for extent in extents.iter().filter(|extent| extent.pull.is_none()) {
        if let Some(pack) = tx.pack_of(extent.pack)? {
            effects.forget.push(pack.digest);
            if !tx
                .extents_of_pack(pack.id)?
                .iter()
                .any(|other| other.pull.is_none())
            {
                effects.removed.push(pack.id);
            }
        }
    }
    Ok(())
}
