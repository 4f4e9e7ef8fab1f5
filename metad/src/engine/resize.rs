//! A donor that lends more or less memory under one epoch, or wants to leave.

use std::collections::HashSet;

use harbour_metad_client::v1;

use super::{
    Effects, Engine,
    donors::{REGION_BYTES_MAX, REGIONS_MAX, TOKEN_BYTES, forget},
};
use crate::{
    error::Error,
    space::{ALIGN, Book, Place},
    store::{DonorRow, RegionRow, Sync, Tx},
};

/// Regions that one call may name as retired: all that a donor can have, some calls late.
const RETIRED_MAX: usize = 4096;

/// A region as the store has it.
pub(super) fn region_row(region: &v1::Region) -> RegionRow {
    RegionRow {
        id: region.id,
        len: region.len,
        huge: region.huge_pages,
        read_token: region.read_token.clone(),
        write_token: region.write_token.clone(),
    }
}

/// Checks regions by themselves: their number, lengths, tokens, and that each has an id of its own.
pub(super) fn checked_regions(name: &str, regions: &[RegionRow]) -> Result<(), Error> {
    let named = |what: String| Error::Invalid(format!("donor {name:?}: {what}"));
    if regions.len() > REGIONS_MAX {
        return Err(named(format!(
            "{} regions, at most {REGIONS_MAX} are allowed",
            regions.len()
        )));
    }
    let mut seen = HashSet::new();
    for region in regions {
        let (id, len) = (region.id, region.len);
        if !(ALIGN..=REGION_BYTES_MAX).contains(&len) {
            return Err(named(format!(
                "region {id} of {len} bytes: {ALIGN} to 2^48 are allowed"
            )));
        }
        if !seen.insert(id) {
            return Err(named(format!("region {id} is named twice")));
        }
        for token in [&region.read_token, &region.write_token] {
            if !token.is_empty() && token.len() != TOKEN_BYTES {
                return Err(named(format!(
                    "a token of region {id} of {} bytes: {TOKEN_BYTES} or none are allowed",
                    token.len()
                )));
            }
        }
    }
    Ok(())
}

/// Takes away all that lies in a region, `waiting` in quarantine. Its memory is never lent again, so
/// nothing has to wait; readers are told all the same.
pub(super) fn retire(
    tx: &Tx<'_>,
    effects: &mut Effects,
    donor: u64,
    region: u32,
    waiting: &[Place],
) -> Result<(), Error> {
    let mut extents = tx.extents_of_donor(donor)?;
    extents.retain(|extent| extent.place.region == region);
    if extents.iter().any(|extent| extent.pull.is_none()) {
        effects.freeing(tx)?;
    }
    for extent in &extents {
        let book = if extent.pull.is_some() {
            Book::Reserved
        } else {
            Book::Used
        };
        effects.freed.push((extent.place, book));
    }
    let waiting = waiting.iter().map(|place| (*place, Book::Quarantined));
    effects.freed.extend(waiting);
    for copy in tx.copies()? {
        if (copy.place.donor, copy.place.region) == (donor, region) {
            effects.ended.push(copy.id);
            effects.freed.push((copy.place, Book::Reserved));
        }
    }
    tx.empty_region(donor, region)?;
    effects.retired.push((donor, region));
    effects.touch();
    forget(tx, effects, &extents)
}

impl Engine {
    /// Takes in regions that came and went, and whether a donor wants to leave.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a donor or epoch that is not known: register again.
    /// [`Error::Refused`] for a region that cannot be: its id was used before in this epoch, or it
    /// is known with another length.
    pub fn donor_resize(&self, request: &v1::ResizeDonor) -> Result<v1::DonorLease, Error> {
        let donor = request.donor.unwrap_or_default();
        let mut state = self.lock();
        self.hear_donor(&mut state, &donor)?;
        let known = state.writer.read().donor(donor.id)?;
        let known = known.ok_or_else(|| {
            Error::NotFound(format!("donor {} is not known: register again", donor.id))
        })?;
        let (row, added) = resized(&known, request)?;
        let gone: Vec<(u32, Vec<Place>)> = known
            .regions
            .iter()
            .filter(|region| request.retired.contains(&region.id))
            .map(|region| (region.id, state.waiting_in(donor.id, region.id)))
            .collect();
        self.change(&mut state, Sync::Process, None, |tx, effects| {
            for (region, waiting) in &gone {
                retire(tx, effects, donor.id, *region, waiting)?;
            }
            if row != known {
                effects.touch();
                tx.put_donor(&row)?;
            }
            Ok(())
        })?;
        for region in &added {
            state.space.add_region(donor.id, region.id, region.len);
        }
        state.space.set_open(donor.id, !row.draining);
        if let Some(lease) = state.donors.get_mut(&donor.id) {
            lease.draining = row.draining;
        }
        if row != known {
            tracing::info!(
                donor = donor.id,
                name = row.name,
                added = added.len(),
                retired = gone.len(),
                draining = row.draining,
                "donor resized"
            );
        }
        let lease = self.donor_lease(&mut state, donor.id);
        drop(state);
        self.tell_space_freed();
        lease
    }
}

/// What a donor is after a request, and the regions that are new.
fn resized(
    known: &DonorRow,
    request: &v1::ResizeDonor,
) -> Result<(DonorRow, Vec<RegionRow>), Error> {
    if request.retired.len() > RETIRED_MAX {
        return Err(Error::Invalid(format!(
            "{} regions retired in one call, at most {RETIRED_MAX} are allowed",
            request.retired.len()
        )));
    }
    let refused =
        |id: u32, why: &str| Error::Refused(format!("donor {:?}, region {id}: {why}", known.name));
    let mut row = known.clone();
    row.draining = request.draining;
    row.regions
        .retain(|region| !request.retired.contains(&region.id));
    let mut added = Vec::new();
    for region in &request.added {
        if request.retired.contains(&region.id) {
            return Err(refused(region.id, "it cannot both come and go"));
        }
        match known.regions.iter().find(|known| known.id == region.id) {
            Some(known) if known.len == region.len => {}
            Some(_) => return Err(refused(region.id, "it is lent with another length")),
            None if u64::from(region.id) < known.regions_seen => {
                return Err(refused(
                    region.id,
                    "its id was used before in this epoch: ids grow",
                ));
            }
            None => added.push(region_row(region)),
        }
    }
    let named = request.added.iter().map(|region| region.id);
    let largest = named.chain(request.retired.iter().copied()).max();
    row.regions_seen = row
        .regions_seen
        .max(largest.map_or(0, |id| u64::from(id) + 1));
    row.regions.extend(added.iter().cloned());
    checked_regions(&known.name, &row.regions)?;
    Ok((row, added))
}
