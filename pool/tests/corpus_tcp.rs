//! Replays the seed corpus of the fuzz target `tcp` on every build, with the target's invariant and
//! what each seed must come to.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::Path};

#[path = "../../tests/fuzz/invariants/tcp.rs"]
#[allow(unreachable_pub)]
mod invariant;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/tcp");
const KINDS: [&str; 5] = ["greeting-", "hello-", "answer-", "request-", "reply-"];

#[test]
fn every_seed_keeps_the_invariant() {
    let mut seen = [0; 5];
    let mut bad = 0;
    for entry in fs::read_dir(CORPUS).expect("the corpus is part of the repository") {
        let path = entry.unwrap().path();
        let is = invariant::holds(&fs::read(&path).unwrap());
        bad += usize::from(is == [false; 5]);
        for (count, is) in seen.iter_mut().zip(is) {
            *count += usize::from(is);
        }
        check_name(&path, is);
    }
    assert!(
        bad > 0 && seen.iter().all(|count| *count > 0),
        "{seen:?}, {bad} others"
    );
}

/// Seeds made by hand say in their name what they are; what fuzzing adds is named by its hash.
fn check_name(path: &Path, is: [bool; 5]) {
    let name = path.file_name().unwrap().to_string_lossy();
    for (prefix, is) in KINDS.into_iter().zip(is) {
        assert!(!name.starts_with(prefix) || is, "{name}");
    }
    assert!(!name.starts_with("bad-") || is == [false; 5], "{name}");
}
