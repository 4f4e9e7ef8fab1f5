//! Donors: who lends what, and for how long that is believed.

use std::collections::{HashMap, HashSet};

use harbour_metad_client::v1;

use super::{Effects, Engine, state::DonorLease, state::State};
use crate::{
    error::{Error, text},
    space::{ALIGN, Book},
    store::{DonorRow, ExtentRow, RegionRow, Sync, Tx},
};

/// Donors that are known at a time. With the bounds below, a list of all fits a frame.
const DONORS_MAX: usize = 256;
/// Regions of one donor.
pub(super) const REGIONS_MAX: usize = 64;
/// Addresses of one donor.
const ADDRESSES_MAX: usize = 8;
/// Length of a region in bytes: what an address of a reader can span.
const REGION_BYTES_MAX: u64 = 1 << 48;

/// Length of a region's token.
const TOKEN_BYTES: usize = 32;

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
    let regions = checked_regions(&donor.name, &donor.regions)?;
    Ok(DonorRow {
        id: 0,
        name: donor.name.clone(),
        epoch: donor.epoch,
        addresses: donor.addresses.clone(),
        live: true,
        regions,
    })
}

/// Regions as the store keeps them. None at all is what a donor has that gave everything back.
pub(super) fn checked_regions(name: &str, regions: &[v1::Region]) -> Result<Vec<RegionRow>, Error> {
    let named = |what: String| Error::Invalid(format!("donor {name:?}: {what}"));
    if regions.len() > REGIONS_MAX {
        return Err(named(format!(
            "{} regions, at most {REGIONS_MAX} are allowed",
            regions.len()
        )));
    }
    let mut seen = HashSet::new();
    for region in regions {
        if region.len < ALIGN || region.len > REGION_BYTES_MAX {
            return Err(named(format!(
                "region {} of {} bytes: {ALIGN} to 2^48 are allowed",
                region.id, region.len
            )));
        }
        if !seen.insert(region.id) {
            return Err(named(format!("region {} is named twice", region.id)));
        }
        for token in [&region.read_token, &region.write_token] {
            if !token.is_empty() && token.len() != TOKEN_BYTES {
                return Err(named(format!(
                    "a token of region {} of {} bytes: {TOKEN_BYTES} or none are allowed",
                    region.id,
                    token.len()
                )));
            }
        }
    }
    let row = |region: &v1::Region| RegionRow {
        id: region.id,
        len: region.len,
        huge: region.huge_pages,
        read_token: region.read_token.clone(),
        write_token: region.write_token.clone(),
    };
    Ok(regions.iter().map(row).collect())
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
        let same = known.as_ref().is_some_and(|known| known.epoch == row.epoch);
        if same {
            self.check_kept(&state, &row)?;
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
            effects.touch();
            tx.put_donor(&row)
        })?;
        row.id = id;
        if !same {
            state.quarantine.retain(|held| held.row.place.donor != id);
        }
        self.rebuild(&mut state, &row)?;
        let lease = DonorLease {
            name: row.name,
            epoch: row.epoch,
            heard_ms: now_ms,
            expires_ms: now_ms + self.options.timing.donor_lease_ms,
            live: true,
            heard: true,
        };
        state.donors.insert(id, lease);
        drop(state);
        self.tell_space_freed();
        Ok(self.donor_lease(id))
    }

    /// Everything that lies with a donor must lie inside of what it lends now.
    fn check_kept(&self, state: &State, row: &DonorRow) -> Result<(), Error> {
        let lens: HashMap<u32, u64> = row
            .regions
            .iter()
            .map(|region| (region.id, region.len))
            .collect();
        let extents = state.writer.read().extents_of_donor(row.id)?;
        let waiting = state
            .quarantine
            .iter()
            .map(|held| held.row.place)
            .filter(|place| place.donor == row.id);
        for place in extents.iter().map(|extent| extent.place).chain(waiting) {
            let len = lens.get(&place.region).map_or(0, |len| len - len % ALIGN);
            if place.offset + place.held_bytes() > len {
                return Err(Error::Refused(format!(
                    "donor {:?} lends {len} bytes of region {} now, but a pack lies at {}+{}: \
                     take a new epoch when memory was lost",
                    row.name, place.region, place.offset, place.len
                )));
            }
        }
        Ok(())
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
        for (place, book) in claims.chain(waiting) {
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
        let now_ms = self.now_ms();
        let mut state = self.lock();
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
            self.set_live(&mut state, donor.id, true)?;
        }
        Ok(self.donor_lease(donor.id))
    }

    fn donor_lease(&self, id: u64) -> v1::DonorLease {
        v1::DonorLease {
            id,
            lease_ms: u32::try_from(self.options.timing.donor_lease_ms).unwrap_or(u32::MAX),
            ..v1::DonorLease::default()
        }
    }

    /// Tells readers of a donor, or not any more.
    pub(super) fn set_live(&self, state: &mut State, id: u64, live: bool) -> Result<(), Error> {
        self.change(state, Sync::Process, None, |tx, effects| {
            effects.touch();
            tx.set_donor_live(id, live)
        })?;
        state.space.set_open(id, live);
        if let Some(lease) = state.donors.get_mut(&id) {
            tracing::info!(donor = id, name = lease.name, live, "donor");
            lease.live = live;
        }
        Ok(())
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

    /// All donors.
    pub fn list_donors(&self) -> Result<v1::ListDonorsReply, Error> {
        let state = self.lock();
        let donors = self.donor_messages(&state, &state.writer.read(), None, Tokens::None)?;
        Ok(v1::ListDonorsReply { donors })
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

/// Has readers forget packs whose extents were taken away.
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
