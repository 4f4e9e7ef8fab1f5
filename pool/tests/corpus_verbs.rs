//! Replays the seed corpus of the fuzz target `verbs` on every build, with the target's invariant
//! and what each seed must come to.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::Path};

use harbour_pool::verbs::frames::{Answer, Request};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/verbs");

#[test]
fn every_seed_keeps_the_invariant() {
    let entries = fs::read_dir(CORPUS).expect("the corpus is part of the repository");
    let mut seen = [0; 3];
    for entry in entries {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let (request, answer) = (Request::parse(&bytes), Answer::parse(&bytes));
        if let Ok(request) = &request {
            assert_eq!(request.encode(), bytes[..], "{}", path.display());
        }
        if let Ok(answer) = &answer {
            assert_eq!(answer.encode(), bytes, "{}", path.display());
        }
        let kind = match (request, answer) {
            (Ok(_), _) => 0,
            (_, Ok(_)) => 1,
            _ => 2,
        };
        check_name(&path, kind);
        seen[kind] += 1;
    }
    assert!(
        seen.iter().all(|count| *count > 0),
        "requests, answers, others: {seen:?}"
    );
}

/// Seeds made by hand say in their name what they are; what fuzzing adds is named by its hash.
fn check_name(path: &Path, kind: usize) {
    let name = path.file_name().unwrap().to_string_lossy();
    for (prefix, expected) in [("request-", 0), ("answer-", 1), ("bad-", 2)] {
        if name.starts_with(prefix) {
            assert_eq!(kind, expected, "{name}");
        }
    }
}
