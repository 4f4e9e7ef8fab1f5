//! How donors have been answering lately: what is usual for each, which are late now, which failed
//! and are set aside.
//!
//! Latencies are kept as if every read had brought one granule ([`usual`](Pace::usual_us) times a
//! weight that grows with the length), so that short and long reads can be told apart from slow
//! ones. All of it is for choosing between replicas: nothing here makes a wrong answer possible.

use std::{
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use harbour_image::object::GRANULE;
use parking_lot::Mutex;

/// Latencies that are remembered of one donor.
const RING: usize = 64;
/// What is usual is found anew after so many reads.
const EVERY: usize = 16;
/// Weight of a read of no bytes, in granules: the round trip.
const ROUND_TRIP: usize = 4;
/// Another replica is asked no sooner than after this: a thread that was not woken in time is no
/// slow donor.
const HEDGE_MIN: Duration = Duration::from_millis(10);
/// And no later.
const HEDGE_MAX: Duration = Duration::from_millis(250);
/// Before there is anything to go by.
const HEDGE_UNKNOWN: Duration = Duration::from_millis(50);
/// How long a donor is set aside after its first failure; doubles with each that follows.
const ASIDE_MIN: Duration = Duration::from_millis(50);
/// The longest that it is set aside.
const ASIDE_MAX: Duration = Duration::from_secs(5);
/// Whoever looks first after that has this long to find out; the others wait meanwhile.
const PROBE: Duration = Duration::from_secs(1);
/// No answer within less than this says more of the caller's deadline than of the donor.
const SILENT: Duration = Duration::from_millis(500);

/// Whether a donor should be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// Nothing speaks against it.
    Good,
    /// A read from it is under way for longer than is usual.
    Late,
    /// It failed a short while ago.
    Aside,
}

/// One donor's record.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Latest latencies in microseconds for a granule; 0 where there is none yet.
    ring: [AtomicU32; RING],
    count: AtomicUsize,
    /// The second longest of them: beyond it lies one read in a hundred, or near that.
    usual: AtomicU32,
    /// A mean in which every new one counts an eighth.
    mean: AtomicU32,
    late: AtomicU32,
    /// Failures since the last answer; read without the lock by who has none to clear.
    failures: AtomicU32,
    until: Mutex<Option<Instant>>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            ring: std::array::from_fn(|_| AtomicU32::new(0)),
            count: AtomicUsize::new(0),
            usual: AtomicU32::new(0),
            mean: AtomicU32::new(0),
            late: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            until: Mutex::new(None),
        }
    }
}

impl Pace {
    /// It answered with `len` bytes.
    pub(crate) fn answered(&self, len: usize, took: Duration) {
        self.cleared();
        let us = (took.as_micros() / weight(len).max(1) as u128).clamp(1, u128::from(u32::MAX));
        let us = us as u32;
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        self.ring[count % RING].store(us, Ordering::Relaxed);
        let mean = self.mean.load(Ordering::Relaxed);
        let mean = if mean == 0 {
            us
        } else {
            mean - mean / 8 + us / 8
        };
        self.mean.store(mean.max(1), Ordering::Relaxed);
        if count % EVERY == EVERY - 1 {
            let (mut first, mut second) = (0, 0);
            for sample in &self.ring {
                let sample = sample.load(Ordering::Relaxed);
                if sample >= first {
                    (first, second) = (sample, first);
                } else {
                    second = second.max(sample);
                }
            }
            self.usual.store(second, Ordering::Relaxed);
        }
    }

