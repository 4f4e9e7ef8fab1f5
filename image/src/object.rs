//! Objects: file content named by its BLAKE3 digest and verified in granules.
//!
//! BLAKE3 is a binary tree over 1 KiB chunks. A granule of 16 KiB is a complete subtree of 16
//! chunks, so its chaining value can be kept beside the object's digest and checked on its own: a
//! 4 KiB read fetches and hashes 16 KiB, not the whole object.
//! Source: the BLAKE3 paper, section 2.1 (tree structure), and the `blake3::hazmat` documentation.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

/// Largest object in bytes. A longer file is a run of objects of exactly this size and a tail.
pub const OBJECT_MAX: usize = 1 << 20;

/// Unit of verification in bytes.
pub const GRANULE: usize = 16 << 10;

/// BLAKE3 digest of an object's content: its name in every layer, image and pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub [u8; 32]);

impl std::fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Name of a pack: BLAKE3 over its objects' digests and lengths (`u32`, little endian), in order.
///
/// Derived from content, so that a pack placed again after a loss is the same pack, and the
/// indexes that point into it stay true.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub [u8; 32]);

impl std::fmt::Debug for PackId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Largest pack in bytes.
pub const PACK_MAX: usize = 4 << 20;

/// Chaining value of one granule of an object longer than a granule.
pub type GranuleHash = [u8; 32];

/// An object's name and what is needed to check any granule of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectHashes {
    /// Name of the object.
    pub id: ObjectId,
    /// One chaining value per granule; empty for objects of at most [`GRANULE`] bytes, whose
    /// digest is checked directly.
    pub granules: Vec<GranuleHash>,
}

/// Hashes an object of 1 to [`OBJECT_MAX`] bytes once, giving its digest and granule hashes.
pub fn hash_object(bytes: &[u8]) -> ObjectHashes {
    if bytes.len() <= GRANULE {
        return ObjectHashes {
            id: ObjectId(*blake3::hash(bytes).as_bytes()),
            granules: Vec::new(),
        };
    }
    let granules: Vec<GranuleHash> = bytes
        .chunks(GRANULE)
        .enumerate()
        .map(|(number, granule)| granule_hash(number, granule))
        .collect();
    let id = root_of(&granules);
    ObjectHashes { id, granules }
}

/// Whether `bytes` is granule `number` of the object `id`, `object_len` bytes long. `hash` is that
/// granule's (unused for an object of at most one granule).
pub fn verify_granule(
    id: &ObjectId,
    object_len: u32,
    hash: Option<&GranuleHash>,
    number: usize,
    bytes: &[u8],
) -> bool {
    let len = object_len as usize;
    let start = number.saturating_mul(GRANULE);
    if start >= len || bytes.len() != (len - start).min(GRANULE) {
        return false;
    }
    if len <= GRANULE {
        return blake3::hash(bytes) == blake3::Hash::from_bytes(id.0);
    }
    hash.is_some_and(|want| {
        blake3::Hash::from_bytes(granule_hash(number, bytes)) == blake3::Hash::from_bytes(*want)
    })
}

/// The digest of an object from its granule hashes (two or more).
pub fn root_of(granules: &[GranuleHash]) -> ObjectId {
    let split = left_len(granules.len());
    let (left, right) = granules.split_at(split);
    ObjectId(*merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes())
}

fn granule_hash(number: usize, bytes: &[u8]) -> GranuleHash {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset((number * GRANULE) as u64);
    hasher.update(bytes);
    hasher.finalize_non_root()
}

/// Chaining value of a run of granules that is one side of a parent node.
fn subtree(granules: &[GranuleHash]) -> GranuleHash {
    match granules {
        [one] => *one,
        many => {
            let (left, right) = many.split_at(left_len(many.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// BLAKE3 puts the largest power of two of chunks that leaves something for the right on the left.
fn left_len(count: usize) -> usize {
    debug_assert!(count > 1);
    (count / 2 + count % 2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_agree_with_the_plain_digest_at_every_awkward_length() {
        let data: Vec<u8> = (0..OBJECT_MAX).map(|i| (i * 31 % 251) as u8).collect();
        for len in [
            1,
            2,
            1024,
            GRANULE - 1,
            GRANULE,
            GRANULE + 1,
            2 * GRANULE,
            3 * GRANULE + 5,
            5 * GRANULE,
            9 * GRANULE + 1,
            63 * GRANULE + 7,
            OBJECT_MAX - 1,
            OBJECT_MAX,
        ] {
            let bytes = &data[..len];
            let hashes = hash_object(bytes);
            assert_eq!(hashes.id.0, *blake3::hash(bytes).as_bytes(), "len {len}");
            for (number, granule) in bytes.chunks(GRANULE).enumerate() {
                let check = |b: &[u8]| {
                    verify_granule(
                        &hashes.id,
                        len as u32,
                        hashes.granules.get(number),
                        number,
                        b,
                    )
                };
                assert!(check(granule), "len {len} granule {number}");
                let mut bad = granule.to_vec();
                bad[0] ^= 1;
                assert!(!check(&bad));
                assert!(!check(&granule[..granule.len() - 1]));
            }
        }
    }
}
