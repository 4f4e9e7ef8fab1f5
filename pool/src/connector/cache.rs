//! What is known of each donor: a connection, an attempt under way, or a failure to sit out.

use std::{collections::HashMap, io, sync::Arc, time::Instant};

use parking_lot::{Condvar, Mutex};

use super::ConnectorConfig;
use crate::{
    token::RegionKey,
    transport::{RegionId, Transport, TransportError, refused, unreachable},
};

/// Donor and epoch.
pub(super) type Key = (u64, u64);

#[derive(Debug)]
pub(super) struct Cache {
    config: ConnectorConfig,
    slots: Mutex<Slots>,
    /// An attempt has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Slots {
    by_key: HashMap<Key, Slot>,
    /// Counts uses, to find the slot unused for longest.
    clock: u64,
}

#[derive(Debug)]
struct Slot {
    state: State,
    used: u64,
    /// Failures since the last connection.
    failures: u32,
}

#[derive(Debug)]
enum State {
    Dialing,
    Ready {
        transport: Arc<dyn Transport>,
        /// Regions whose keys it was made with.
        regions: Vec<RegionId>,
    },
    Aside {
        until: Instant,
        why: Failure,
    },
}

impl Slot {
    fn ready(transport: Arc<dyn Transport>, keys: &[RegionKey], used: u64) -> Self {
        let regions = keys.iter().map(|key| key.region).collect();
        Self {
            state: State::Ready { transport, regions },
            used,
            failures: 0,
        }
    }
}

/// A [`TransportError`] that can be given to many callers.
#[derive(Debug)]
enum Failure {
    Unreachable {
        address: String,
        kind: io::ErrorKind,
        text: String,
    },
    Refused {
        address: String,
        reason: String,
    },
    WrongEpoch {
        wanted: u64,
        actual: u64,
    },
}

/// What a caller gets.
#[derive(Debug)]
pub(super) enum Lookup<'a> {
    Ready(Arc<dyn Transport>),
    /// It is up to this caller to connect; others wait for it.
    Dial(Attempt<'a>),
}

/// An attempt to connect. Dropped without a result, the next caller may try.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    cache: &'a Cache,
    key: Key,
    failures: u32,
}

