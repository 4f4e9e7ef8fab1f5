//! Checked granules of which a read took only a part: the next one often takes another part.

use std::num::NonZeroUsize;

use harbour_image::object::{GRANULE, ObjectId};
use lru::LruCache;
use parking_lot::Mutex;

const SHARDS: usize = 8;

type Key = (ObjectId, u16);

/// A bounded memory of granules by object and number.
#[derive(Debug)]
pub(crate) struct Edges {
    shards: [Mutex<LruCache<Key, Box<[u8]>>>; SHARDS],
    enabled: bool,
}

impl Edges {
    /// Holds up to about `bytes` bytes; 0 holds nothing.
    pub(crate) fn new(bytes: usize) -> Self {
        let each = NonZeroUsize::new(bytes / GRANULE / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self {
            shards: std::array::from_fn(|_| Mutex::new(LruCache::sparse(each))),
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
        let mut shard = self.shard(object, number).lock();
        let part = shard
            .get(&key)
            .and_then(|granule| granule.get(from..from + into.len()));
        if let Some(part) = part {
            into.copy_from_slice(part);
        }
        part.is_some()
    }

    /// Keeps a granule that was checked.
    pub(crate) fn put(&self, object: &ObjectId, number: usize, granule: &[u8]) {
        let Some(key) = self.key(object, number) else {
            return;
        };
        let granule = Box::from(granule);
        self.shard(object, number).lock().put(key, granule);
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
