//! Least recently used, weighed by bytes.

use lru::LruCache;

use super::{Key, Policy, Weight};

/// Gives up what was not read for the longest time, as many packs as the bytes need.
#[derive(Debug)]
pub struct Lru {
    packs: LruCache<Key, Kept>,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    weight: Weight,
    /// Halved with every [`Policy::cool`].
    reads: u32,
}

impl Lru {
    /// Knows no packs.
    pub fn new() -> Self {
        // The pool bounds it, not a count.
        Self {
            packs: LruCache::unbounded(),
        }
    }
}

impl Default for Lru {
    fn default() -> Self {
        Self::new()
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn admits(&mut self, _: Key, _: Weight) -> bool {
        true
    }

    fn inserted(&mut self, key: Key, weight: Weight) {
        let reads = self.packs.peek(&key).map_or(0, |kept| kept.reads);
        self.packs.put(key, Kept { weight, reads });
    }

    fn hit(&mut self, key: Key, reads: u32) {
        if let Some(kept) = self.packs.get_mut(&key) {
            kept.reads = kept.reads.saturating_add(reads);
        }
    }

    fn removed(&mut self, key: Key) {
        self.packs.pop(&key);
    }

    fn hot(&self, reads: u32, most: usize) -> Vec<Key> {
        let packs = self.packs.iter();
        packs
            .filter(|(_, kept)| kept.reads >= reads)
            .take(most)
            .map(|(key, _)| *key)
            .collect()
    }

    fn known(&self) -> Vec<Key> {
        self.packs.iter().map(|(key, _)| *key).collect()
    }

    fn cool(&mut self) {
        self.packs.iter_mut().for_each(|(_, kept)| kept.reads /= 2);
    }

    fn victims(&mut self, bytes: u64, spared: &mut dyn FnMut(Key) -> bool) -> Vec<Key> {
        let mut victims = Vec::new();
        let mut sum = 0;
        // From the least recent: the iterator starts at the other end.
        for (key, kept) in self.packs.iter().rev() {
            if sum >= bytes {
                break;
            }
            if !spared(*key) {
                sum += kept.weight.bytes;
                victims.push(*key);
            }
        }
        victims
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Lru {
        let mut lru = Lru::new();
        (1..=5).for_each(|key| {
            lru.inserted(
                key,
                Weight {
                    bytes: key * 10,
                    cost: 0,
                },
            )
        });
        lru
    }

    #[test]
    fn oldest_first_until_the_bytes_are_reached() {
        for (bytes, want) in [
            (0, vec![]),
            (1, vec![1]),
            (10, vec![1]),
            (11, vec![1, 2]),
            (60, vec![1, 2, 3]),
            (61, vec![1, 2, 3, 4]),
            (1000, vec![1, 2, 3, 4, 5]),
        ] {
            assert_eq!(filled().victims(bytes, &mut |_| false), want, "{bytes}");
        }
    }

    #[test]
    fn what_is_read_often_is_hot_until_it_cools() {
        let mut lru = filled();
        lru.hit(2, 8);
        lru.hit(4, 3);
        lru.hit(4, 5);
        lru.hit(5, 7);
        assert_eq!(lru.hot(8, 9), [4, 2]);
        assert_eq!(lru.hot(8, 1), [4]);
        lru.inserted(2, Weight { bytes: 1, cost: 0 });
        assert_eq!(lru.hot(8, 9), [2, 4], "told again is not forgotten");
        lru.cool();
        assert_eq!(lru.hot(4, 9), [2, 4]);
        assert_eq!(lru.hot(5, 9), Vec::<Key>::new());
    }

    #[test]
    fn hits_insertions_and_the_spared_count() {
        let mut lru = filled();
        lru.hit(1, 3);
        lru.hit(99, 1);
        lru.inserted(2, Weight { bytes: 20, cost: 0 });
        lru.removed(4);
        lru.removed(98);
        assert_eq!(lru.victims(1000, &mut |_| false), [3, 5, 1, 2]);
        assert_eq!(lru.victims(1000, &mut |key| key == 5), [3, 1, 2]);
        assert_eq!(
            lru.victims(1000, &mut |_| false).len(),
            4,
            "asking removes nothing"
        );
        assert!(lru.admits(
            7,
            Weight {
                bytes: 1 << 40,
                cost: 0
            }
        ));
    }
}
