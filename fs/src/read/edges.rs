//! Checked granules of which a read took only a part: the next one often takes another part.
//!
//! A granule is kept when it was brought a second time within a while. Keeping it at once would
//! cost reads in random order, which come back to a granule too late, a third more time.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering},
};

use harbour_image::object::{GRANULE, ObjectId};
use lru::LruCache;
use parking_lot::Mutex;

const SHARDS: usize = 8;
/// Granules that are remembered as brought once, in slots that newer ones take over.
const BROUGHT: usize = 1024;

type Key = (ObjectId, u16);

/// A bounded memory of granules by object and number.
#[derive(Debug)]
pub(crate) struct Edges {
    shards: [Mutex<LruCache<Key, Box<[u8]>>>; SHARDS],
    /// Marks of granules that were brought.
    brought: Box<[AtomicU64]>,
    enabled: bool,
}

impl Edges {
    /// Holds up to about `bytes` bytes; 0 holds nothing.
    pub(crate) fn new(bytes: usize) -> Self {
        let each = NonZeroUsize::new(bytes / GRANULE / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self {
            shards: std::array::from_fn(|_| Mutex::new(LruCache::sparse(each))),
            brought: (0..BROUGHT).map(|_| AtomicU64::new(0)).collect(),
            enabled: bytes >= GRANULE,
        }
    }

    /// Copies `into.len()` bytes at `from` of a granule into `into`; `false` when it is not held.
    pub(crate) fn copy(
        &self,
        object: &ObjectId,
        number: usize,
        from: usize,
        into: &mut [u8],
    ) -> bool {
        let Some(key) = self.key(object, number) else {
            return false;
        };
        // What was not brought lately is not worth a look: most reads end here.
        let (mark, slot) = self.mark(object, number);
        if slot.load(Ordering::Relaxed) != mark {
            return false;
        }
        let mut shard = self.shard(object, number).lock();
        let part = shard
            .get(&key)
            .and_then(|granule| granule.get(from..from + into.len()));
        if let Some(part) = part {
            into.copy_from_slice(part);
        }
        part.is_some()
    }

    /// Hears of a granule that was checked, and keeps it when it is not the first time.
    pub(crate) fn put(&self, object: &ObjectId, number: usize, granule: &[u8]) {
        let Some(key) = self.key(object, number) else {
            return;
        };
        let (mark, slot) = self.mark(object, number);
        if slot.swap(mark, Ordering::Relaxed) != mark {
            return;
        }
        let granule = Box::from(granule);
        self.shard(object, number).lock().put(key, granule);
    }

    /// A granule's mark and the slot that remembers it. Two granules with one mark do no harm: one
    /// is kept a read too early.
    fn mark(&self, object: &ObjectId, number: usize) -> (u64, &AtomicU64) {
        let mut mark = [0; 8];
        mark.copy_from_slice(&object.0[..8]);
        // 0 is no mark.
        let mark = u64::from_le_bytes(mark).wrapping_add(number as u64).max(1);
        (mark, &self.brought[mark as usize % BROUGHT])
    }

    fn key(&self, object: &ObjectId, number: usize) -> Option<Key> {
        let number = u16::try_from(number).ok()?;
        self.enabled.then_some((*object, number))
    }

    fn shard(&self, object: &ObjectId, number: usize) -> &Mutex<LruCache<Key, Box<[u8]>>> {
        &self.shards[(usize::from(object.0[0]) + number) % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_from_the_granule_that_was_put() {
        let edges = Edges::new(1 << 20);
        let object = ObjectId([9; 32]);
        let granule: Vec<u8> = (0..GRANULE).map(|i| (i % 251) as u8).collect();
        let mut part = [0; 100];
        assert!(!edges.copy(&object, 3, 50, &mut part));
        edges.put(&object, 3, &granule);
        assert!(!edges.copy(&object, 3, 50, &mut part), "brought once");
        edges.put(&object, 4, &granule);
        assert!(!edges.copy(&object, 4, 50, &mut part));
        edges.put(&object, 3, &granule);
        assert!(edges.copy(&object, 3, 50, &mut part));
        assert_eq!(part, granule[50..150]);
        assert!(
            !edges.copy(&object, 3, GRANULE - 50, &mut part),
            "beyond the end"
        );
        assert!(!edges.copy(&object, 4, 0, &mut part));
        let none = Edges::new(0);
        none.put(&object, 3, &granule);
        assert!(!none.copy(&object, 3, 0, &mut part));
    }
}
