//! Lays objects into packs and packs into the pool: the sink that layers are decoded into.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use harbour_image::{
    index::{PackRef, Placement},
    object::{ObjectHashes, ObjectId, PACK_MAX, PackId, hash_object},
    tree::{ObjectKey, ObjectSink},
};
use harbour_metad_client::v1;

use super::{IngestError, lease::Pull};

/// Where an object lies: its pack, that pack's length, and the offset in it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Pack.
    pub pack: PackRef,
    /// Offset of the object in bytes.
    pub offset: u32,
}

/// Objects that this pull has stored, shared by the layers it unpacks at the same time.
pub type Stored = Arc<Mutex<HashMap<ObjectId, Place>>>;

/// A pack that this layer refers to and, when this layer stored it, the objects in it.
#[derive(Debug)]
pub struct PackRecord {
    /// Name and length.
    pub pack: PackRef,
    /// Objects that were stored with it, by offset; empty for a pack stored by others.
    pub objects: Vec<(ObjectId, u32, u32)>,
}

/// What a finished layer brings: where every object of it lies.
pub struct Packed {
    /// For the index.
    pub placement: Placement,
    /// For metad.
    pub packs: Vec<PackRecord>,
    /// Bytes that were written to the pool for it.
    pub new_bytes: u64,
}

/// An object that waits in the buffer until its pack is sealed.
struct Waiting {
    key: ObjectKey,
    id: ObjectId,
    start: usize,
    len: usize,
    /// Whether metad was asked for it already (and does not have it).
    asked: bool,
}

/// The sink. Memory: one pack buffer of 4 MiB, and about 100 bytes for each object of the layer.
pub struct Packer<'a> {
    pull: &'a Pull,
    stored: Stored,
    buffer: Vec<u8>,
    waiting: Vec<Waiting>,
    keys: HashMap<ObjectId, ObjectKey>,
    objects: Vec<Hashed>,
    packs: Vec<PackRecord>,
    pack_numbers: HashMap<PackId, u32>,
    new_bytes: u64,
}

struct Hashed {
    hashes: ObjectHashes,
    len: u32,
    place: Option<(u32, u32)>,
}

impl<'a> Packer<'a> {
    /// A sink for one layer of `pull`.
    pub fn new(pull: &'a Pull, stored: Stored) -> Self {
        Self {
            pull,
            stored,
            buffer: Vec::with_capacity(PACK_MAX),
            waiting: Vec::new(),
            keys: HashMap::new(),
            objects: Vec::new(),
            packs: Vec::new(),
            pack_numbers: HashMap::new(),
            new_bytes: 0,
        }
    }

    /// Seals what waits and tells where everything is.
    pub fn finish(mut self) -> Result<Packed, IngestError> {
        self.ask()?;
        self.seal()?;
        let mut placement = Placement {
            packs: self.packs.iter().map(|r| r.pack).collect(),
            ..Placement::default()
        };
        for object in self.objects {
            let (pack, offset) = object.place.ok_or_else(|| {
                IngestError::Bug(format!("object {:?} was never placed", object.hashes.id))
            })?;
            placement
                .push(&object.hashes, object.len, pack, offset)
                .ok_or_else(too_many)?;
        }
        Ok(Packed {
            placement,
            packs: self.packs,
            new_bytes: self.new_bytes,
        })
    }

    /// Drops from the buffer what the pool has already: stored by this pull, or known to metad.
    fn ask(&mut self) -> Result<(), IngestError> {
        let mut known: HashMap<ObjectId, Place> = HashMap::new();
        {
            let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            for waiting in self.waiting.iter().filter(|w| !w.asked) {
                if let Some(place) = stored.get(&waiting.id) {
                    known.insert(waiting.id, *place);
                }
            }
        }
        let unknown: Vec<ObjectId> = self
            .waiting
            .iter()
            .filter(|w| !w.asked && !known.contains_key(&w.id))
            .map(|w| w.id)
            .collect();
        for ids in unknown.chunks(8192) {
            self.pull.check()?;
            let found = self.pull.find_objects(ids)?;
            for (id, object) in ids.iter().zip(found) {
                if let Some(place) = object {
                    known.insert(*id, place);
                }
            }
        }
        let mut end = 0;
        let mut kept = Vec::with_capacity(self.waiting.len());
        for mut waiting in std::mem::take(&mut self.waiting) {
            if let Some(place) = known.get(&waiting.id) {
                let number = self.pack_number(place.pack, Vec::new());
                self.objects[waiting.key.0 as usize].place = Some((number, place.offset));
                continue;
            }
            self.buffer
                .copy_within(waiting.start..waiting.start + waiting.len, end);
            waiting.start = end;
            waiting.asked = true;
            end += waiting.len;
            kept.push(waiting);
        }
        self.buffer.truncate(end);
        self.waiting = kept;
        Ok(())
    }

