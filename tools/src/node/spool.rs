//! Packs that the pool could not take or give, kept on this host's disk for a while.
//!
//! One file without a name, in slots of a pack each; a slot that is used again has another region
//! number, and what a reader gets from it is checked like anything else. To the file system it is
//! a donor ([`DONOR`]) that only this node knows.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use harbour_fs::source::Extent;
use harbour_image::object::{PACK_MAX, PackId};
use harbour_pool::transport::{Read, RegionId, TransportError};

/// The spool's number among donors; metad gives none that is so large.
pub const DONOR: u64 = u64::MAX;
/// Its one epoch.
const EPOCH: u64 = 1;
/// Packs that it holds at most: 256 MiB of disk when all are full.
pub const SLOTS: usize = 64;

/// The file and what is in it.
pub struct Spool {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    by_pack: HashMap<PackId, Entry>,
    /// Regions of packs that are whole, and of those that are being written.
    by_region: HashMap<u32, usize>,
    free: Vec<usize>,
    last_region: u32,
    clock: u64,
}

#[derive(Clone, Copy)]
struct Entry {
    region: u32,
    slot: usize,
    len: u32,
    used: u64,
}

/// A slot that is being written. Dropped, it is free again.
pub struct Filling<'a> {
    spool: &'a Spool,
    pack: PackId,
    slot: usize,
    len: u32,
    kept: bool,
}

