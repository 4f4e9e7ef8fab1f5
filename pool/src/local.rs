//! `local`: lent memory inside this process. The reference that the contract suite was written
//! against, and the pool of tests that need no processes.

use std::{io, sync::Arc, time::Instant};

use parking_lot::RwLock;

use crate::transport::{
    Access, Read, RegionId, RegionInfo, Transport, TransportError, TransportKind, Write, bounds,
    in_time, refused, unreachable,
};

/// Memory that one donor lends, in this process. Regions are numbered from 0.
#[derive(Debug)]
pub struct LocalDonor {
    name: String,
    lent: RwLock<Option<Arc<Lent>>>,
}

#[derive(Debug)]
struct Lent {
    epoch: u64,
    regions: Vec<RwLock<Box<[u8]>>>,
}

/// A connection to a [`LocalDonor`].
#[derive(Debug)]
pub struct LocalTransport {
    donor: Arc<LocalDonor>,
    epoch: u64,
    access: Access,
}

impl LocalDonor {
    /// Lends zeroed regions of these lengths in bytes, in this epoch. `name` is for errors.
    pub fn new(name: impl Into<String>, epoch: u64, regions: &[usize]) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            lent: RwLock::new(Some(Lent::new(epoch, regions))),
        })
    }

    /// Connects. `epoch` is the one that the caller's locations are of, or 0 for whichever it is.
    ///
    /// # Errors
    /// `WrongEpoch`, and `Unreachable` after [`LocalDonor::stop`].
    pub fn connect(
        self: &Arc<Self>,
        epoch: u64,
        access: Access,
    ) -> Result<LocalTransport, TransportError> {
        let lent = self.lent(epoch)?;
        Ok(LocalTransport {
            donor: Arc::clone(self),
            epoch: lent.epoch,
            access,
        })
    }

    /// What it lends now; nothing after [`LocalDonor::stop`].
    pub fn regions(&self) -> Vec<RegionInfo> {
        let lent = self.lent.read().clone();
        let lens = lent
            .iter()
            .flat_map(|lent| &lent.regions)
            .map(|bytes| bytes.read().len() as u64);
        (0..)
            .zip(lens)
            .map(|(id, len)| RegionInfo {
                id: RegionId(id),
                len,
                huge_pages: false,
            })
            .collect()
    }

    /// Takes all memory back and lends zeroed regions in a new epoch.
    pub fn renew(&self, epoch: u64, regions: &[usize]) {
        *self.lent.write() = Some(Lent::new(epoch, regions));
    }

    /// Takes all memory back for good, as the death of a donor's process does.
    pub fn stop(&self) {
        *self.lent.write() = None;
    }

    fn lent(&self, wanted: u64) -> Result<Arc<Lent>, TransportError> {
        let lent = self.lent.read().clone();
        let lent =
            lent.ok_or_else(|| unreachable(self.address(), io::ErrorKind::ConnectionReset.into()))?;
        if wanted != 0 && lent.epoch != wanted {
            return Err(TransportError::WrongEpoch {
                wanted,
                actual: lent.epoch,
            });
        }
        Ok(lent)
    }

    fn address(&self) -> String {
        format!("{}:{}", TransportKind::Local, self.name)
    }
}

impl Lent {
    fn new(epoch: u64, regions: &[usize]) -> Arc<Self> {
        let regions = regions
            .iter()
            .map(|len| RwLock::new(vec![0; *len].into_boxed_slice()))
            .collect();
        Arc::new(Self { epoch, regions })
    }

    fn get(&self, id: RegionId) -> Option<&RwLock<Box<[u8]>>> {
        usize::try_from(id.0)
            .ok()
            .and_then(|index| self.regions.get(index))
    }

    fn check(&self, region: RegionId, offset: u64, len: usize) -> Result<usize, TransportError> {
        bounds(
            region,
            self.get(region).map(|bytes| bytes.read().len() as u64),
            offset,
            len,
        )
    }
}

impl Transport for LocalTransport {
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        let lent = self.donor.lent(self.epoch)?;
        for read in &*batch {
            lent.check(read.region, read.offset, read.into.len())?;
        }
        for read in batch {
            in_time(deadline)?;
            let start = lent.check(read.region, read.offset, read.into.len())?;
            let Some(region) = lent.get(read.region) else {
                continue;
            };
            if let Some(from) = region.read().get(start..start + read.into.len()) {
                read.into.copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        if self.access != Access::ReadWrite {
            return Err(refused(
                self.donor.address(),
                "the connection was made for reading only",
            ));
        }
        let lent = self.donor.lent(self.epoch)?;
        for write in batch {
            lent.check(write.region, write.offset, write.from.len())?;
        }
        for write in batch {
            in_time(deadline)?;
            let start = lent.check(write.region, write.offset, write.from.len())?;
            let Some(region) = lent.get(write.region) else {
                continue;
            };
            if let Some(to) = region.write().get_mut(start..start + write.from.len()) {
                to.copy_from_slice(write.from);
            }
        }
        Ok(())
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kind(&self) -> TransportKind {
        TransportKind::Local
    }
}
