//! Layers and names that are committed by themselves.

use harbour_metad_client::v1;
use tokio::sync::mpsc;

use super::{
    super::{Ask, Heard, Session, Wish},
    world::{Layer, Pack, World, digest, layer},
};
use crate::{
    error::Error,
    locks::{Key, Mode, Reply},
};

/// A pull with a session that claims layers.
struct Puller {
    pull: v1::PullRef,
    session: Session,
    heard: mpsc::Receiver<Heard>,
}

impl Puller {
    fn new(world: &World) -> Self {
        let pull = world.begin();
        let (send, heard) = mpsc::channel(16);
        let session = world.engine.listen(&pull, send).unwrap();
        Self {
            pull,
            session,
            heard,
        }
    }

    fn wish(&mut self, world: &World, wish: Wish) -> Reply {
        let (session, id) = (self.session, 1);
        world.engine.claim(vec![Ask { session, id, wish }]).unwrap();
        let reply = match self.heard.try_recv() {
            Ok(Heard::Reply { id: 1, reply }) => reply,
            other => panic!("{other:?}"),
        };
        // Who waits hears for whom.
        if matches!(reply, Reply::Waiting { .. }) {
            let holder = self.heard.try_recv();
            assert!(matches!(holder, Ok(Heard::Progress { .. })), "{holder:?}");
        }
        reply
    }

    fn take(&mut self, world: &World, key: Key) -> Reply {
        let (mode, wait) = (Mode::Exclusive, true);
        self.wish(world, Wish::Acquire { key, mode, wait })
    }

    /// Claims a layer that nobody holds; gives the fencing token.
    fn hold(&mut self, world: &World, diff: u32) -> u64 {
        match self.take(world, key(diff)) {
            Reply::Held { fence } => fence,
            other => panic!("{other:?}"),
        }
    }

    fn commit(&self, world: &World, diff: u32, fence: u64) -> Result<v1::CommitLayerReply, Error> {
        world.engine.commit_layer(&v1::CommitLayerRequest {
            pull: Some(self.pull),
            diff_id: digest(b'l', diff).to_vec(),
            fence,
        })
    }

    /// Claims, stages and commits.
    fn fetch(&mut self, world: &World, layer: &Layer) -> v1::CommitLayerReply {
        let fence = self.hold(world, layer.diff);
        world.stage(self.pull, layer).unwrap();
        self.commit(world, layer.diff, fence).unwrap()
    }

    /// Whether there is a whole layer, which is held on to from then on.
    fn finds(&self, world: &World, diff: u32) -> bool {
        let find = v1::FindLayersRequest {
            pull: Some(self.pull),
            diff_ids: vec![digest(b'l', diff).to_vec()],
        };
        world.engine.find_layers(&find).unwrap().layers[0].found
    }

    fn name(&self, world: &World, tag: &str, manifest: u32) -> Result<v1::CommitReply, Error> {
        world.engine.commit_name(&v1::CommitNameRequest {
            pull: Some(self.pull),
            registry: "r".into(),
            repository: "p".into(),
            tag: tag.into(),
            manifest: digest(b'm', manifest).to_vec(),
            source: "docker://r/p".into(),
            replicas: 0,
        })
    }
}

fn key(diff: u32) -> Key {
    Key::Layer(digest(b'l', diff))
}

/// Layers in sight.
fn layers(world: &World) -> usize {
    world.snapshot().1.len()
}

#[test]
fn a_layer_is_there_before_its_image_and_for_as_long_as_a_pull_wants_it() {
    let world = World::new(64);
    let (mut first, second) = (Puller::new(&world), Puller::new(&world));
    assert!(!second.finds(&world, 1));
    let before = *world.engine.watch().borrow();
    let fence = first.hold(&world, 1);
    world.stage(first.pull, &layer(1, 2)).unwrap();
    assert_eq!(layers(&world), 0);
    let reply = first.commit(&world, 1, fence).unwrap();
    assert!(reply.generation > before);
    let (images, shown) = world.snapshot();
    assert_eq!((images.len(), shown.len()), (0, 1));
    assert_eq!(
        (shown[0].number, shown[0].state(), shown[0].new_bytes),
        (reply.number, v1::LayerState::Ready, 3 * 4096)
    );
    assert_eq!(world.locate(&[Pack(100, 4096)])[0].len(), 1);
    assert!(
        world.engine.list_locks().is_empty(),
        "the claim is given up"
    );
    assert!(second.finds(&world, 1));
    world.books();
    world.engine.abort(&first.pull).unwrap();
    world.pass(1000);
    assert_eq!(layers(&world), 1, "the other one holds on to it");
    world.engine.abort(&second.pull).unwrap();
    world.pass(1000);
    assert_eq!((layers(&world), world.books().used), (0, 0));
}

