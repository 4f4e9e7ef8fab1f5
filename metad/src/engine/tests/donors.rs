//! Donors that come, go, fall silent and lie.

use harbour_metad_client::v1;

use super::world::{Pack, World, layer};
use crate::error::Error;

fn state(world: &World) -> v1::LayerState {
    world.snapshot().1[0].state()
}

#[test]
fn a_silent_donor_is_not_told_and_comes_back_with_what_it_had() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    let before = *world.engine.watch().borrow();
    world.pass(6_000);
    assert_eq!(world.locate(&[Pack(100, 4096)]), [vec![]]);
    assert_eq!(state(&world), v1::LayerState::Partial);
    assert!(*world.engine.watch().borrow() > before, "readers are told");
    let pull = world.begin();
    assert!(
        matches!(world.reserve(pull, &[Pack(7, 1)]), Err(Error::Exhausted(_))),
        "nobody lends"
    );
    let donor = world.engine.list_donors().unwrap().donors.remove(0);
    assert!(!donor.live && donor.heard_ms_ago >= 6_000);
    let beat = v1::DonorHeartbeat {
        donor: Some(v1::DonorRef {
            id: donor.id,
            epoch: 1,
        }),
    };
    world.engine.donor_heartbeat(&beat).unwrap();
    assert_eq!(world.locate(&[Pack(100, 4096)])[0].len(), 1);
    assert_eq!(state(&world), v1::LayerState::Ready);
}

#[test]
fn a_donor_that_is_silent_for_long_is_forgotten() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    world.pass(601_000);
    assert_eq!(world.books().lent, 0);
    assert_eq!(world.engine.list_donors().unwrap().donors, []);
    assert_eq!(state(&world), v1::LayerState::Partial);
}

#[test]
fn a_new_epoch_drops_extents_and_a_pull_brings_them_back() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let number = world.snapshot().1[0].number;
    assert!(
        matches!(world.try_donor("d", 2, &[16]), Err(Error::Refused(_))),
        "the first one is alive"
    );
    world.pass(6_000);
    world.donor("d", 2, &[16]);
    assert_eq!((world.books().used, world.books().quarantined), (0, 0));
    assert_eq!(state(&world), v1::LayerState::Partial);
    let stale = v1::DonorHeartbeat {
        donor: Some(v1::DonorRef { id: 1, epoch: 1 }),
    };
    assert!(matches!(
        world.engine.donor_heartbeat(&stale),
        Err(Error::NotFound(_))
    ));
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    assert_eq!(
        (state(&world), world.snapshot().1[0].number),
        (v1::LayerState::Ready, number)
    );
    assert_eq!(world.locate(&[Pack(100, 4096)])[0][0].epoch, 2);
}

#[test]
fn who_knows_its_predecessor_to_be_dead_does_not_wait_for_its_lease() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let take_over = |epoch, replaces_epoch| {
        let mut donor = world.engine.list_donors().unwrap().donors.remove(0);
        donor.epoch = epoch;
        world.engine.register_donor(&v1::RegisterDonorRequest {
            donor: Some(donor),
            replaces_epoch,
        })
    };
    assert!(
        matches!(take_over(3, 2), Err(Error::Refused(_))),
        "another one's epoch"
    );
    assert_eq!(state(&world), v1::LayerState::Ready);
    take_over(3, 1).unwrap();
    assert_eq!((world.books().used, world.books().quarantined), (0, 0));
    assert_eq!(state(&world), v1::LayerState::Partial);
    let (old, new) = (
        v1::DonorRef { id: 1, epoch: 1 },
        v1::DonorRef { id: 1, epoch: 3 },
    );
    let beat = |donor| {
        world
            .engine
            .donor_heartbeat(&v1::DonorHeartbeat { donor: Some(donor) })
    };
    assert!(matches!(beat(old), Err(Error::NotFound(_))));
    beat(new).unwrap();
}

#[test]
fn a_lost_layer_that_is_cut_another_way_gets_a_new_view() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let (images, layers) = world.snapshot();
    world.pass(6_000);
    world.donor("d", 2, &[16]);
    let other = super::world::Layer {
        diff: 1,
        index: 6000,
        packs: vec![Pack(900, 5000)],
    };
    let pull = world.begin();
    world.stage(pull, &other).unwrap();
    world.commit(pull, "a", 1, 77, &[1]).unwrap();
    let (new_images, new_layers) = world.snapshot();
    assert_eq!((new_images.len(), new_layers.len()), (1, 1));
    assert!(new_layers[0].number > layers[0].number && new_images[0].number > images[0].number);
    assert_eq!(new_layers[0].state(), v1::LayerState::Ready);
}

