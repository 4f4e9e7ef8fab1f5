//! Eviction, quarantine, and what readers have to say to it.

use harbour_metad_client::v1;

use super::super::Reserving;
use super::world::{Pack, World, digest, layer, pack, wanted};
use crate::error::Error;

/// A world of `pages` pages whose donor does not fall silent while time passes.
fn pass(world: &World, pages: u64, ms: u64) {
    for _ in 0..ms / 2000 {
        world.pass(2000);
        world.donor("d", 1, &[pages]);
    }
}

fn wait(world: &World, pull: v1::PullRef, packs: &[Pack]) -> bool {
    let request = v1::ReserveRequest {
        pull: Some(pull),
        packs: wanted(packs),
        avoid: Vec::new(),
    };
    matches!(
        world.engine.reserve(&request, true).unwrap(),
        Reserving::Wait
    )
}

#[test]
fn the_least_recently_used_goes_and_its_layer_is_partial() {
    let world = World::new(12);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    world.pull("b", 2, &[layer(2, 4)]).unwrap();
    let uses = |number| v1::PackUse {
        pack: pack(number).to_vec(),
        reads: 2,
    };
    world
        .engine
        .report_use(&v1::UseReport {
            packs: vec![uses(100), uses(101), uses(9999)],
        })
        .unwrap();
    let pull = world.begin();
    world
        .reserve(pull, &[Pack(900, 4096), Pack(901, 4096)])
        .unwrap();
    let held: Vec<usize> = world
        .locate(&layer(1, 4).packs)
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(held, [1, 1, 0, 0], "what was read stays");
    assert_eq!(world.locate(&layer(2, 4).packs).iter().flatten().count(), 4);
    let states: Vec<_> = world
        .snapshot()
        .1
        .iter()
        .map(|layer| layer.state())
        .collect();
    assert_eq!(states, [v1::LayerState::Partial, v1::LayerState::Ready]);
    assert_eq!(world.engine.status().unwrap().evictions, 2);
    assert_eq!(world.books().free, 0);
}

#[test]
fn evicted_space_waits_for_every_reader() {
    let world = World::new(6);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    let (one, two) = (world.node(), world.node());
    let lease = world.beat(one, 0, &[]);
    world.beat(two, lease.freed_generation, &[]);
    let pull = world.begin();
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    assert_eq!(world.books().quarantined, 4096);
    assert!(
        wait(&world, pull, &[Pack(900, 4096)]),
        "asking again evicts no more"
    );
    assert_eq!(world.books().quarantined, 4096);
    let lease = world.beat(one, 0, &[]);
    assert_eq!(lease.freed, [pack(100).to_vec()]);
    assert!(lease.freed_generation > 0);
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    world.beat(one, lease.freed_generation, &[]);
    assert!(
        wait(&world, pull, &[Pack(900, 4096)]),
        "the other one may still read it"
    );
    world.beat(two, u64::MAX, &[]);
    assert_eq!(world.books().quarantined, 0);
    assert_eq!(world.beat(two, 0, &[]).freed, Vec::<Vec<u8>>::new());
    world.reserve(pull, &[Pack(900, 4096)]).unwrap();
}

#[test]
fn a_silent_reader_holds_space_until_its_lease_ends_and_not_longer() {
    let world = World::new(6);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    world.node();
    let pull = world.begin();
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    pass(&world, 6, 8_000);
    assert_eq!(world.books().quarantined, 4096);
    world.engine.renew(&pull).unwrap();
    pass(&world, 6, 4_000);
    assert_eq!(world.books().quarantined, 0);
    world.reserve(pull, &[Pack(900, 4096)]).unwrap();
}

#[test]
fn readers_of_before_a_restart_count_too() {
    let mut world = World::new(6);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    let node = world.node();
    world.restart();
    world.donor("d", 1, &[6]);
    let pull = world.begin();
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    let gone = v1::NodeHeartbeat {
        node,
        ..Default::default()
    };
    assert!(matches!(
        world.engine.node_heartbeat(&gone),
        Err(Error::NotFound(_))
    ));
    pass(&world, 6, 8_000);
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    pass(&world, 6, 4_000);
    world.reserve(pull, &[Pack(900, 4096)]).unwrap();
}

#[test]
fn quarantine_outlives_a_restart() {
    let mut world = World::new(6);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    world.node();
    let pull = world.begin();
    assert!(wait(&world, pull, &[Pack(900, 4096)]));
    world.restart();
    world.donor("d", 1, &[6]);
    assert_eq!(world.books().quarantined, 4096);
    world.engine.renew(&pull).unwrap();
    pass(&world, 6, 8_000);
    world.engine.renew(&pull).unwrap();
    assert_eq!(world.books().quarantined, 4096);
    pass(&world, 6, 10_000);
    assert_eq!(world.books().quarantined, 0);
}

#[test]
fn what_nodes_hold_open_goes_last() {
    let world = World::new(12);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    world.pull("b", 2, &[layer(2, 4)]).unwrap();
    let first = world
        .snapshot()
        .0
        .iter()
        .find(|image| image.tag == "a")
        .unwrap()
        .number;
    let node = world.node();
    world.beat(node, 0, &[first]);
    let pull = world.begin();
    let three = [Pack(900, 4096), Pack(901, 4096), Pack(902, 4096)];
    assert!(wait(&world, pull, &three));
    assert_eq!(
        world.locate(&layer(1, 4).packs).iter().flatten().count(),
        4,
        "held open"
    );
    assert_eq!(world.locate(&layer(2, 4).packs).iter().flatten().count(), 1);
    let lease = world.beat(node, 0, &[first]);
    world.beat(node, lease.freed_generation, &[first]);
    world.reserve(pull, &three).unwrap();
    assert!(wait(
        &world,
        pull,
        &(910..916)
            .map(|number| Pack(number, 4096))
            .collect::<Vec<_>>()
    ));
    assert!(
        world.locate(&layer(1, 4).packs).iter().flatten().count() < 4,
        "nothing else was left"
    );
}

