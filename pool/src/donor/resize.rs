//! Regions that come and go under one epoch: what a donor does when its host wants memory back, and
//! when it has some to spare again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{DonorError, DonorServer, Lending, Lent, MAX_REGIONS, Shared, check_regions};
use crate::transport::{RegionId, RegionInfo};

/// How long the thread that tells readers may take before pages go back all the same. What readers
/// that were not told yet read then are zeros, which their digests refuse.
const TELL_LIMIT: Duration = Duration::from_millis(10);
/// Threads that give pages back at one time: freeing is bound by one core's speed.
const THREADS: usize = 4;

impl DonorServer {
    /// Takes these regions back at once, asking nobody; the epoch and the other regions live on.
    /// Transports forget them first, then their pages go to the host, even while readers still map
    /// them (huge pages: once they no longer do). To tell metad is up to the caller, afterwards.
    /// Returns those that were lent until now.
    pub fn retire(&self, regions: &[RegionId]) -> Vec<RegionInfo> {
        let _alone = self.renewing.lock();
        let shared = &self.shared;
        let gone = {
            let mut lent = shared.lent.write();
            let Some(before) = lent.as_ref() else {
                return Vec::new();
            };
            let (gone, left): (Vec<_>, Vec<_>) = before
                .regions
                .iter()
                .cloned()
                .partition(|region| regions.contains(&region.info.id));
            if gone.is_empty() {
                return Vec::new();
            }
            let after = Lent {
                epoch: before.epoch,
                regions: left,
                next: before.next,
            };
            *lent = Some(Arc::new(after));
            gone
        };
        self.change_told();
        give_back(&shared.config.name, &gone);
        let infos: Vec<_> = gone.iter().map(|region| region.info).collect();
        let bytes: u64 = infos.iter().map(|region| region.len).sum();
        tracing::info!(
            name = shared.config.name,
            regions = infos.len(),
            bytes,
            "took regions back"
        );
        infos
    }

    /// Lends one more region of `len` bytes under the same epoch. Its id was not used before.
    ///
    /// # Errors
    /// When the length is none that can be lent, there are 64 regions already, the donor lends
    /// nothing (after a failed [`DonorServer::renew`]), or the memory cannot be had.
    pub fn extend(&self, len: u64) -> Result<RegionInfo, DonorError> {
        let _alone = self.renewing.lock();
        let shared = &self.shared;
        let wrong = |what: String| DonorError::Config {
            name: shared.config.name.clone(),
            what,
        };
        check_regions(&shared.config.name, &[len])?;
        let before = shared.lent.read().clone();
        let before = before.ok_or_else(|| wrong("there is no epoch to extend".to_owned()))?;
        if before.regions.len() >= MAX_REGIONS {
            return Err(wrong(format!("{MAX_REGIONS} regions are lent already")));
        }
        let next = before.next.checked_add(1);
        let next = next.ok_or_else(|| wrong("no region ids are left in this epoch".to_owned()))?;
        let region = Lending::new(
            &shared.config,
            shared.verbs.as_deref(),
            RegionId(before.next),
            len,
        )?;
        let info = region.info;
        let mut regions = before.regions.clone();
        regions.push(Arc::new(region));
        let after = Lent {
            epoch: before.epoch,
            regions,
            next,
        };
        // Nobody else changes what is lent while `renewing` is held.
        *shared.lent.write() = Some(Arc::new(after));
        self.change_told();
        Ok(info)
    }

    /// How many bytes of each region the host has really given: pages that were never written take
    /// none. By growing id.
    pub fn held(&self) -> Vec<(RegionInfo, u64)> {
        let lent = self.shared.lent.read().clone();
        let regions = lent.iter().flat_map(|lent| &lent.regions);
        regions
            .map(|region| (region.info, region.memory.held()))
            .collect()
    }

    /// Has every reader told of a change, and waits a moment for that.
    fn change_told(&self) {
        let change = self.shared.changes.fetch_add(1, Ordering::AcqRel) + 1;
        self.shared.wake();
        let deadline = Instant::now() + TELL_LIMIT;
        let mut told = self.shared.told.lock();
        while *told < change
            && !self
                .shared
                .telling
                .wait_until(&mut told, deadline)
                .timed_out()
        {}
    }
}

impl Shared {
    /// Every reader was told of all changes up to this one, or has lost its connection.
    pub(super) fn told(&self, change: u64) {
        let mut told = self.told.lock();
        if *told < change {
            *told = change;
            self.telling.notify_all();
        }
    }
}

/// Returns the pages of `regions` to the host, whoever maps them; RDMA devices let go of them first.
///
/// A reader of a huge page that is gone dies of SIGBUS when the host has no other to put in its
/// place; and huge pages go back to the host's huge pages only, which is no relief to anyone. So
/// those go when their readers have let go, which they do when told.
pub(super) fn give_back(name: &str, regions: &[Arc<Lending>]) {
    for region in regions {
        region.devices.withdraw();
    }
    let ordinary: Vec<_> = regions
        .iter()
        .filter(|region| !region.info.huge_pages)
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(region) = ordinary.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Locked pages would have to be unlocked one by one as they go.
            drop(region.locked.lock().take());
            if let Err(error) = region.memory.discard(0..region.info.len) {
                tracing::warn!(name, region = region.info.id.0, %error, "memory comes back only when its readers let go");
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let helpers = cores.min(THREADS).min(ordinary.len()).saturating_sub(1);
    thread::scope(|scope| {
        for _ in 0..helpers {
            // A thread that cannot be had is no loss: this one does all of the work then.
            if let Err(error) = thread::Builder::new().spawn_scoped(scope, work) {
                tracing::debug!(%error, "memory is given back by fewer threads");
            }
        }
        work();
    });
}

#[cfg(test)]
mod tests;
