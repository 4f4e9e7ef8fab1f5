//! A catalogue, a pool and a refill in memory, with faults to be switched on.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use harbour_fs::{
    Config, Fs,
    source::{
        Catalogue, Extent, ImageEntry, IndexRef, LayerEntry, Pool, Refill, Snapshot, SourceError,
    },
};
use harbour_image::{
    digest::Digest,
    index::ViewKind,
    object::{PACK_MAX, PackId},
};
use harbour_pool::transport::{Read, RegionId, TransportError};

use super::model::Model;

/// What a donor does to whoever reads from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One bit of every read is wrong.
    Flip,
    /// It cannot be reached.
    Gone,
    /// Reads last until their deadline.
    Hang,
    /// Reads take so many milliseconds, and put other bytes into memory until then.
    Slow(u64),
}

#[derive(Default)]
struct State {
    snapshot: Arc<Snapshot>,
    documents: HashMap<Digest, Arc<[u8]>>,
    /// Where packs are said to lie when asked anew, and when a cache may answer.
    places: HashMap<PackId, Vec<Extent>>,
    stale: HashMap<PackId, Vec<Extent>>,
    /// Everything that a refill could bring back.
    origin: HashMap<PackId, Vec<u8>>,
    /// Memory of each donor.
    donors: HashMap<u64, Vec<u8>>,
    faults: HashMap<u64, Fault>,
    /// Index files on metad's disk.
    disk: HashMap<[u8; 32], Vec<u8>>,
    refuse_refills: bool,
    hang_refills: bool,
    /// So many refills more are in vain: what they bring is pushed out before it is asked for.
    vain_refills: usize,
    refills: Vec<PackId>,
    lost: Vec<(PackId, Extent, String)>,
    used: HashSet<PackId>,
    metad_down: bool,
}

/// The world outside of a file system.
#[derive(Default)]
pub struct World {
    state: Mutex<State>,
    pub batches: AtomicU64,
    pub reads: AtomicU64,
    pub bytes: AtomicU64,
}

impl World {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A file system over this world.
    pub fn fs(self: &Arc<Self>, config: Config) -> Arc<Fs> {
        let (catalogue, pool, refill) = (Arc::clone(self), Arc::clone(self), Arc::clone(self));
        Fs::new(config, catalogue, pool, refill)
    }

    /// Puts a pack onto each of `donors`.
    pub fn place(&self, id: PackId, bytes: &[u8], donors: &[u64]) {
        let mut state = self.state.lock().unwrap();
        state.origin.insert(id, bytes.to_vec());
        for donor in donors {
            let memory = state.donors.entry(*donor).or_default();
            let offset = memory.len() as u64;
            memory.extend_from_slice(bytes);
            let extent = Extent {
                donor: *donor,
                epoch: 1,
                region: RegionId(7),
                offset,
                len: bytes.len() as u32,
            };
            state.places.entry(id).or_default().push(extent);
        }
    }

    /// Writes a model's index and places all of it.
    pub fn publish(
        &self,
        model: &mut Model,
        kind: ViewKind,
        number: u32,
        donors: &[u64],
    ) -> IndexRef {
        let written = model.write(kind);
        for (id, bytes) in &model.packs {
            self.place(*id, bytes, donors);
        }
        let mut packs = Vec::new();
        for (part, bytes) in written.bytes.chunks(PACK_MAX).enumerate() {
            let mut id = written.digest;
            id[31] = part as u8;
            id[30] = number as u8;
            packs.push(PackId(id));
            self.place(PackId(id), bytes, donors);
        }
        self.state
            .lock()
            .unwrap()
            .disk
            .insert(written.digest, written.bytes);
        IndexRef {
            digest: written.digest,
            len: written.len,
            packs,
        }
    }

    pub fn layer(&self, model: &mut Model, number: u32, donors: &[u64]) -> LayerEntry {
        let index = self.publish(model, ViewKind::Layer, number, donors);
        LayerEntry {
            diff_id: Digest::of(&number.to_le_bytes()),
            number,
            index,
            blobs: Vec::new(),
            unpacked_bytes: 0,
        }
    }

