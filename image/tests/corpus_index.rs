//! Replays the corpus of the fuzz target `index` and random damage to it, with stable Rust.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "index_support/seeds.rs"]
mod seeds;
#[path = "index_support/support.rs"]
mod support;
#[path = "index_support/walk.rs"]
mod walk;

use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*, sample::Index as Place};
use seeds::seeds;
use walk::{mend, walk};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/index");

#[test]
fn the_corpus_holds_its_invariant() {
    let mut count = 0;
    for entry in fs::read_dir(CORPUS).unwrap_or_else(|error| panic!("{CORPUS}: {error}")) {
        let mut bytes = fs::read(entry.unwrap().path()).unwrap();
        walk(&bytes);
        mend(&mut bytes);
        walk(&bytes);
        count += 1;
    }
    assert!(count >= seeds().len(), "only {count} files in {CORPUS}");
}

#[test]
fn seeds_are_those_of_this_version_and_judged_as_expected() {
    for (name, bytes, good) in seeds() {
        assert_eq!(walk(&bytes), good, "{name}");
        let there = fs::read(Path::new(CORPUS).join(name)).unwrap_or_default();
        if there != bytes {
            let wanted = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            fs::write(&wanted, bytes).unwrap();
            panic!(
                "the seed {name} is another now; when that is meant, copy {} over it",
                wanted.display()
            );
        }
    }
}

#[test]
fn overlapping_directories_and_attributes_are_errors_and_not_work() {
    // 2000 directories that all claim the same blocks, and the longest attributes there can be.
    let mut builder = support::Builder::new();
    for number in 0..2000u32 {
        builder.dir(
            harbour_image::tree::Tree::ROOT,
            format!("{number:0200}").as_bytes(),
        );
    }
    let good = builder.write(harbour_image::index::ViewKind::Layer).bytes;
    assert!(walk(&good));
    let index = harbour_image::index::Index::open(&good).unwrap();
    let root = index.root().unwrap();
    let root_at = root.nid.0 as usize * 32;
    let mut shared = good.clone();
    let mut long = good.clone();
    index
        .readdir(&root, 0, |entry| {
            let at = entry.nid.0 as usize * 32;
            // Layout, size and block address of the root.
            shared.copy_within(root_at..root_at + 2, at);
            shared.copy_within(root_at + 8..root_at + 20, at + 8);
            long[at + 2..at + 4].fill(0xff);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert!(!walk(&shared));
    assert!(!walk(&long));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn damaged_indexes_do_no_harm(
        seed in any::<Place>(),
        edits in vec((any::<Place>(), any::<u8>(), 0..4u8), 1..12),
    ) {
        let seeds = seeds_once();
        let (_, bytes, _) = seed.get(seeds);
        let mut bytes = bytes.clone();
        for (place, value, how) in edits {
            let at = place.index(bytes.len());
            match how {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value % 8),
                // A number that is far too large, or as small as can be.
                2 => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
                _ => bytes[at..].iter_mut().take(4).for_each(|byte| *byte = 0),
            }
        }
        mend(&mut bytes);
        walk(&bytes);
    }
}

fn seeds_once() -> &'static [(&'static str, Vec<u8>, bool)] {
    static SEEDS: std::sync::OnceLock<Vec<(&'static str, Vec<u8>, bool)>> =
        std::sync::OnceLock::new();
    SEEDS.get_or_init(seeds)
}
