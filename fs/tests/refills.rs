//! Reads that wait for a refill look around meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/support.rs"]
mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use harbour_fs::{Attr, Config, Fs};
use harbour_image::{object::PackId, tree::Tree};
use support::{
    model::{Model, meta, noise},
    walk::find,
    world::{Fault, World},
};

const LEN: usize = 1 << 20;

/// A file of 1 MiB in one pack on `donors`, and a source that never answers.
fn one(donors: &[u64]) -> (Arc<World>, Arc<Fs>, Attr) {
    let (world, fs, file, _) = packs(1, donors);
    world.hang_refills(true);
    (world, fs, file)
}

/// A file of so many MiB, each in a pack of its own that all `donors` have.
fn packs(count: usize, donors: &[u64]) -> (Arc<World>, Arc<Fs>, Attr, Vec<PackId>) {
    let world = World::new();
    let mut model = Model::new(LEN);
    let content = noise(7, count * LEN);
    model.file(Tree::ROOT, b"file", meta(0o644), content, false);
    let layer = world.layer(&mut model, 1, donors);
    let path = format!("layers/{}/file", layer.diff_id.short());
    world.show(vec![], vec![layer]);
    let fs = world.fs(Config {
        deadline: Duration::from_secs(20),
        edge_cache_bytes: 0,
        ..Config::default()
    });
    let file = find(&fs, &path).unwrap();
    (world, fs, file, model.pack_ids())
}

fn read(fs: &Fs, file: &Attr) -> Duration {
    let start = Instant::now();
    let data = fs.patiently(|fs| fs.read(file.node, 0, LEN)).unwrap();
    assert_eq!(*data, noise(7, LEN));
    start.elapsed()
}

#[test]
fn a_donor_that_comes_to_is_read_although_the_source_is_silent() {
    let (world, fs, file) = one(&[100]);
    read(&fs, &file);
    world.fault(100, Some(Fault::Hang));
    let thaw = {
        let world = Arc::clone(&world);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1_500));
            world.fault(100, None);
        })
    };
    let took = read(&fs, &file);
    assert!(took > Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(fs.stats().refills, 1, "one, however often it is waited for");
    thaw.join().unwrap();
}

#[test]
fn a_donor_that_others_set_aside_is_asked_before_a_silent_source_is_waited_for_long() {
    let (world, fs, file) = one(&[100]);
    world.fault(100, Some(Fault::Gone));
    let failed = fs.quickly(|fs| fs.read(file.node, 0, LEN));
    assert!(failed.is_err());
    world.fault(100, None);
    let took = read(&fs, &file);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn a_place_that_is_found_while_the_source_is_silent_is_taken() {
    let (world, fs, file) = one(&[100]);
    world.fault(100, Some(Fault::Hang));
    let copy = {
        let world = Arc::clone(&world);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1_500));
            world.move_all(101);
        })
    };
    let took = read(&fs, &file);
    assert!(took < Duration::from_secs(4), "{took:?}");
    copy.join().unwrap();
}

#[test]
fn two_silent_donors_of_one_read_cost_little_more_than_one() {
    let (world, fs, file, packs) = packs(2, &[100, 101]);
    world.keep(&packs[0], 100);
    world.keep(&packs[1], 101);
    for donor in [100, 101] {
        world.fault(donor, Some(Fault::Hang));
    }
    let start = Instant::now();
    let offset = LEN as u64 / 2;
    let data = fs.patiently(|fs| fs.read(file.node, offset, LEN)).unwrap();
    let took = start.elapsed();
    assert_eq!(*data, noise(7, 2 * LEN)[LEN / 2..][..LEN]);
    assert_eq!(world.refills().len(), 2, "both packs came from the source");
    assert!(took > Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_donor_found_anew_that_is_silent_too_costs_little_more() {
    let (world, fs, file, _) = packs(1, &[100]);
    world.freeze_places();
    world.move_all(101);
    for donor in [100, 101] {
        world.fault(donor, Some(Fault::Hang));
    }
    let took = read(&fs, &file);
    assert_eq!(world.refills().len(), 1, "it came from the source");
    assert!(took > Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_millis(2_200), "{took:?}");
}

/// Where pool and spool are full of what others read, what a refill brought may be gone when it is read.
#[test]
fn what_was_pushed_out_again_is_brought_again() {
    let (world, fs, file, ids) = packs(1, &[100]);
    world.lose(&ids);
    world.vain_refills(3);
    read(&fs, &file);
    assert_eq!(world.refills().len(), 4);
    // Not for ever.
    let (world, fs, file, ids) = packs(1, &[100]);
    world.lose(&ids);
    world.vain_refills(usize::MAX);
    let error = fs.patiently(|fs| fs.read(file.node, 0, LEN)).unwrap_err();
    assert!(world.refills().len() < 20, "{error}");
}
