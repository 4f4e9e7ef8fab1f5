//! Where objects lie: the half of an index that is not the tree.

use crate::{
    object::{GRANULE, GranuleHash, ObjectHashes, ObjectId, PackId},
    tree::ObjectKey,
};

/// A pack and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRef {
    /// Name of the pack.
    pub id: PackId,
    /// Length in bytes, at most [`crate::object::PACK_MAX`].
    pub len: u32,
}

/// One object's name and place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedObject {
    /// Name of the object.
    pub id: ObjectId,
    /// Length in bytes: 1 to [`crate::object::OBJECT_MAX`].
    pub len: u32,
    /// Its pack, as a place in [`Placement::packs`].
    pub pack: u32,
    /// Its offset in that pack in bytes.
    pub offset: u32,
    /// Its first granule hash, as a place in [`Placement::granules`]; without meaning for objects
    /// of one granule, which have none.
    pub first_granule: u32,
}

impl PlacedObject {
    /// Number of granule hashes that this object has: none up to one granule.
    pub const fn granule_count(&self) -> u32 {
        granule_count(self.len)
    }
}

/// Number of granule hashes kept for an object of `len` bytes.
pub const fn granule_count(len: u32) -> u32 {
    if len as usize <= GRANULE {
        0
    } else {
        len.div_ceil(GRANULE as u32)
    }
}

/// The objects of a tree and the packs they lie in. [`ObjectKey`] is a place in `objects`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Objects by [`ObjectKey`].
    pub objects: Vec<PlacedObject>,
    /// Granule hashes of all objects, those of one object together.
    pub granules: Vec<GranuleHash>,
    /// Packs; those that no object of the tree needs are left out of an index.
    pub packs: Vec<PackRef>,
}

impl Placement {
    /// Adds an object of `len` bytes at `offset` of pack number `pack` and gives its key; `None`
    /// when there are 2^32 objects or granules, more than an index can number.
    pub fn push(
        &mut self,
        hashes: &ObjectHashes,
        len: u32,
        pack: u32,
        offset: u32,
    ) -> Option<ObjectKey> {
        let key = ObjectKey(u32::try_from(self.objects.len()).ok()?);
        let first_granule = u32::try_from(self.granules.len()).ok()?;
        self.granules.extend_from_slice(&hashes.granules);
        self.objects.push(PlacedObject {
            id: hashes.id,
            len,
            pack,
            offset,
            first_granule,
        });
        Some(key)
    }

    /// The object with this key.
    pub fn object(&self, key: ObjectKey) -> Option<&PlacedObject> {
        self.objects.get(key.0 as usize)
    }

    /// Granule hashes of `object`; `None` when they lie outside of [`Self::granules`].
    pub fn granules_of(&self, object: &PlacedObject) -> Option<&[GranuleHash]> {
        let first = object.first_granule as usize;
        match object.granule_count() as usize {
            0 => Some(&[]),
            count => self.granules.get(first..first.checked_add(count)?),
        }
    }
}
