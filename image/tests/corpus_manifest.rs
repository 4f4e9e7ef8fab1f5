//! Replays the seeds of the fuzz target `manifest`, and whatever it once found, with stable Rust.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "../../tests/fuzz/invariants/manifest.rs"]
mod invariant;

use std::path::Path;

#[test]
fn the_corpus_keeps_the_invariant() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/manifest");
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let data = std::fs::read(&path).unwrap();
        eprintln!("{}", path.display());
        invariant::check(&data);
        count += 1;
    }
    assert!(count >= 10, "{} holds {count} files", folder.display());
}
