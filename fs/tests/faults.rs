//! The rungs of a read, one fault after another.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/support.rs"]
mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use harbour_fs::{Attr, Config, Error, Fs, source::IndexRef};
use harbour_image::{index::ViewKind, object::PackId, tree::Tree};
use support::{
    model::{Model, meta, noise, sample},
    walk::{compare, find},
    world::{Fault, World},
};

const LEN: usize = 3 << 20;

/// One file of 3 MiB in packs of 1 MiB on `donors`.
struct One {
    world: Arc<World>,
    fs: Arc<Fs>,
    file: Attr,
    content: Vec<u8>,
    packs: Vec<PackId>,
    index: IndexRef,
}

impl One {
    fn new(donors: &[u64], config: Config) -> Self {
        let world = World::new();
        let mut model = Model::new(1 << 20);
        let content = noise(7, LEN);
        model.file(Tree::ROOT, b"file", meta(0o644), content.clone(), false);
        let layer = world.layer(&mut model, 1, donors);
        let index = layer.index.clone();
        let path = format!("layers/{}/file", layer.diff_id.short());
        world.show(vec![], vec![layer]);
        let fs = world.fs(config);
        let file = find(&fs, &path).unwrap();
        // Everything of the index is in memory from here on.
        let _ = fs.patiently(|fs| fs.read(file.node, 0, 1)).unwrap();
        Self {
            world,
            fs,
            file,
            content,
            packs: model.pack_ids(),
            index,
        }
    }

    fn read(&self, offset: usize, len: usize) -> Result<(), Error> {
        let data = self
            .fs
            .patiently(|fs| fs.read(self.file.node, offset as u64, len))?;
        assert!(
            *data == self.content[offset..LEN.min(offset + len)],
            "{len} bytes at {offset}"
        );
        Ok(())
    }

    fn quick(&self) -> Result<(), Error> {
        self.fs
            .quickly(|fs| fs.read(self.file.node, 0, LEN))
            .map(drop)
    }
}

fn config() -> Config {
    Config {
        deadline: Duration::from_secs(4),
        edge_cache_bytes: 0,
        ..Config::default()
    }
}

#[test]
fn a_donor_with_wrong_bytes_is_passed_over_and_nothing_wrong_gets_out() {
    for donors in [[1, 2], [100, 101]] {
        let one = One::new(&donors, config());
        one.world.fault(donors[0], Some(Fault::Flip));
        one.quick().unwrap();
        one.read(0, LEN).unwrap();
        one.read(12_345, 100_000).unwrap();
        assert!(one.fs.stats().wrong > 0);
        assert_eq!(one.world.refills(), []);
        assert_eq!(
            one.world.lost(),
            [],
            "a replica that another stood in for is not reported yet"
        );
    }
}

#[test]
fn wrong_bytes_everywhere_are_a_refill_and_the_replicas_are_reported() {
    let one = One::new(&[1, 2], config());
    one.world.fault(1, Some(Fault::Flip));
    one.world.fault(2, Some(Fault::Flip));
    assert!(
        matches!(one.quick(), Err(Error::Later)),
        "not something for a quick thread"
    );
    one.read(0, LEN).unwrap();
    assert_eq!(one.world.refills().len(), 3);
    let lost = one.world.lost();
    assert_eq!(lost.len(), 6);
    assert!(
        lost.iter().all(|(.., why)| why == "wrong bytes"),
        "{lost:?}"
    );
}

