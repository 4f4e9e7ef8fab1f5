//! Locks over the wire: sessions of pulls, and the list.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/common.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Daemon, begin_of};
use harbour_metad_client::{
    Error, LockSession,
    v1::{self, LockOutcome, lock_event::Event},
};

const LONG: Duration = Duration::from_secs(10);

fn layer(number: u32) -> String {
    let digest = common::hash("layer", number);
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("layer:{digits}")
}

async fn any(session: &mut LockSession) -> Event {
    tokio::time::timeout(LONG, session.next())
        .await
        .expect("nothing came")
        .unwrap()
}

/// What comes next, other than how far a holder is.
async fn next(session: &mut LockSession) -> Event {
    loop {
        match any(session).await {
            Event::Progress(_) => {}
            other => return other,
        }
    }
}

/// The reply to the only question that is open.
async fn reply(session: &mut LockSession, id: u64) -> v1::LockReply {
    match next(session).await {
        Event::Reply(reply) if reply.id == id => reply,
        other => panic!("{other:?}"),
    }
}

async fn acquire(session: &mut LockSession, key: String, wait: bool) -> v1::LockReply {
    let id = session.acquire(key, false, wait).await.unwrap();
    reply(session, id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_goes_from_one_client_to_the_next() {
    let daemon = Daemon::start(|_| {}).await;
    let (one, other) = (daemon.client().await, daemon.client().await);
    let (first, second) = (begin_of(&one, "a").await, begin_of(&other, "b").await);
    let mut holder = one.lock_session(first).await.unwrap();
    let mut waiter = other.lock_session(second).await.unwrap();
    let held = acquire(&mut holder, layer(1), true).await;
    assert_eq!(held.outcome(), LockOutcome::Held);
    let busy = acquire(&mut waiter, layer(1), false).await;
    assert_eq!(busy.outcome(), LockOutcome::Busy);
    let waiting = acquire(&mut waiter, layer(1), true).await;
    assert_eq!(
        (waiting.outcome(), waiting.ahead),
        (LockOutcome::Waiting, 1)
    );
    let renewed = holder.renew().await.unwrap();
    assert_eq!(
        reply(&mut holder, renewed).await.outcome(),
        LockOutcome::Done
    );
    let listed = one.list_locks().await.unwrap();
    let seen: Vec<_> = listed
        .iter()
        .map(|l| (&*l.what, l.fence > 0, l.exclusive))
        .collect();
    assert_eq!(seen, [("a", true, true), ("b", false, true)]);
    assert!(listed.iter().all(|lock| lock.key == layer(1)));
    // Ctrl-C of a pull.
    one.abort(first).await.unwrap();
    match next(&mut waiter).await {
        Event::News(news) => assert!(news.key == layer(1) && news.fence > held.fence),
        other => panic!("{other:?}"),
    }
    let over = tokio::time::timeout(LONG, holder.next())
        .await
        .expect("it ends");
    assert!(matches!(over, Err(Error::Unavailable { .. })), "{over:?}");
    let id = waiter.release(layer(1)).await.unwrap();
    assert_eq!(reply(&mut waiter, id).await.outcome(), LockOutcome::Done);
    assert!(one.list_locks().await.unwrap().is_empty());
    daemon.stop().await;
}

/// Who waits is told who holds it and how far that one is; what anyone else says of it is passed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_is_watched_by_those_in_line() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    let (first, second) = (begin_of(&client, "a").await, begin_of(&client, "b").await);
    let mut holder = client.lock_session(first).await.unwrap();
    let mut waiter = client.lock_session(second).await.unwrap();
    acquire(&mut holder, layer(1), true).await;
    let waiting = acquire(&mut waiter, layer(1), true).await;
    assert_eq!(waiting.outcome(), LockOutcome::Waiting);
    let progress = |event: Event| match event {
        Event::Progress(of) => {
            assert_eq!((&of.key, of.pull), (&layer(1), first.pull));
            (of.done_bytes, of.total_bytes)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(progress(any(&mut waiter).await), (0, 0));
    waiter.report(layer(1), 7, 8);
    holder.report(layer(1), 3, 8);
    assert_eq!(progress(any(&mut waiter).await), (3, 8));
    let listed = client.list_locks().await.unwrap();
    let seen: Vec<_> = listed
        .iter()
        .map(|l| (&*l.what, l.done_bytes, l.total_bytes))
        .collect();
    assert_eq!(seen, [("a", 3, 8), ("b", 0, 0)]);
    // What the one before said is not said of its successor.
    client.abort(first).await.unwrap();
    assert!(matches!(any(&mut waiter).await, Event::News(news) if news.fence > 0));
    let listed = client.list_locks().await.unwrap();
    assert_eq!((&*listed[0].what, listed[0].total_bytes), ("b", 0));
    waiter.report("no key".into(), 1, 2);
    let over = tokio::time::timeout(LONG, waiter.next()).await.unwrap();
    assert!(over.unwrap_err().to_string().contains("is no key"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_nobody_and_keys_of_nothing_are_refused() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    let pull = begin_of(&client, "a").await;
    let forged = v1::PullRef {
        token: pull.token + 1,
        ..pull
    };
    for wrong in [forged, v1::PullRef { pull: 77, token: 1 }] {
        let error = client.lock_session(wrong).await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    for key in ["", "layer:12", "pack:00", "name:\n", &"x".repeat(1 << 16)] {
        let mut session = client.lock_session(pull).await.unwrap();
        session.acquire(key.to_owned(), false, true).await.unwrap();
        let over = tokio::time::timeout(LONG, session.next()).await.unwrap();
        let error = over.unwrap_err().to_string();
        assert!(error.contains("is no key"), "{error}");
    }
    // The pull is none the worse for it.
    let mut session = client.lock_session(pull).await.unwrap();
    let held = acquire(&mut session, "name:r/p:t".into(), true).await;
    assert_eq!(held.outcome(), LockOutcome::Held);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_take_turns() {
    const CLIENTS: usize = 50;
    const TURNS: usize = 20;
    let daemon = Daemon::start(|_| {}).await;
    let counter = std::sync::Arc::new(std::sync::Mutex::new((0_u64, 0)));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..CLIENTS {
        let client = daemon.client().await;
        let counter = counter.clone();
        tasks.spawn(async move {
            let pull = begin_of(&client, &number.to_string()).await;
            let mut session = client.lock_session(pull).await.unwrap();
            for _ in 0..TURNS {
                let reply = acquire(&mut session, layer(0), true).await;
                let fence = match reply.outcome() {
                    LockOutcome::Held => reply.fence,
                    LockOutcome::Waiting => match next(&mut session).await {
                        Event::News(news) => news.fence,
                        other => panic!("{other:?}"),
                    },
                    other => panic!("{other:?}"),
                };
                {
                    let mut counter = counter.lock().unwrap();
                    assert!(fence > counter.0, "tokens grow with every grant");
                    *counter = (fence, counter.1 + 1);
                }
                let id = session.release(layer(0)).await.unwrap();
                reply_done(&mut session, id).await;
            }
        });
    }
    while let Some(ended) = tokio::time::timeout(6 * LONG, tasks.join_next())
        .await
        .expect("all are served")
    {
        ended.unwrap();
    }
    assert_eq!(counter.lock().unwrap().1, CLIENTS * TURNS);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_in_line_does_not_wait_long_for_one_that_died() {
    let daemon = Daemon::start(|_| {}).await;
    let (one, other) = (daemon.client().await, daemon.client().await);
    let second = begin_of(&other, "b").await;
    let mut waiter = other.lock_session(second).await.unwrap();
    for way in ["dies", "closes"] {
        let first = begin_of(&one, "a").await;
        let mut holder = one.lock_session(first).await.unwrap();
        let held = acquire(&mut holder, layer(1), true).await;
        assert_eq!(held.outcome(), LockOutcome::Held);
        let waiting = acquire(&mut waiter, layer(1), true).await;
        assert_eq!(waiting.outcome(), LockOutcome::Waiting);
        let began = Instant::now();
        match way {
            "dies" => drop(holder),
            _ => tokio::time::timeout(LONG, holder.close())
                .await
                .expect("it is answered")
                .unwrap(),
        }
        match next(&mut waiter).await {
            Event::News(news) => assert!(news.fence > held.fence),
            other => panic!("{other:?}"),
        }
        let took = began.elapsed();
        let renewed = one.renew(first).await;
        if way == "dies" {
            // A full lease would be fifteen seconds.
            let soon = Duration::from_millis(1900)..Duration::from_secs(6);
            assert!(soon.contains(&took), "{took:?}");
            assert!(matches!(renewed, Err(Error::Refused { .. })), "{renewed:?}");
        } else {
            assert!(took < Duration::from_secs(1), "{took:?}");
            renewed.unwrap();
        }
        let id = waiter.release(layer(1)).await.unwrap();
        reply_done(&mut waiter, id).await;
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_opens_a_session_again_keeps_its_locks() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    let pull = begin_of(&client, "a").await;
    let mut session = client.lock_session(pull).await.unwrap();
    let fence = acquire(&mut session, layer(1), true).await.fence;
    for _ in 0..2 {
        drop(session);
        tokio::time::sleep(Duration::from_millis(500)).await;
        session = client.lock_session(pull).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(acquire(&mut session, layer(1), true).await.fence, fence);
    }
    daemon.stop().await;
}

async fn reply_done(session: &mut LockSession, id: u64) {
    assert_eq!(reply(session, id).await.outcome(), LockOutcome::Done);
}
