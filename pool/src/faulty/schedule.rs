//! Which call gets which fault.

use std::time::Duration;

/// What goes wrong with one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It fails and moves nothing.
    Fail(FaultKind),
    /// It takes this long more, but not longer than its deadline.
    Delay(Duration),
    /// It fails after moving part of the batch: destinations of a read hold right bytes and
    /// garbage, memory that a write was meant for is torn.
    Partial {
        /// How it fails.
        kind: FaultKind,
        /// How much of the batch is moved first, in 1/256.
        share: u8,
    },
    /// A read succeeds with one wrong bit; a write succeeds.
    Flip {
        /// Which bit, modulo the bits of the batch.
        bit: u64,
    },
}

/// The errors of [`TransportError`](crate::transport::TransportError).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// `OutOfBounds`, of the first operation.
    OutOfBounds,
    /// `WrongEpoch`.
    WrongEpoch,
    /// `Unreachable`.
    Unreachable,
    /// `Refused`.
    Refused,
    /// `Deadline`.
    Deadline,
}

/// How many of 1000 calls get which fault, on average. More than 1000 in all leaves none without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// [`Fault::Fail`] with [`FaultKind::OutOfBounds`].
    pub out_of_bounds: u32,
    /// [`Fault::Fail`] with [`FaultKind::WrongEpoch`].
    pub wrong_epoch: u32,
    /// [`Fault::Fail`] with [`FaultKind::Unreachable`].
    pub unreachable: u32,
    /// [`Fault::Fail`] with [`FaultKind::Refused`].
    pub refused: u32,
    /// [`Fault::Fail`] with [`FaultKind::Deadline`].
    pub deadline: u32,
    /// [`Fault::Partial`] with [`FaultKind::Unreachable`].
    pub partial: u32,
    /// [`Fault::Flip`].
    pub flip: u32,
    /// [`Fault::Delay`].
    pub delay: u32,
    /// The longest delay.
    pub delay_max: Duration,
}

/// Faults by number of call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    seed: u64,
    rates: Rates,
    script: Vec<Fault>,
    die_at: Option<u64>,
}

impl Schedule {
    /// No faults.
    pub fn quiet() -> Self {
        Self::seeded(0, Rates::default())
    }

    /// Faults at these rates, drawn from `seed`.
    pub fn seeded(seed: u64, rates: Rates) -> Self {
        Self {
            seed,
            rates,
            script: Vec::new(),
            die_at: None,
        }
    }

    /// The first calls get exactly these faults, those after them what the rates say.
    #[must_use]
    pub fn script(mut self, faults: impl Into<Vec<Fault>>) -> Self {
        self.script = faults.into();
        self
    }

    /// From this call on (counted from 0) the donor is gone: every one is `Unreachable`.
    #[must_use]
    pub fn die_at(mut self, call: u64) -> Self {
        self.die_at = Some(call);
        self
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What happens at call number `call`, counted from 0.
    pub fn at(&self, call: u64) -> Fault {
        if self.die_at.is_some_and(|death| call >= death) {
            return Fault::Fail(FaultKind::Unreachable);
        }
        if let Some(fault) = usize::try_from(call)
            .ok()
            .and_then(|call| self.script.get(call))
        {
            return *fault;
        }
        let mut random = Random::new(self.seed, call);
        let mut draw = random.next() % 1000;
        let rates = &self.rates;
        let detail = random.next();
        let share = detail.to_le_bytes()[0];
        let table = [
            (rates.out_of_bounds, Fault::Fail(FaultKind::OutOfBounds)),
            (rates.wrong_epoch, Fault::Fail(FaultKind::WrongEpoch)),
            (rates.unreachable, Fault::Fail(FaultKind::Unreachable)),
            (rates.refused, Fault::Fail(FaultKind::Refused)),
            (rates.deadline, Fault::Fail(FaultKind::Deadline)),
            (
                rates.partial,
                Fault::Partial {
                    kind: FaultKind::Unreachable,
                    share,
                },
            ),
            (rates.flip, Fault::Flip { bit: detail }),
            (rates.delay, Fault::Delay(self.delay(detail))),
        ];
        for (rate, fault) in table {
            match draw.checked_sub(u64::from(rate)) {
                Some(left) => draw = left,
                None => return fault,
            }
        }
        Fault::None
    }

    fn delay(&self, detail: u64) -> Duration {
        let max = u64::try_from(self.rates.delay_max.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(detail % max.saturating_add(1).max(1))
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014),
/// so that a seed means the same for ever, whatever becomes of a library.
struct Random(u64);

impl Random {
    fn new(seed: u64, call: u64) -> Self {
        let mut by_call = Self(call);
        Self(seed ^ by_call.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
