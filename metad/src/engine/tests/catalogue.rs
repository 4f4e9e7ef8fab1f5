//! Names, documents, and layers that readers still hold.

use harbour_metad_client::v1;
use prost::Message;

use super::world::{Pack, World, layer};
use crate::error::Error;

#[test]
fn an_image_goes_with_its_last_name() {
    let world = World::new(64);
    world.pull("a", 1, &[layer(1, 1), layer(2, 1)]).unwrap();
    world.pull("b", 1, &[layer(1, 1), layer(2, 1)]).unwrap();
    world.pull("c", 2, &[layer(2, 1), layer(3, 1)]).unwrap();
    let gone = world.remove("a").unwrap();
    assert_eq!(
        (gone.image_removed, gone.layers_removed, gone.bytes_freed),
        (false, 0, 0)
    );
    let gone = world.remove("b").unwrap();
    // Layer 1 with its pack and index, and the image's index; layer 2 is c's too.
    assert_eq!(
        (gone.image_removed, gone.layers_removed, gone.bytes_freed),
        (true, 1, 3 * 4096)
    );
    assert!(matches!(world.remove("b"), Err(Error::NotFound(_))));
    world.remove("c").unwrap();
    assert_eq!(
        (world.books().free, world.engine.status().unwrap().packs),
        (64 * 4096, 0)
    );
    assert_eq!(
        std::fs::read_dir(world.path().join("index"))
            .unwrap()
            .count(),
        0
    );
    let status = world.engine.status().unwrap();
    assert_eq!((status.images, status.layers, status.objects), (0, 0, 0));
}

#[test]
fn what_a_node_holds_open_stays_until_it_lets_go() {
    for way in ["release", "lease", "restart"] {
        let mut world = World::new(64);
        world.pull("a", 1, &[layer(1, 1)]).unwrap();
        let number = world.snapshot().1[0].number;
        let node = world.node();
        world.beat(node, 0, &[number]);
        let gone = world.remove("a").unwrap();
        assert!(gone.image_removed && gone.layers_removed == 1);
        assert_eq!(world.snapshot(), (vec![], vec![]), "out of sight at once");
        assert_eq!(world.locate(&[Pack(100, 4096)])[0].len(), 1, "{way}");
        match way {
            "release" => {
                let lease = world.beat(node, 0, &[]);
                world.engine.tick().unwrap();
                assert_eq!(world.locate(&[Pack(100, 4096)]), [vec![]]);
                let lease = world.beat(node, lease.freed_generation, &[]);
                world.beat(node, lease.freed_generation, &[]);
            }
            "lease" => world.pass(12_000),
            _ => {
                world.restart();
                world.pass(4_000);
                assert_eq!(
                    world.locate(&[Pack(100, 4096)])[0].len(),
                    1,
                    "nodes are not known yet"
                );
                world.pass(24_000);
            }
        }
        assert_eq!(world.books().used + world.books().quarantined, 0, "{way}");
    }
}

#[test]
fn what_engines_use_stays_in_sight_without_an_image() {
    for way in ["release", "lease", "restart"] {
        let mut world = World::new(64);
        world.pull("a", 1, &[layer(1, 1), layer(2, 1)]).unwrap();
        let number = world.snapshot().1[0].number;
        let node = world.node();
        let using = |world: &World, node: u64, used: Vec<u32>| {
            let request = v1::NodeHeartbeat {
                node,
                used,
                ..Default::default()
            };
            world.engine.node_heartbeat(&request).unwrap()
        };
        using(&world, node, vec![number]);
        let gone = world.remove("a").unwrap();
        assert!(gone.image_removed && gone.layers_removed == 1, "{gone:?}");
        let numbers = |world: &World| {
            let layers = world.snapshot().1.into_iter();
            layers.map(|layer| layer.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&world), [number], "{way}");
        world.books();
        match way {
            "release" => drop(using(&world, node, vec![])),
            "lease" => {}
            _ => {
                world.restart();
                world.pass(1_000);
                // The image's, or another of the same layers, is not swept away before its users are known.
                world.pull("b", 2, &[layer(2, 1)]).unwrap();
                world.remove("b").unwrap();
                assert!(numbers(&world).contains(&number));
            }
        }
        world.pass(30_000);
        assert_eq!(numbers(&world), [0; 0], "{way}");
    }
}

#[test]
fn pages_stay_under_the_frame() {
    let world = World::new(6000);
    let layers: Vec<_> = (1..100).map(|diff| layer(diff, 1)).collect();
    for image in 0..400 {
        world
            .pull(&format!("{:0500}", image), image % 4 + 10_000, &layers[..])
            .unwrap();
        if image % 4 == 3 && image > 20 {
            break;
        }
    }
    let long = (0..160).map(|image| format!("{image:0500}"));
    long.for_each(|tag| world.pull(&tag, 10_000, &layers[..1]).map_or((), drop));
    let pages = world.engine.snapshot().unwrap();
    assert!(pages.iter().all(|page| page.encoded_len() < 1 << 20));
    assert_eq!(pages.iter().filter(|page| page.last).count(), 1);
    assert!(
        pages
            .last()
            .is_some_and(|page| page.last && page.generation > 0)
    );
    assert_eq!(world.snapshot().1.len(), 99);
}

#[test]
fn questions_with_bad_digests_and_lengths_are_refused() {
    let world = World::new(8);
    let short = v1::DocumentRequest {
        digest: vec![1; 31],
    };
    assert!(matches!(
        world.engine.document(&short),
        Err(Error::Invalid(_))
    ));
    let none = v1::ReadIndexRequest {
        digest: vec![1; 32],
        offset: u64::MAX,
        len: 1,
    };
    assert!(matches!(
        world.engine.read_index(&none),
        Err(Error::NotFound(_))
    ));
    let long = v1::ReadIndexRequest {
        digest: vec![1; 32],
        offset: 0,
        len: 1 << 20,
    };
    assert!(matches!(
        world.engine.read_index(&long),
        Err(Error::Invalid(_))
    ));
    let many = v1::LocateRequest {
        packs: vec![vec![0; 32]; 4097],
    };
    assert!(matches!(world.engine.locate(&many), Err(Error::Invalid(_))));
    let held = v1::NodeHeartbeat {
        node: world.node(),
        held: vec![1; 65_537],
        ..Default::default()
    };
    assert!(matches!(
        world.engine.node_heartbeat(&held),
        Err(Error::Invalid(_))
    ));
}

#[test]
fn a_node_that_lags_too_far_forgets_everything() {
    let world = World::new(20_000);
    let node = world.node();
    let lease = world.beat(node, 0, &[]);
    assert!(!lease.forget_all);
    for image in 0..3 {
        let packs = (0..3000)
            .map(|number| Pack(image * 10_000 + number, 10))
            .collect();
        let wide = super::world::Layer {
            diff: 1,
            index: 1,
            packs,
        };
        world.pull("a", image, &[wide]).unwrap();
        world.remove("a").unwrap();
    }
    assert!(world.beat(node, 0, &[]).forget_all);
    let now = world.beat(node, 0, &[]).freed_generation;
    assert!(!world.beat(node, now, &[]).forget_all);
}