#[test]
fn leaving_takes_everything_along_and_reserved_space_too() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    let pull = world.begin();
    world.stage(pull, &layer(2, 1)).unwrap();
    world
        .engine
        .donor_leave(&v1::DonorRef { id: 1, epoch: 9 })
        .unwrap();
    assert_eq!(
        world.books().lent,
        16 * 4096,
        "another epoch's farewell is not this one's"
    );
    world
        .engine
        .donor_leave(&v1::DonorRef { id: 1, epoch: 1 })
        .unwrap();
    world
        .engine
        .donor_leave(&v1::DonorRef { id: 1, epoch: 1 })
        .unwrap();
    assert_eq!(world.books().lent, 0);
    world.donor("e", 5, &[16]);
    world.commit(pull, "b", 2, 2, &[2]).unwrap();
    let (_, layers) = world.snapshot();
    assert!(
        layers
            .iter()
            .all(|layer| layer.state() == v1::LayerState::Partial),
        "no half layer looks whole"
    );
}

#[test]
fn a_restart_keeps_what_donors_have() {
    let mut world = World::new(16);
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    let places = world.locate(&[Pack(100, 4096)]);
    world.restart();
    assert_eq!(
        world.locate(&[Pack(100, 4096)]),
        places,
        "a donor found at start has a grace"
    );
    world.pass(4_000);
    world.donor("d", 1, &[16]);
    assert_eq!(world.locate(&[Pack(100, 4096)]), places);
    world.restart();
    world.donor("d", 2, &[16]);
    assert_eq!(
        world.locate(&[Pack(100, 4096)]),
        [vec![]],
        "a machine that restarted whole need not wait"
    );
}

#[test]
fn donors_that_lie_are_refused() {
    let world = World::empty();
    world.donor("d", 1, &[8, 8]);
    world.pull("a", 1, &[layer(1, 9)]).unwrap();
    assert!(
        matches!(world.try_donor("d", 1, &[8, 1]), Err(Error::Refused(_))),
        "shrunk under its extents"
    );
    assert!(matches!(
        world.try_donor("d", 1, &[8]),
        Err(Error::Refused(_))
    ));
    world.donor("d", 1, &[8, 20]);
    assert_eq!(world.books().lent, 28 * 4096, "it may grow");
    let good = v1::Donor {
        name: "x".into(),
        addresses: vec!["a".into()],
        regions: vec![v1::Region {
            id: 1,
            len: 4096,
            huge_pages: false,
            ..Default::default()
        }],
        ..Default::default()
    };
    let region = |id, len| v1::Region {
        id,
        len,
        huge_pages: true,
        ..Default::default()
    };
    let bad = [
        v1::Donor {
            name: String::new(),
            ..good.clone()
        },
        v1::Donor {
            name: "a\nb".into(),
            ..good.clone()
        },
        v1::Donor {
            name: "x".repeat(256),
            ..good.clone()
        },
        v1::Donor {
            addresses: Vec::new(),
            ..good.clone()
        },
        v1::Donor {
            addresses: vec!["a\nb".into()],
            ..good.clone()
        },
        v1::Donor {
            addresses: vec!["a".into(); 9],
            ..good.clone()
        },
        v1::Donor {
            regions: vec![region(1, 4095)],
            ..good.clone()
        },
        v1::Donor {
            regions: vec![region(1, (1 << 48) + 1)],
            ..good.clone()
        },
        v1::Donor {
            regions: vec![region(1, u64::MAX)],
            ..good.clone()
        },
        v1::Donor {
            regions: vec![region(1, 4096), region(1, 4096)],
            ..good.clone()
        },
        v1::Donor {
            regions: vec![v1::Region {
                read_token: vec![1; 31],
                ..region(1, 4096)
            }],
            ..good.clone()
        },
        v1::Donor {
            regions: (0..65).map(|id| region(id, 4096)).collect(),
            ..good.clone()
        },
    ];
    for donor in bad {
        let outcome = world.engine.register_donor(&v1::RegisterDonorRequest {
            donor: Some(donor.clone()),
            replaces_epoch: 0,
        });
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{donor:?}");
    }
    assert_eq!(world.engine.list_donors().unwrap().donors.len(), 1);
}

