//! A donor that lends more or less memory under one epoch, or wants to leave.

use harbour_metad_client::v1;

use super::{
    Engine,
    donors::{REGIONS_MAX, checked_regions, forget},
    state::State,
};
use crate::{
    error::Error,
    store::{DonorRow, Sync},
};

/// Regions that one call may name as retired: all that a donor can have, some calls late.
const RETIRED_MAX: usize = 4096;

impl Engine {
    /// Takes in regions that came and went, and whether a donor wants to leave.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a donor or epoch that is not known: register again.
    /// [`Error::Refused`] for a region that is known with another length.
    pub fn donor_resize(&self, request: &v1::ResizeDonor) -> Result<v1::DonorLease, Error> {
        let heartbeat = v1::DonorHeartbeat {
            donor: request.donor,
        };
        let mut lease = self.donor_heartbeat(&heartbeat)?;
        let mut state = self.lock();
        let known = state.writer.read().donor(lease.id)?;
        let known = known.ok_or_else(|| {
            Error::NotFound(format!("donor {} is not known: register again", lease.id))
        })?;
        let row = resized(&known, request)?;
        self.retire(&mut state, &row, &request.retired)?;
        self.rebuild(&mut state, &row)?;
        state.space.set_open(row.id, row.live && !request.draining);
        if request.draining {
            let used = state
                .space
                .donor_books(row.id)
                .map_or(0, |books| books.used);
            lease.draining = true;
            lease.left_bytes = used;
            // Nothing copies packs from donor to donor, so all of it stays until a refill.
            lease.stuck_bytes = used;
        }
        drop(state);
        self.tell_space_freed();
        Ok(lease)
    }

    /// Takes away all that lies in regions that are gone. Their memory is never lent again, so
    /// nothing has to wait; readers are told all the same.
    fn retire(&self, state: &mut State, row: &DonorRow, retired: &[u32]) -> Result<(), Error> {
        let waiting: Vec<u64> = state
            .quarantine
            .iter()
            .map(|held| &held.row)
            .filter(|held| held.place.donor == row.id && retired.contains(&held.place.region))
            .map(|held| held.id)
            .collect();
        self.change(state, Sync::Process, None, |tx, effects| {
            let mut extents = tx.extents_of_donor(row.id)?;
            extents.retain(|extent| retired.contains(&extent.place.region));
            if !extents.is_empty() {
                effects.freeing(tx)?;
            }
            for extent in &extents {
                tx.delete_extent(extent.id)?;
            }
            for id in &waiting {
                tx.delete_quarantine(*id)?;
            }
            forget(tx, effects, &extents)?;
            effects.touch();
            tx.put_donor(row).map(|_| ())
        })?;
        state
            .quarantine
            .retain(|held| !waiting.contains(&held.row.id));
        Ok(())
    }
}

/// The donor as it is after `request`.
fn resized(known: &DonorRow, request: &v1::ResizeDonor) -> Result<DonorRow, Error> {
    if request.retired.len() > RETIRED_MAX {
        return Err(Error::Invalid(format!(
            "{} regions retired in one call, at most {RETIRED_MAX} are allowed",
            request.retired.len()
        )));
    }
    let refused =
        |id: u32, why: &str| Error::Refused(format!("donor {:?}, region {id}: {why}", known.name));
    let mut row = known.clone();
    row.regions
        .retain(|region| !request.retired.contains(&region.id));
    for region in checked_regions(&known.name, &request.added)? {
        if request.retired.contains(&region.id) {
            return Err(refused(region.id, "it cannot both come and go"));
        }
        match known.regions.iter().find(|other| other.id == region.id) {
            Some(other) if other.len == region.len => {}
            Some(_) => return Err(refused(region.id, "it is lent with another length")),
            None => row.regions.push(region),
        }
    }
    if row.regions.len() > REGIONS_MAX {
        return Err(Error::Invalid(format!(
            "donor {:?} would have {} regions, at most {REGIONS_MAX} are allowed",
            known.name,
            row.regions.len()
        )));
    }
    Ok(row)
}
