//! Pulls from beginning to end, and everything that can come between.

use harbour_metad_client::v1;

use super::world::{Layer, Pack, World, digest, index_pack, layer, pack, sealed, sound, wanted};
use crate::error::Error;

#[test]
fn an_image_is_visible_after_its_commit_and_not_before() {
    let world = World::new(64);
    let pull = world.begin();
    let (reply, number) = world.stage(pull, &layer(1, 3)).unwrap();
    assert!(
        reply
            .packs
            .iter()
            .all(|pack| !pack.present && pack.extents.len() == 1)
    );
    assert_eq!((world.snapshot().0.len(), world.snapshot().1.len()), (0, 0));
    assert_eq!(
        world.locate(&[Pack(100, 4096)]),
        [vec![]],
        "reserved space is not told to readers"
    );
    assert_eq!(world.books().reserved, 4 * 4096);
    let before = *world.engine.watch().borrow();
    let (_, committed) = world.commit(pull, "a", 1, 1, &[1]).unwrap();
    assert!(committed.generation > before);
    assert_eq!(*world.engine.watch().borrow(), committed.generation);
    let (images, layers) = world.snapshot();
    assert_eq!(images[0].diff_ids, [digest(b'l', 1).to_vec()]);
    assert_eq!(images[0].index, Some(sealed(1).1));
    assert_ne!(images[0].number, number);
    assert_eq!(
        (layers[0].number, layers[0].state()),
        (number, v1::LayerState::Ready)
    );
    assert_eq!(
        (
            layers[0].pool_bytes,
            layers[0].new_bytes,
            layers[0].blobs.len()
        ),
        (4 * 4096, 4 * 4096, 1)
    );
    assert_eq!(world.books().used, 5 * 4096);
    let document = v1::DocumentRequest {
        digest: digest(b'm', 1).to_vec(),
    };
    assert_eq!(
        world.engine.document(&document).unwrap().content,
        b"manifest"
    );
    let range = v1::ReadIndexRequest {
        digest: sealed(1).1.digest,
        offset: 19_990,
        len: 100,
    };
    assert_eq!(
        world.engine.read_index(&range).unwrap().content,
        sealed(1).0[19_990..20_064].to_vec()
    );
}

#[test]
fn the_same_commit_again_is_answered_the_same_and_another_is_refused() {
    let mut world = World::new(64);
    let pull = world.begin();
    world.stage(pull, &layer(1, 1)).unwrap();
    let (_, first) = world.commit(pull, "a", 1, 1, &[1]).unwrap();
    let request = world.commit_request(pull, "a", 1, 1, &[1]);
    assert_eq!(world.engine.commit(&request).unwrap(), first);
    world.restart();
    assert_eq!(
        world.engine.commit(&request).unwrap(),
        first,
        "after a restart too"
    );
    let other = world.commit_request(pull, "b", 1, 1, &[1]);
    assert!(matches!(
        world.engine.commit(&other),
        Err(Error::Refused(_))
    ));
    let forged = v1::CommitRequest {
        pull: Some(v1::PullRef {
            token: pull.token + 1,
            ..pull
        }),
        ..request
    };
    assert!(matches!(
        world.engine.commit(&forged),
        Err(Error::Refused(_))
    ));
    assert!(matches!(world.engine.renew(&pull), Err(Error::Refused(_))));
    world.engine.abort(&pull).unwrap();
    assert_eq!(world.names().len(), 1);
}

#[test]
fn pulling_what_is_there_changes_nothing() {
    let world = World::new(64);
    world.pull("a", 1, &[layer(1, 2), layer(2, 1)]).unwrap();
    let (before, books) = (world.snapshot(), world.books());
    world.pull("a", 1, &[layer(1, 2), layer(2, 1)]).unwrap();
    assert_eq!(world.snapshot(), before);
    assert_eq!(world.books(), books);
    let pull = world.begin();
    let find = v1::FindLayersRequest {
        pull: Some(pull),
        diff_ids: vec![digest(b'l', 1).to_vec(), vec![0; 32]],
    };
    let found = world.engine.find_layers(&find).unwrap().layers;
    assert!(found[0].found && !found[1].found && found[1].layer.is_none());
    world.commit(pull, "b", 1, 1, &[1, 2]).unwrap();
    assert_eq!(
        world.books(),
        books,
        "another name of the same image costs nothing"
    );
    assert_eq!(world.snapshot().0[0].number, world.snapshot().0[1].number);
}

