//! How far holders of keys say that they are, for those in line. In memory alone: who holds says it again.

use super::{Heard, State};
use crate::locks::{Key, OwnerId};

/// What the holder of a key says of its work.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Progress {
    pub(super) pull: OwnerId,
    bytes: (u64, u64),
}

impl State {
    /// How far the holder of a key has come, if it is this pull and has said so.
    pub(super) fn bytes_of(&self, pull: OwnerId, key: &Key) -> (u64, u64) {
        let progress = self.progress.get(key);
        progress
            .filter(|progress| progress.pull == pull)
            .map_or((0, 0), |progress| progress.bytes)
    }

    /// Takes down what a holder says of its work, and passes it on to those in line.
    pub(super) fn report(&mut self, pull: OwnerId, key: Key, bytes: (u64, u64)) {
        if !self.locks.holders(&key).any(|holder| holder == pull) {
            return;
        }
        self.progress.insert(key.clone(), Progress { pull, bytes });
        let waiting: Vec<OwnerId> = self.locks.waiting(&key).collect();
        for waiting in waiting {
            self.tell_holder(waiting, &key);
        }
    }

    /// Tells one in line for a key who holds it, unless it has much to read as it is.
    pub(super) fn tell_holder(&self, waiting: OwnerId, key: &Key) {
        let holder = self.locks.holders(key).next();
        let holder = holder.filter(|holder| *holder != waiting);
        let (Some(listener), Some(pull)) = (self.listeners.get(&waiting), holder) else {
            return;
        };
        if listener.send.capacity() * 2 < listener.send.max_capacity() {
            return;
        }
        let of = self.pulls.get(&pull);
        let _full = listener.send.try_send(Heard::Progress {
            key: key.clone(),
            pull,
            host: of.map_or_else(String::new, |of| of.host.clone()),
            pid: of.map_or(0, |of| of.pid),
            bytes: self.bytes_of(pull, key),
        });
    }
}