#[test]
fn those_who_waited_hold_on_to_it_whatever_becomes_of_who_fetched_it() {
    for dies in [false, true] {
        let mut world = World::new(64);
        let (mut first, mut second) = (Puller::new(&world), Puller::new(&world));
        let fence = first.hold(&world, 1);
        let waits = second.take(&world, key(1));
        assert_eq!(waits, Reply::Waiting { ahead: 1 });
        world.stage(first.pull, &layer(1, 1)).unwrap();
        first.commit(&world, 1, fence).unwrap();
        let news = Heard::News {
            key: key(1),
            fence: None,
        };
        assert_eq!(second.heard.try_recv(), Ok(news));
        if dies {
            world.engine.broke(first.session).unwrap();
            world.pass(3000);
        } else {
            world.engine.abort(&first.pull).unwrap();
        }
        assert_eq!(layers(&world), 1);
        world.restart();
        assert!(second.finds(&world, 1));
        world.commit(second.pull, "a", 1, 1, &[1]).unwrap();
        assert_eq!((layers(&world), world.names().len()), (1, 1));
        world.books();
        world.remove("a").unwrap();
        world.pass(12_000);
        assert_eq!((layers(&world), world.books().used), (0, 0));
    }
}

#[test]
fn who_was_taken_over_is_refused() {
    let world = World::new(64);
    let (mut late, mut next) = (Puller::new(&world), Puller::new(&world));
    let old = late.hold(&world, 1);
    world.stage(late.pull, &layer(1, 1)).unwrap();
    // Without a claim nothing is committed, with somebody else's neither.
    let fenced = |outcome| matches!(outcome, Err(Error::Fenced(_)));
    assert!(fenced(late.commit(&world, 1, 0)));
    assert!(fenced(late.commit(&world, 1, old + 1)));
    world.stage(next.pull, &layer(1, 1)).unwrap();
    assert!(fenced(next.commit(&world, 1, old)));
    assert_eq!(layers(&world), 0);
    let release = Wish::Release { key: key(1) };
    assert_eq!(late.wish(&world, release), Reply::Done);
    let new = next.hold(&world, 1);
    assert!(fenced(late.commit(&world, 1, old)));
    assert!(fenced(late.commit(&world, 1, new)));
    next.commit(&world, 1, new).unwrap();
    // Also when it is there by now.
    assert!(fenced(late.commit(&world, 1, old)));
    // One that is dead for metad is told so.
    world.engine.broke(late.session).unwrap();
    world.pass(2000);
    assert!(matches!(
        late.commit(&world, 1, old),
        Err(Error::Refused(_))
    ));
    assert_eq!(layers(&world), 1);
    world.books();
}

#[test]
fn what_is_not_staged_whole_is_not_committed() {
    let world = World::new(64);
    let mut puller = Puller::new(&world);
    let fence = puller.hold(&world, 1);
    let refused = puller.commit(&world, 1, fence);
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    let index = world.put_index(puller.pull, 5).unwrap();
    world
        .reserve(puller.pull, &[super::world::index_pack(5)])
        .unwrap();
    let head = v1::LayerHead {
        pull: Some(puller.pull),
        layer: Some(v1::Layer {
            diff_id: digest(b'l', 1).to_vec(),
            index: Some(index),
            ..Default::default()
        }),
    };
    let mut upload = world.engine.begin_layer(&head).unwrap();
    let refused = puller.commit(&world, 1, fence);
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    assert_eq!(layers(&world), 0);
    // The claim is as it was.
    world.engine.finish_layer(&mut upload).unwrap();
    puller.commit(&world, 1, fence).unwrap();
    assert_eq!(layers(&world), 1);
    world.books();
}