    pub fn image(
        &self,
        name: (&str, &str, &str),
        model: &mut Model,
        number: u32,
        donors: &[u64],
    ) -> ImageEntry {
        let index = self.publish(model, ViewKind::Image, number, donors);
        let config = format!("{{\"config\":{number}}}");
        let manifest = format!("{{\"manifest\":{number}}}");
        let entry = ImageEntry {
            registry: name.0.into(),
            repository: name.1.into(),
            tag: name.2.into(),
            manifest: Digest::of(manifest.as_bytes()),
            config: Digest::of(config.as_bytes()),
            diff_ids: Vec::new(),
            number,
            index,
        };
        let mut state = self.state.lock().unwrap();
        state
            .documents
            .insert(entry.manifest, manifest.into_bytes().into());
        state
            .documents
            .insert(entry.config, config.into_bytes().into());
        drop(state);
        entry
    }

    pub fn show(&self, images: Vec<ImageEntry>, layers: Vec<LayerEntry>) {
        let mut state = self.state.lock().unwrap();
        let generation = state.snapshot.generation + 1;
        state.snapshot = Arc::new(Snapshot {
            generation,
            images,
            layers,
        });
    }

    pub fn fault(&self, donor: u64, fault: Option<Fault>) {
        let mut state = self.state.lock().unwrap();
        match fault {
            Some(fault) => state.faults.insert(donor, fault),
            None => state.faults.remove(&donor),
        };
    }

    /// The pool has none of these any more.
    pub fn lose(&self, packs: &[PackId]) {
        let mut state = self.state.lock().unwrap();
        for pack in packs {
            state.places.remove(pack);
        }
    }

    /// Of a pack's places only that at `donor` counts.
    pub fn keep(&self, pack: &PackId, donor: u64) {
        let mut state = self.state.lock().unwrap();
        if let Some(places) = state.places.get_mut(pack) {
            places.retain(|extent| extent.donor == donor);
        }
    }

    /// A cache of places goes on answering what is true now.
    pub fn freeze_places(&self) {
        let mut state = self.state.lock().unwrap();
        state.stale = state.places.clone();
    }

    /// Moves every pack to a new donor and fills the old memory with something else.
    pub fn move_all(&self, to: u64) {
        let mut state = self.state.lock().unwrap();
        for memory in state.donors.values_mut() {
            memory.fill(0xee);
        }
        let origin: Vec<(PackId, Vec<u8>)> = state.origin.clone().into_iter().collect();
        state.places.clear();
        drop(state);
        for (id, bytes) in origin {
            self.place(id, &bytes, &[to]);
        }
    }

    pub fn corrupt_document(&self, digest: &Digest) {
        self.state
            .lock()
            .unwrap()
            .documents
            .insert(*digest, b"something else".to_vec().into());
    }

    pub fn refuse_refills(&self, refuse: bool) {
        self.state.lock().unwrap().refuse_refills = refuse;
    }

    /// What so many refills bring is gone before it is asked for.
    pub fn vain_refills(&self, count: usize) {
        self.state.lock().unwrap().vain_refills = count;
    }

    /// Refills last until their deadline, as those from a source that is cut off.
    pub fn hang_refills(&self, hang: bool) {
        self.state.lock().unwrap().hang_refills = hang;
    }

    pub fn metad_down(&self, down: bool) {
        self.state.lock().unwrap().metad_down = down;
    }

    pub fn lost(&self) -> Vec<(PackId, Extent, String)> {
        self.state.lock().unwrap().lost.clone()
    }

    pub fn refills(&self) -> Vec<PackId> {
        self.state.lock().unwrap().refills.clone()
    }

    pub fn used(&self) -> HashSet<PackId> {
        self.state.lock().unwrap().used.clone()
    }

    fn up(&self, what: &str) -> Result<std::sync::MutexGuard<'_, State>, SourceError> {
        let state = self.state.lock().unwrap();
        if state.metad_down {
            let source = Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
            return Err(SourceError::Unavailable {
                what: what.into(),
                source,
            });
        }
        Ok(state)
    }
}