#[test]
fn objects_are_found_in_the_pool_and_pinned() {
    let world = World::new(4);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let pull = world.begin();
    let ask = |numbers: &[u32]| v1::FindObjectsRequest {
        pull: Some(pull),
        objects: numbers
            .iter()
            .map(|number| digest(b'o', *number).to_vec())
            .collect(),
    };
    let found = world
        .engine
        .find_objects(&ask(&[101, 7, 100]))
        .unwrap()
        .objects;
    assert_eq!(
        found.iter().map(|object| object.found).collect::<Vec<_>>(),
        [true, false, true]
    );
    assert_eq!(
        (found[0].pack.clone(), found[0].pack_len),
        (pack(101).to_vec(), 4096)
    );
    // The pool is full: two packs, two indexes. What was found must stay.
    assert!(
        world.reserve(pull, &[Pack(9, 2 * 4096)]).is_ok(),
        "the indexes are evicted"
    );
    assert!(matches!(
        world.reserve(pull, &[Pack(10, 4096)]),
        Err(Error::Exhausted(_))
    ));
    assert_eq!(
        world
            .locate(&[Pack(100, 4096), Pack(101, 4096)])
            .iter()
            .filter(|e| e.len() == 1)
            .count(),
        2
    );
}

#[test]
fn a_pull_that_stops_gives_everything_back() {
    for way in ["abort", "expire", "restart and expire"] {
        let mut world = World::new(16);
        world.pull("keep", 1, &[layer(1, 1)]).unwrap();
        let (before, indexes) = (world.books(), index_files(&world));
        let pull = world.begin();
        world.stage(pull, &layer(2, 5)).unwrap();
        world.reserve(pull, &[Pack(77, 9000)]).unwrap();
        world.put_index(pull, 44).unwrap();
        match way {
            "abort" => {
                world.engine.abort(&pull).unwrap();
                world.engine.abort(&pull).unwrap();
            }
            "expire" => world.pass(31_000),
            _ => {
                world.restart();
                world.engine.renew(&pull).unwrap();
                world.pass(12_000);
                world.engine.renew(&pull).unwrap();
                world.pass(36_000);
            }
        }
        // The donor was silent meanwhile, and is not forgotten.
        assert_eq!(world.books(), before, "{way}");
        assert_eq!(index_files(&world), indexes, "{way}");
        assert!(
            matches!(world.engine.renew(&pull), Err(Error::Refused(_))),
            "{way}"
        );
        let request = world.commit_request(pull, "x", 2, 2, &[2]);
        assert!(
            matches!(world.engine.commit(&request), Err(Error::Refused(_))),
            "{way}"
        );
        assert_eq!(world.names().len(), 1);
    }
}

fn index_files(world: &World) -> usize {
    std::fs::read_dir(world.path().join("index"))
        .unwrap()
        .count()
}

#[test]
fn space_of_an_expired_pull_waits_for_its_late_writer() {
    let world = World::new(2);
    let pull = world.begin();
    world.reserve(pull, &[Pack(1, 8192)]).unwrap();
    let keep_donor = |ms: u64| {
        (0..ms / 2000).for_each(|_| {
            world.pass(2000);
            world.donor("d", 1, &[2]);
        })
    };
    keep_donor(16_000);
    assert_eq!(world.books().quarantined, 8192);
    let next = world.begin();
    assert!(matches!(
        world.reserve(next, &[Pack(2, 4096)]),
        Err(Error::Exhausted(_))
    ));
    keep_donor(14_000);
    world.engine.abort(&next).unwrap();
    let next = world.begin();
    world.reserve(next, &[Pack(2, 4096)]).unwrap();
}

#[test]
fn two_pulls_of_one_layer_keep_one_copy() {
    let world = World::new(64);
    let (first, second) = (world.begin(), world.begin());
    let (a, _) = world.stage(first, &layer(1, 3)).unwrap();
    let (b, _) = world.stage(second, &layer(1, 3)).unwrap();
    assert!(
        a.packs
            .iter()
            .zip(&b.packs)
            .all(|(a, b)| !b.present && a.extents != b.extents)
    );
    world.commit(first, "a", 1, 1, &[1]).unwrap();
    let books = world.books();
    assert_eq!(books.reserved, 4 * 4096);
    world.commit(second, "b", 1, 1, &[1]).unwrap();
    assert_eq!(world.books().used, books.used);
    assert_eq!(world.books().reserved, 0);
    assert_eq!(world.snapshot().1.len(), 1);
    let again = world.begin();
    assert!(
        world
            .reserve(again, &layer(1, 3).packs)
            .unwrap()
            .packs
            .iter()
            .all(|pack| pack.present)
    );
}

