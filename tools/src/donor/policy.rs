//! When a donor gives memory back and when it lends more: readings and time in, a decision out. No
//! clock and no system call in here.
//!
//! A host has `available` bytes that it could use; of what is lent, `held` bytes are in use and the
//! rest is a promise that writers may call in at any moment. So what may be lent without ever
//! taking the host below its floor is `held + available - floor`, a sum that giving memory back does
//! not change. More than that goes back at once. Less is taken up slowly: one region at a time, only
//! after the host has been at ease for a while, and later still after it had to be given back.

use std::time::Duration;

/// How often the host is looked at. Giving 4 GiB back has to be over within 200 ms, so this is
/// short; it costs three small files under /proc.
pub const SAMPLE: Duration = Duration::from_millis(50);
/// Share of a sample's time in which something waited for memory from which on the host is short
/// of it.
const STALL_SHARE: f64 = 0.10;
/// A host that has this many times its floor to spare is not short of memory, whatever waits.
const STALL_IGNORED_FLOORS: u64 = 2;
/// Part of what is lent that goes back each time the host stalls.
const STALL_GIVES_BACK: u64 = 8;
/// Between two times of giving back because of stalls: time for the first to show.
const STALL_PAUSE: Duration = Duration::from_millis(500);
/// The host must be at ease for so long before more is lent.
const EASE: Duration = Duration::from_secs(10);
/// The same after memory had to be given back.
const EASE_AFTER_SHRINKING: Duration = Duration::from_secs(60);
/// Between two regions more.
const GROW_PAUSE: Duration = Duration::from_secs(2);
/// Besides the region itself, this part of the floor must be free before more is lent: growing must
/// not be what makes the next shrinking.
const GROW_SLACK: u64 = 4;

/// What the host looks like at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Bytes that can be used without anything being swapped out or failing.
    pub available: u64,
    /// Part of the time since the last reading in which something waited for memory, 0 to 1; `None`
    /// where the kernel does not tell.
    pub stalled: Option<f64>,
    /// Bytes lent.
    pub lent: u64,
    /// Part of them that has pages.
    pub held: u64,
}

/// What is configured.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that the host keeps.
    pub floor: u64,
    /// Never lend more than that.
    pub most: u64,
    /// Bytes of the next region.
    pub unit: u64,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Stay,
    /// Give at least so many bytes back, now.
    Shrink {
        /// How many.
        bytes: u64,
        /// Why.
        why: Why,
    },
    /// Lend so many bytes more.
    Grow {
        /// How many.
        bytes: u64,
    },
}

/// Why memory goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The host would be left with less than its floor.
    Floor,
    /// Something waits for memory.
    Stall,
}

/// Decides. Times are since any fixed moment, and grow.
#[derive(Debug)]
pub struct Policy {
    limits: Limits,
    /// Since when the host has been at ease, once it is.
    at_ease: Option<Duration>,
    shrunk: Option<Duration>,
    stalled: Option<Duration>,
    grown: Option<Duration>,
}

impl Policy {
    /// A policy that knows nothing of the host yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            at_ease: None,
            shrunk: None,
            stalled: None,
            grown: None,
        }
    }

    /// What to do about `reading`, at `now`.
    pub fn decide(&mut self, reading: Reading, now: Duration) -> Decision {
        let allowed = may_lend(reading, self.limits);
        if reading.lent > allowed {
            self.shrunk = Some(now);
            self.at_ease = None;
            return Decision::Shrink {
                bytes: reading.lent - allowed,
                why: Why::Floor,
            };
        }
        let short = reading.available < self.limits.floor.saturating_mul(STALL_IGNORED_FLOORS);
        if reading.stalled.is_some_and(|share| share >= STALL_SHARE) {
            self.at_ease = None;
            let lately = self
                .stalled
                .is_some_and(|then| now.saturating_sub(then) < STALL_PAUSE);
            if short && reading.lent > 0 && !lately {
                self.stalled = Some(now);
                self.shrunk = Some(now);
                let bytes = (reading.lent / STALL_GIVES_BACK).max(1);
                return Decision::Shrink {
                    bytes,
                    why: Why::Stall,
                };
            }
            return Decision::Stay;
        }
        self.grow(reading, now)
    }

    fn grow(&mut self, reading: Reading, now: Duration) -> Decision {
        let Limits { floor, unit, .. } = self.limits;
        // `most` may leave less than a whole region.
        let wanted = self.limits.most.saturating_sub(reading.lent).min(unit);
        let spare = (reading.held + reading.available)
            .saturating_sub(floor)
            .saturating_sub(reading.lent);
        if wanted == 0 || spare < wanted + floor / GROW_SLACK {
            self.at_ease = None;
            return Decision::Stay;
        }
        let since = *self.at_ease.get_or_insert(now);
        let patience = match self.shrunk {
            Some(then) if now.saturating_sub(then) < EASE_AFTER_SHRINKING => EASE_AFTER_SHRINKING,
            _ => EASE,
        };
        let lately = self
            .grown
            .is_some_and(|then| now.saturating_sub(then) < GROW_PAUSE);
        if now.saturating_sub(since) < patience || lately {
            return Decision::Stay;
        }
        self.grown = Some(now);
        Decision::Grow { bytes: wanted }
    }
}

