//! A window read from another host's memory, with a second try beside the first when that is late.
//!
//! Each leg reads in a thread of its own, into a buffer of its own, and keeps both until its donor
//! has answered or its deadline has passed, whether somebody still waits or not: what a late answer
//! writes into belongs to nobody else by then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use harbour_pool::transport::{Read, RegionId, TransportError};
use parking_lot::{Condvar, Mutex};

use super::{
    Run, Want,
    round::{Failure, Why},
};
use crate::{
    buffers::{Buffer, Buffers},
    slow::Slow,
    source::{Extent, Pool},
    stats::Donor,
};

/// Threads for legs. When all are taken, reads go on without hedges.
const LEGS: usize = 32;
/// Hedges under way at the same time.
const HEDGES: usize = 16;
/// Of a hundred reads that could be hedged, so many may be, in the long run.
const SHARE: i64 = 8;
/// Hedges that may come together after a quiet time: as many as there may be reads under way when
/// a donor freezes.
const BURST: i64 = 32;

/// What hedges may cost.
pub(crate) struct Hedging {
    legs: Slow,
    /// In hundredths of a hedge.
    budget: AtomicI64,
    under_way: Arc<AtomicUsize>,
}

impl Default for Hedging {
    fn default() -> Self {
        Self {
            legs: Slow::new(LEGS),
            budget: AtomicI64::new(BURST * 100),
            under_way: Arc::default(),
        }
    }
}

impl Drop for Hedging {
    fn drop(&mut self) {
        self.legs.close();
    }
}

impl Hedging {
    /// A read that could be hedged begins.
    fn earn(&self) {
        let earned = self.budget.fetch_add(SHARE, Ordering::Relaxed) + SHARE;
        if earned > BURST * 100 {
            self.budget.fetch_sub(SHARE, Ordering::Relaxed);
        }
    }

    /// Whether one more hedge may be made, which then counts until the result is dropped.
    fn spend(&self) -> Option<Place> {
        let place = Place(Arc::clone(&self.under_way));
        if place.0.fetch_add(1, Ordering::Relaxed) >= HEDGES {
            return None;
        }
        if self.budget.fetch_sub(100, Ordering::Relaxed) < 100 {
            self.budget.fetch_add(100, Ordering::Relaxed);
            return None;
        }
        Some(place)
    }
}

/// A hedge under way.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the threads of one window share.
#[derive(Default)]
struct Race {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// By leg; taken by whoever waits.
    answers: Vec<Option<Result<Buffer, TransportError>>>,
    ended: Vec<bool>,
    /// Whether the leg was called late while it ran.
    late: Vec<bool>,
}

/// What one leg reads, and from whom.
struct Leg {
    donor: Arc<Donor>,
    number: u64,
    epoch: u64,
    wants: Vec<(usize, Extent)>,
}

