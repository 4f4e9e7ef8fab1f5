//! An index's bytes, fetched granule by granule and checked before anything reads them.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use harbour_image::{
    index::{IndexBytes, ReadError, seal},
    object::{GRANULE, PACK_MAX, PackId},
};

use crate::{
    budget::Budget,
    read::{Errand, Missed, Outside, Want},
    source::IndexRef,
};

/// Granules that are fetched together when one is missing: directories and the inodes they name
/// lie near each other.
const CLUSTER: u64 = 4;
/// Longest granule table, for an index of 8 GiB: more than any tree of 2^32 nodes should need in
/// practice, and a bound on what a wrong catalogue entry makes us allocate.
const TABLE_MAX: u64 = 16 << 20;

/// The bytes of one index, as far as they were needed.
#[derive(Debug)]
pub(crate) struct Lazy {
    owner: u32,
    index: IndexRef,
    table: OnceLock<Box<[u8]>>,
    granules: Box<[OnceLock<Box<[u8]>>]>,
    /// Memory of all indexes, and the part of it that is ours.
    memory: Arc<AtomicU64>,
    ours: AtomicU64,
}

/// [`Lazy`] bytes and the world that they come from.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(crate) lazy: &'a Lazy,
    pub(crate) outside: &'a Outside,
}

impl Lazy {
    pub(crate) fn new(owner: u32, index: IndexRef, memory: Arc<AtomicU64>) -> Self {
        let count = if seal::table_len(index.len) <= TABLE_MAX {
            index.len.div_ceil(GRANULE as u64)
        } else {
            0
        };
        // At most 2^19, as the table is bounded.
        let granules = (0..count).map(|_| OnceLock::new()).collect();
        let ours = AtomicU64::new(0);
        let lazy = Self {
            owner,
            index,
            table: OnceLock::new(),
            granules,
            memory,
            ours,
        };
        lazy.account(count * size_of::<OnceLock<Box<[u8]>>>() as u64);
        lazy
    }

    /// Number of granules.
    pub(crate) fn count(&self) -> u64 {
        self.granules.len() as u64
    }

    /// Fetches those of granules `first` to `last` (not included) that are missing.
    pub(crate) fn load(&self, outside: &Outside, first: u64, last: u64) -> Result<(), Missed> {
        let last = last.min(self.count());
        let missing = |number: &u64| self.granules[*number as usize].get().is_none();
        let Some(from) = (first..last).find(missing) else {
            return Ok(());
        };
        let to = (from..last)
            .rev()
            .find(missing)
            .map_or(last, |number| number + 1);
        let table = self.table(outside)?;
        let start = from * GRANULE as u64;
        let len = (to * GRANULE as u64).min(self.index.len) - start;
        let mut buffer = outside.buffers.take(len as usize);
        let bytes = &mut buffer[..len as usize];
        let check = |at: u64, bytes: &[u8]| {
            bytes
                .chunks(GRANULE)
                .zip(at / GRANULE as u64..)
                .all(|(granule, number)| {
                    seal::check_granule(self.index.len, table, number, granule)
                })
        };
        self.bring(outside, start, bytes, &check)?;
        for (granule, number) in bytes.chunks(GRANULE).zip(from..) {
            if self.granules[number as usize].set(granule.into()).is_ok() {
                self.account(granule.len() as u64);
            }
        }
        Ok(())
    }