#[test]
fn a_dead_donor_and_no_source_are_eio_with_all_that_was_tried() {
    let one = One::new(&[1], config());
    one.world.fault(1, Some(Fault::Gone));
    one.world.refuse_refills(true);
    let error = one.read(0, 4096).unwrap_err();
    let text = error.to_string();
    for part in [
        "layer sha256:",
        "nid",
        "4096 bytes at 0",
        "donor 1 (local)",
        "cannot be reached",
        "refill",
        "the source",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_eq!(harbour_fs::errno::errno(&error), nix::errno::Errno::EIO);
    one.world.refuse_refills(false);
    one.read(0, 4096).unwrap();
}

#[test]
fn packs_that_moved_are_found_again() {
    let one = One::new(&[1], config());
    one.world.freeze_places();
    one.world.move_all(3);
    assert!(
        matches!(one.quick(), Err(Error::Later)),
        "places must be asked for anew"
    );
    one.read(0, LEN).unwrap();
    one.quick().unwrap();
    assert_eq!(one.world.refills(), []);
    assert_eq!(one.world.lost(), [], "a stale place is not a lost replica");
}

#[test]
fn freed_places_are_dropped() {
    let one = One::new(&[1], config());
    one.read(0, LEN).unwrap();
    one.world.move_all(3);
    one.fs.freed(&one.packs);
    let wrong = one.fs.stats().wrong;
    one.quick().unwrap();
    assert_eq!(
        one.fs.stats().wrong,
        wrong,
        "the old place was not looked at"
    );
    one.world.move_all(4);
    one.fs.forget_locations();
    one.quick().unwrap();
    assert_eq!(one.fs.stats().wrong, wrong);
}

#[test]
fn lost_packs_come_back_by_refill_whatever_part_is_read() {
    let one = One::new(&[1], config());
    one.world.lose(&one.packs);
    one.fs.forget_locations();
    one.read(1 << 20, 10).unwrap();
    assert_eq!(one.world.refills().len(), 1);
    one.read(0, LEN).unwrap();
    assert_eq!(one.world.refills().len(), 3);
    let why = one.fs.patiently(|fs| fs.why(one.file.node)).unwrap();
    assert_eq!((why.packs, why.packs_missing), (3, 0));
}

#[test]
fn a_donor_that_hangs_costs_the_deadline_at_most() {
    let one = One::new(
        &[1],
        Config {
            deadline: Duration::from_millis(600),
            ..config()
        },
    );
    one.world.fault(1, Some(Fault::Hang));
    one.world.refuse_refills(true);
    let start = Instant::now();
    assert!(one.read(0, LEN).is_err());
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    let start = Instant::now();
    assert!(matches!(one.quick(), Err(Error::Later)));
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_donor_that_hangs_leaves_time_for_the_other() {
    let one = One::new(&[1, 2], config());
    one.world.fault(1, Some(Fault::Hang));
    let start = Instant::now();
    one.read(0, 4096).unwrap();
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(one.world.refills(), []);
}

#[test]
fn without_metad_what_is_known_goes_on_and_the_rest_fails_by_name() {
    let one = One::new(&[1], config());
    one.read(0, LEN).unwrap();
    one.world.metad_down(true);
    one.read(0, LEN).unwrap();
    one.fs.forget_locations();
    one.world.refuse_refills(true);
    let text = one.read(0, 10).unwrap_err().to_string();
    assert!(text.contains("metad for places did not answer"), "{text}");
}

#[test]
fn an_index_comes_from_disk_when_the_pool_has_it_wrong_or_not_at_all() {
    for fault in [Fault::Flip, Fault::Gone] {
        let world = World::new();
        let mut model = sample(ViewKind::Layer, 500);
        let layer = world.layer(&mut model, 1, &[1]);
        let (path, packs) = (
            format!("layers/{}", layer.diff_id.short()),
            layer.index.packs.clone(),
        );
        world.show(vec![], vec![layer]);
        let fs = world.fs(Config {
            prefetch_indexes: false,
            ..config()
        });
        world.fault(1, Some(fault));
        let root = find(&fs, &path).unwrap();
        let names = support::walk::list(&fs, root.node, true, 1000).unwrap();
        assert!(names.len() > 10);
        assert!(fs.stats().index_fallback_bytes > 0);
        world.fault(1, None);
        compare(&fs, root.node, &model, true);

        // And with neither pool nor disk: an error that says so, and another try later.
        let fs = world.fs(Config {
            prefetch_indexes: false,
            ..config()
        });
        world.fault(1, Some(fault));
        world.metad_down(true);
        world.refuse_refills(true);
        let error = find(&fs, &path).unwrap_err();
        let text = format!(
            "{error}: {:?}",
            std::error::Error::source(&error).map(ToString::to_string)
        );
        assert!(text.contains("index of layer sha256:"), "{text}");
        world.metad_down(false);
        world.lose(&packs);
        find(&fs, &path).unwrap();
        world.refuse_refills(false);
        world.fault(1, None);
    }
}

#[test]
fn an_index_that_is_not_what_its_digest_says_is_refused() {
    let world = World::new();
    let mut model = sample(ViewKind::Layer, 10);
    let mut layer = world.layer(&mut model, 1, &[1]);
    let path = format!("layers/{}", layer.diff_id.short());
    layer.index.digest[3] ^= 1;
    let mut long = layer.clone();
    (long.number, long.index.len) = (2, u64::MAX / 2);
    long.diff_id = harbour_image::digest::Digest::of(b"long");
    let long_path = format!("layers/{}", long.diff_id.short());
    world.show(vec![], vec![layer, long]);
    let fs = world.fs(config());
    assert!(matches!(find(&fs, &path), Err(Error::Index { .. })));
    assert!(matches!(find(&fs, &long_path), Err(Error::Index { .. })));
    // The directory around them is there all the same.
    let names = support::walk::list(&fs, find(&fs, "layers").unwrap().node, true, 10).unwrap();
    assert_eq!(names.len(), 4);
}

#[test]
fn uses_are_told_in_the_end() {
    let one = One::new(&[1], config());
    one.read(0, LEN).unwrap();
    let (world, packs, index) = (Arc::clone(&one.world), one.packs.clone(), one.index.clone());
    drop(one);
    let used = world.used();
    assert!(
        packs
            .iter()
            .chain(&index.packs)
            .all(|pack| used.contains(pack))
    );
}

#[test]
fn checking_can_be_left_out_for_a_measurement_only() {
    let one = One::new(
        &[1],
        Config {
            verify: false,
            ..config()
        },
    );
    let before = one.world.bytes.load(Ordering::Relaxed);
    one.read(0, LEN).unwrap();
    assert_eq!(one.world.bytes.load(Ordering::Relaxed) - before, LEN as u64);
    assert_eq!(one.fs.stats().granules_verified, 0);
    assert!(Config::default().verify);
}

/// Reads until what is usual for its donors is known.
fn warm(one: &One) {
    for _ in 0..40 {
        one.read(0, 64 << 10).unwrap();
    }
}

#[test]
fn a_slow_replica_is_hedged_and_its_late_bytes_harm_nobody() {
    let one = One::new(&[100, 101], config());
    warm(&one);
    one.world.fault(100, Some(Fault::Slow(700)));
    for _ in 0..30 {
        let start = Instant::now();
        one.read(0, LEN).unwrap();
        assert!(
            start.elapsed() < Duration::from_millis(600),
            "{:?}",
            start.elapsed()
        );
    }
    let stats = one.fs.stats();
    assert!(stats.hedges > 0 && stats.hedge_wins > 0, "{stats:?}");
    // A donor known to be late is not what a read begins with: far fewer hedges than reads.
    assert!(stats.hedges < 20, "{stats:?}");
    assert_eq!((stats.wrong, one.world.refills().len()), (0, 0));
    assert_eq!(one.world.lost(), [], "slow is not lost");
}

#[test]
fn a_frozen_donor_costs_no_more_than_a_hedge_while_another_has_the_pack() {
    let one = One::new(&[100, 101], config());
    warm(&one);
    for frozen in [100, 101] {
        one.world.fault(frozen, Some(Fault::Hang));
        let mut longest = Duration::ZERO;
        for at in 0..20 {
            let start = Instant::now();
            one.read(at * 100_000, 300_000).unwrap();
            longest = longest.max(start.elapsed());
        }
        assert!(longest < Duration::from_millis(600), "{longest:?}");
        one.world.fault(frozen, None);
        // What is under way to it ends within an attempt, and then it is as good as before.
        std::thread::sleep(Duration::from_millis(1500));
        one.read(0, LEN).unwrap();
    }
    assert_eq!(one.world.refills(), []);
    assert_eq!(one.world.lost(), []);
}

#[test]
fn a_frozen_donor_alone_gives_way_to_the_source_in_time() {
    for donor in [1, 100] {
        let one = One::new(
            &[donor],
            Config {
                deadline: Duration::from_secs(30),
                ..config()
            },
        );
        warm(&one);
        one.world.fault(donor, Some(Fault::Hang));
        let start = Instant::now();
        one.read(0, LEN).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(one.world.refills().len(), 3);
    }
}

#[test]
fn a_frozen_donor_and_no_source_are_waited_for_with_what_time_is_left() {
    let one = One::new(
        &[100],
        Config {
            deadline: Duration::from_secs(20),
            ..config()
        },
    );
    warm(&one);
    one.world.fault(100, Some(Fault::Slow(2500)));
    one.world.refuse_refills(true);
    // Longer than an attempt lasts while something else could be tried; shorter than the last one.
    one.read(0, 100_000).unwrap();
    assert!(!one.world.refills().is_empty());
}

#[test]
fn a_dead_donor_is_left_alone_for_a_while() {
    let one = One::new(&[100, 101], config());
    one.world.fault(101, Some(Fault::Gone));
    for _ in 0..50 {
        one.read(0, 64 << 10).unwrap();
    }
    let before = one.fs.stats();
    assert!(before.donors_aside <= 1, "{before:?}");
    one.world.fault(101, None);
    one.world.fault(100, Some(Fault::Gone));
    std::thread::sleep(Duration::from_millis(300));
    one.read(0, LEN).unwrap();
    assert_eq!(one.world.refills(), []);
}

#[test]
fn seeded_faults_give_right_bytes_in_bounded_time() {
    let seed = std::env::var("HARBOUR_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    for seed in seed.map_or(1..5, |seed: u64| seed..seed + 1) {
        eprintln!("HARBOUR_SEED={seed}");
        let one = One::new(
            &[1, 100, 101],
            Config {
                deadline: Duration::from_secs(30),
                seed,
                ..config()
            },
        );
        let mut state = seed;
        let mut next = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for step in 0..60 {
            let donor = [1, 100, 101][next(3) as usize];
            let fault = match next(6) {
                0 => Some(Fault::Flip),
                1 => Some(Fault::Gone),
                2 => Some(Fault::Hang),
                3 => Some(Fault::Slow(20 + next(400))),
                _ => None,
            };
            one.world.fault(donor, fault);
            if next(8) == 0 {
                one.fs.forget_locations();
            }
            let offset = next(LEN as u64) as usize;
            let len = 1 + next(300_000) as usize;
            let start = Instant::now();
            one.read(offset, len.min(LEN - offset)).unwrap();
            // The slowest way: a frozen donor is tried on two rungs, and then comes the source.
            let took = start.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "seed {seed} step {step}: {took:?}"
            );
        }
    }
}
