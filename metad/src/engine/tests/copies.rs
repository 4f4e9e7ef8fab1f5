//! Copies after a loss: planned, made, failed, late.

use harbour_metad_client::v1;

use super::world::{Pack, Tune, World, layer, pack, wanted};
use crate::error::Error;

/// Three donors of 32 pages, an image of three packs with two replicas each.
fn three() -> World {
    let world = World::tuned(Tune::replicas(2));
    for name in ["a", "b", "c"] {
        world.donor(name, 1, &[32]);
    }
    world.pull("i", 1, &[layer(1, 3)]).unwrap();
    world
}

/// The donor of this number falls silent; the others are heard.
fn lose(world: &World, gone: u64) {
    for _ in 0..6 {
        world.pass(1_000);
        let donors = world.engine.list_donors().unwrap().donors;
        let others = donors.iter().map(|donor| donor.id).filter(|id| *id != gone);
        others.for_each(|id| drop(world.heartbeat(id, 1)));
    }
}

fn all_have(world: &World, replicas: usize) {
    for pack in layer(1, 3).packs {
        assert_eq!(world.holders(pack).len(), replicas);
    }
}

#[test]
fn what_a_lost_donor_held_is_copied_from_those_that_have_it() {
    let world = three();
    for _ in 0..6 {
        world.pass(1_000);
        // They are heard, and take no tasks yet: those come with an answer.
        world.engine.tick().unwrap();
        for id in [1, 2] {
            let lease = world.heartbeat(id, 1);
            for task in &lease.tasks {
                let to = task.to.unwrap();
                assert_eq!((to.donor, to.epoch, to.len), (id, 1, task.len));
                let from: Vec<u64> = task.from.iter().map(|from| from.donor).collect();
                assert!(!from.is_empty() && !from.contains(&id) && !from.contains(&3));
                assert!(task.donors.len() == 2 && task.lease_ms > 0);
                if task.pack == pack(100) {
                    assert_eq!((task.objects.len(), task.object_count), (1, 1));
                }
            }
            let tasks: Vec<u64> = lease.tasks.iter().map(|task| task.task).collect();
            world.copied(id, 1, &tasks, true);
            world.books();
        }
    }
    world.work(&[1, 2], 2_000);
    all_have(&world, 2);
    assert!(world.holders(layer(1, 3).packs[0]).iter().all(|id| *id < 3));
    let status = world.engine.status().unwrap();
    assert!(status.copies_done > 0 && status.copies_running == 0);
    assert_eq!((status.replicas_missing, status.copies_failed), (0, 0));
    // It comes back with what it had: some packs have a third replica, and lose one again.
    world.heartbeat(3, 1);
    world.work(&[1, 2, 3], 5_000);
    all_have(&world, 2);
    assert_eq!(world.books().quarantined, 0);
}

#[test]
fn a_layer_is_partial_until_a_copy_or_a_refill_makes_it_whole() {
    let world = World::tuned(Tune::replicas(1));
    world.donor("a", 1, &[32]);
    world.pull("i", 1, &[layer(1, 3)]).unwrap();
    world.donor("b", 1, &[32]);
    lose(&world, 1);
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Partial);
    let status = world.engine.status().unwrap();
    assert_eq!((status.packs_lost, status.packs_short), (5, 0));
    assert_eq!(status.copies_done, 0, "nothing to copy from");
    world.heartbeat(1, 1);
    world.work(&[1, 2], 2_000);
    assert_eq!(world.snapshot().1[0].state(), v1::LayerState::Ready);
}

/// While a copy is made its sources are lost, and a refill writes the same pack to the same donor.
#[test]
fn a_copy_that_comes_after_a_refill_on_its_donor_is_not_a_second_replica() {
    let world = World::tuned(Tune::replicas(2));
    world.donors(&["a", "b"], &[32]);
    world.pull("i", 1, &[layer(1, 3)]).unwrap();
    lose(&world, 2);
    world.donor("b", 2, &[32]);
    let mut tasks: Vec<u64> = Vec::new();
    // Then the other one falls silent.
    for second in 0..9 {
        world.pass(1_000);
        if second < 3 {
            world.heartbeat(1, 1);
        }
        tasks.extend(world.heartbeat(2, 2).tasks.iter().map(|task| task.task));
    }
    tasks.sort_unstable();
    tasks.dedup();
    assert!(tasks.len() >= 3, "{tasks:?}");
    world.donor("a", 2, &[32]);
    let packs = layer(1, 3).packs;
    let refill = world.begin();
    world.reserve(refill, &packs).unwrap();
    let request = v1::CommitRefillRequest {
        pull: Some(refill),
        packs: wanted(&packs),
    };
    world.engine.commit_refill(&request).unwrap();
    world.copied(2, 2, &tasks, true);
    for pack in packs {
        let mut holders = world.holders(pack);
        assert!(holders.contains(&2), "{holders:?}");
        holders.dedup();
        assert_eq!(holders.len(), world.holders(pack).len(), "{holders:?}");
    }
    world.books();
}

