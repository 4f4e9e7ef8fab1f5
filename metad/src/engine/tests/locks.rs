//! Locks of pulls: over deaths, restarts and failures.

use harbour_metad_client::v1;
use tokio::sync::mpsc;

use super::{
    super::{Ask, Effects, Heard, Session, Wish, locks::Claims},
    world::{World, layer},
};
use crate::{
    error::Error,
    locks::{Key, Mode, Reply, Request},
    store::{Sync, Tx},
};

/// A pull with a session.
struct Puller {
    pull: v1::PullRef,
    session: Session,
    heard: mpsc::Receiver<Heard>,
}

const ONE: Key = Key::Layer([1; 32]);
const TWO: Key = Key::Layer([2; 32]);

fn puller(world: &World) -> Puller {
    listen(world, world.begin())
}

fn listen(world: &World, pull: v1::PullRef) -> Puller {
    let (send, heard) = mpsc::channel(16);
    let session = world.engine.listen(&pull, send).unwrap();
    Puller {
        pull,
        session,
        heard,
    }
}

impl Puller {
    fn ask(&self, id: u64, wish: Wish) -> Ask {
        let session = self.session;
        Ask { session, id, wish }
    }

    fn take(&self, id: u64, key: Key) -> Ask {
        let mode = Mode::Exclusive;
        let wait = true;
        self.ask(id, Wish::Acquire { key, mode, wait })
    }

    /// All that it heard since it was asked last.
    fn news(&mut self) -> Vec<Heard> {
        std::iter::from_fn(|| self.heard.try_recv().ok()).collect()
    }

    /// The token of the grant that it heard of, and nothing else.
    fn granted(&mut self) -> u64 {
        match self.news()[..] {
            [
                Heard::Reply {
                    reply: Reply::Held { fence },
                    ..
                },
            ]
            | [
                Heard::News {
                    fence: Some(fence), ..
                },
            ] => fence,
            ref other => panic!("{other:?}"),
        }
    }

    fn waits(&mut self) {
        let news = self.news();
        let waiting = |heard: &Heard| {
            matches!(
                heard,
                Heard::Reply {
                    reply: Reply::Waiting { .. },
                    ..
                }
            )
        };
        assert!(news.len() == 1 && news.iter().all(waiting), "{news:?}");
    }

    fn is_over(&self) -> bool {
        self.heard.is_closed()
    }
}

/// Key, whose, and whether it is held, as listed.
fn listed(world: &World) -> Vec<(String, u64, bool)> {
    let locks = world.engine.list_locks().into_iter();
    locks
        .map(|lock| (lock.key, lock.pull, lock.fence > 0))
        .collect()
}

#[test]
fn locks_go_on_when_their_pull_ends_however_it_ends() {
    let world = World::new(64);
    for way in ["release", "abort", "commit", "silence"] {
        let (mut first, mut second) = (puller(&world), puller(&world));
        let asks = vec![first.take(1, ONE), second.take(2, ONE)];
        world.engine.claim(asks).unwrap();
        let fence = first.granted();
        second.waits();
        match way {
            "release" => {
                let release = first.ask(3, Wish::Release { key: ONE });
                world.engine.claim(vec![release]).unwrap();
                let done = Heard::Reply {
                    id: 3,
                    reply: Reply::Done,
                };
                assert_eq!(first.news(), [done]);
            }
            "abort" => world.engine.abort(&first.pull).unwrap(),
            "commit" => {
                world.stage(first.pull, &layer(1, 1)).unwrap();
                world.commit(first.pull, "a", 1, 1, &[1]).unwrap();
            }
            _ => {
                world.pass(10_000);
                world.engine.renew(&second.pull).unwrap();
                world.pass(6_000);
            }
        }
        assert!(second.granted() > fence, "{way}");
        assert_eq!(first.is_over(), way != "release", "{way}");
        let key = ONE.to_string();
        assert_eq!(listed(&world), [(key, second.pull.pull, true)], "{way}");
        world.engine.abort(&first.pull).unwrap();
        world.engine.abort(&second.pull).unwrap();
        assert!(listed(&world).is_empty(), "{way}");
    }
}

