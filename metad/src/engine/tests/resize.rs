//! Donors that grow, shrink and leave.

use harbour_metad_client::v1;

use super::world::{Pack, Tune, World, layer};
use crate::error::Error;

#[test]
fn a_region_that_goes_takes_what_lay_there_and_nothing_waits() {
    let world = World::empty();
    world.donor("d", 1, &[16, 16]);
    world.pull("i", 1, &[layer(1, 10)]).unwrap();
    let pull = world.begin();
    world
        .reserve(pull, &[Pack(900, 4096), Pack(901, 4096)])
        .unwrap();
    world.node();
    world.remove("i").unwrap();
    world.pull("j", 2, &[layer(2, 1)]).unwrap();
    assert!(world.books().quarantined > 0, "the node has not let go");
    let before = *world.engine.watch().borrow();
    let lease = world.resize(1, &[], &[1], false).unwrap();
    assert_eq!((lease.id, lease.draining), (1, false));
    assert!(*world.engine.watch().borrow() > before, "readers are told");
    assert_eq!(world.books().lent, 16 * 4096);
    world.resize(1, &[], &[0], false).unwrap();
    assert_eq!(
        world.books(),
        Default::default(),
        "a donor may lend nothing"
    );
    assert!(
        world
            .snapshot()
            .1
            .iter()
            .all(|l| l.state() == v1::LayerState::Partial)
    );
    world.resize(1, &[], &[0, 1, 77], false).unwrap();
    world.resize(1, &[(78, 16)], &[], false).unwrap();
    world.resize(1, &[(78, 16)], &[], false).unwrap();
    assert_eq!(
        world.books().lent,
        16 * 4096,
        "a repetition changes nothing"
    );
    world.pull("j", 2, &[layer(2, 1)]).unwrap();
    assert_eq!(world.locate(&layer(2, 1).packs)[0][0].region, 78);
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let mut world = World::empty();
    world.donor("d", 1, &[8]);
    world.resize(1, &[(1, 8)], &[], false).unwrap();
    world.resize(1, &[], &[1], false).unwrap();
    for restarted in [false, true] {
        if restarted {
            world.restart();
        }
        for (added, retired) in [
            (&[(1, 8)][..], &[][..]),
            (&[(0, 9)], &[]),
            (&[(5, 8)], &[5]),
        ] {
            let outcome = world.resize(1, added, retired, false);
            assert!(
                matches!(outcome, Err(Error::Refused(_))),
                "{added:?} {retired:?}"
            );
        }
        let again = world.try_donor_in("", "d", 1, &[(0, 8), (1, 8)]);
        assert!(
            matches!(again, Err(Error::Refused(_))),
            "nor at a registration"
        );
    }
    for added in [
        &[(9, 0)][..],
        &[(9, 8), (9, 8)],
        &(9..73).map(|id| (id, 1)).collect::<Vec<_>>(),
    ] {
        let outcome = world.resize(1, added, &[], false);
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{added:?}");
    }
    let stale = v1::ResizeDonor {
        donor: Some(v1::DonorRef { id: 1, epoch: 2 }),
        ..Default::default()
    };
    assert!(matches!(
        world.engine.donor_resize(&stale),
        Err(Error::NotFound(_))
    ));
    assert_eq!(world.books().lent, 8 * 4096);
    world.pass(6_000);
    world.donor("d", 2, &[8, 8]);
    assert_eq!(world.books().lent, 16 * 4096, "a new epoch counts anew");
}

#[test]
fn what_was_retired_while_nobody_listened_is_known_at_the_next_registration() {
    let world = World::empty();
    world.donor("d", 1, &[8, 8]);
    world.pull("i", 1, &[layer(1, 10)]).unwrap();
    world.try_donor_in("", "d", 1, &[(1, 8), (2, 8)]).unwrap();
    assert_eq!(world.books().lent, 16 * 4096);
    let located = world.locate(&layer(1, 10).packs);
    let regions: Vec<u32> = located
        .iter()
        .flatten()
        .map(|extent| extent.region)
        .collect();
    assert!(regions.iter().all(|region| *region == 1) && regions.len() < 10);
    assert!(
        world
            .try_donor_in("", "d", 1, &[(0, 8), (1, 8), (2, 8)])
            .is_err()
    );
}