    fn table(&self, outside: &Outside) -> Result<&[u8], Missed> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let len = seal::table_len(self.index.len);
        if len > TABLE_MAX {
            return Err(Missed::Failed(format!(
                "an index of {} bytes is not believed",
                self.index.len
            )));
        }
        let mut table = vec![0; len as usize];
        // The table is checked as a whole, so no single replica can be blamed for a part of it:
        // each source gives all of it or none.
        let check = |_, bytes: &[u8]| {
            bytes.len() as u64 != len
                || seal::check_table(&self.index.digest, self.index.len, bytes)
        };
        self.bring(outside, self.index.len, &mut table, &check)?;
        if !seal::check_table(&self.index.digest, self.index.len, &table) {
            self.fall_back(outside, self.index.len, &mut table)?;
            if !seal::check_table(&self.index.digest, self.index.len, &table) {
                return Err(Missed::Failed(
                    "granule table does not have its digest".into(),
                ));
            }
        }
        self.account(len);
        Ok(self.table.get_or_init(|| table.into()))
    }

    /// Fills `into` from `offset` of the index file: from the pool, else from metad's disk, else
    /// from the pool after a refill. `check` gets an offset in the file and the bytes from there.
    fn bring(
        &self,
        outside: &Outside,
        offset: u64,
        into: &mut [u8],
        check: &dyn Fn(u64, &[u8]) -> bool,
    ) -> Result<(), Missed> {
        let (packs, wants) = self.wants(offset, into.len())?;
        let by_want = |want: usize, bytes: &[u8]| {
            wants
                .get(want)
                .is_some_and(|want| check(offset + want.at as u64, bytes))
        };
        let mut errand = Errand {
            owner: self.owner,
            packs: &packs,
            wants: &wants,
            refill: false,
        };
        let tried = match outside.fetch(&errand, into, &by_want) {
            Ok(()) => return Ok(()),
            Err(Missed::Later) => return Err(Missed::Later),
            Err(Missed::Failed(tried)) => tried,
        };
        let tried = match self.fall_back(outside, offset, into) {
            Ok(()) if check(offset, into) => return Ok(()),
            Ok(()) => format!("{tried}; metad's disk: wrong bytes"),
            Err(Missed::Later) => return Err(Missed::Later),
            Err(Missed::Failed(why)) => format!("{tried}; {why}"),
        };
        errand.refill = true;
        match outside.fetch(&errand, into, &by_want) {
            Err(Missed::Failed(more)) => Err(Missed::Failed(format!("{tried}; {more}"))),
            other => other,
        }
    }

    /// Reads from metad's disk, unchecked.
    fn fall_back(&self, outside: &Outside, offset: u64, into: &mut [u8]) -> Result<(), Missed> {
        let budget = Budget::current();
        if budget.quick {
            return Err(Missed::Later);
        }
        outside.stats.index_fallback_bytes.add(into.len() as u64);
        outside
            .catalogue
            .read_index(&self.index, offset, into, budget.deadline)
            .map_err(|error| {
                Missed::Failed(format!("metad's disk: {}", crate::errno::chain(&error)))
            })
    }

    /// Cuts a range of the index file at the borders of its packs.
    fn wants(&self, offset: u64, len: usize) -> Result<(Vec<PackId>, Vec<Want>), Missed> {
        let (mut packs, mut wants) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < len {
            let position = offset + at as u64;
            let inside = (position % PACK_MAX as u64) as usize;
            let part = (PACK_MAX - inside).min(len - at);
            let pack = usize::try_from(position / PACK_MAX as u64)
                .ok()
                .and_then(|number| self.index.packs.get(number));
            let Some(pack) = pack else {
                // Not in the pool at all: metad's disk has it.
                return Ok((Vec::new(), Vec::new()));
            };
            // Fits: PACK_MAX is far below 2^32.
            wants.push(Want {
                pack: packs.len(),
                offset: inside as u32,
                at,
                len: part,
            });
            packs.push(*pack);
            at += part;
        }
        Ok((packs, wants))
    }

    fn account(&self, bytes: u64) {
        self.ours.fetch_add(bytes, Ordering::Relaxed);
        self.memory.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.memory
            .fetch_sub(self.ours.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl IndexBytes for Bytes<'_> {
    fn len(&self) -> u64 {
        self.lazy.index.len
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let (len, end) = (into.len() as u64, self.lazy.index.len);
        if offset.checked_add(len).is_none_or(|last| last > end) {
            return Err(ReadError::PastEnd { offset, len, end });
        }
        let mut done = 0;
        while done < into.len() {
            let position = offset + done as u64;
            let number = position / GRANULE as u64;
            let granule = self.granule(number).map_err(|missed| ReadError::Failed {
                offset,
                len,
                source: Box::new(missed),
            })?;
            let from = (position % GRANULE as u64) as usize;
            let part = (granule.len() - from).min(into.len() - done);
            into[done..done + part].copy_from_slice(&granule[from..from + part]);
            done += part;
        }
        Ok(())
    }
}

impl<'a> Bytes<'a> {
    fn granule(&self, number: u64) -> Result<&'a [u8], Missed> {
        let cell = usize::try_from(number)
            .ok()
            .and_then(|number| self.lazy.granules.get(number));
        let Some(cell) = cell else {
            return Err(Missed::Failed(format!(
                "an index of {} bytes is not believed",
                self.lazy.index.len
            )));
        };
        if let Some(granule) = cell.get() {
            return Ok(granule);
        }
        let first = number - number % CLUSTER;
        self.lazy.load(self.outside, first, first + CLUSTER)?;
        cell.get()
            .map(|granule| &**granule)
            .ok_or_else(|| Missed::Failed("granule went missing".into()))
    }
}