#[test]
fn a_renewal_on_the_session_keeps_the_pull() {
    let world = World::new(8);
    let mut puller = puller(&world);
    for id in 0..10 {
        world.pass(5_000);
        let renew = puller.ask(id, Wish::Renew);
        world.engine.claim(vec![renew]).unwrap();
        let reply = Reply::Done;
        assert_eq!(puller.news(), [Heard::Reply { id, reply }]);
    }
    world.engine.renew(&puller.pull).unwrap();
    world.pass(16_000);
    assert!(puller.is_over());
    assert!(matches!(
        world.engine.renew(&puller.pull),
        Err(Error::Refused(_))
    ));
}

#[test]
fn a_restart_knows_who_holds_and_who_waits() {
    let mut world = World::new(8);
    let (mut first, mut second) = (puller(&world), puller(&world));
    let asks = vec![first.take(1, ONE), second.take(1, ONE), second.take(2, TWO)];
    world.engine.claim(asks).unwrap();
    let fence = first.granted();
    let before = listed(&world);
    world.restart();
    assert_eq!(listed(&world), before);
    // Both speak again within the grace; a repetition tells how things stand.
    let mut first = listen(&world, first.pull);
    let second_heard = second.news();
    assert_eq!(second_heard.len(), 2);
    let mut second = listen(&world, second.pull);
    let asks = vec![first.take(7, ONE), second.take(8, ONE)];
    world.engine.claim(asks).unwrap();
    assert_eq!(first.granted(), fence);
    second.waits();
    world.engine.abort(&first.pull).unwrap();
    assert!(second.granted() > fence);
    // Who does not speak loses them, after the grace.
    world.restart();
    world.pass(16_000);
    assert_eq!(listed(&world).len(), 2);
    world.pass(5_000);
    assert!(listed(&world).is_empty());
    assert_eq!(world.engine.status().unwrap().pulls.len(), 0);
}

#[test]
fn a_new_session_takes_the_place_of_the_old() {
    let world = World::new(8);
    let mut old = puller(&world);
    let mut new = listen(&world, old.pull);
    assert!(old.is_over());
    // What the old one had under way is not served any more.
    let asks = vec![old.take(1, ONE), new.take(2, TWO)];
    world.engine.claim(asks).unwrap();
    assert!(old.news().is_empty());
    new.granted();
    assert_eq!(listed(&world).len(), 1);
    // Ending the old one does not end the new one.
    world.engine.hang_up(&[old.session]);
    assert!(!new.is_over());
    world.engine.hang_up(&[new.session]);
    assert!(new.is_over());
    assert_eq!(listed(&world).len(), 1, "locks stay");
}

#[test]
fn a_session_that_is_not_read_ends() {
    let world = World::new(8);
    let mut puller = puller(&world);
    let asks = (0..17).map(|id| puller.ask(id, Wish::Renew)).collect();
    world.engine.claim(asks).unwrap();
    assert_eq!(puller.news().len(), 16);
    assert!(puller.is_over());
}

#[test]
fn a_transaction_that_fails_changes_no_locks() {
    let world = World::new(8);
    let (mut first, mut second) = (puller(&world), puller(&world));
    let asks = vec![first.take(1, ONE), second.take(1, ONE)];
    world.engine.claim(asks).unwrap();
    let fence = first.granted();
    second.waits();
    let before = listed(&world);
    let fails = |_: &Tx<'_>, _: &mut Effects, claims: &mut Claims<'_>| {
        let owner = first.pull.pull;
        claims.apply(Request::Close { owner });
        Err::<(), _>(Error::Exhausted("the disk".into()))
    };
    let mut state = world.engine.lock();
    let failed = world
        .engine
        .change_locked(&mut state, Sync::Process, None, fails);
    assert!(matches!(failed, Err(Error::Exhausted(_))));
    drop(state);
    assert_eq!(listed(&world), before);
    assert!(second.news().is_empty());
    world.engine.abort(&first.pull).unwrap();
    assert!(second.granted() > fence);
}
