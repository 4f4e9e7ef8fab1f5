//! The object map as it is written: packs, segments and granule hashes in the order of the data
//! region.

use std::collections::HashMap;

use super::{
    Header, PlacedObject, Placement, Refusal, WriteError,
    layout::{BLOCK, HASH_LEN, KEY_LEN, PACK_LEN, SEGMENT_LEN, put_u32},
    placement::granule_count,
    plan::{Plan, files},
};
use crate::{
    object::{OBJECT_MAX, ObjectId, PACK_MAX, PackId},
    tree::{Content, ObjectKey},
};

/// One object's place in the data region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// First block, from the start of the data region.
    key: u32,
    object: ObjectKey,
    /// Number of its first granule hash in the index.
    granules: u32,
}

/// What will stand behind the metadata.
#[derive(Debug, Default)]
pub(crate) struct ObjectMap {
    /// Ascending by key.
    pub(crate) segments: Vec<Segment>,
    /// Packs in order of first use, as places in the placement.
    pub(crate) packs: Vec<u32>,
    pub(crate) granule_count: u32,
    pub(crate) content_len: u64,
    /// Objects whose granule hashes are written, with the number of the first.
    granules: Vec<(u32, ObjectKey)>,
    /// Number in this index of each pack of the placement.
    pack_numbers: Vec<Option<u32>>,
}

impl ObjectMap {
    pub(crate) fn new(plan: &Plan<'_>, placement: &Placement) -> Result<Self, WriteError> {
        let mut map = Self {
            pack_numbers: vec![None; placement.packs.len()],
            ..Self::default()
        };
        let mut known = Known::default();
        let small = files(plan.tree, &plan.places, false);
        for (id, content, place) in small.chain(files(plan.tree, &plan.places, true)) {
            check_runs(content).map_err(|why| plan.refuse(id, why))?;
            for run in &content.runs {
                let object = placement
                    .object(run.object)
                    .ok_or("no such key")
                    .and_then(|object| check_object(object, run.len, placement))
                    .map_err(|why| plan.refuse(id, Refusal::Object(why)))?;
                let granules = map.number_granules(&mut known, run.object, object)?;
                map.number_pack(&mut known, object.pack, placement)?;
                // A file's blocks were counted with its size, which the run is inside of.
                let key = place.first_block + (run.offset / BLOCK) as u32;
                map.segments.push(Segment {
                    key,
                    object: run.object,
                    granules,
                });
                map.content_len += u64::from(run.len);
            }
        }
        Ok(map)
    }

    /// The number of the first granule hash of `object`; one run of hashes for all its copies.
    fn number_granules(
        &mut self,
        known: &mut Known,
        key: ObjectKey,
        object: &PlacedObject,
    ) -> Result<u32, WriteError> {
        let count = granule_count(object.len);
        if count == 0 {
            return Ok(0);
        }
        if let Some(first) = known.granules.get(&object.id) {
            return Ok(*first);
        }
        let first = self.granule_count;
        self.granule_count = first.checked_add(count).ok_or(WriteError::TooLarge)?;
        self.granules.push((first, key));
        known.granules.insert(object.id, first);
        Ok(first)
    }

    fn number_pack(
        &mut self,
        known: &mut Known,
        pack: u32,
        placement: &Placement,
    ) -> Result<(), WriteError> {
        let slot = &mut self.pack_numbers[pack as usize];
        if slot.is_none() {
            let next = u32::try_from(self.packs.len()).map_err(|_| WriteError::TooLarge)?;
            let number = *known
                .packs
                .entry(placement.packs[pack as usize].id)
                .or_insert(next);
            if number == next {
                self.packs.push(pack);
            }
            *slot = Some(number);
        }
        Ok(())
    }

    /// Writes all tables but that of implied directories.
    pub(crate) fn emit(&self, placement: &Placement, header: &Header, index: &mut [u8]) {
        let packs = index[header.packs.at as usize..].chunks_exact_mut(PACK_LEN as usize);
        for (number, out) in self.packs.iter().zip(packs) {
            let pack = &placement.packs[*number as usize];
            out[..32].copy_from_slice(&pack.id.0);
            put_u32(out, 32, pack.len);
        }
        let keys = index[header.keys.at as usize..].chunks_exact_mut(KEY_LEN as usize);
        for (segment, out) in self.segments.iter().zip(keys) {
            put_u32(out, 0, segment.key);
        }
        let records = index[header.segments.at as usize..].chunks_exact_mut(SEGMENT_LEN as usize);
        for (segment, out) in self.segments.iter().zip(records) {
            let object = &placement.objects[segment.object.0 as usize];
            out[..32].copy_from_slice(&object.id.0);
            put_u32(out, 32, object.len);
            put_u32(
                out,
                36,
                self.pack_numbers[object.pack as usize].unwrap_or(0),
            );
            put_u32(out, 40, object.offset);
            put_u32(out, 44, segment.granules);
        }
        for (first, key) in &self.granules {
            let object = &placement.objects[key.0 as usize];
            let at = header.granules.at as usize + *first as usize * HASH_LEN as usize;
            let hashes = placement
                .granules_of(object)
                .unwrap_or_default()
                .as_flattened();
            index[at..at + hashes.len()].copy_from_slice(hashes);
        }
    }
}

/// What has a number already, by name.
#[derive(Default)]
struct Known {
    granules: HashMap<ObjectId, u32>,
    packs: HashMap<PackId, u32>,
}

fn check_runs(content: &Content) -> Result<(), Refusal> {
    let mut free = 0;
    for run in &content.runs {
        let end = run
            .offset
            .checked_add(u64::from(run.len))
            .ok_or(Refusal::Runs)?;
        if !run.offset.is_multiple_of(BLOCK)
            || run.offset < free
            || run.len == 0
            || end > content.size
        {
            return Err(Refusal::Runs);
        }
        free = end;
    }
    Ok(())
}

fn check_object<'a>(
    object: &'a PlacedObject,
    len: u32,
    placement: &Placement,
) -> Result<&'a PlacedObject, &'static str> {
    if object.len != len || len as usize > OBJECT_MAX {
        return Err("its length differs from the run's, or is over 1 MiB");
    }
    let Some(pack) = placement.packs.get(object.pack as usize) else {
        return Err("its pack is not in the placement");
    };
    let end = u64::from(object.offset) + u64::from(object.len);
    if pack.len as usize > PACK_MAX || end > u64::from(pack.len) {
        return Err("it lies outside of its pack");
    }
    if placement.granules_of(object).is_none() {
        return Err("its granule hashes are missing");
    }
    Ok(object)
}