impl Cache {
    pub(super) fn new(config: ConnectorConfig) -> Self {
        Self {
            config,
            slots: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// A connection made with all of `keys`, an error to sit out, or the task to connect. Waits for
    /// an attempt that is under way, and for room when every slot has one.
    pub(super) fn look_up(
        &self,
        key: Key,
        keys: &[RegionKey],
        deadline: Instant,
    ) -> Result<Lookup<'_>, TransportError> {
        let mut slots = self.slots.lock();
        loop {
            slots.clock += 1;
            let clock = slots.clock;
            let failures = match slots.by_key.get_mut(&key) {
                Some(slot) => {
                    slot.used = clock;
                    match &slot.state {
                        State::Ready { transport, regions } if knows(regions, keys) => {
                            return Ok(Lookup::Ready(Arc::clone(transport)));
                        }
                        State::Ready { .. } => Some(0),
                        State::Aside { until, why } if Instant::now() < *until => {
                            return Err(why.error());
                        }
                        State::Aside { .. } => Some(slot.failures),
                        State::Dialing => None,
                    }
                }
                None => Some(0),
            };
            let wait = match failures {
                None => true,
                Some(_) if slots.by_key.contains_key(&key) => false,
                Some(_) => match slots.make_room(self.config.max_connections) {
                    Room::Free => false,
                    Room::None => true,
                    Room::From(evicted) => {
                        // Closing joins a thread: not under the lock.
                        drop(slots);
                        drop(evicted);
                        slots = self.slots.lock();
                        continue;
                    }
                },
            };
            if !wait {
                let failures = failures.unwrap_or_default();
                let before = slots.by_key.insert(
                    key,
                    Slot {
                        state: State::Dialing,
                        used: clock,
                        failures,
                    },
                );
                drop(slots);
                drop(before);
                return Ok(Lookup::Dial(Attempt {
                    cache: self,
                    key,
                    failures,
                }));
            }
            if self.ended.wait_until(&mut slots, deadline).timed_out() {
                return Err(TransportError::Deadline);
            }
        }
    }

    /// The connection to a donor in whichever epoch.
    pub(super) fn ready(&self, donor: u64) -> Option<Arc<dyn Transport>> {
        let slots = self.slots.lock();
        let of_donor = slots.by_key.iter().filter(|((id, _), _)| *id == donor);
        let ready = of_donor.filter_map(|(_, slot)| match &slot.state {
            State::Ready { transport, .. } => Some((slot.used, transport)),
            State::Dialing | State::Aside { .. } => None,
        });
        ready
            .max_by_key(|(used, _)| *used)
            .map(|(_, transport)| Arc::clone(transport))
    }

    /// Puts `better`, made with `keys`, in the place of `old`, unless that is gone already.
    pub(super) fn replace(
        &self,
        key: Key,
        old: &Arc<dyn Transport>,
        better: Arc<dyn Transport>,
        keys: &[RegionKey],
    ) {
        let mut slots = self.slots.lock();
        if !slots.holds(key, old) {
            return;
        }
        let used = slots.clock;
        let before = slots.by_key.insert(key, Slot::ready(better, keys, used));
        drop(slots);
        drop(before);
    }

    /// Lets go of a connection that died, unless somebody has replaced it already.
    pub(super) fn drop_dead(&self, key: Key, dead: &Arc<dyn Transport>) {
        let mut slots = self.slots.lock();
        let gone = if slots.holds(key, dead) {
            slots.by_key.remove(&key)
        } else {
            None
        };
        drop(slots);
        drop(gone);
    }

    /// Sets a donor aside whose connection failed, unless somebody has replaced that already.
    pub(super) fn set_aside(&self, key: Key, failed: &Arc<dyn Transport>, error: &TransportError) {
        let mut slots = self.slots.lock();
        let gone = if slots.holds(key, failed) {
            self.put_aside(&mut slots, key, 0, error)
        } else {
            None
        };
        drop(slots);
        drop(gone);
    }

    pub(super) fn forget(&self, donor: u64) {
        let mut slots = self.slots.lock();
        let forgotten: Vec<_> = slots
            .by_key
            .extract_if(|(id, _), slot| *id == donor && !matches!(slot.state, State::Dialing))
            .collect();
        drop(slots);
        drop(forgotten);
    }

    fn put_aside(
        &self,
        slots: &mut Slots,
        key: Key,
        failures: u32,
        error: &TransportError,
    ) -> Option<Slot> {
        let Some(why) = Failure::of(error) else {
            return slots.by_key.remove(&key);
        };
        let wait = match why {
            Failure::Unreachable { .. } => {
                let doubled = self
                    .config
                    .backoff_min
                    .saturating_mul(1 << failures.min(20));
                doubled.min(self.config.backoff_max)
            }
            Failure::Refused { .. } | Failure::WrongEpoch { .. } => self.config.backoff_max,
        };
        let state = State::Aside {
            until: Instant::now() + wait,
            why,
        };
        let used = slots.clock;
        slots.by_key.insert(
            key,
            Slot {
                state,
                used,
                failures: failures.saturating_add(1),
            },
        )
    }
}

fn knows(regions: &[RegionId], keys: &[RegionKey]) -> bool {
    keys.iter().all(|key| regions.contains(&key.region))
}

enum Room {
    Free,
    /// After this one went.
    From(Slot),
    /// Every slot has an attempt under way.
    None,
}

impl Slots {
    fn make_room(&mut self, max: usize) -> Room {
        if self.by_key.len() < max.max(1) {
            return Room::Free;
        }
        let idle = self
            .by_key
            .iter()
            .filter(|(_, slot)| !matches!(slot.state, State::Dialing));
        let oldest = idle.min_by_key(|(_, slot)| slot.used).map(|(key, _)| *key);
        oldest
            .and_then(|key| self.by_key.remove(&key))
            .map_or(Room::None, Room::From)
    }

    fn holds(&self, key: Key, transport: &Arc<dyn Transport>) -> bool {
        let slot = self.by_key.get(&key);
        slot.is_some_and(
            |slot| matches!(&slot.state, State::Ready { transport: held, .. } if Arc::ptr_eq(held, transport)),
        )
    }
}

impl Attempt<'_> {
    /// The connection was made with `keys`.
    pub(super) fn succeeded(self, transport: Arc<dyn Transport>, keys: &[RegionKey]) {
        let mut slots = self.cache.slots.lock();
        let used = slots.clock;
        slots
            .by_key
            .insert(self.key, Slot::ready(transport, keys, used));
    }

    pub(super) fn failed(self, error: &TransportError) {
        let mut slots = self.cache.slots.lock();
        self.cache
            .put_aside(&mut slots, self.key, self.failures, error);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut slots = self.cache.slots.lock();
        if let Some(slot) = slots.by_key.get_mut(&self.key)
            && matches!(slot.state, State::Dialing)
        {
            slots.by_key.remove(&self.key);
        }
        self.cache.ended.notify_all();
    }
}

impl Failure {
    fn of(error: &TransportError) -> Option<Self> {
        match error {
            TransportError::Unreachable { address, source } => Some(Self::Unreachable {
                address: address.clone(),
                kind: source.kind(),
                text: source.to_string(),
            }),
            TransportError::Refused { address, reason } => Some(Self::Refused {
                address: address.clone(),
                reason: reason.clone(),
            }),
            TransportError::WrongEpoch { wanted, actual } => Some(Self::WrongEpoch {
                wanted: *wanted,
                actual: *actual,
            }),
            TransportError::OutOfBounds { .. } | TransportError::Deadline => None,
        }
    }

    fn error(&self) -> TransportError {
        match self {
            Self::Unreachable {
                address,
                kind,
                text,
            } => unreachable(address.as_str(), io::Error::new(*kind, text.clone())),
            Self::Refused { address, reason } => refused(address.as_str(), reason.as_str()),
            Self::WrongEpoch { wanted, actual } => TransportError::WrongEpoch {
                wanted: *wanted,
                actual: *actual,
            },
        }
    }
}