impl Catalogue for World {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.state.lock().unwrap().snapshot)
    }

    fn document(&self, digest: &Digest, _deadline: Instant) -> Result<Arc<[u8]>, SourceError> {
        let state = self.up("metad for a document")?;
        state
            .documents
            .get(digest)
            .cloned()
            .ok_or_else(|| SourceError::Gone(digest.to_string()))
    }

    fn read_index(
        &self,
        index: &IndexRef,
        offset: u64,
        into: &mut [u8],
        _deadline: Instant,
    ) -> Result<(), SourceError> {
        let state = self.up("metad for an index")?;
        let file = state
            .disk
            .get(&index.digest)
            .ok_or_else(|| SourceError::Gone("index".into()))?;
        into.copy_from_slice(&file[offset as usize..][..into.len()]);
        Ok(())
    }

    fn locate(
        &self,
        packs: &[PackId],
        fresh: bool,
        _deadline: Instant,
    ) -> Result<Vec<Vec<Extent>>, SourceError> {
        let state = self.up("metad for places")?;
        let answer = |pack: &PackId| {
            let stale = state.stale.get(pack).filter(|_| !fresh);
            stale
                .or_else(|| state.places.get(pack))
                .cloned()
                .unwrap_or_default()
        };
        Ok(packs.iter().map(answer).collect())
    }

    fn report_lost(&self, pack: &PackId, extent: &Extent, why: &str) {
        self.state
            .lock()
            .unwrap()
            .lost
            .push((*pack, *extent, why.into()));
    }

    fn report_use(&self, packs: &[PackId]) {
        self.state.lock().unwrap().used.extend(packs);
    }
}

impl Pool for World {
    fn read(
        &self,
        donor: u64,
        epoch: u64,
        batch: &mut [Read<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let state = self.state.lock().unwrap();
        let fault = state.faults.get(&donor).copied();
        if fault == Some(Fault::Hang) {
            drop(state);
            std::thread::sleep(
                deadline
                    .saturating_duration_since(Instant::now())
                    .min(Duration::from_secs(60)),
            );
            return Err(TransportError::Deadline);
        }
        let state = match fault {
            Some(Fault::Slow(ms)) => {
                drop(state);
                batch.iter_mut().for_each(|read| read.into.fill(0xdd));
                let left = deadline.saturating_duration_since(Instant::now());
                std::thread::sleep(Duration::from_millis(ms).min(left));
                if left < Duration::from_millis(ms) {
                    return Err(TransportError::Deadline);
                }
                self.state.lock().unwrap()
            }
            _ => state,
        };
        let memory = state.donors.get(&donor);
        let Some(memory) = memory.filter(|_| fault != Some(Fault::Gone)) else {
            let source = std::io::ErrorKind::ConnectionRefused.into();
            return Err(TransportError::Unreachable {
                address: format!("donor {donor}"),
                source,
            });
        };
        if epoch != 1 {
            return Err(TransportError::WrongEpoch {
                wanted: epoch,
                actual: 1,
            });
        }
        self.batches.fetch_add(1, Ordering::Relaxed);
        for read in batch {
            let (offset, len) = (read.offset, read.into.len() as u64);
            let from = memory.get(offset as usize..(offset + len) as usize);
            let from = from.ok_or(TransportError::OutOfBounds {
                region: read.region,
                offset,
                len,
            })?;
            read.into.copy_from_slice(from);
            if fault == Some(Fault::Flip) {
                let middle = read.into.len() / 2;
                read.into[middle] ^= 0x10;
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    }

    fn describe(&self, donor: u64) -> String {
        if donor < 100 {
            "local".into()
        } else {
            "far".into()
        }
    }

    fn remark(&self, _: u64) -> Option<String> {
        None
    }
}

impl Refill for World {
    fn refill(
        &self,
        _number: u32,
        pack: &PackId,
        _listed: bool,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let mut state = self.state.lock().unwrap();
        state.refills.push(*pack);
        if state.hang_refills {
            drop(state);
            std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            return Err(SourceError::Deadline("the source".into()));
        }
        if state.refuse_refills {
            return Err(SourceError::Gone("the source".into()));
        }
        let bytes = state
            .origin
            .get(pack)
            .cloned()
            .ok_or_else(|| SourceError::Gone("pack".into()))?;
        state.places.remove(pack);
        if let Some(left) = state.vain_refills.checked_sub(1) {
            state.vain_refills = left;
            return Ok(());
        }
        drop(state);
        self.place(*pack, &bytes, &[50]);
        Ok(())
    }
}