#[test]
fn a_region_that_goes_is_made_up_for_by_the_other_replicas() {
    let world = World::tuned(Tune::replicas(2));
    world.donors(&["a", "b", "c"], &[32]);
    world.pull("i", 1, &[layer(1, 3)]).unwrap();
    world.resize(1, &[(1, 32)], &[0], false).unwrap();
    assert_eq!(
        world.snapshot().1[0].state(),
        v1::LayerState::Ready,
        "the others have it"
    );
    world.work(&[1, 2, 3], 3_000);
    for pack in layer(1, 3).packs {
        assert_eq!(world.holders(pack).len(), 2);
    }
    // A copy under way into a region that goes is nobody's any more.
    world.resize(2, &[], &[0], false).unwrap();
    world.pass(1_000);
    let tasks = world.heartbeat(1, 1).tasks;
    let told: Vec<u64> = tasks.iter().map(|task| task.task).collect();
    assert!(!told.is_empty());
    world.resize(1, &[(2, 32)], &[1], false).unwrap();
    world.copied(1, 1, &told, true);
    world.books();
    assert_eq!(world.engine.status().unwrap().copies_failed, 0);
}

#[test]
fn who_wants_to_leave_gets_nothing_new_and_hears_what_is_left() {
    let world = World::empty();
    world.donors(&["a", "b"], &[64]);
    world.pull("i", 1, &[layer(1, 20)]).unwrap();
    let lease = world.resize(1, &[], &[], true).unwrap();
    assert!(lease.draining && lease.left_bytes > 8 * 4096, "{lease:?}");
    assert_eq!(lease.stuck_bytes, 0);
    world.pull("j", 2, &[layer(2, 5)]).unwrap();
    for pack in layer(2, 5).packs {
        assert_eq!(world.holders(pack), [2]);
    }
    world.work(&[1, 2], 4_000);
    let lease = world.heartbeat(1, 1);
    assert_eq!((lease.draining, lease.left_bytes), (true, 0));
    for pack in layer(1, 20).packs {
        assert_eq!(world.holders(pack), [2], "moved, and the old one dropped");
    }
    assert!(world.engine.list_donors().unwrap().donors[0].draining);
    world
        .engine
        .donor_leave(&v1::DonorRef { id: 1, epoch: 1 })
        .unwrap();
    assert!(
        world
            .snapshot()
            .1
            .iter()
            .all(|l| l.state() == v1::LayerState::Ready)
    );
}

#[test]
fn who_cannot_leave_hears_that_too_and_may_stay() {
    let mut world = World::empty();
    world.donor("a", 1, &[64]);
    world.pull("i", 1, &[layer(1, 20)]).unwrap();
    world.donor("b", 1, &[8]);
    let lease = world.resize(1, &[], &[], true).unwrap();
    assert_eq!(lease.left_bytes, 22 * 4096);
    // The other one has 8 pages, and keeps a sixteenth free.
    assert_eq!(lease.stuck_bytes, 14 * 4096 + 2048);
    world.work(&[1, 2], 4_000);
    let lease = world.heartbeat(1, 1);
    assert_eq!(lease.left_bytes, 15 * 4096);
    assert_eq!(lease.stuck_bytes, 14 * 4096 + 2048);
    world.restart();
    world.donor("a", 1, &[64]);
    assert!(
        world.heartbeat(1, 1).draining,
        "a restart does not forget it"
    );
    world.resize(1, &[], &[], false).unwrap();
    let lease = world.heartbeat(1, 1);
    assert_eq!((lease.draining, lease.left_bytes), (false, 0));
    world.pull("j", 2, &[layer(2, 20)]).unwrap();
    world.books();
}

#[test]
fn two_of_one_name_do_not_share_it() {
    let world = World::empty();
    world.donor("d", 1, &[8]);
    let other = world.try_donor_in("elsewhere", "d", 2, &[(0, 8)]);
    assert!(matches!(other, Err(Error::Refused(_))));
    assert_eq!(world.engine.list_donors().unwrap().donors.len(), 1);
    world.heartbeat(1, 1);
}
