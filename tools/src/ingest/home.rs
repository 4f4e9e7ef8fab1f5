//! Where the objects of a refill go: into reserved extents of the pool, or wherever else a layer is
//! read to.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use harbour_image::object::PackId;
use harbour_metad_client::v1;
use harbour_pool::transport::TransportError;

use super::{IngestError, lease::Pull};

/// Where the objects of packs are put.
pub(super) trait Home {
    /// Whether this pack is to be filled.
    fn wants(&self, pack: &PackId) -> bool;

    /// Puts an object at `offset` of a pack that is to be filled; gives the bytes written.
    fn put(&self, pack: &PackId, offset: u32, bytes: &[u8]) -> Result<u64, IngestError>;

    /// The object was put wherever it belongs; whether anything is still wanted.
    fn placed(&self, packs: &[PackId]) -> Result<bool, IngestError>;
}

/// Extents that were reserved.
pub(super) struct InPool<'a> {
    pub(super) lease: &'a Pull,
    pub(super) targets: &'a Targets,
}

impl Home for InPool<'_> {
    fn wants(&self, pack: &PackId) -> bool {
        self.targets.has(pack)
    }

    fn put(&self, pack: &PackId, offset: u32, bytes: &[u8]) -> Result<u64, IngestError> {
        let written = self.targets.write(self.lease, pack, offset, bytes)?;
        Ok(written * bytes.len() as u64)
    }

    fn placed(&self, _packs: &[PackId]) -> Result<bool, IngestError> {
        self.lease.check()?;
        // The whole layer is read, so that its digests are checked as in a pull.
        Ok(true)
    }
}

/// Where the packs of a refill are written to: all replicas of each, until one fails.
pub(super) struct Targets {
    extents: Mutex<HashMap<PackId, Vec<v1::Extent>>>,
}

impl Targets {
    pub(super) fn new(extents: HashMap<PackId, Vec<v1::Extent>>) -> Self {
        Self {
            extents: Mutex::new(extents),
        }
    }

    /// Whether something is wanted of this pack.
    pub(super) fn has(&self, pack: &PackId) -> bool {
        self.lock().contains_key(pack)
    }

    /// Whether every pack is filled.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The pack is filled: nothing more is wanted of it.
    pub(super) fn filled(&self, pack: &PackId) {
        self.lock().remove(pack);
    }

    /// Writes to every replica that is left; gives how many took it. One that fails is given back
    /// and left out from then on, and so are all others of its donor, or each of them would be
    /// waited for; when none is left the refill fails, for what was written of the pack before is
    /// lost.
    pub(super) fn write(
        &self,
        lease: &Pull,
        pack: &PackId,
        offset: u32,
        bytes: &[u8],
    ) -> Result<u64, IngestError> {
        let extents = self.lock().get(pack).cloned().unwrap_or_default();
        let avoided = lease.avoided();
        let (given_up, open): (Vec<_>, Vec<_>) = extents
            .iter()
            .copied()
            .partition(|extent| avoided.contains(&extent.donor));
        let mut failed = lease.write_all(&open, offset, bytes);
        failed.extend(
            given_up
                .into_iter()
                .map(|extent| (extent, failed_before(&extent))),
        );
        if failed.is_empty() {
            return Ok(extents.len() as u64);
        }
        let left = extents.len() - failed.len();
        if let Some(kept) = self.lock().get_mut(pack) {
            kept.retain(|extent| !failed.iter().any(|(bad, _)| bad == extent));
        }
        match lease.give_back(&pack.0, failed)? {
            Some(error) if left == 0 => Err(error),
            _ => Ok(left as u64),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PackId, Vec<v1::Extent>>> {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed_before(extent: &v1::Extent) -> IngestError {
    let source = std::io::Error::other("it failed to take another part a moment ago");
    IngestError::Pool {
        donor: extent.donor,
        source: TransportError::Unreachable {
            address: format!("donor {}", extent.donor),
            source,
        },
    }
}