#[test]
fn leases_do_not_end_while_this_process_stands_still() {
    let world = World::new(16);
    let pull = world.begin();
    let node = world.node();
    world.clock.advance(60_000);
    world.engine.tick().unwrap();
    world.engine.renew(&pull).unwrap();
    world.beat(node, 0, &[]);
    assert!(world.engine.list_donors().unwrap().donors[0].live);
}

#[test]
fn tokens_reach_those_who_read_or_write_and_nobody_else() {
    let mut world = World::empty();
    let region = v1::Region {
        id: 0,
        len: 64 * 4096,
        read_token: vec![0xA1; 32],
        write_token: vec![0xB2; 32],
        ..Default::default()
    };
    let donor = v1::Donor {
        name: "d".into(),
        epoch: 1,
        addresses: vec!["tcp:192.0.2.1:1".into()],
        regions: vec![region.clone()],
        ..Default::default()
    };
    let register = v1::RegisterDonorRequest {
        donor: Some(donor),
        replaces_epoch: 0,
    };
    world.engine.register_donor(&register).unwrap();
    // Before and after a restart of metad: the store keeps them.
    for turn in 0..2 {
        let pull = world.begin();
        let reserved = world.reserve(pull, &[Pack(7 + turn, 1)]).unwrap();
        assert_eq!(reserved.donors[0].regions[0], region, "writers");
        world.pull("a", 1, &[layer(1, 1)]).unwrap();
        let located = world.engine.locate(&v1::LocateRequest {
            packs: super::world::wanted(&[Pack(100, 4096)])
                .into_iter()
                .map(|wanted| wanted.pack)
                .collect(),
        });
        let reading = v1::Region {
            write_token: Vec::new(),
            ..region.clone()
        };
        assert_eq!(located.unwrap().donors[0].regions, [reading], "readers");
        let listed = world.engine.list_donors().unwrap().donors;
        assert!(listed[0].regions[0].read_token.is_empty(), "people");
        assert!(listed[0].regions[0].write_token.is_empty(), "people");
        world.restart();
        world.engine.register_donor(&register).unwrap();
    }
    let text = format!("{region:?}");
    assert!(!text.contains("161") && !text.contains("178"), "{text}");
}

#[test]
fn regions_that_go_take_what_lay_in_them() {
    let world = World::new(16);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let id = world.engine.list_donors().unwrap().donors[0].id;
    let (used, lent) = (world.books().used, world.books().lent);
    let resize = |added: &[(u32, u64)], retired: &[u32], draining| {
        let region = |(id, len): &(u32, u64)| v1::Region {
            id: *id,
            len: *len,
            ..v1::Region::default()
        };
        world.engine.donor_resize(&v1::ResizeDonor {
            donor: Some(v1::DonorRef { id, epoch: 1 }),
            added: added.iter().map(region).collect(),
            retired: retired.to_vec(),
            draining,
        })
    };
    resize(&[(7, 1 << 20)], &[], false).unwrap();
    assert_eq!(
        (world.books().lent, world.books().used),
        (lent + (1 << 20), used)
    );
    assert!(matches!(
        resize(&[(7, 2 << 20)], &[], false),
        Err(Error::Refused(_))
    ));
    assert!(matches!(
        resize(&[(8, 1 << 20)], &[8], false),
        Err(Error::Refused(_))
    ));
    let lease = resize(&[], &[], true).unwrap();
    assert!(lease.draining && lease.left_bytes == used);
    let pull = world.begin();
    assert!(
        matches!(world.reserve(pull, &[Pack(7, 1)]), Err(Error::Exhausted(_))),
        "nothing new goes to a donor that leaves"
    );
    let before = *world.engine.watch().borrow();
    for _ in 0..2 {
        resize(&[], &[0], false).unwrap();
        assert_eq!((world.books().lent, world.books().used), (1 << 20, 0));
    }
    assert!(*world.engine.watch().borrow() > before, "readers are told");
    assert_eq!(world.locate(&[Pack(100, 4096)]), [vec![]]);
    assert_eq!(state(&world), v1::LayerState::Partial);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    assert_eq!(world.locate(&[Pack(100, 4096)])[0][0].region, 7);
    let stale = world.engine.donor_resize(&v1::ResizeDonor {
        donor: Some(v1::DonorRef { id, epoch: 2 }),
        ..v1::ResizeDonor::default()
    });
    assert!(matches!(stale, Err(Error::NotFound(_))));
}