#[test]
fn a_layer_cut_another_way_keeps_the_first_view_and_both_packs() {
    let world = World::new(64);
    world.pull("a", 1, &[layer(1, 2)]).unwrap();
    let number = world.snapshot().1[0].number;
    let other = Layer {
        diff: 1,
        index: 6000,
        packs: vec![Pack(900, 5000)],
    };
    world.pull("b", 2, &[other]).unwrap();
    let layers = world.snapshot().1;
    assert_eq!(
        (layers.len(), layers[0].number),
        (1, number),
        "the first wins"
    );
    assert_eq!(
        world.locate(&[Pack(900, 5000)])[0].len(),
        1,
        "the second image's index refers to it"
    );
    world.remove("a").unwrap();
    assert_eq!(
        world.snapshot().1.len(),
        1,
        "the layer is the second image's now"
    );
    assert_eq!(
        world
            .locate(&[Pack(900, 5000), Pack(100, 4096)])
            .iter()
            .flatten()
            .count(),
        2
    );
    world.remove("b").unwrap();
    assert_eq!(world.books().used, 0);
}

#[test]
fn a_name_moves_and_its_old_image_goes() {
    let world = World::new(64);
    world.pull("a", 1, &[layer(1, 1), layer(2, 1)]).unwrap();
    world.pull("a", 2, &[layer(1, 1), layer(3, 1)]).unwrap();
    let (images, layers) = world.snapshot();
    assert_eq!((images.len(), layers.len()), (1, 2));
    assert_eq!(images[0].manifest, digest(b'm', 2));
    let old = v1::DocumentRequest {
        digest: digest(b'm', 1).to_vec(),
    };
    assert!(matches!(
        world.engine.document(&old),
        Err(Error::NotFound(_))
    ));
    let index = v1::ReadIndexRequest {
        digest: sealed(1).1.digest,
        offset: 0,
        len: 10,
    };
    assert!(matches!(
        world.engine.read_index(&index),
        Err(Error::NotFound(_))
    ));
}

#[test]
fn what_is_not_there_cannot_be_committed() {
    let world = World::new(64);
    let pull = world.begin();
    world.stage(pull, &layer(1, 1)).unwrap();
    let refused = |request: &v1::CommitRequest| {
        matches!(world.engine.commit(request), Err(Error::Refused(_)))
    };
    assert!(
        refused(&world.commit_request(pull, "a", 1, 1, &[1])),
        "its index is not on disk"
    );
    world.put_index(pull, 1).unwrap();
    assert!(
        refused(&world.commit_request(pull, "a", 1, 1, &[1])),
        "its index's pack was not reserved"
    );
    world.reserve(pull, &[index_pack(1)]).unwrap();
    assert!(
        refused(&world.commit_request(pull, "a", 1, 1, &[1, 2])),
        "layer 2 is nowhere"
    );
    let head = v1::LayerHead {
        pull: Some(pull),
        layer: Some(v1::Layer {
            diff_id: digest(b'l', 2).to_vec(),
            index: Some(v1::IndexRef {
                packs: Vec::new(),
                ..sealed(1).1
            }),
            ..Default::default()
        }),
    };
    let mut upload = world.engine.begin_layer(&head).unwrap();
    assert!(
        refused(&world.commit_request(pull, "a", 1, 1, &[1, 2])),
        "layer 2 was not finished"
    );
    let stranger = v1::PackObjects {
        pack: pack(500).to_vec(),
        len: 1,
        objects: Vec::new(),
    };
    assert!(matches!(
        world.engine.layer_packs(&mut upload, &[stranger]),
        Err(Error::Refused(_))
    ));
    world.engine.finish_layer(&mut upload).unwrap();
    assert!(!refused(&world.commit_request(pull, "a", 1, 1, &[1, 2])));
}

