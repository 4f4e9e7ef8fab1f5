//! The granule table: how a reader that fetches an index piece by piece checks each piece.
//!
//! An index of `len` bytes is followed by one BLAKE3 digest for each 16 KiB piece of it (the last
//! one shorter). The index's own digest is BLAKE3 over `len` (`u64`, little endian) and the table.
//! So a reader that knows digest and length fetches the table (32 bytes for 16 KiB of index),
//! checks it once, and then any piece by itself. Pieces are hashed plainly, not as parts of a tree:
//! they are always fetched whole, and each stands alone.

use crate::object::GRANULE;

/// Length in bytes of the granule table of an index that is `len` bytes long.
pub const fn table_len(len: u64) -> u64 {
    len.div_ceil(GRANULE as u64).saturating_mul(32)
}

/// The granule table of `index`, which does not include one yet.
pub fn granule_table(index: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(index.len().div_ceil(GRANULE) * 32);
    for granule in index.chunks(GRANULE) {
        table.extend_from_slice(blake3::hash(granule).as_bytes());
    }
    table
}

/// The digest that names an index: over its length without the table, and the table.
pub fn index_digest(len: u64, table: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    hasher.update(table);
    *hasher.finalize().as_bytes()
}

/// Whether `table` is the whole granule table of the index with this `digest` and `len`.
pub fn check_table(digest: &[u8; 32], len: u64, table: &[u8]) -> bool {
    table.len() as u64 == table_len(len)
        && blake3::Hash::from_bytes(index_digest(len, table)) == blake3::Hash::from_bytes(*digest)
}

/// Whether `bytes` is granule `number` of the index of `len` bytes whose checked table is `table`.
pub fn check_granule(len: u64, table: &[u8], number: u64, bytes: &[u8]) -> bool {
    let granule = GRANULE as u64;
    let Some(start) = number.checked_mul(granule) else {
        return false;
    };
    if start >= len || bytes.len() as u64 != (len - start).min(granule) {
        return false;
    }
    let hashes = table.as_chunks::<32>().0;
    usize::try_from(number)
        .ok()
        .and_then(|number| hashes.get(number))
        .is_some_and(|want| blake3::hash(bytes) == blake3::Hash::from_bytes(*want))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_granule_is_checked_and_every_flip_is_seen() {
        for len in [1, GRANULE - 1, GRANULE, GRANULE + 1, 5 * GRANULE + 77] {
            let index: Vec<u8> = (0..len).map(|i| (i * 7 % 253) as u8).collect();
            let table = granule_table(&index);
            let total = len as u64;
            let digest = index_digest(total, &table);
            assert_eq!(table.len() as u64, table_len(total));
            assert!(check_table(&digest, total, &table));
            assert!(
                !check_table(&digest, total + 1, &table),
                "length is part of the digest"
            );
            for (number, granule) in index.chunks(GRANULE).enumerate() {
                let number = number as u64;
                assert!(check_granule(total, &table, number, granule));
                assert!(!check_granule(total, &table, number + 1, granule));
                assert!(!check_granule(
                    total,
                    &table,
                    number,
                    &granule[..granule.len() - 1]
                ));
                let mut bad = granule.to_vec();
                *bad.last_mut().unwrap() ^= 0x80;
                assert!(!check_granule(total, &table, number, &bad));
            }
            assert!(!check_granule(total, &table, u64::MAX, &index[..1]));
        }
    }
}
