//! How many replicas packs get, and where.

use harbour_metad_client::v1;

use super::world::{Pack, Tune, World, index_pack, layer, pack, wanted};
use crate::{engine::Reserving, error::Error};

fn domains(world: &World, of: &[(&str, &str)]) {
    for (name, domain) in of {
        world.try_donor_in(domain, name, 1, &[(0, 64)]).unwrap();
    }
}

#[test]
fn replicas_lie_on_donors_that_do_not_fail_together() {
    let world = World::tuned(Tune::replicas(2));
    domains(&world, &[("a", "x"), ("b", "x"), ("c", "y")]);
    world.pull("i", 1, &[layer(1, 8)]).unwrap();
    let (mut on_a, mut on_b) = (0, 0);
    for pack in layer(1, 8).packs {
        let holders = world.holders(pack);
        assert_eq!((holders.len(), holders[1]), (2, 3), "one on c: {holders:?}");
        on_a += usize::from(holders[0] == 1);
        on_b += usize::from(holders[0] == 2);
    }
    assert_eq!((on_a, on_b), (4, 4), "evenly");
    let status = world.engine.status().unwrap();
    world.pass(1000);
    assert_eq!(status.replicas_missing, 0);
}

#[test]
fn with_fewer_domains_than_replicas_donors_do() {
    let world = World::tuned(Tune::replicas(3));
    domains(&world, &[("a", "x"), ("b", "x"), ("c", "y")]);
    world.pull("i", 1, &[layer(1, 2)]).unwrap();
    assert_eq!(world.holders(layer(1, 2).packs[0]), [1, 2, 3]);
}

#[test]
fn an_image_keeps_the_number_that_it_was_pulled_with() {
    let mut world = World::tuned(Tune::replicas(1));
    domains(&world, &[("a", "x"), ("b", "y"), ("c", "z")]);
    world.pull("one", 1, &[layer(1, 2)]).unwrap();
    world.pull_with("two", 2, &[layer(2, 2)], 2).unwrap();
    assert_eq!(world.holders(layer(1, 2).packs[0]).len(), 1);
    assert_eq!(world.holders(layer(2, 2).packs[0]).len(), 2);
    assert_eq!(world.holders(index_pack(2)).len(), 2, "its index too");
    world.restart();
    domains(&world, &[("a", "x"), ("b", "y"), ("c", "z")]);
    world.pull("two", 2, &[layer(2, 2)]).unwrap();
    let images = world.snapshot().0;
    let of = |tag: &str| {
        images
            .iter()
            .find(|image| image.tag == tag)
            .unwrap()
            .replicas
    };
    assert_eq!(
        (of("one"), of("two")),
        (0, 2),
        "who says nothing changes nothing"
    );
    world.pull_with("one", 1, &[layer(1, 2)], 3).unwrap();
    world.pass(1000);
    assert_eq!(world.engine.status().unwrap().replicas_missing, 2 * 4);
    world.work(&[1, 2, 3], 4_000);
    assert_eq!(
        world.holders(layer(1, 2).packs[0]),
        [1, 2, 3],
        "made up for afterwards"
    );
    world.pull_with("one", 1, &[layer(1, 2)], 1).unwrap();
    world.work(&[1, 2, 3], 4_000);
    assert_eq!(
        world.holders(layer(1, 2).packs[0]).len(),
        1,
        "and taken back"
    );
    let much = v1::BeginRequest {
        replicas: 17,
        ..Default::default()
    };
    assert!(matches!(world.engine.begin(&much), Err(Error::Invalid(_))));
}

