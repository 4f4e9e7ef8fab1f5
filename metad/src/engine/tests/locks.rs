//! Locks of pulls: over deaths, restarts and failures.

use harbour_metad_client::v1;
use tokio::sync::mpsc;

use super::{
    super::{Ask, Effects, Heard, Session, Wish, locks::Claims},
    world::{Pack, World, layer},
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

    /// All that it heard since it was asked last, other than how far holders are.
    fn news(&mut self) -> Vec<Heard> {
        let heard = std::iter::from_fn(|| self.heard.try_recv().ok());
        heard
            .filter(|heard| !matches!(heard, Heard::Progress { .. }))
            .collect()
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
    // Who does not speak loses them, soon after the grace; who has none keeps its lease.
    let idle = world.begin();
    world.restart();
    world.pass(6_500);
    assert_eq!(listed(&world).len(), 2);
    world.pass(500);
    assert!(listed(&world).is_empty());
    let pulls = |world: &World| world.engine.status().unwrap().pulls.len();
    assert_eq!(pulls(&world), 1);
    world.pass(12_500);
    world.engine.renew(&idle).unwrap();
    world.pass(15_000);
    assert_eq!(pulls(&world), 0);
}

#[test]
fn a_session_that_breaks_ends_its_pull_soon() {
    let world = World::new(64);
    let (mut first, mut second) = (puller(&world), puller(&world));
    let asks = vec![first.take(1, ONE), second.take(2, ONE)];
    world.engine.claim(asks).unwrap();
    let fence = first.granted();
    second.waits();
    world.reserve(first.pull, &[Pack(1, 4096)]).unwrap();
    world.engine.broke(first.session).unwrap();
    assert!(first.is_over());
    world.pass(1_500);
    assert!(second.news().is_empty());
    world.pass(500);
    assert!(second.granted() > fence);
    assert!(matches!(
        world.engine.renew(&first.pull),
        Err(Error::Refused(_))
    ));
    // It may be late all the same: what it was given to write to is not given to others yet.
    let books = world.books();
    assert_eq!((books.reserved, books.quarantined), (0, 4096));
    world.pass(15_000);
    assert_eq!(world.books().quarantined, 0);
}

#[test]
fn who_comes_back_after_its_session_broke_keeps_everything() {
    let world = World::new(8);
    let mut other = puller(&world);
    for way in ["session", "renewal"] {
        let mut first = puller(&world);
        world.engine.renew(&other.pull).unwrap();
        let asks = vec![first.take(1, ONE), other.take(2, ONE)];
        world.engine.claim(asks).unwrap();
        let fence = first.granted();
        other.waits();
        world.engine.broke(first.session).unwrap();
        world.pass(1_500);
        if way == "renewal" {
            world.engine.renew(&first.pull).unwrap();
            world.pass(5_000);
        }
        let mut again = listen(&world, first.pull);
        // News of the broken one that come late end nothing.
        world.engine.broke(first.session).unwrap();
        assert!(!again.is_over());
        world.engine.renew(&other.pull).unwrap();
        world.pass(10_000);
        let take = again.take(3, ONE);
        world.engine.claim(vec![take]).unwrap();
        assert_eq!(again.granted(), fence, "{way}");
        world.engine.abort(&first.pull).unwrap();
        assert!(other.granted() > fence, "{way}");
        let release = other.ask(4, Wish::Release { key: ONE });
        world.engine.claim(vec![release]).unwrap();
        other.news();
    }
}

#[test]
fn who_says_farewell_gives_all_up_and_keeps_its_lease() {
    let world = World::new(8);
    let (mut first, mut second) = (puller(&world), puller(&world));
    let asks = vec![first.take(1, ONE), first.take(2, TWO), second.take(3, ONE)];
    world.engine.claim(asks).unwrap();
    assert_eq!(first.news().len(), 2);
    second.waits();
    let asks = vec![first.ask(4, Wish::Close), first.take(5, TWO)];
    world.engine.claim(asks).unwrap();
    let reply = Reply::Done;
    assert_eq!(first.news(), [Heard::Reply { id: 4, reply }]);
    assert!(first.is_over());
    second.granted();
    assert_eq!(listed(&world).len(), 1, "nothing is claimed behind it");
    // The end of the stream, which comes next, is no death.
    world.engine.broke(first.session).unwrap();
    world.pass(14_500);
    world.engine.renew(&first.pull).unwrap();
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
