//! Donors killed, frozen, cut off, slowed, corrupted and squeezed under fio and a container: no
//! read fails, none gives a wrong byte, none stands still for longer than 3 s.
//!
//! `HARBOUR_FAULT_RUNS=200 tests/run faults` is the long version; `HARBOUR_FAULT_SEED` is the seed
//! of the first run, and the others have those that follow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use harbour_tests::{
    faults::{
        self,
        plan::{Kind, Plan},
    },
    setting,
};

/// Runs when nothing is said: what fits into 90 s, and has every kind of fault.
const RUNS: u64 = 7;
/// Seed of the first when nothing is said.
const SEED: u64 = 84;

#[test]
fn donors_fail_while_programs_read() {
    let first = setting("HARBOUR_FAULT_SEED", SEED);
    let count = setting("HARBOUR_FAULT_RUNS", RUNS);
    let sum =
        faults::runs(first, count, |line| println!("{line}")).unwrap_or_else(|e| panic!("{e:#}"));
    println!("figures: seeds {first} to {}: {sum}", first + (count - 1));
    assert_eq!(sum.runs as u64, count);
}

#[test]
fn the_short_version_has_every_kind_of_fault() {
    let mut seen = [false; Kind::NAMES.len()];
    for plan in (SEED..SEED + RUNS).map(Plan::of) {
        plan.faults
            .iter()
            .for_each(|f| seen[f.kind.number()] = true);
    }
    assert_eq!(seen, [true; Kind::NAMES.len()]);
}