    /// Writes the buffer as one pack to every replica that metad reserves.
    fn seal(&mut self) -> Result<(), IngestError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.pull.check()?;
        let list: Vec<(ObjectId, u32, u32)> = self
            .waiting
            .iter()
            .map(|w| (w.id, w.start as u32, w.len as u32))
            .collect();
        let pack = PackRef {
            id: pack_id(&list),
            len: self.buffer.len() as u32,
        };
        if self.pull.store_pack(&pack, &self.buffer)? {
            self.new_bytes += u64::from(pack.len);
        }
        {
            let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            for (id, offset, _) in &list {
                stored.entry(*id).or_insert(Place {
                    pack,
                    offset: *offset,
                });
            }
        }
        let number = self.pack_number(pack, list);
        for waiting in self.waiting.drain(..) {
            self.objects[waiting.key.0 as usize].place = Some((number, waiting.start as u32));
        }
        self.buffer.clear();
        Ok(())
    }

    fn pack_number(&mut self, pack: PackRef, objects: Vec<(ObjectId, u32, u32)>) -> u32 {
        let next = self.packs.len() as u32;
        let number = *self.pack_numbers.entry(pack.id).or_insert(next);
        if number == next {
            self.packs.push(PackRecord { pack, objects });
        } else if !objects.is_empty() {
            self.packs[number as usize].objects = objects;
        }
        number
    }
}

impl ObjectSink for Packer<'_> {
    type Error = IngestError;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, IngestError> {
        let hashes = hash_object(bytes);
        if let Some(key) = self.keys.get(&hashes.id) {
            return Ok(*key);
        }
        if self.buffer.len() + bytes.len() > PACK_MAX {
            self.ask()?;
            // Asking may have made room; a pack less than three quarters full is worth filling up.
            if self.buffer.len() + bytes.len() > PACK_MAX || self.buffer.len() >= PACK_MAX / 4 * 3 {
                self.seal()?;
            }
        }
        let key = ObjectKey(u32::try_from(self.objects.len()).map_err(|_| too_many())?);
        self.waiting.push(Waiting {
            key,
            id: hashes.id,
            start: self.buffer.len(),
            len: bytes.len(),
            asked: false,
        });
        self.buffer.extend_from_slice(bytes);
        self.keys.insert(hashes.id, key);
        self.objects.push(Hashed {
            hashes,
            len: bytes.len() as u32,
            place: None,
        });
        Ok(key)
    }
}

fn too_many() -> IngestError {
    IngestError::Limit("a layer of more than 2^32 objects".into())
}

/// The name of a pack that holds these objects (digest, offset, length) end to end.
pub fn pack_id(objects: &[(ObjectId, u32, u32)]) -> PackId {
    let mut hasher = blake3::Hasher::new();
    for (id, _, len) in objects {
        hasher.update(&id.0);
        hasher.update(&len.to_le_bytes());
    }
    PackId(*hasher.finalize().as_bytes())
}

impl From<&PackRecord> for v1::PackObjects {
    fn from(record: &PackRecord) -> Self {
        Self {
            pack: record.pack.id.0.to_vec(),
            len: record.pack.len,
            objects: record
                .objects
                .iter()
                .map(|(id, offset, len)| v1::PackObject {
                    object: id.0.to_vec(),
                    offset: *offset,
                    len: *len,
                })
                .collect(),
        }
    }
}
