//! Donors that join: the load becomes even, slowly, once.

use super::world::{Pack, Tune, World, layer};

const PACK: u32 = 64 << 10;

/// A layer of large packs.
fn large(diff: u32, packs: u32) -> super::world::Layer {
    let mut layer = layer(diff, packs);
    layer.packs.iter_mut().for_each(|pack| pack.1 = PACK);
    layer
}

fn tuned(replicas: u32, rebalance_mib_s: u32) -> World {
    World::tuned(Tune {
        replicas,
        hot_replicas: 0,
        rebalance_mib_s,
    })
}

/// How far the donor that is farthest from the mean is from it, in percent.
fn farthest(world: &World) -> u64 {
    let used = world.used();
    let mean = used.iter().map(|(_, used)| used).sum::<u64>() / used.len() as u64;
    used.iter()
        .map(|(_, used)| used.abs_diff(mean) * 100 / mean)
        .max()
        .unwrap()
}

#[test]
fn a_donor_that_joins_takes_its_share_and_then_nothing_moves() {
    for replicas in [1, 2] {
        let world = tuned(replicas, 128);
        world.donors(&["a", "b", "c"], &[4096]);
        world.pull("i", 1, &[large(1, 90)]).unwrap();
        world.pull("j", 2, &[large(2, 60)]).unwrap();
        assert_eq!(world.work(&[1, 2, 3], 5_000), 0, "even from the start");
        world.donor("d", 1, &[4096]);
        let moved = world.work(&[1, 2, 3, 4], 30_000);
        assert!(farthest(&world) <= 20, "{:?}", world.used());
        let share = 150 * replicas as usize / 4;
        assert!(
            (share * 7 / 10..=share * 11 / 10).contains(&moved),
            "{moved} moved"
        );
        assert_eq!(world.work(&[1, 2, 3, 4], 60_000), 0, "it stays so");
        for pack in large(1, 90).packs.iter().chain(&large(2, 60).packs) {
            assert_eq!(world.holders(*pack).len(), replicas as usize);
        }
        let status = world.engine.status().unwrap();
        // Some of them are parts of indexes, which are small.
        let most = u64::from(PACK) * moved as u64;
        assert!((most * 8 / 10..=most).contains(&status.moved_bytes));
        assert!(!status.rebalancing && world.books().quarantined == 0);
    }
}

#[test]
fn a_donor_that_grows_takes_more() {
    let world = tuned(1, 128);
    world.donors(&["a", "b"], &[1024]);
    world.pull("i", 1, &[large(1, 80)]).unwrap();
    world.resize(1, &[(1, 2048)], &[], false).unwrap();
    world.work(&[1, 2], 20_000);
    let used = world.used();
    let ratio = used[0].1 as f64 / used[1].1 as f64;
    assert!(
        (2.4..=3.6).contains(&ratio),
        "three times as large: {used:?}"
    );
}

#[test]
fn what_moves_in_a_second_is_bounded() {
    let world = tuned(1, 1);
    world.donors(&["a", "b"], &[8192]);
    world.pull("i", 1, &[large(1, 90)]).unwrap();
    world.pull("j", 2, &[large(2, 90)]).unwrap();
    world.pull("k", 3, &[large(3, 90)]).unwrap();
    world.donor("c", 1, &[8192]);
    // A burst of one pack of full length, and a MiB a second.
    world.work(&[1, 2, 3], 2_000);
    let early = world.engine.status().unwrap().moved_bytes;
    assert!(early <= 4 << 20, "{early}");
    world.work(&[1, 2, 3], 3_000);
    let later = world.engine.status().unwrap().moved_bytes;
    assert!(later - early <= 4 << 20, "{later}");
    let none = tuned(2, 0);
    none.donor("a", 1, &[1024]);
    none.pull("i", 1, &[large(1, 9)]).unwrap();
    none.donor("b", 1, &[1024]);
    assert_eq!(none.work(&[1, 2], 10_000), 0, "0 is nothing at all");
}

#[test]
fn packs_do_not_move_into_the_failure_domain_of_their_other_replica() {
    let world = tuned(2, 128);
    world.try_donor_in("x", "a", 1, &[(0, 4096)]).unwrap();
    world.try_donor_in("y", "b", 1, &[(0, 4096)]).unwrap();
    world.pull("i", 1, &[large(1, 60)]).unwrap();
    world.try_donor_in("x", "c", 1, &[(0, 4096)]).unwrap();
    world.work(&[1, 2, 3], 20_000);
    for pack in large(1, 60).packs {
        let holders = world.holders(pack);
        assert!(holders.contains(&2) && holders.len() == 2, "{holders:?}");
    }
    let used = world.used();
    assert!(used[2].1 > used[0].1 / 2, "c took from a: {used:?}");
    assert!(
        !world.engine.status().unwrap().rebalancing,
        "as even as can be"
    );
}

#[test]
fn a_small_and_a_large_pack_do_not_change_places_for_ever() {
    let world = tuned(1, 128);
    world.donors(&["a", "b"], &[64]);
    let layer = super::world::Layer {
        diff: 1,
        index: 5001,
        packs: vec![Pack(1, 20 * 4096), Pack(2, 4096)],
    };
    world.pull("i", 1, &[layer]).unwrap();
    let moved = world.work(&[1, 2], 60_000);
    assert!(moved <= 3, "{moved}");
}