/// Bytes that may be lent in all.
pub fn may_lend(reading: Reading, limits: Limits) -> u64 {
    (reading.held + reading.available)
        .saturating_sub(limits.floor)
        .min(limits.most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn limits() -> Limits {
        Limits {
            floor: 2 * GIB,
            most: 8 * GIB,
            unit: GIB / 4,
        }
    }

    fn reading(available: u64, lent: u64, held: u64) -> Reading {
        Reading {
            available,
            stalled: Some(0.0),
            lent,
            held,
        }
    }

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn memory_goes_back_at_once() {
        let shrink = |bytes| Decision::Shrink {
            bytes,
            why: Why::Floor,
        };
        for (what, reading, decision) in [
            (
                "all is well",
                reading(4 * GIB, 2 * GIB, 2 * GIB),
                Decision::Stay,
            ),
            (
                "at the floor",
                reading(2 * GIB, 8 * GIB, 8 * GIB),
                Decision::Stay,
            ),
            (
                "below it",
                reading(2 * GIB - 1, 8 * GIB, 8 * GIB),
                shrink(1),
            ),
            (
                "far below it",
                reading(0, 8 * GIB, 8 * GIB),
                shrink(2 * GIB),
            ),
            (
                "a promise that cannot be kept",
                reading(4 * GIB, 8 * GIB, GIB),
                shrink(5 * GIB),
            ),
            ("nothing left", reading(0, GIB, 0), shrink(GIB)),
            ("nothing lent", reading(0, 0, 0), Decision::Stay),
        ] {
            assert_eq!(
                Policy::new(limits()).decide(reading, s(0.0)),
                decision,
                "{what}"
            );
        }
    }

    #[test]
    fn stalls_give_back_a_part_now_and_then() {
        let mut policy = Policy::new(limits());
        let stalled = |available, share| Reading {
            stalled: Some(share),
            ..reading(available, 4 * GIB, 4 * GIB)
        };
        let part = Decision::Shrink {
            bytes: GIB / 2,
            why: Why::Stall,
        };
        assert_eq!(
            policy.decide(stalled(3 * GIB, 0.09), s(0.0)),
            Decision::Stay
        );
        assert_eq!(
            policy.decide(stalled(5 * GIB, 0.9), s(0.1)),
            Decision::Stay,
            "there is plenty"
        );
        assert_eq!(policy.decide(stalled(3 * GIB, 0.1), s(0.2)), part);
        assert_eq!(
            policy.decide(stalled(3 * GIB, 0.5), s(0.6)),
            Decision::Stay,
            "too soon"
        );
        assert_eq!(policy.decide(stalled(3 * GIB, 0.5), s(0.8)), part);
        let silent = Reading {
            stalled: None,
            ..reading(3 * GIB, 4 * GIB, 4 * GIB)
        };
        assert_eq!(policy.decide(silent, s(2.0)), Decision::Stay);
    }

    /// Runs a policy over a host that always has `available`, for so many seconds; gives the times
    /// of growing and what is lent in the end.
    fn run(
        policy: &mut Policy,
        from: f64,
        seconds: f64,
        mut lent: u64,
        total: u64,
    ) -> (Vec<f64>, u64) {
        let (mut times, mut now) = (Vec::new(), from);
        while now < from + seconds {
            // Everything lent is written at once, the worst case.
            match policy.decide(reading(total.saturating_sub(lent), lent, lent), s(now)) {
                Decision::Grow { bytes } => {
                    times.push(now);
                    lent += bytes;
                }
                Decision::Shrink { bytes, .. } => lent -= bytes,
                Decision::Stay => {}
            }
            now += 0.5;
        }
        (times, lent)
    }

    #[test]
    fn growing_is_slow_and_ends_below_what_would_shrink_it() {
        let mut policy = Policy::new(limits());
        let (times, lent) = run(&mut policy, 0.0, 300.0, GIB, 6 * GIB);
        assert_eq!(&times[..3], [10.0, 12.0, 14.0]);
        // Floor and slack stay free: 6 - 2 - 0.5.
        assert_eq!(lent, 3 * GIB + GIB / 2);
        assert_eq!(
            run(&mut policy, 300.0, 600.0, lent, 6 * GIB),
            (vec![], lent),
            "no more, no less"
        );
    }

    #[test]
    fn growing_again_takes_longer_and_most_is_never_passed() {
        let mut policy = Policy::new(limits());
        let squeezed = policy.decide(reading(GIB, 4 * GIB, 4 * GIB), s(1.0));
        assert!(matches!(squeezed, Decision::Shrink { .. }));
        let (times, lent) = run(&mut policy, 1.5, 400.0, 7 * GIB - 1, 64 * GIB);
        assert!(times[0] >= 61.0, "{}", times[0]);
        assert_eq!(lent, 8 * GIB, "the last step is as small as it has to be");
    }

    proptest::proptest! {
        /// Whatever happens: after one decision the promise can be kept, unless nothing is lent
        /// any more; and what is lent never passes `most`.
        #[test]
        fn the_floor_is_kept(steps in proptest::collection::vec((0..16 * GIB, 0.0..1.0_f64, 0.0..1.0_f64), 1..200)) {
            let (mut policy, mut lent) = (Policy::new(limits()), 4 * GIB);
            for (at, (available, stalled, written)) in steps.into_iter().enumerate() {
                let held = (lent as f64 * written) as u64;
                let reading = Reading { available, stalled: Some(stalled), lent, held };
                let allowed = may_lend(reading, limits());
                match policy.decide(reading, s(at as f64)) {
                    Decision::Shrink { bytes, .. } => {
                        proptest::prop_assert!(bytes > 0 && bytes <= lent);
                        lent -= bytes;
                    }
                    Decision::Grow { bytes } => lent += bytes,
                    Decision::Stay => {}
                }
                proptest::prop_assert!(lent <= allowed || lent == 0, "{lent} of {allowed}");
                proptest::prop_assert!(lent <= limits().most);
            }
        }
    }
}