#[test]
fn what_could_not_be_written_is_given_back_and_elsewhere_the_next_time() {
    let world = World::tuned(Tune::replicas(2));
    domains(&world, &[("a", "x"), ("b", "y"), ("c", "z")]);
    let pull = world.begin();
    let reply = world.reserve(pull, &[Pack(7, 4096)]).unwrap();
    let [first, second] = reply.packs[0].extents[..] else {
        panic!("{reply:?}")
    };
    let give_back = |extents: &[v1::Extent]| {
        let request = v1::GiveBackRequest {
            pull: Some(pull),
            pack: pack(7).to_vec(),
            extents: extents.to_vec(),
            why: "gone\nforever".into(),
        };
        world.engine.give_back(&request).unwrap().left
    };
    assert_eq!(give_back(&[first]), 1);
    assert_eq!(give_back(&[first]), 1, "again is no error");
    assert_eq!(
        world.books().quarantined,
        4096,
        "what was sent may still arrive"
    );
    let again = world.reserve(pull, &[Pack(7, 4096)]).unwrap();
    assert_eq!(again.packs[0].extents, [second], "the one that was written");
    assert_eq!(give_back(&[second]), 0);
    let request = v1::ReserveRequest {
        pull: Some(pull),
        packs: wanted(&[Pack(7, 4096)]),
        avoid: vec![first.donor, second.donor],
    };
    let Reserving::Done(reply) = world.engine.reserve(&request, false).unwrap() else {
        panic!("there is room")
    };
    let [third] = reply.packs[0].extents[..] else {
        panic!("only one donor is left: {reply:?}")
    };
    assert_eq!(6 - first.donor - second.donor, third.donor);
    let none = v1::ReserveRequest {
        packs: wanted(&[Pack(8, 4096)]),
        avoid: vec![1, 2, 3],
        ..request
    };
    let error = world.engine.reserve(&none, false).unwrap_err();
    assert!(matches!(error, Error::Exhausted(_)), "{error}");
    world.engine.abort(&pull).unwrap();
    for _ in 0..10 {
        world.pass(2_000);
        domains(&world, &[("a", "x"), ("b", "y"), ("c", "z")]);
    }
    assert_eq!(world.books().free, world.books().lent);
}

#[test]
fn a_full_donor_gives_up_what_is_least_used_and_packs_with_other_replicas_stay() {
    let world = World::tuned(Tune::replicas(2));
    world.try_donor_in("x", "small", 1, &[(0, 10)]).unwrap();
    world.try_donor_in("y", "large", 1, &[(0, 64)]).unwrap();
    world.pull("old", 1, &[layer(1, 8)]).unwrap();
    assert_eq!(world.used()[0].1, 10 * 4096, "small is full");
    world.pull("new", 2, &[layer(2, 4)]).unwrap();
    for pack in &layer(2, 4).packs {
        assert_eq!(world.holders(*pack).len(), 2, "what is new has both");
    }
    let old: Vec<usize> = layer(1, 8)
        .packs
        .iter()
        .map(|pack| world.holders(*pack).len())
        .collect();
    assert!(
        old.iter().all(|count| *count > 0),
        "nothing is lost: {old:?}"
    );
    assert!(old.contains(&1), "but some are thinner: {old:?}");
    assert!(world.engine.status().unwrap().evictions > 0);
    // There is no room for what is missing: nothing is copied back and forth.
    assert_eq!(world.work(&[1, 2], 10_000), 0);
}

#[test]
fn packs_that_are_read_often_get_one_more_while_memory_is_free() {
    let world = World::tuned(Tune {
        replicas: 1,
        hot_replicas: 2,
        rebalance_mib_s: 128,
    });
    domains(&world, &[("a", "x"), ("b", "y")]);
    world.pull("i", 1, &[layer(1, 4)]).unwrap();
    let hot = layer(1, 4).packs[0];
    let read = v1::UseReport {
        packs: vec![v1::PackUse {
            pack: pack(hot.0).to_vec(),
            reads: 200,
        }],
    };
    world.engine.report_use(&read).unwrap();
    // Looked at when something changes.
    world.pull("j", 2, &[layer(2, 1)]).unwrap();
    assert_eq!(world.work(&[1, 2], 3_000), 1);
    assert_eq!(world.holders(hot).len(), 2);
    assert_eq!(world.holders(layer(1, 4).packs[1]).len(), 1);
    assert_eq!(world.engine.status().unwrap().pool_reads, 200);
    world.work(&[1, 2], 180_000);
    assert_eq!(world.holders(hot).len(), 1, "it cooled");
}