#[test]
fn a_pool_that_is_too_small_says_so_and_evicts_nothing() {
    let world = World::new(8);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    let pull = world.begin();
    world.reserve(pull, &[Pack(900, 4096)]).unwrap();
    let before = world.books();
    let error = world.reserve(pull, &[Pack(901, 8 * 4096)]).unwrap_err();
    let Error::Exhausted(text) = error else {
        panic!("{error}")
    };
    for figure in [
        "32768 bytes",
        "lend 32768",
        "4096 free",
        "24576 used",
        "4096 reserved",
    ] {
        assert!(text.contains(figure), "{figure} in {text}");
    }
    assert_eq!(world.books(), before);
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Ready);
}

#[test]
fn what_a_layer_has_left_stays_while_the_rest_is_brought_back() {
    let world = World::new(8);
    world.pull("a", 1, &[layer(1, 4)]).unwrap();
    let other = world.begin();
    world
        .reserve(other, &[Pack(900, 4096), Pack(901, 4096), Pack(902, 4096)])
        .unwrap();
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Partial);
    let left = || world.locate(&layer(1, 4).packs).iter().flatten().count();
    let before = left();
    assert!((1..4).contains(&before), "{before} packs are left");
    let pull = world.begin();
    let find = v1::FindLayersRequest {
        pull: Some(pull),
        diff_ids: vec![digest(b'l', 1).to_vec()],
    };
    let found = world.engine.find_layers(&find).unwrap().layers;
    assert!(!found[0].found && found[0].layer.is_some());
    let _full = world.reserve(other, &[Pack(910, 4 * 4096)]);
    assert_eq!(left(), before, "nothing of it was taken");
}

#[test]
fn scattered_holes_are_joined_by_evicting_more() {
    let world = World::new(8);
    world.pull("a", 1, &[layer(1, 3)]).unwrap();
    world.pull("b", 2, &[layer(2, 1)]).unwrap();
    let pull = world.begin();
    world.reserve(pull, &[Pack(900, 5 * 4096)]).unwrap();
    assert_eq!(world.books().reserved, 5 * 4096);
}

#[test]
fn index_packs_come_and_go_as_others_do_and_metad_has_them_still() {
    let world = World::new(3);
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    let pull = world.begin();
    world.reserve(pull, &[Pack(900, 3 * 4096)]).unwrap();
    let index = world.snapshot().1.remove(0).index.unwrap();
    let range = v1::ReadIndexRequest {
        digest: index.digest,
        offset: 0,
        len: 4,
    };
    assert_eq!(
        world.engine.read_index(&range).unwrap().content,
        5001u32.to_le_bytes()
    );
}

#[test]
fn lost_replicas_are_dropped_but_one_node_cannot_empty_the_pool() {
    let world = World::new(2000);
    world.pull("a", 1, &[layer(1, 700)]).unwrap();
    let node = world.node();
    let packs = layer(1, 700).packs;
    let report = |number: usize| {
        let extent = world.locate(&packs[number..=number])[0].first().copied();
        let lost = v1::LostReport {
            pack: pack(packs[number].0).to_vec(),
            extent,
            why: "x".into(),
            node,
        };
        if extent.is_some() {
            world.engine.report_lost(&lost).unwrap();
        }
    };
    let mut wrong = world.locate(&packs[..1])[0][0];
    wrong.offset += 4096;
    let lie = v1::LostReport {
        pack: pack(packs[0].0).to_vec(),
        extent: Some(wrong),
        why: String::new(),
        node,
    };
    world.engine.report_lost(&lie).unwrap();
    assert_eq!(
        world.locate(&packs[..1])[0].len(),
        1,
        "that is not where it lies"
    );
    report(0);
    assert_eq!(world.locate(&packs[..1]), [vec![]]);
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Partial);
    let pull = world.begin();
    assert!(
        !world.reserve(pull, &packs[..1]).unwrap().packs[0].present,
        "a refill can write it"
    );
    let refill = v1::CommitRefillRequest {
        pull: Some(pull),
        packs: wanted(&packs[..1]),
    };
    let reply = world.engine.commit_refill(&refill).unwrap();
    assert_eq!(world.engine.commit_refill(&refill).unwrap(), reply);
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Ready);
    (0..700).for_each(report);
    let left = world.locate(&packs).iter().flatten().count();
    assert_eq!(left, 700 - 255, "a burst of 256 in all");
    world.pass(1_000);
    (0..700).for_each(report);
    assert_eq!(world.locate(&packs).iter().flatten().count(), left - 4);
}

#[test]
fn a_refill_of_what_nobody_wants_leaves_nothing() {
    let world = World::new(8);
    let pull = world.begin();
    world.reserve(pull, &[Pack(1, 4096)]).unwrap();
    let refill = v1::CommitRefillRequest {
        pull: Some(pull),
        packs: wanted(&[Pack(1, 4096)]),
    };
    world.engine.commit_refill(&refill).unwrap();
    assert_eq!(
        (world.books().free, world.engine.status().unwrap().packs),
        (8 * 4096, 0)
    );
    let pull = world.begin();
    let refill = v1::CommitRefillRequest {
        pull: Some(pull),
        packs: wanted(&[Pack(2, 4096)]),
    };
    assert!(matches!(
        world.engine.commit_refill(&refill),
        Err(Error::Refused(_))
    ));
}