impl Run<'_> {
    /// Reads `good` from `donor`, and from others too when it takes longer than is usual; gives
    /// what failed, or `None` when no thread is free for this.
    pub(super) fn race(
        &self,
        first: (&Arc<Donor>, u64, u64),
        good: &[(usize, Extent)],
        arena: &mut [u8],
        check: &dyn Fn(usize, &[u8]) -> bool,
    ) -> Option<Vec<Failure>> {
        let hedging = &self.outside.hedging;
        let mut legs = vec![Leg {
            donor: Arc::clone(first.0),
            number: first.1,
            epoch: first.2,
            wants: good.to_vec(),
        }];
        let race = Arc::new(Race::default());
        let len = self.bytes_of(good);
        let deadline = self.batch_deadline(len);
        if !self.start(&race, &legs[0], 0, deadline, None) {
            return None;
        }
        hedging.earn();
        let mut hedge_at = Some(Instant::now() + legs[0].donor.pace.hedge_after(len));
        let mut pending: Vec<usize> = good.iter().map(|(want, _)| *want).collect();
        let mut failures = Vec::new();
        let mut seen = 0;
        let mut state = race.state.lock();
        while !pending.is_empty() {
            let ready = state
                .answers
                .iter_mut()
                .enumerate()
                .find_map(|(leg, answer)| answer.take().map(|answer| (leg, answer)));
            if let Some((leg, answer)) = ready {
                drop(state);
                self.take(
                    &legs[leg],
                    answer,
                    &mut pending,
                    &mut failures,
                    arena,
                    check,
                );
                if leg > 0 && pending.is_empty() {
                    self.outside.stats.hedge_wins.add(1);
                }
                seen += 1;
                // Whoever failed outright needs no hedge: the next round asks another.
                hedge_at = hedge_at.filter(|_| leg > 0);
                state = race.state.lock();
                continue;
            }
            if seen == legs.len() {
                break;
            }
            let until = hedge_at.unwrap_or(deadline).min(deadline);
            if !race.changed.wait_until(&mut state, until).timed_out() {
                continue;
            }
            if Instant::now() >= deadline {
                break;
            }
            if hedge_at.take().is_some() {
                if !state.ended[0] {
                    state.late[0] = true;
                    legs[0].donor.pace.late(true);
                }
                drop(state);
                self.hedge(&race, &mut legs, deadline);
                state = race.state.lock();
            }
        }
        let silent: Vec<usize> = (0..legs.len()).filter(|leg| !state.ended[*leg]).collect();
        drop(state);
        for leg in silent {
            let of_leg = legs[leg]
                .wants
                .iter()
                .filter(|(want, _)| pending.contains(want));
            failures.extend(of_leg.map(|(want, extent)| (*want, *extent, Some(Why::silent()))));
        }
        // A want that one leg brought has not failed, whatever the other said.
        failures.retain(|(want, ..)| pending.contains(want));
        Some(failures)
    }

    /// Starts legs to the next replicas of everything that the first leg reads.
    fn hedge(&self, race: &Arc<Race>, legs: &mut Vec<Leg>, deadline: Instant) {
        let mut second: Vec<Leg> = Vec::new();
        for (want, _) in &legs[0].wants {
            let Want {
                pack, offset, len, ..
            } = self.errand.wants[*want];
            let Some(extent) = self.packs[pack].alternative() else {
                continue;
            };
            if u64::from(offset) + len as u64 > u64::from(extent.len) {
                continue;
            }
            let to = (extent.donor, extent.epoch);
            match second.iter_mut().find(|leg| (leg.number, leg.epoch) == to) {
                Some(leg) => leg.wants.push((*want, extent)),
                None => second.push(Leg {
                    donor: self.donor(&extent),
                    number: extent.donor,
                    epoch: extent.epoch,
                    wants: vec![(*want, extent)],
                }),
            }
        }
        for leg in second {
            let Some(place) = self.outside.hedging.spend() else {
                return;
            };
            if self.start(race, &leg, legs.len(), deadline, Some(place)) {
                self.outside.stats.hedges.add(1);
                legs.push(leg);
            }
        }
    }

    /// Gives a leg to a thread; `false` when none is free.
    fn start(
        &self,
        race: &Arc<Race>,
        leg: &Leg,
        number: usize,
        deadline: Instant,
        place: Option<Place>,
    ) -> bool {
        let reads: Vec<(RegionId, u64, usize)> = leg
            .wants
            .iter()
            .map(|(want, extent)| {
                let Want { offset, len, .. } = self.errand.wants[*want];
                (extent.region, extent.offset + u64::from(offset), len)
            })
            .collect();
        {
            let mut state = race.state.lock();
            state.answers.push(None);
            state.ended.push(false);
            state.late.push(false);
        }
        let (pool, buffers) = (
            Arc::clone(&self.outside.pool),
            Arc::clone(&self.outside.buffers),
        );
        let (donor, to) = (Arc::clone(&leg.donor), (leg.number, leg.epoch));
        let shared = Arc::clone(race);
        let started = self.outside.hedging.legs.offer(move || {
            let answer = read_leg(pool.as_ref(), &buffers, &donor, to, &reads, deadline);
            let mut state = shared.state.lock();
            state.answers[number] = Some(answer);
            state.ended[number] = true;
            if state.late[number] {
                donor.pace.late(false);
            }
            drop(state);
            shared.changed.notify_all();
            drop(place);
        });
        if !started {
            let mut state = race.state.lock();
            state.answers.pop();
            state.ended.pop();
            state.late.pop();
        }
        started
    }

    /// Takes in what a leg brought: bytes that pass the check go to the arena.
    fn take(
        &self,
        leg: &Leg,
        answer: Result<Buffer, TransportError>,
        pending: &mut Vec<usize>,
        failures: &mut Vec<Failure>,
        arena: &mut [u8],
        check: &dyn Fn(usize, &[u8]) -> bool,
    ) {
        let buffer = match answer {
            Ok(buffer) => buffer,
            Err(error) => {
                let why = Why::of(&error);
                let all = leg.wants.iter();
                failures.extend(all.map(|(want, extent)| (*want, *extent, Some(why.clone()))));
                return;
            }
        };
        let mut from = 0;
        for (want, extent) in &leg.wants {
            let Want { at, len, .. } = self.errand.wants[*want];
            let bytes = &buffer[from..from + len];
            from += len;
            if !pending.contains(want) {
                continue;
            }
            if check(*want, bytes) {
                arena[at..at + len].copy_from_slice(bytes);
                leg.donor.bytes.add(len as u64);
                pending.retain(|other| other != want);
            } else {
                self.outside.stats.wrong.add(1);
                failures.push((*want, *extent, Some(Why::wrong())));
            }
        }
    }
}

/// Reads `reads` end to end into a buffer, and notes how long it took.
fn read_leg(
    pool: &dyn Pool,
    buffers: &Arc<Buffers>,
    donor: &Donor,
    (number, epoch): (u64, u64),
    reads: &[(RegionId, u64, usize)],
    deadline: Instant,
) -> Result<Buffer, TransportError> {
    let len = reads.iter().map(|(.., len)| len).sum();
    let mut buffer = buffers.take(len);
    let mut rest = &mut buffer[..len];
    let mut batch = Vec::with_capacity(reads.len());
    for (region, offset, len) in reads {
        let (into, tail) = std::mem::take(&mut rest).split_at_mut(*len);
        rest = tail;
        batch.push(Read {
            region: *region,
            offset: *offset,
            into,
        });
    }
    let start = Instant::now();
    let outcome = pool.read(number, epoch, &mut batch, deadline);
    drop(batch);
    donor.note(len, start, &outcome);
    outcome.map(|()| buffer)
}
