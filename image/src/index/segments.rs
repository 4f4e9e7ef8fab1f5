//! Reading the object map: from a place in the data region to objects.

use super::{
    Index, IndexBytes, IndexError, PackRef,
    layout::{BLOCK, HASH_LEN, KEY_LEN, PACK_LEN, SEGMENT_LEN, array, get_u32},
    placement::granule_count,
};
use crate::object::{GranuleHash, OBJECT_MAX, ObjectId, PACK_MAX, PackId};

/// Keys that are read at once when a search has come this close: 1 KiB of them.
const KEYS_AT_ONCE: usize = 256;

/// What fills one stretch of the data region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the EROFS file, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What is there.
    pub what: What,
}

/// Content of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Zeros.
    Hole,
    /// A part of an object.
    Object(ObjectPart),
}

/// A part of an object, and where the object lies. How long the part is stands in its [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectPart {
    /// Name of the object.
    pub id: ObjectId,
    /// Length of the whole object in bytes.
    pub object_len: u32,
    /// Its pack.
    pub pack: PackRef,
    /// Number of that pack in this index.
    pub pack_number: u32,
    /// Where the object begins in its pack, in bytes.
    pub pack_offset: u32,
    /// Where the part begins in the object, in bytes.
    pub skip: u32,
    /// Number of the object's first granule hash, for [`Index::granule_hashes`]; without meaning
    /// for objects of one granule.
    pub granules: u32,
}

impl ObjectPart {
    /// How many granule hashes the object has.
    pub const fn granule_count(&self) -> u32 {
        granule_count(self.object_len)
    }
}

/// One record, as it is stored.
struct Record {
    id: ObjectId,
    len: u32,
    pack: u32,
    pack_offset: u32,
    granules: u32,
}

impl<B: IndexBytes> Index<B> {
    /// What fills `len` bytes at `offset` of the EROFS file, which must lie in the data region.
    /// Segments follow each other without gaps and cover exactly what was asked for.
    pub fn segments(&self, offset: u64, len: u64) -> Result<Vec<Segment>, IndexError> {
        let (from, to) = (self.header.meta_len, self.header.erofs_len());
        let end = offset
            .checked_add(len)
            .filter(|end| offset >= from && *end <= to);
        let end = end.ok_or(IndexError::OutOfRange {
            what: "data at offset",
            number: offset,
        })?;
        let mut found = Vec::new();
        if len == 0 {
            return Ok(found);
        }
        // Keys have 32 bits, as `decode` of the header has checked.
        let mut number = self.segment_at(((offset - from) / BLOCK) as u32)?;
        let mut at = offset;
        let mut packs = None;
        let mut next_key = self.key_offset(number)?;
        while at < end {
            let Some(start) = next_key.filter(|start| *start < end) else {
                found.push(Segment {
                    offset: at,
                    len: end - at,
                    what: What::Hole,
                });
                break;
            };
            let record = self.record(number)?;
            number += 1;
            next_key = self.key_offset(number)?;
            let object_end = start + u64::from(record.len);
            if object_end > next_key.unwrap_or(to) {
                return Err(self.corrupt_segment(number - 1, "a segment that runs into the next"));
            }
            if object_end <= at {
                continue;
            }
            if start > at {
                found.push(Segment {
                    offset: at,
                    len: start - at,
                    what: What::Hole,
                });
                at = start;
            }
            let stop = object_end.min(end);
            let pack = self.pack_of(&record, &mut packs)?;
            let part = ObjectPart {
                id: record.id,
                object_len: record.len,
                pack,
                pack_number: record.pack,
                pack_offset: record.pack_offset,
                skip: (at - start) as u32,
                granules: record.granules,
            };
            found.push(Segment {
                offset: at,
                len: stop - at,
                what: What::Object(part),
            });
            at = stop;
        }
        Ok(found)
    }

    /// Granule hashes `first` to `first + count`.
    pub fn granule_hashes(&self, first: u32, count: u32) -> Result<Vec<GranuleHash>, IndexError> {
        let table = self.header.granules;
        if u64::from(first) + u64::from(count) > table.count {
            return Err(IndexError::OutOfRange {
                what: "granule hash",
                number: u64::from(first),
            });
        }
        let mut hashes = vec![[0; HASH_LEN as usize]; count as usize];
        self.bytes.read_at(
            table.at + u64::from(first) * HASH_LEN,
            hashes.as_flattened_mut(),
        )?;
        Ok(hashes)
    }

