//! Replays the seed corpus of the fuzz target `frames` on every build, with the target's invariant
//! and what each seed must come to.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::Path};

use harbour_pool::shm::frames::{Answer, Hello};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/frames");

#[test]
fn every_seed_keeps_the_invariant() {
    let entries = fs::read_dir(CORPUS).expect("the corpus is part of the repository");
    let mut seen = [0; 3];
    for entry in entries {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let (hello, answer) = (Hello::parse(&bytes), Answer::parse(&bytes));
        if let Ok(hello) = &hello {
            assert_eq!(hello.encode(), bytes[..], "{}", path.display());
        }
        if let Ok(answer) = &answer {
            assert_eq!(answer.encode(), bytes, "{}", path.display());
        }
        let kind = match (hello, answer) {
            (Ok(_), _) => 0,
            (_, Ok(_)) => 1,
            _ => 2,
        };
        check_name(&path, kind);
        seen[kind] += 1;
    }
    assert!(
        seen.iter().all(|count| *count > 0),
        "hellos, answers, others: {seen:?}"
    );
}

/// Seeds made by hand say in their name what they are; what fuzzing adds is named by its hash.
fn check_name(path: &Path, kind: usize) {
    let name = path.file_name().unwrap().to_string_lossy();
    for (prefix, expected) in [("hello-", 0), ("answer-", 1), ("bad-", 2)] {
        if name.starts_with(prefix) {
            assert_eq!(kind, expected, "{name}");
        }
    }
}