#[test]
fn a_lost_answer_is_given_again() {
    let world = World::new(64);
    let mut puller = Puller::new(&world);
    let fence = puller.hold(&world, 1);
    world.stage(puller.pull, &layer(1, 1)).unwrap();
    let reply = puller.commit(&world, 1, fence).unwrap();
    assert_eq!(puller.commit(&world, 1, fence).unwrap(), reply);
    world.commit(puller.pull, "a", 1, 1, &[1]).unwrap();
    let named = Puller::new(&world);
    let reply = named.name(&world, "b", 1).unwrap();
    assert_eq!(named.name(&world, "b", 1).unwrap(), reply);
    let other = named.name(&world, "c", 1);
    assert!(matches!(other, Err(Error::Refused(_))), "{other:?}");
}

#[test]
fn an_image_of_layers_from_several_pulls_is_as_one_from_one() {
    let world = World::new(64);
    let all = [layer(1, 2), layer(2, 1), layer(3, 3)];
    world.pull("a", 1, &all).unwrap();
    let (alone, books) = (world.snapshot(), world.books());
    let world = World::new(64);
    let (mut first, mut second) = (Puller::new(&world), Puller::new(&world));
    first.fetch(&world, &all[0]);
    second.fetch(&world, &all[1]);
    first.fetch(&world, &all[2]);
    for (puller, theirs) in [(&first, 2), (&second, 1), (&second, 3)] {
        assert!(puller.finds(&world, theirs));
    }
    world.commit(first.pull, "a", 1, 1, &[1, 2, 3]).unwrap();
    let (images, shown) = world.snapshot();
    assert_eq!((images, shown.len()), (alone.0, alone.1.len()));
    second.name(&world, "b", 1).unwrap();
    assert_eq!(world.names().len(), 2);
    assert_eq!(world.books(), books);
    assert_eq!(world.engine.status().unwrap().pulls.len(), 0);
}

#[test]
fn a_name_is_given_to_what_is_there_and_whole() {
    let world = World::new(64);
    let puller = Puller::new(&world);
    let none = puller.name(&world, "b", 1);
    assert!(matches!(none, Err(Error::NotFound(_))), "{none:?}");
    world.pull("a", 1, &[layer(1, 1)]).unwrap();
    world.pull("other", 2, &[layer(2, 1)]).unwrap();
    // It can still be asked, for the pull goes on.
    puller.name(&world, "other", 1).unwrap();
    let images = world.snapshot().0;
    let moved = images.iter().filter(|image| image.tag == "other");
    let manifests: Vec<_> = moved.map(|image| image.manifest.clone()).collect();
    assert_eq!(manifests, [digest(b'm', 1).to_vec()]);
    assert_eq!(layers(&world), 1, "nobody names the other image any more");
    // Content that was lost is brought back first.
    world.pass(6000);
    world.donor("d", 2, &[64]);
    let puller = Puller::new(&world);
    let partial = puller.name(&world, "b", 1);
    assert!(matches!(partial, Err(Error::NotFound(_))), "{partial:?}");
}

#[test]
fn an_image_is_committed_once_by_those_who_claim_it() {
    let world = World::new(64);
    let (mut first, mut second) = (Puller::new(&world), Puller::new(&world));
    let image = Key::Image(digest(b'm', 1));
    let Reply::Held { fence } = first.take(&world, image.clone()) else {
        panic!("nobody else wants it");
    };
    assert_eq!(
        second.take(&world, image.clone()),
        Reply::Waiting { ahead: 1 }
    );
    world.stage(first.pull, &layer(1, 1)).unwrap();
    world
        .reserve(first.pull, &[super::world::index_pack(1)])
        .unwrap();
    world.put_index(first.pull, 1).unwrap();
    let mut request = world.commit_request(first.pull, "a", 1, 1, &[1]);
    request.fence = fence + 1;
    let refused = world.engine.commit(&request);
    assert!(matches!(refused, Err(Error::Fenced(_))), "{refused:?}");
    request.fence = fence;
    world.engine.commit(&request).unwrap();
    let news = Heard::News {
        key: image,
        fence: None,
    };
    assert_eq!(second.heard.try_recv(), Ok(news));
    second.name(&world, "b", 1).unwrap();
    assert_eq!(world.names().len(), 2);
    world.books();
}
