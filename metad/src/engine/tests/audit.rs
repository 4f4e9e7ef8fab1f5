//! A falsified book is reported by name.

use harbour_metad_client::v1;

use super::world::{Layer, Pack, World, layer, sound};
use crate::{
    space::{Book, Place},
    store::Falsehood,
};

/// Two donors, an image with an object in each pack, a pull under way with reserved space, space in
/// quarantine that a node has not let go of: something in every book and in every table.
fn world() -> World {
    let world = World::empty();
    world.donors(&["a", "b"], &[64, 64]);
    let node = world.node();
    world.pull("gone", 2, &[layer(2, 3)]).unwrap();
    world.beat(node, 0, &[]);
    world.pull("stays", 1, &[layer(1, 4)]).unwrap();
    world.remove("gone").unwrap();
    let pull = world.begin();
    world
        .reserve(pull, &[Pack(900, 4096), Pack(901, 4096)])
        .unwrap();
    let books = sound(&world.engine);
    assert!(books.used > 0 && books.reserved > 0 && books.quarantined > 0);
    world
}

/// Audits, and gives what differs as text.
fn found(world: &World) -> Vec<String> {
    let audit = world.engine.audit().unwrap();
    assert_eq!(audit.found, audit.differences.len() as u64);
    let line = |d: &v1::Difference| format!("{}: {} | {}", d.what, d.stored, d.kept);
    audit.differences.iter().map(line).collect()
}

#[track_caller]
fn names(found: &[String], what: &str) {
    assert!(
        found.iter().any(|line| line.contains(what)),
        "{what:?} is not in {found:#?}"
    );
}

#[test]
fn what_was_counted_is_told() {
    let world = world();
    let audit = world.engine.audit().unwrap();
    let count = |what: &str| {
        let counted = audit.counted.iter().find(|counted| counted.what == what);
        counted.map(|counted| counted.count)
    };
    for (what, want) in [
        ("donors", 2),
        ("regions", 4),
        ("extents committed", 6),
        ("extents reserved", 2),
        ("places in quarantine", 5),
        ("copies", 0),
        ("pulls", 1),
        ("packs", 8),
        ("names", 1),
        ("images", 1),
        ("layers", 1),
        ("objects", 4),
    ] {
        assert_eq!(count(what), Some(want), "{what}: {:?}", audit.counted);
    }
    assert_eq!(audit.donors.len(), 2);
    for donor in &audit.donors {
        assert_eq!(donor.stored, donor.kept, "{}", donor.name);
    }
    let books = audit.kept.unwrap();
    assert_eq!(books.lent_bytes, 2 * 128 * 4096);
}

#[test]
fn a_falsified_store_is_reported_by_name() {
    for (how, what) in [
        (Falsehood::ExtentGone, "reserved bytes: "),
        (Falsehood::ExtentGone, "free map: "),
        (Falsehood::ExtentShorter, ": length: 4095 | 4096"),
        (Falsehood::ExtentMoved, ": place of extent"),
        (Falsehood::ExtentTwice, "second replica on one donor"),
        (Falsehood::QuarantineGone, "quarantined bytes: 0 | "),
        (Falsehood::QuarantineGone, "quarantine 1: none | "),
        (Falsehood::PullGone, "pull "),
        (Falsehood::PinsGone, "pin of its pull: none"),
        (Falsehood::PinsGone, "references: 0"),
        (Falsehood::ReferencesGone, "references: 0"),
        (Falsehood::ObjectGone, ": objects: 0 | 1"),
        (Falsehood::ObjectBeyond, "the last object ends at 8388618"),
        (Falsehood::PackHidden, "not known to readers"),
        (
            Falsehood::DonorSilent,
            "\"a\": gets new packs: Some(false) | Some(true)",
        ),
        (Falsehood::DonorDrains, "draining: true"),
        (
            Falsehood::DonorElsewhere,
            "failure domain: Some(\"elsewhere\")",
        ),
        (
            Falsehood::RegionLonger,
            "\"b\": region 1, bytes: 266240 | 262144",
        ),
        (Falsehood::RegionLonger, "\"b\": lent bytes: "),
        (
            Falsehood::NameGone,
            "images in sight that no name points at: 1",
        ),
        (Falsehood::CounterBack, "a number that was not given yet"),
    ] {
        let world = world();
        world.engine.state.lock().writer.falsify(how);
        let found = found(&world);
        assert!(!found.is_empty(), "{how:?} was not noticed");
        names(&found, what);
    }
}