impl Spool {
    /// A spool in `dir`, of which nothing is left when this process ends.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("spool.{}", std::process::id()));
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        let slots = Slots {
            free: (0..SLOTS).rev().collect(),
            ..Slots::default()
        };
        Ok(Self {
            file,
            slots: Mutex::new(slots),
        })
    }

    /// Where it has `pack`.
    pub fn find(&self, pack: &PackId) -> Option<Extent> {
        let mut slots = self.slots();
        slots.clock += 1;
        let clock = slots.clock;
        let entry = slots.by_pack.get_mut(pack)?;
        entry.used = clock;
        Some(Extent {
            donor: DONOR,
            epoch: EPOCH,
            region: RegionId(entry.region),
            offset: 0,
            len: entry.len,
        })
    }

    /// Room for `pack` of `len` bytes; the pack unused for longest makes it. `None` when all slots
    /// are being written, or when it is there already.
    pub fn fill(&self, pack: PackId, len: u32) -> Option<Filling<'_>> {
        if len as usize > PACK_MAX {
            return None;
        }
        let mut slots = self.slots();
        if slots.by_pack.contains_key(&pack) {
            return None;
        }
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None => {
                let oldest = slots.by_pack.iter().min_by_key(|(_, entry)| entry.used);
                let oldest = oldest.map(|(pack, entry)| (*pack, *entry))?;
                slots.by_pack.remove(&oldest.0);
                slots.by_region.remove(&oldest.1.region);
                oldest.1.slot
            }
        };
        Some(Filling {
            spool: self,
            pack,
            slot,
            len,
            kept: false,
        })
    }

    /// Reads a batch, as a transport would.
    pub fn read(&self, batch: &mut [Read<'_>]) -> Result<(), TransportError> {
        for read in batch {
            let len = read.into.len() as u64;
            let bounds = TransportError::OutOfBounds {
                region: read.region,
                offset: read.offset,
                len,
            };
            let slot = self.slots().by_region.get(&read.region.0).copied();
            let inside = read
                .offset
                .checked_add(len)
                .is_some_and(|end| end <= PACK_MAX as u64);
            let Some(slot) = slot.filter(|_| inside) else {
                return Err(bounds);
            };
            let at = slot as u64 * PACK_MAX as u64 + read.offset;
            self.file.read_exact_at(read.into, at).map_err(|source| {
                TransportError::Unreachable {
                    address: "the spool of this node".into(),
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// Gives up `pack`, which proved wrong in `region`.
    pub fn forget(&self, pack: &PackId, region: RegionId) {
        let mut slots = self.slots();
        let bad = slots.by_pack.get(pack).copied();
        if let Some(bad) = bad.filter(|entry| entry.region == region.0) {
            slots.by_pack.remove(pack);
            slots.by_region.remove(&bad.region);
            slots.free.push(bad.slot);
        }
    }

    /// All of `pack`, when it is here and as long as `len`.
    pub fn whole(&self, pack: &PackId, len: u32) -> Option<Vec<u8>> {
        let extent = self.find(pack).filter(|extent| extent.len == len)?;
        let mut bytes = vec![0; len as usize];
        let read = Read {
            region: extent.region,
            offset: 0,
            into: &mut bytes,
        };
        self.read(&mut [read]).ok()?;
        // A slot that was given to another pack meanwhile has another region.
        let here = self.slots().by_region.contains_key(&extent.region.0);
        here.then_some(bytes)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filling<'_> {
    /// Writes a part of the pack.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if u64::from(offset) + bytes.len() as u64 > u64::from(self.len) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a part lies beyond the end of its pack",
            ));
        }
        let at = self.slot as u64 * PACK_MAX as u64 + u64::from(offset);
        self.spool.file.write_all_at(bytes, at)
    }

    /// The pack is whole: readers may find it.
    pub fn keep(mut self) {
        let mut slots = self.spool.slots();
        if slots.by_pack.contains_key(&self.pack) {
            // Another pass was faster: its slot is as good.
            drop(slots);
            return;
        }
        // Bytes between objects were never written; a read of the slot's whole length must work.
        let end = self.slot as u64 * PACK_MAX as u64 + u64::from(self.len);
        let grown = self.spool.file.metadata().map(|meta| meta.len());
        if grown.is_ok_and(|len| len < end) && self.spool.file.set_len(end).is_err() {
            return;
        }
        slots.last_region = slots.last_region.wrapping_add(1);
        slots.clock += 1;
        let entry = Entry {
            region: slots.last_region,
            slot: self.slot,
            len: self.len,
            used: slots.clock,
        };
        slots.by_region.insert(entry.region, entry.slot);
        slots.by_pack.insert(self.pack, entry);
        self.kept = true;
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.spool.slots().free.push(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pack(number: usize) -> PackId {
        PackId(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    fn read(
        spool: &Spool,
        extent: &Extent,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, TransportError> {
        let mut into = vec![0; len];
        let mut batch = [Read {
            region: extent.region,
            offset,
            into: &mut into,
        }];
        spool.read(&mut batch).map(|()| into)
    }

    #[test]
    fn packs_are_found_when_they_are_whole_and_the_oldest_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let filling = spool.fill(pack(0), 100).unwrap();
        filling.write(10, b"hello").unwrap();
        assert!(filling.write(96, b"hello").is_err());
        assert!(spool.find(&pack(0)).is_none());
        filling.keep();
        let first = spool.find(&pack(0)).unwrap();
        assert_eq!(read(&spool, &first, 10, 5).unwrap(), b"hello");
        assert_eq!(read(&spool, &first, 0, 100).unwrap().len(), 100);
        assert!(read(&spool, &first, PACK_MAX as u64 - 3, 5).is_err());
        assert!(read(&spool, &first, u64::MAX, 5).is_err());
        assert!(spool.fill(pack(0), 100).is_none(), "it is there");
        assert!(spool.fill(pack(1), PACK_MAX as u32 + 1).is_none());
        drop(spool.fill(pack(1), 5).unwrap());
        for number in 1..SLOTS {
            spool.fill(pack(number), 5).unwrap().keep();
        }
        spool.find(&pack(0)).unwrap();
        spool.fill(pack(SLOTS), 5).unwrap().keep();
        assert!(spool.find(&pack(1)).is_none(), "unused for longest");
        assert!(spool.find(&pack(0)).is_some());
        let all: Vec<_> = (0..=SLOTS).filter_map(|n| spool.find(&pack(n))).collect();
        assert_eq!(all.len(), SLOTS);
        let held: Vec<_> = (0..SLOTS)
            .map(|n| spool.fill(pack(1000 + n), 5).unwrap())
            .collect();
        assert!(spool.fill(pack(2000), 5).is_none(), "all are being written");
        assert!(
            matches!(
                read(&spool, &first, 10, 5),
                Err(TransportError::OutOfBounds { .. })
            ),
            "a place of a pack that made room"
        );
        drop(held);
        assert!(spool.fill(pack(2000), 5).is_some());
    }

    #[test]
    fn whole_packs_are_given_out_and_wrong_ones_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path()).unwrap();
        let (one, other) = (
            spool.fill(pack(0), 5).unwrap(),
            spool.fill(pack(0), 5).unwrap(),
        );
        assert_eq!(spool.whole(&pack(0), 5), None, "it is being written");
        one.write(0, b"hello").unwrap();
        one.keep();
        other.keep();
        assert_eq!(spool.whole(&pack(0), 5).unwrap(), b"hello");
        assert_eq!(spool.whole(&pack(0), 6), None, "another length");
        let place = spool.find(&pack(0)).unwrap();
        spool.forget(&pack(0), RegionId(place.region.0 + 1));
        assert!(spool.find(&pack(0)).is_some(), "a place that it had before");
        spool.forget(&pack(0), place.region);
        assert!(spool.find(&pack(0)).is_none());
        assert!(read(&spool, &place, 0, 5).is_err());
        let all: Vec<_> = (0..SLOTS).filter_map(|n| spool.fill(pack(n), 5)).collect();
        assert_eq!(all.len(), SLOTS, "no slot is lost");
    }
}