    /// Number of packs that this index points into.
    pub const fn pack_count(&self) -> u32 {
        self.header.packs.count as u32
    }

    /// Pack `number`.
    pub fn pack(&self, number: u32) -> Result<PackRef, IndexError> {
        let table = self.header.packs;
        if u64::from(number) >= table.count {
            return Err(IndexError::OutOfRange {
                what: "pack",
                number: u64::from(number),
            });
        }
        let raw: [u8; PACK_LEN as usize] = self.entry(table, u64::from(number))?;
        let len = get_u32(&raw, 32);
        if len as usize > PACK_MAX {
            let at = table.at + u64::from(number) * PACK_LEN;
            return Err(IndexError::Corrupt {
                at,
                what: "a pack longer than 4 MiB",
            });
        }
        Ok(PackRef {
            id: PackId(array(&raw, 0)),
            len,
        })
    }

    /// Number of the last segment whose key is at most `block`, or 0 when there is none.
    fn segment_at(&self, block: u32) -> Result<u64, IndexError> {
        let table = self.header.keys;
        let (mut low, mut high) = (0, table.count);
        while high - low > KEYS_AT_ONCE as u64 {
            let middle = low + (high - low) / 2;
            if u32::from_le_bytes(self.entry(table, middle)?) <= block {
                low = middle;
            } else {
                high = middle;
            }
        }
        let mut raw = [0; KEYS_AT_ONCE * KEY_LEN as usize];
        let raw = &mut raw[..(high - low) as usize * KEY_LEN as usize];
        self.bytes.read_at(table.at + low * KEY_LEN, raw)?;
        let keys = raw.as_chunks::<{ KEY_LEN as usize }>().0;
        let not_above = keys.partition_point(|key| u32::from_le_bytes(*key) <= block);
        Ok(low + (not_above as u64).saturating_sub(1))
    }

    /// Where segment `number` begins in the EROFS file; `None` behind the last.
    fn key_offset(&self, number: u64) -> Result<Option<u64>, IndexError> {
        if number >= self.header.keys.count {
            return Ok(None);
        }
        let key = u32::from_le_bytes(self.entry(self.header.keys, number)?);
        Ok(Some(self.header.meta_len + u64::from(key) * BLOCK))
    }

    fn record(&self, number: u64) -> Result<Record, IndexError> {
        let raw: [u8; SEGMENT_LEN as usize] = self.entry(self.header.segments, number)?;
        let record = Record {
            id: ObjectId(array(&raw, 0)),
            len: get_u32(&raw, 32),
            pack: get_u32(&raw, 36),
            pack_offset: get_u32(&raw, 40),
            granules: get_u32(&raw, 44),
        };
        if record.len == 0 || record.len as usize > OBJECT_MAX {
            return Err(self.corrupt_segment(number, "an object of no or too great length"));
        }
        let hashes = u64::from(record.granules) + u64::from(granule_count(record.len));
        if granule_count(record.len) > 0 && hashes > self.header.granules.count {
            return Err(
                self.corrupt_segment(number, "an object whose granule hashes are not there")
            );
        }
        Ok(record)
    }

    /// The pack of a record; `last` keeps the one before, as neighbours mostly share theirs.
    fn pack_of(
        &self,
        record: &Record,
        last: &mut Option<(u32, PackRef)>,
    ) -> Result<PackRef, IndexError> {
        let pack = match *last {
            Some((number, pack)) if number == record.pack => pack,
            _ => self.pack(record.pack)?,
        };
        *last = Some((record.pack, pack));
        if u64::from(record.pack_offset) + u64::from(record.len) > u64::from(pack.len) {
            let at = self.header.segments.at;
            return Err(IndexError::Corrupt {
                at,
                what: "an object outside of its pack",
            });
        }
        Ok(pack)
    }

    fn corrupt_segment(&self, number: u64, what: &'static str) -> IndexError {
        IndexError::Corrupt {
            at: self.header.segments.at + number * SEGMENT_LEN,
            what,
        }
    }
}