#[test]
fn rows_that_name_nothing_are_reported() {
    let world = world();
    let falsify = |how| world.engine.state.lock().writer.falsify(how);
    falsify(Falsehood::DonorGone);
    let found = found(&world);
    names(
        &found,
        "rows of extents that refer to donors that are not there",
    );
    names(&found, "no such donor");
    names(&found, "free map of donor 1: no such donor | there");
}

#[test]
fn falsified_memory_is_reported_by_name() {
    type Falsify = fn(&mut crate::engine::state::State, Place);
    let cases: [(Falsify, &str); 9] = [
        (
            |state, place| state.space.free(&place, Book::Used),
            "used bytes: ",
        ),
        (
            |state, place| state.space.free(&place, Book::Used),
            "free map: ",
        ),
        (
            |state, place| state.space.shift(&place, Book::Used, Book::Reserved),
            "books of all donors: ",
        ),
        (
            |state, _| assert!(state.space.reserve_on(2, 4096).is_some()),
            "\"b\": region 0, free map: ",
        ),
        (
            |state, _| state.space.remove_donor(2),
            "free map of donor \"b\"",
        ),
        (|state, _| state.space.set_open(2, false), "gets new packs"),
        (
            |state, _| assert!(state.quarantine.pop().is_some()),
            "quarantine ",
        ),
        (
            |state, _| assert!(state.pulls.pop_first().is_some()),
            "pull ",
        ),
        (
            |state, _| {
                let known = state.policy.known();
                known.iter().for_each(|pack| state.policy.removed(*pack));
            },
            "in the order of eviction: a replica | none",
        ),
    ];
    for (falsify, what) in cases {
        let world = world();
        let mut state = world.engine.state.lock();
        let mut used = Vec::new();
        let read = state.writer.read();
        read.for_each_extent(|extent| {
            used.extend(extent.pull.is_none().then_some(extent.place));
            Ok(())
        })
        .unwrap();
        falsify(&mut state, used[0]);
        drop(state);
        names(&found(&world), what);
    }
}

#[test]
fn a_lost_copy_is_reported_from_either_side() {
    let copying = || {
        let world = World::tuned(super::world::Tune::replicas(2));
        world.donors(&["a"], &[64]);
        world.pull("x", 1, &[layer(1, 2)]).unwrap();
        world.donors(&["b"], &[64]);
        world.pass(2_000);
        sound(&world.engine);
        world
    };
    let world = copying();
    world
        .engine
        .state
        .lock()
        .writer
        .falsify(Falsehood::CopyGone);
    names(&found(&world), "copy ");
    let world = copying();
    world.engine.state.lock().copies.under_way.pop_first();
    let found = found(&world);
    names(&found, ": CopyRow");
    names(&found, "| none");
}

#[test]
fn many_differences_are_counted_and_some_are_told() {
    let world = World::new(2048);
    let packs = (0..400).map(|number| Pack(number, 4096)).collect();
    let layer = Layer {
        diff: 1,
        index: 5001,
        packs,
    };
    world.pull("x", 1, &[layer]).unwrap();
    world
        .engine
        .state
        .lock()
        .writer
        .falsify(Falsehood::ReferencesGone);
    let audit = world.engine.audit().unwrap();
    assert_eq!((audit.found, audit.differences.len()), (402, 256));
}

#[test]
fn audits_run_beside_pulls_and_one_at_a_time() {
    let world = World::new(4096);
    std::thread::scope(|threads| {
        let audits = threads.spawn(|| {
            for done in 0..60 {
                let audit = world.engine.audit().unwrap();
                assert_eq!(audit.differences, [], "after {done} audits");
            }
        });
        let mut number = 1;
        while !audits.is_finished() {
            world.pull("x", number, &[layer(number, 5)]).unwrap();
            world.engine.tick().unwrap();
            number += 1;
        }
        audits.join().unwrap();
    });
    let alone = world.engine.auditing.lock();
    let refused = world.engine.audit().unwrap_err().to_string();
    assert!(refused.contains("another audit"), "{refused}");
    drop(alone);
    sound(&world.engine);
}

#[test]
fn a_pack_that_comes_and_goes_in_one_commit_has_no_rank() {
    let world = World::new(64);
    world.pull("x", 1, &[layer(1, 1)]).unwrap();
    let pull = world.begin();
    let other = Layer {
        diff: 1,
        index: 5999,
        packs: vec![Pack(777, 4096)],
    };
    // The same layer, packed otherwise: the first stays, and what this pull wrote goes at once.
    world.stage(pull, &other).unwrap();
    world.commit(pull, "x", 1, 1, &[1]).unwrap();
    sound(&world.engine);
    assert!(world.holders(Pack(777, 4096)).is_empty());
}
