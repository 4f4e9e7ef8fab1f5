//! Which packs are worth their memory: an engine behind one small trait.
//!
//! The same trait drives the daemon and replays of recorded traces. A policy knows packs by a
//! number and is told everything that happens to them; it touches neither store nor pool.

mod lru;

use std::fmt::Debug;

pub use lru::Lru;

/// A pack, by whatever number the caller knows it.
pub type Key = u64;

/// What a pack is to the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Bytes that it takes in the pool.
    pub bytes: u64,
    /// What it would cost to bring it back: bytes to fetch from the source.
    pub cost: u64,
}

/// Order of eviction and admission. There are no default methods: a wrapper that counts or
/// replays stops compiling when it misses one.
pub trait Policy: Send + Debug {
    /// Its name in the status, as in `lru`.
    fn name(&self) -> &'static str;

    /// Whether a pack that is not in the pool may come in at all.
    fn admits(&mut self, key: Key, weight: Weight) -> bool;

    /// A pack came into the pool, or is told again.
    fn inserted(&mut self, key: Key, weight: Weight);

    /// A pack was read `reads` times. One that was never inserted is no error.
    fn hit(&mut self, key: Key, reads: u32);

    /// A pack left the pool, by eviction or otherwise. One that was never inserted is no error.
    fn removed(&mut self, key: Key);

    /// Packs that were read at least `reads` times lately, the last read first, at most `most`.
    fn hot(&self, reads: u32, most: usize) -> Vec<Key>;

    /// Every pack that it knows, in no order.
    fn known(&self) -> Vec<Key>;

    /// What was read before counts half from now on.
    fn cool(&mut self);

    /// Packs to give up, the first first, whose bytes reach `bytes`; fewer when there are no
    /// others. Those that `spared` answers `true` for stay. Nothing is removed by asking.
    fn victims(&mut self, bytes: u64, spared: &mut dyn FnMut(Key) -> bool) -> Vec<Key>;
}
