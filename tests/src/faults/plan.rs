//! What goes wrong in one run, and when: all of it follows from the seed.

use std::{fmt, ops::RangeInclusive, time::Duration};

/// Donors that there are, on hosts 1 to this.
pub const DONORS: usize = 3;

/// Of a hundred runs, so many have no registry to fall back to, and then one donor that fails.
const WITHOUT_REGISTRY: u64 = 20;
/// Of a hundred others, so many have two donors that fail, and so many have all of them.
const TWO: u64 = 35;
const THREE: u64 = 20;
/// When faults begin, in milliseconds after the readers are at work.
const BEGINS_MS: RangeInclusive<u64> = 200..=1_500;
/// How long they last: the longer ones outlast a donor's lease.
const LASTS_MS: RangeInclusive<u64> = 500..=7_000;
/// What a slow cable carries, in Mbit a second.
const RATE_MBIT: RangeInclusive<u64> = 16..=128;
/// How much of what a donor holds goes bad or back, in percent.
const PART_PERCENT: RangeInclusive<u64> = 20..=100;
/// Readers go on for so long after the last fault has passed.
const AFTER: Duration = Duration::from_millis(1_000);

/// A small generator: the same numbers from the same seed, on every machine and for ever
/// (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// One for this seed; seeds that lie side by side give unrelated numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.roll() % end.max(1)
    }

    /// A number of a range.
    pub fn of(&mut self, range: &RangeInclusive<u64>) -> u64 {
        range.start() + self.below(range.end() - range.start() + 1)
    }
}

/// What happens to a donor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Killed with SIGKILL; another one is started in its place at the end.
    Kill,
    /// Stopped with SIGSTOP.
    Freeze,
    /// Its cable is pulled out.
    Cut,
    /// Its cable carries so many Mbit a second.
    Slow(u32),
    /// So many percent of what it holds become other bytes.
    Corrupt(u32),
    /// Its host has so little memory left that it gives back so many percent of what it holds.
    Squeeze(u32),
}

impl Kind {
    /// Their names, in the order of [`Self::number`].
    pub const NAMES: [&'static str; 6] = ["kill", "freeze", "cut", "slow", "corrupt", "squeeze"];

    fn any(dice: &mut Dice) -> Self {
        let number = dice.below(Self::NAMES.len() as u64);
        // Both ranges are far below 2^32.
        let (rate, part) = (dice.of(&RATE_MBIT) as u32, dice.of(&PART_PERCENT) as u32);
        match number {
            0 => Self::Kill,
            1 => Self::Freeze,
            2 => Self::Cut,
            3 => Self::Slow(rate),
            4 => Self::Corrupt(part),
            _ => Self::Squeeze(part),
        }
    }

    /// Place of its name.
    pub fn number(self) -> usize {
        match self {
            Self::Kill => 0,
            Self::Freeze => 1,
            Self::Cut => 2,
            Self::Slow(_) => 3,
            Self::Corrupt(_) => 4,
            Self::Squeeze(_) => 5,
        }
    }

    /// Whether the donor has lost something by it, and does not get it back when it passes.
    pub fn loses(self) -> bool {
        matches!(self, Self::Kill | Self::Corrupt(_) | Self::Squeeze(_))
    }
}

/// One thing that goes wrong with one donor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Host of the donor.
    pub host: usize,
    /// What.
    pub kind: Kind,
    /// When it begins.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
}

/// What goes wrong in one run. At most one fault for each donor, so that what it takes is one
/// replica; where more than one donor fails the registry remains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What it follows from.
    pub seed: u64,
    /// Faults in the order in which they begin.
    pub faults: Vec<Fault>,
    /// Whether the registry can be reached.
    pub registry: bool,
}

impl Plan {
    /// The plan of this seed.
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let registry = dice.below(100) >= WITHOUT_REGISTRY;
        let many = dice.below(100);
        let count = match many {
            _ if !registry => 1,
            ..THREE => DONORS,
            many if many < THREE + TWO => 2,
            _ => 1,
        };
        let mut hosts: Vec<usize> = (1..=DONORS).collect();
        let mut faults: Vec<Fault> = (0..count)
            .map(|_| Fault {
                // Below the number of hosts, which is small.
                host: hosts.swap_remove(dice.below(hosts.len() as u64) as usize),
                kind: Kind::any(&mut dice),
                at: Duration::from_millis(dice.of(&BEGINS_MS)),
                lasts: Duration::from_millis(dice.of(&LASTS_MS)),
            })
            .collect();
        faults.sort_by_key(|fault| fault.at);
        Self {
            seed,
            faults,
            registry,
        }
    }

    /// How long readers are at work.
    pub fn lasts(&self) -> Duration {
        let ends = self.faults.iter().map(|fault| fault.at + fault.lasts);
        ends.max().unwrap_or_default() + AFTER
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}:", self.seed)?;
        for fault in &self.faults {
            write!(
                f,
                " h{} {:?} at {} ms for {} ms;",
                fault.host,
                fault.kind,
                fault.at.as_millis(),
                fault.lasts.as_millis()
            )?;
        }
        let registry = if self.registry { "there" } else { "away" };
        write!(f, " registry {registry}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays_its_plan() {
        assert_eq!(Plan::of(7), Plan::of(7));
        assert_ne!(Plan::of(7).faults, Plan::of(8).faults);
        // What a seed means must not change by accident, or what failed once cannot be replayed.
        assert_eq!(
            Plan::of(1).to_string(),
            "seed 1: h3 Corrupt(45) at 220 ms for 567 ms; h2 Squeeze(40) at 299 ms for 2570 ms; \
             h1 Squeeze(97) at 609 ms for 3704 ms; registry there"
        );
    }

    #[test]
    fn plans_keep_what_is_promised_and_leave_no_kind_out() {
        let (mut kinds, mut away, mut counts) = ([0; 6], 0, [0; DONORS + 1]);
        for plan in (0..200).map(Plan::of) {
            let mut hosts: Vec<_> = plan.faults.iter().map(|fault| fault.host).collect();
            hosts.sort_unstable();
            hosts.dedup();
            assert_eq!(hosts.len(), plan.faults.len(), "{plan}");
            assert!(hosts.iter().all(|host| (1..=DONORS).contains(host)));
            assert!(plan.registry || plan.faults.len() == 1, "{plan}");
            assert!(plan.lasts() < Duration::from_secs(10), "{plan}");
            plan.faults.iter().for_each(|f| kinds[f.kind.number()] += 1);
            away += usize::from(!plan.registry);
            counts[plan.faults.len()] += 1;
        }
        assert!(kinds.iter().all(|count| *count >= 30), "{kinds:?}");
        assert!((20..60).contains(&away), "{away}");
        assert!(
            counts[0] == 0 && counts[1..].iter().all(|c| *c >= 15),
            "{counts:?}"
        );
    }
}