#[test]
fn a_copy_that_failed_is_given_back_and_tried_again_later() {
    let world = three();
    lose(&world, 3);
    let before = world.books();
    let tasks = |lease: &v1::DonorLease| lease.tasks.iter().map(|t| t.task).collect::<Vec<_>>();
    // Tasks were told with the heartbeats of `lose`; those run out.
    let running = world.engine.status().unwrap().copies_running;
    assert!(running > 0 && before.reserved > 0);
    for _ in 0..40 {
        world.pass(500);
        for id in [1, 2] {
            let failed = tasks(&world.heartbeat(id, 1));
            world.copied(id, 1, &failed, false);
            world.books();
        }
    }
    let status = world.engine.status().unwrap();
    assert!(status.copies_failed >= 3 && status.copies_done == 0);
    assert!(
        status.copies_failed < 40,
        "not without pause: {}",
        status.copies_failed
    );
    world.work(&[1, 2], 330_000);
    all_have(&world, 2);
    assert_eq!((world.books().quarantined, world.books().reserved), (0, 0));
}

#[test]
fn a_copy_that_nobody_reports_waits_as_long_as_its_maker_may_write() {
    let world = three();
    lose(&world, 3);
    let reserved = world.books().reserved;
    assert!(reserved > 0);
    let beat = |ms: u64| {
        for _ in 0..ms / 1_000 {
            world.pass(1_000);
            [1, 2].iter().for_each(|id| drop(world.heartbeat(*id, 1)));
        }
    };
    beat(17_000);
    assert!(
        world.books().quarantined >= reserved,
        "not given to others yet"
    );
    let late = world.copied(1, 1, &[1, 2, 3, u64::MAX], true);
    assert_eq!(late.id, 1, "too late is no error");
}

#[test]
fn a_restart_plans_anew_and_gives_nothing_to_others_that_is_being_written() {
    let mut world = three();
    lose(&world, 3);
    let reserved = world.books().reserved;
    assert!(reserved > 0);
    world.restart();
    assert_eq!(world.books().quarantined, reserved);
    assert_eq!(world.engine.status().unwrap().copies_running, 0);
    world.work(&[1, 2], 40_000);
    all_have(&world, 2);
    assert_eq!((world.books().quarantined, world.books().reserved), (0, 0));
}

#[test]
fn reports_of_others_copies_change_nothing() {
    let world = three();
    lose(&world, 3);
    let before = (world.books(), world.engine.status().unwrap().copies_running);
    let all: Vec<u64> = {
        let state = world.engine.lock();
        state.copies.under_way.values().map(|c| c.row.id).collect()
    };
    world.heartbeat(3, 1);
    world.copied(3, 1, &all, true);
    assert_eq!(world.engine.status().unwrap().copies_done, 0);
    assert!(world.engine.status().unwrap().copies_running <= before.1);
    let stale = v1::CopiedReport {
        donor: Some(v1::DonorRef { id: 1, epoch: 9 }),
        outcomes: Vec::new(),
    };
    assert!(matches!(
        world.engine.copied(&stale),
        Err(Error::NotFound(_))
    ));
    let many = v1::CopiedReport {
        donor: Some(v1::DonorRef { id: 1, epoch: 1 }),
        outcomes: vec![v1::CopyOutcome::default(); 257],
    };
    assert!(matches!(world.engine.copied(&many), Err(Error::Invalid(_))));
}

#[test]
fn a_source_that_its_reader_found_wrong_is_dropped_as_far_as_that_one_is_believed() {
    let world = three();
    let victim = layer(1, 3).packs[0];
    // A third replica is wanted of all packs from now on.
    world.pull_with("i", 1, &[layer(1, 3)], 3).unwrap();
    world.pass(1_000);
    let mut told = Vec::new();
    for id in 1..=3 {
        let tasks = world.heartbeat(id, 1).tasks;
        told.extend(tasks.into_iter().map(|task| (id, task)));
    }
    let of_victim = |(_, task): &&(u64, v1::CopyTask)| task.pack == pack(victim.0);
    let (maker, task) = told.iter().find(of_victim).unwrap();
    let report = v1::CopiedReport {
        donor: Some(v1::DonorRef {
            id: *maker,
            epoch: 1,
        }),
        outcomes: vec![v1::CopyOutcome {
            task: task.task,
            ok: false,
            why: "other bytes".into(),
            bad: vec![task.from[0], task.from[0]],
        }],
    };
    world.engine.copied(&report).unwrap();
    assert_eq!(world.holders(victim), [task.from[1].donor]);
    assert_eq!(world.locate(&[Pack(victim.0, victim.1)])[0].len(), 1);
    world.books();
}

#[test]
fn a_pack_that_nobody_wants_any_more_goes_with_its_copies() {
    let world = three();
    lose(&world, 3);
    assert!(world.books().reserved > 0);
    world.remove("i").unwrap();
    for _ in 0..40 {
        world.pass(500);
        [1, 2].iter().for_each(|id| drop(world.heartbeat(*id, 1)));
        world.books();
    }
    let books = world.books();
    let held: u64 = world.used().iter().map(|(_, used)| used).sum();
    assert_eq!((books.reserved, books.quarantined, held), (0, 0, 0));
    assert_eq!(world.engine.status().unwrap().packs, 0);
}

#[test]
fn a_clock_that_jumps_ends_no_copy() {
    let world = three();
    lose(&world, 3);
    let running = world.engine.status().unwrap().copies_running;
    world.clock.advance(3_600_000);
    world.engine.tick().unwrap();
    assert_eq!(world.engine.status().unwrap().copies_running, running);
    assert_eq!(world.engine.status().unwrap().copies_failed, 0);
    world.books();
}