    /// It answered, from memory of this host: nobody measures that.
    pub(crate) fn cleared(&self) {
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
            *self.until.lock() = None;
        }
    }

    /// It could not be read from.
    pub(crate) fn failed(&self, now: Instant) {
        let mut until = self.until.lock();
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        let wait = ASIDE_MIN.saturating_mul(1 << before.min(16)).min(ASIDE_MAX);
        *until = Some(now + wait);
    }

    /// It did not answer within `took`.
    pub(crate) fn silent(&self, took: Duration, now: Instant) {
        if took >= SILENT {
            self.failed(now);
        }
    }

    /// Whether to ask it. Once after it was set aside the answer is "good" to one caller, who finds
    /// out for all.
    pub(crate) fn standing(&self, now: Instant) -> Standing {
        if self.failures.load(Ordering::Relaxed) != 0 {
            let mut until = self.until.lock();
            match *until {
                Some(time) if now < time => return Standing::Aside,
                Some(_) => *until = Some(now + PROBE),
                None => {}
            }
        }
        if self.late.load(Ordering::Relaxed) != 0 {
            return Standing::Late;
        }
        Standing::Good
    }

    /// Whether it is set aside, for who only looks.
    pub(crate) fn is_aside(&self, now: Instant) -> bool {
        self.failures.load(Ordering::Relaxed) != 0 && self.until.lock().is_some_and(|t| now < t)
    }

    /// A read turned out to be late, or has ended after all.
    pub(crate) fn late(&self, begins: bool) {
        if begins {
            self.late.fetch_add(1, Ordering::Relaxed);
        } else {
            self.late.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// How long to wait for `len` bytes before another is asked too.
    pub(crate) fn hedge_after(&self, len: usize) -> Duration {
        match self.usual.load(Ordering::Relaxed) {
            0 => HEDGE_UNKNOWN,
            usual => Duration::from_micros(u64::from(usual).saturating_mul(weight(len) as u64))
                .clamp(HEDGE_MIN, HEDGE_MAX),
        }
    }

    /// For comparing donors: doublings of the mean latency. 0 is unknown, and worth a try.
    pub(crate) fn rank(&self) -> u32 {
        u32::BITS - self.mean.load(Ordering::Relaxed).leading_zeros()
    }
}

const fn weight(len: usize) -> usize {
    ROUND_TRIP + len / GRANULE
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_usual_is_learned_for_any_length() {
        let pace = Pace::default();
        assert_eq!(pace.hedge_after(1 << 20), HEDGE_UNKNOWN);
        // 68 granules' worth in 68 ms, and 4 in 4 ms: the same pace.
        for _ in 0..RING {
            pace.answered(1 << 20, 68 * MS);
            pace.answered(0, 4 * MS);
        }
        assert_eq!(pace.hedge_after(1 << 20), 68 * MS);
        assert_eq!(pace.hedge_after(0), HEDGE_MIN);
        assert_eq!(pace.hedge_after(64 << 20), HEDGE_MAX);
        // One straggler is what hedging is for, not what it waits for; two are.
        for _ in 0..EVERY - 1 {
            pace.answered(0, 4 * MS);
        }
        pace.answered(0, 400 * MS);
        assert_eq!(pace.hedge_after(1 << 20), 68 * MS);
        for _ in 0..EVERY {
            pace.answered(0, 400 * MS);
        }
        assert_eq!(pace.hedge_after(1 << 20), HEDGE_MAX);
    }

    #[test]
    fn a_donor_that_failed_is_set_aside_and_one_caller_finds_out() {
        let pace = Pace::default();
        let start = Instant::now();
        assert_eq!(pace.standing(start), Standing::Good);
        pace.silent(499 * MS, start);
        assert_eq!(pace.standing(start), Standing::Good, "a short deadline");
        pace.silent(500 * MS, start);
        assert_eq!(pace.standing(start + 49 * MS), Standing::Aside);
        assert_eq!(pace.standing(start + 51 * MS), Standing::Good, "the probe");
        assert_eq!(
            pace.standing(start + 52 * MS),
            Standing::Aside,
            "one of them"
        );
        pace.failed(start + 60 * MS);
        assert_eq!(
            pace.standing(start + 159 * MS),
            Standing::Aside,
            "twice as long"
        );
        for _ in 0..40 {
            pace.failed(start);
        }
        assert_eq!(pace.standing(start + ASIDE_MAX + MS), Standing::Good);
        pace.answered(0, MS);
        assert_eq!(pace.standing(start), Standing::Good);
        pace.late(true);
        assert_eq!(pace.standing(start), Standing::Late);
        pace.late(false);
        assert_eq!(pace.standing(start), Standing::Good);
    }
}