#[test]
fn nonsense_is_refused_by_name() {
    let world = World::new(64);
    let pull = world.begin();
    let invalid = |packs: Vec<v1::PackWanted>| {
        let request = v1::ReserveRequest {
            pull: Some(pull),
            packs,
            ..Default::default()
        };
        matches!(
            world.engine.reserve(&request, false),
            Err(Error::Invalid(_))
        )
    };
    assert!(invalid(vec![v1::PackWanted {
        pack: vec![1; 31],
        len: 1
    }]));
    assert!(invalid(vec![v1::PackWanted {
        pack: vec![1; 32],
        len: 0
    }]));
    assert!(invalid(vec![v1::PackWanted {
        pack: vec![1; 32],
        len: (4 << 20) + 1
    }]));
    assert!(invalid(wanted(&[Pack(1, 5), Pack(1, 5)])));
    assert!(invalid(wanted(
        &(0..4097).map(|number| Pack(number, 1)).collect::<Vec<_>>()
    )));
    world.reserve(pull, &[Pack(1, 5)]).unwrap();
    assert!(invalid(wanted(&[Pack(1, 6)])), "a pack has one length");
    let objects = |offset, len| v1::PackObjects {
        pack: pack(100).to_vec(),
        len: 4096,
        objects: vec![v1::PackObject {
            object: vec![1; 32],
            offset,
            len,
        }],
    };
    world.stage(pull, &layer(1, 1)).unwrap();
    let head = v1::LayerHead {
        pull: Some(pull),
        layer: Some(v1::Layer {
            diff_id: digest(b'l', 1).to_vec(),
            index: Some(sealed(5001).1),
            ..Default::default()
        }),
    };
    let mut upload = world.engine.begin_layer(&head).unwrap();
    for (offset, len) in [(0, 0), (0, 4097), (4096, 1), (u32::MAX, 2), (0, 2 << 20)] {
        let outcome = world
            .engine
            .layer_packs(&mut upload, &[objects(offset, len)]);
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{offset} {len}");
    }
    let (_, mut lie) = sealed(1);
    lie.digest[0] ^= 1;
    let chunk = v1::IndexChunk {
        pull: Some(pull),
        digest: lie.digest,
        len_bytes: lie.len_bytes,
        content: vec![],
    };
    let mut upload = world.engine.begin_index(&chunk).unwrap();
    upload.chunk(&sealed(1).0).unwrap();
    assert!(matches!(upload.finish(), Err(Error::Invalid(_))));
    let long = v1::BeginRequest {
        what: "x".repeat(5000),
        ..Default::default()
    };
    assert!(matches!(world.engine.begin(&long), Err(Error::Invalid(_))));
}

#[test]
fn numbers_are_never_used_again() {
    let mut world = World::new(64);
    let mut seen = std::collections::HashSet::new();
    for round in 0..4 {
        world.pull("a", round, &[layer(1, 1)]).unwrap();
        let (images, layers) = world.snapshot();
        assert!(
            seen.insert(images[0].number) && seen.insert(layers[0].number),
            "round {round}"
        );
        world.remove("a").unwrap();
        let dropped = world.begin();
        let (_, number) = world.stage(dropped, &layer(1, 1)).unwrap();
        assert!(seen.insert(number));
        world.engine.abort(&dropped).unwrap();
        world.restart();
        world.donor("d", 1, &[64]);
        world.pass(12_000);
        world.donor("d", 1, &[64]);
    }
}

/// What a machine finds that copies the directory at some moment, as a crash would leave it.
fn copy(world: &World) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("index")).unwrap();
    for name in ["metad.db", "metad.db-wal"] {
        std::fs::copy(world.path().join(name), folder.path().join(name)).unwrap();
    }
    for entry in std::fs::read_dir(world.path().join("index")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(
            entry.path(),
            folder.path().join("index").join(entry.file_name()),
        )
        .unwrap();
    }
    folder
}

#[test]
fn a_crash_after_any_step_shows_all_of_an_image_or_nothing() {
    let world = World::new(64);
    world.pull("old", 1, &[layer(1, 1)]).unwrap();
    let check = |step: &str, names: usize| {
        let folder = copy(&world);
        std::fs::write(folder.path().join("index").join("half.0.part"), b"x").unwrap();
        let options = super::super::Options {
            clock: world.clock.clone(),
            ..Default::default()
        };
        let engine = super::super::Engine::open(folder.path(), options).unwrap();
        sound(&engine);
        let images: usize = engine
            .snapshot()
            .unwrap()
            .iter()
            .map(|page| page.images.len())
            .sum();
        assert_eq!(images, names, "{step}");
        let whole = engine
            .snapshot()
            .unwrap()
            .iter()
            .flat_map(|p| p.layers.clone())
            .all(|layer| layer.state() == v1::LayerState::Ready);
        assert!(whole, "{step}");
        let indexes = std::fs::read_dir(folder.path().join("index"))
            .unwrap()
            .count();
        assert_eq!(
            indexes,
            index_files(&world),
            "{step}: orphans are swept, nothing else"
        );
    };
    check("before", 1);
    let pull = world.begin();
    check("begun", 1);
    world.reserve(pull, &layer(2, 3).packs).unwrap();
    check("reserved", 1);
    world.stage(pull, &layer(2, 3)).unwrap();
    check("staged", 1);
    world.commit(pull, "new", 2, 2, &[2]).unwrap();
    check("committed", 2);
    world.remove("old").unwrap();
    check("removed", 1);
}
