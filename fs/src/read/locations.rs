//! Where packs lie, remembered between reads.

use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use harbour_image::object::PackId;
use lru::LruCache;
use parking_lot::Mutex;

use crate::source::Extent;

const SHARDS: usize = 16;

/// A bounded memory of replicas by pack.
#[derive(Debug)]
pub(crate) struct Locations {
    shards: [Mutex<LruCache<PackId, Arc<[Extent]>>>; SHARDS],
    /// Grows whenever something is dropped, so that an answer that was under way at the time is
    /// not remembered afterwards.
    drops: AtomicU64,
}

impl Locations {
    /// Remembers up to about `capacity` packs.
    pub(crate) fn new(capacity: usize) -> Self {
        let each = NonZeroUsize::new(capacity.div_ceil(SHARDS)).unwrap_or(NonZeroUsize::MIN);
        Self {
            shards: std::array::from_fn(|_| Mutex::new(LruCache::sparse(each))),
            drops: AtomicU64::new(0),
        }
    }

    /// What is remembered of `pack`.
    pub(crate) fn get(&self, pack: &PackId) -> Option<Arc<[Extent]>> {
        self.shard(pack).lock().get(pack).cloned()
    }

    /// To be taken before asking anew, and given to [`Self::put`] with the answer.
    pub(crate) fn ticket(&self) -> u64 {
        self.drops.load(Ordering::Acquire)
    }

    /// Remembers an answer, unless something was dropped while it was under way.
    pub(crate) fn put(&self, ticket: u64, pack: PackId, extents: Arc<[Extent]>) {
        let mut shard = self.shard(&pack).lock();
        if self.ticket() == ticket {
            shard.put(pack, extents);
        }
    }

    /// Drops these packs.
    pub(crate) fn forget(&self, packs: &[PackId]) {
        self.drops.fetch_add(1, Ordering::AcqRel);
        for pack in packs {
            self.shard(pack).lock().pop(pack);
        }
    }

    /// Drops everything.
    pub(crate) fn forget_all(&self) {
        self.drops.fetch_add(1, Ordering::AcqRel);
        for shard in &self.shards {
            shard.lock().clear();
        }
    }

    fn shard(&self, pack: &PackId) -> &Mutex<LruCache<PackId, Arc<[Extent]>>> {
        &self.shards[usize::from(pack.0[0]) % SHARDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_from_before_a_drop_is_not_remembered() {
        let locations = Locations::new(64);
        let pack = PackId([3; 32]);
        let ticket = locations.ticket();
        locations.put(ticket, pack, Arc::new([]));
        assert!(locations.get(&pack).is_some());
        let late = locations.ticket();
        locations.forget(&[pack]);
        assert!(locations.get(&pack).is_none());
        locations.put(late, pack, Arc::new([]));
        assert!(locations.get(&pack).is_none());
        locations.put(locations.ticket(), pack, Arc::new([]));
        locations.forget_all();
        assert!(locations.get(&pack).is_none());
    }

    #[test]
    fn it_stays_bounded() {
        let locations = Locations::new(32);
        for number in 0..1000u32 {
            let mut id = [0; 32];
            id[..4].copy_from_slice(&number.to_le_bytes());
            locations.put(locations.ticket(), PackId(id), Arc::new([]));
        }
        let kept: usize = locations
            .shards
            .iter()
            .map(|shard| shard.lock().len())
            .sum();
        assert!(kept <= 32, "{kept}");
    }
}
