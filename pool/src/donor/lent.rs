//! What a donor lends: regions, each of them a memfd.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;

use super::{DonorConfig, DonorError, MAX_REGION_BYTES, MAX_REGIONS, random};
use crate::{
    memory::{Locked, Memory, MemoryError, REGION_ALIGN_BYTES},
    sys::Mapping,
    token::{RegionKey, Token},
    transport::{RegionId, RegionInfo},
    verbs::lender::{Lender, Registered},
};

/// A region is a multiple of this long, so that few regions hold what many packs are.
const REGION_STEP_BYTES: u64 = 16 << 20;
/// Regions that a donor begins with, at most, and one for what is left over.
const REGIONS_WANTED: u64 = 32;

/// What is lent in one epoch. A region that comes or goes makes a new one of these.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) epoch: u64,
    /// By growing id.
    pub(crate) regions: Vec<Arc<Lending>>,
    /// Id of the next region: none is used twice in an epoch.
    pub(super) next: u32,
}

/// One region that is lent.
#[derive(Debug)]
pub(crate) struct Lending {
    pub(crate) info: RegionInfo,
    /// Keeps its pages from being swapped out, where that was asked for; let go before the memory
    /// is given back.
    pub(super) locked: Mutex<Option<Locked>>,
    pub(crate) memory: Memory,
    pub(super) read_only: OwnedFd,
    /// What opens it for readers on other hosts.
    pub(super) key: RegionKey,
    /// In this process's address space, once somebody on another host reads or writes there.
    mapping: OnceLock<Option<Mapping>>,
    /// What RDMA devices know of it, until it is taken back.
    pub(crate) devices: Registered,
}

impl Lending {
    /// Takes the memory of one region and registers it with the devices of `verbs`.
    pub(super) fn new(
        config: &DonorConfig,
        verbs: Option<&Lender>,
        id: RegionId,
        len: u64,
    ) -> Result<Self, DonorError> {
        let memory_error = |source| DonorError::Memory {
            name: config.name.clone(),
            source,
        };
        let memory = Memory::new(len, config.huge, config.populate).map_err(memory_error)?;
        let read_only = memory.read_only().map_err(|source| {
            memory_error(MemoryError::Call {
                call: "opening /proc/self/fd",
                len,
                source,
            })
        })?;
        let locked = config.lock.then(|| Locked::take(&memory)).flatten();
        let info = RegionInfo {
            id,
            len,
            huge_pages: memory.huge_pages(),
        };
        let key = RegionKey {
            region: id,
            read: Some(random(Token::random)?),
            write: Some(random(Token::random)?),
        };
        let devices = verbs.map(|lender| lender.register(id, &memory));
        Ok(Self {
            info,
            locked: Mutex::new(locked),
            memory,
            read_only,
            key,
            mapping: OnceLock::new(),
            devices: devices.unwrap_or_default(),
        })
    }

    /// Its mapping in this process; `None` when it cannot be mapped.
    pub(super) fn mapping(&self) -> Option<&Mapping> {
        let mapping = self.mapping.get_or_init(|| {
            let mapping = Mapping::new(&self.memory, true);
            mapping
                .inspect_err(|error| tracing::error!(%error, "a region cannot be mapped"))
                .ok()
        });
        mapping.as_ref()
    }

    /// Writes for a reader on another host.
    pub(super) fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let mapping = self.mapping();
        if !self.memory.huge_pages() {
            if let Some(mapping) = mapping {
                let end = offset.saturating_add(from.len() as u64);
                self.memory.prepare(mapping, offset..end);
            }
            return self.memory.write_at(from, offset);
        }
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        match mapping {
            Some(mapping) if mapping.copy_in(at, from) => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Lent {
    /// The region of this id.
    pub(crate) fn get(&self, id: RegionId) -> Option<&Lending> {
        let found = self
            .regions
            .binary_search_by_key(&id, |region| region.info.id);
        let region = found.ok().and_then(|index| self.regions.get(index));
        region.map(Arc::as_ref)
    }
}

/// Takes the memory of a donor's regions.
pub(super) fn lend(
    config: &DonorConfig,
    verbs: Option<&Lender>,
    epoch: u64,
    lens: &[u64],
) -> Result<Lent, DonorError> {
    let mut regions = Vec::with_capacity(lens.len());
    let mut next = 0;
    for len in lens.iter().copied() {
        let region = Lending::new(config, verbs, RegionId(next), len)?;
        regions.push(Arc::new(region));
        next += 1;
    }
    Ok(Lent {
        epoch,
        regions,
        next,
    })
}

/// The length of a region when up to `lend_bytes` are to be lent: a 32nd of that, in steps of
/// 16 MiB. Half of the regions that a donor may have are left for growing in other steps.
pub fn region_unit(lend_bytes: u64) -> u64 {
    let step = REGION_STEP_BYTES;
    let unit = (lend_bytes / REGIONS_WANTED)
        .div_ceil(step)
        .saturating_mul(step);
    unit.clamp(step, MAX_REGION_BYTES)
}

/// `lend_bytes`, rounded down to what can be lent, as regions of [`region_unit`] each; what is left
/// over is a smaller one.
pub fn region_lens(lend_bytes: u64) -> Vec<u64> {
    let all = lend_bytes - lend_bytes % REGION_ALIGN_BYTES;
    let unit = region_unit(all);
    let mut lens = vec![
        unit;
        usize::try_from(all / unit)
            .unwrap_or(usize::MAX)
            .min(MAX_REGIONS)
    ];
    if !all.is_multiple_of(unit) {
        lens.push(all % unit);
    }
    lens
}
