#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;

use super::*;

const A: OwnerId = 1;
const B: OwnerId = 2;
const C: OwnerId = 3;
const D: OwnerId = 4;

/// A machine in which four owners have leases until 100.
fn machine() -> Machine<&'static str> {
    let mut machine = Machine::new(10);
    for owner in [A, B, C, D] {
        let until_ms = 100;
        machine.apply(Request::Open { owner, until_ms }, 0);
    }
    machine
}

fn ask(machine: &mut Machine<&'static str>, owner: OwnerId, mode: Mode) -> Reply {
    let (key, wait) = ("k", true);
    let request = Request::Acquire {
        owner,
        key,
        mode,
        wait,
    };
    let reply = machine.apply(request, 0).reply;
    machine.check().unwrap();
    reply
}

fn give_up(machine: &mut Machine<&'static str>, owner: OwnerId, now_ms: u64) -> Vec<OwnerId> {
    let outcome = machine.apply(Request::Release { owner, key: "k" }, now_ms);
    machine.check().unwrap();
    outcome.news.into_iter().map(|news| news.owner).collect()
}

#[test]
fn an_exclusive_holder_is_alone_and_others_are_served_in_turn() {
    let mut machine = machine();
    let Reply::Held { fence } = ask(&mut machine, A, Mode::Exclusive) else {
        panic!("free, and not granted");
    };
    assert!(machine.holds(A, &"k", Mode::Exclusive, fence, 99));
    assert!(
        !machine.holds(A, &"k", Mode::Exclusive, fence, 100),
        "its lease is over"
    );
    assert!(
        !machine.holds(A, &"k", Mode::Exclusive, fence + 1, 99),
        "another token"
    );
    assert!(
        !machine.holds(B, &"k", Mode::Exclusive, fence, 99),
        "somebody else's token"
    );
    assert_eq!(
        ask(&mut machine, B, Mode::Shared),
        Reply::Waiting { ahead: 1 }
    );
    assert_eq!(
        ask(&mut machine, C, Mode::Shared),
        Reply::Waiting { ahead: 2 }
    );
    assert_eq!(
        ask(&mut machine, D, Mode::Exclusive),
        Reply::Waiting { ahead: 3 }
    );
    // Asked again, each hears the same.
    assert_eq!(ask(&mut machine, A, Mode::Exclusive), Reply::Held { fence });
    assert_eq!(
        ask(&mut machine, C, Mode::Shared),
        Reply::Waiting { ahead: 2 }
    );
    assert_eq!(ask(&mut machine, C, Mode::Exclusive), Reply::OtherMode);
    assert_eq!(give_up(&mut machine, A, 1), [B, C], "both readers at once");
    assert!(give_up(&mut machine, A, 1).is_empty(), "given up before");
    assert!(give_up(&mut machine, B, 2).is_empty());
    assert_eq!(give_up(&mut machine, C, 3), [D]);
}

#[test]
fn a_stream_of_readers_does_not_keep_a_writer_waiting() {
    let mut machine = machine();
    assert!(matches!(
        ask(&mut machine, A, Mode::Shared),
        Reply::Held { .. }
    ));
    assert!(matches!(
        ask(&mut machine, B, Mode::Shared),
        Reply::Held { .. }
    ));
    assert_eq!(
        ask(&mut machine, C, Mode::Exclusive),
        Reply::Waiting { ahead: 2 }
    );
    assert_eq!(
        ask(&mut machine, D, Mode::Shared),
        Reply::Waiting { ahead: 3 },
        "would overtake"
    );
    let request = Request::Acquire {
        owner: D,
        key: "other",
        mode: Mode::Shared,
        wait: false,
    };
    assert!(matches!(
        machine.apply(request, 0).reply,
        Reply::Held { .. }
    ));
    // A writer that gives up waiting makes room for those behind it.
    assert_eq!(give_up(&mut machine, C, 1), [D]);
}

#[test]
fn an_owner_that_is_not_heard_of_loses_all_and_is_told() {
    let mut machine = machine();
    let Reply::Held { fence } = ask(&mut machine, A, Mode::Exclusive) else {
        panic!("free, and not granted");
    };
    assert_eq!(
        ask(&mut machine, B, Mode::Exclusive),
        Reply::Waiting { ahead: 1 }
    );
    assert_eq!(
        ask(&mut machine, C, Mode::Exclusive),
        Reply::Waiting { ahead: 2 }
    );
    machine.apply(
        Request::Renew {
            owner: C,
            until_ms: 200,
        },
        50,
    );
    let outcome = machine.apply(Request::Tick, 100);
    machine.check().unwrap();
    // B's lease ended at the same moment: it is not served.
    let granted: Vec<OwnerId> = outcome.news.iter().map(|news| news.owner).collect();
    assert_eq!(granted, [C]);
    assert!(outcome.news[0].fence > Some(fence));
    for owner in [A, B, D] {
        let ended = Change::Ended {
            owner,
            silent: true,
        };
        assert!(outcome.changes.contains(&ended), "{owner}");
    }
    assert!(
        !machine.holds(A, &"k", Mode::Exclusive, fence, 100),
        "it is late"
    );
    assert_eq!(ask(&mut machine, A, Mode::Exclusive), Reply::Gone);
    let until_ms = 300;
    assert_eq!(
        machine
            .apply(Request::Renew { owner: A, until_ms }, 100)
            .reply,
        Reply::Gone
    );
    assert_eq!(machine.next_end_ms(), Some(200));
    machine.move_on(50);
    assert!(machine.lives(C, 249) && !machine.lives(C, 250));
    machine.check().unwrap();
}

#[test]
fn an_owner_that_is_taken_for_dead_ends_soon_unless_it_speaks() {
    for speaks in [false, true] {
        let mut machine = machine();
        ask(&mut machine, A, Mode::Exclusive);
        ask(&mut machine, B, Mode::Exclusive);
        let owner = A;
        let shorten = |until_ms| Request::Shorten { owner, until_ms };
        assert_eq!(machine.apply(shorten(30), 10).reply, Reply::Done);
        assert_eq!(machine.apply(shorten(50), 11).reply, Reply::Done);
        assert_eq!(machine.until_ms(A), Some(30), "never longer");
        if speaks {
            let until_ms = 90;
            machine.apply(Request::Renew { owner, until_ms }, 29);
        }
        let outcome = machine.apply(Request::Tick, 30);
        machine.check().unwrap();
        assert_eq!(machine.lives(A, 30), speaks);
        let granted: Vec<OwnerId> = outcome.news.iter().map(|news| news.owner).collect();
        assert_eq!(granted, if speaks { vec![] } else { vec![B] });
        let reply = machine.apply(shorten(0), 30).reply;
        assert_eq!(reply, if speaks { Reply::Done } else { Reply::Gone });
    }
}

#[test]
fn all_is_given_up_at_once_and_the_lease_goes_on() {
    let mut machine = machine();
    let take = |owner, key| Request::Acquire {
        owner,
        key,
        mode: Mode::Exclusive,
        wait: true,
    };
    for (owner, key) in [(A, "held"), (B, "held"), (C, "waited"), (A, "waited")] {
        machine.apply(take(owner, key), 0);
    }
    let outcome = machine.apply(Request::ReleaseAll { owner: A }, 1);
    machine.check().unwrap();
    assert_eq!(outcome.reply, Reply::Done);
    let granted: Vec<_> = outcome.news.iter().map(|n| (n.owner, n.key)).collect();
    assert_eq!(granted, [(B, "held")]);
    assert!(machine.lives(A, 99) && machine.list().all(|claim| claim.owner != A));
    let gone = Request::ReleaseAll { owner: 9 };
    assert_eq!(machine.apply(gone, 1).reply, Reply::Gone);
}

#[test]
fn a_commit_counts_under_the_token_and_sends_all_waiters_away() {
    let mut machine = machine();
    let Reply::Held { fence } = ask(&mut machine, A, Mode::Exclusive) else {
        panic!("free, and not granted");
    };
    ask(&mut machine, B, Mode::Exclusive);
    ask(&mut machine, C, Mode::Shared);
    let commit = |owner, fence| Request::Commit {
        owner,
        key: "k",
        fence,
    };
    for (owner, fence, reply) in [
        (A, fence + 1, Reply::Fenced),
        (B, fence, Reply::Fenced),
        (9, fence, Reply::Gone),
    ] {
        let outcome = machine.apply(commit(owner, fence), 1);
        assert_eq!((outcome.reply, outcome.news), (reply, Vec::new()));
    }
    let outcome = machine.apply(commit(A, fence), 1);
    machine.check().unwrap();
    let news = |owner| News {
        owner,
        key: "k",
        fence: None,
    };
    assert_eq!(outcome.news, [news(B), news(C)]);
    assert_eq!(machine.list().count(), 0);
    assert_eq!(machine.apply(commit(A, fence), 1).reply, Reply::Fenced);
    // One who comes later finds it free.
    assert!(matches!(
        ask(&mut machine, D, Mode::Exclusive),
        Reply::Held { .. }
    ));
}

#[test]
fn what_is_granted_and_given_up_by_one_request_is_no_news() {
    let mut machine = machine();
    let until_ms = 200;
    machine.apply(Request::Renew { owner: B, until_ms }, 0);
    ask(&mut machine, A, Mode::Exclusive);
    ask(&mut machine, B, Mode::Exclusive);
    // By now A's lease is over, so B was granted the key before it gives it up.
    let outcome = machine.apply(Request::Release { owner: B, key: "k" }, 100);
    machine.check().unwrap();
    assert_eq!((outcome.reply, outcome.news), (Reply::Done, Vec::new()));
    assert_eq!(machine.list().count(), 0);
}

#[test]
fn who_does_not_want_to_wait_is_told_so_and_claims_nothing() {
    let mut machine = machine();
    assert!(matches!(
        ask(&mut machine, A, Mode::Shared),
        Reply::Held { .. }
    ));
    let request = Request::Acquire {
        owner: B,
        key: "k",
        mode: Mode::Exclusive,
        wait: false,
    };
    let outcome = machine.apply(request, 0);
    assert_eq!((outcome.reply, outcome.changes), (Reply::Busy, Vec::new()));
    assert!(give_up(&mut machine, A, 0).is_empty());
    assert_eq!(machine.list().count(), 0);
}

#[test]
fn claims_are_bounded() {
    let mut machine: Machine<u64> = Machine::new(0);
    machine.apply(
        Request::Open {
            owner: A,
            until_ms: 9,
        },
        0,
    );
    let claim = |owner, key| Request::Acquire {
        owner,
        key,
        mode: Mode::Exclusive,
        wait: true,
    };
    for key in 0..CLAIMS_PER_OWNER_MAX as u64 {
        assert!(matches!(
            machine.apply(claim(A, key), 0).reply,
            Reply::Held { .. }
        ));
    }
    assert_eq!(machine.apply(claim(A, 1 << 40), 0).reply, Reply::TooMany);
    let others = 10..10 + CLAIMS_PER_KEY_MAX as u64;
    for owner in others.clone() {
        machine.apply(Request::Open { owner, until_ms: 9 }, 0);
        let reply = machine.apply(claim(owner, 0), 0).reply;
        let last = owner + 1 == others.end;
        assert_eq!(reply == Reply::TooMany, last, "{owner}: {reply:?}");
    }
    machine.check().unwrap();
    // All of them at once.
    let outcome = machine.apply(Request::Tick, 9);
    assert!(outcome.news.is_empty());
    assert_eq!(machine, Machine::new(machine.issued()));
}

#[test]
fn what_cannot_have_been_written_is_refused() {
    let row = |owner, ticket, fence| Row {
        key: "k",
        owner,
        mode: Mode::Exclusive,
        ticket,
        fence,
    };
    let restore = |rows: Vec<Row<&'static str>>| Machine::restore(9, [(A, 100), (B, 100)], rows, 0);
    assert!(restore(vec![row(A, 1, Some(1)), row(B, 2, None)]).is_ok());
    for (what, rows) in [
        (
            "two exclusive holders",
            vec![row(A, 1, Some(1)), row(B, 2, Some(2))],
        ),
        ("an owner that is not there", vec![row(C, 1, Some(1))]),
        ("twice", vec![row(A, 1, Some(1)), row(A, 2, None)]),
        ("overtaken", vec![row(A, 1, None), row(B, 2, Some(2))]),
        ("waits for nobody", vec![row(A, 1, None)]),
        ("from the future", vec![row(A, 1, Some(10))]),
        (
            "one ticket for two",
            vec![row(A, 1, Some(1)), row(B, 1, None)],
        ),
    ] {
        assert!(restore(rows).is_err(), "{what}");
    }
}

/// A request of one of four owners about one of three keys.
fn request() -> impl Strategy<Value = (Request<u8>, u64)> {
    let owner = 1..5_u64;
    let mode = prop_oneof![Just(Mode::Shared), Just(Mode::Exclusive)];
    let one = (owner, 0..3_u8, mode, any::<bool>(), 0..12_u32, 1..60_u64).prop_map(
        |(owner, key, mode, wait, what, lease)| match what {
            0 => Request::Tick,
            1 => Request::Close { owner },
            2 => Request::Open {
                owner,
                until_ms: lease,
            },
            3 => Request::Renew {
                owner,
                until_ms: lease,
            },
            4 => Request::Release { owner, key },
            6 => Request::Shorten {
                owner,
                until_ms: lease,
            },
            7 => Request::ReleaseAll { owner },
            // Its token is put in where it is known.
            5 => Request::Commit {
                owner,
                key,
                fence: 0,
            },
            _ => Request::Acquire {
                owner,
                key,
                mode,
                wait,
            },
        },
    );
    (one, prop_oneof![4 => Just(0_u64), 1 => 1..30_u64])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is asked, the machine stays sound; what it says to write down is the machine; tokens
    /// grow; what it says of a claim is so.
    #[test]
    fn any_history_leaves_a_sound_machine_that_can_be_restored(
        requests in prop::collection::vec(request(), 1..200)
    ) {
        let mut machine = Machine::new(0);
        let mut written: std::collections::BTreeMap<(u8, OwnerId), Row<u8>> = Default::default();
        let (mut now, mut newest) = (0, 0);
        for (request, pass) in requests {
            now += pass;
            // Leases are given as lengths.
            let request = match request {
                Request::Open { owner, until_ms } => Request::Open { owner, until_ms: now + until_ms },
                Request::Renew { owner, until_ms } => Request::Renew { owner, until_ms: now + until_ms },
                Request::Shorten { owner, until_ms } => Request::Shorten { owner, until_ms: now + until_ms },
                Request::Commit { owner, key, .. } => {
                    let fence = written.get(&(key, owner)).and_then(|row| row.fence).unwrap_or(0);
                    Request::Commit { owner, key, fence }
                }
                other => other,
            };
            let before = written.clone();
            let outcome = machine.apply(request.clone(), now);
            prop_assert_eq!(machine.check(), Ok(()));
            for change in outcome.changes {
                match change {
                    Change::Put(row) => {
                        if let Some(fence) = row.fence {
                            prop_assert!(fence > newest);
                            newest = fence;
                        }
                        written.insert((row.key, row.owner), row);
                    }
                    Change::Delete { key, owner, ticket } => {
                        let removed = written.remove(&(key, owner));
                        prop_assert_eq!(removed.map(|row| row.ticket), Some(ticket));
                    }
                    Change::Ended { owner, .. } => {
                        prop_assert!(written.keys().all(|(_, other)| *other != owner));
                    }
                }
            }
            for news in &outcome.news {
                let row = written.get(&(news.key, news.owner));
                prop_assert_eq!(row.map(|row| row.fence), news.fence.map(Some));
            }
            if let (Request::Acquire { owner, key, mode, .. }, Reply::Held { fence }) = (&request, &outcome.reply) {
                prop_assert!(machine.holds(*owner, key, *mode, *fence, now));
            }
            if let (Request::Commit { owner, key, fence }, Reply::Done) = (&request, &outcome.reply) {
                let row = before.get(&(*key, *owner));
                prop_assert!(row.is_some_and(|row| (row.mode, row.fence) == (Mode::Exclusive, Some(*fence))));
                prop_assert!(!written.keys().any(|(other, _)| other == key));
            }
            if let (Request::ReleaseAll { owner }, Reply::Done) = (&request, &outcome.reply) {
                prop_assert!(!written.keys().any(|(_, other)| other == owner));
                prop_assert!(machine.lives(*owner, now));
            }
            let owners: Vec<(OwnerId, u64)> = machine.owners().map(|owner| (owner, now + 1)).collect();
            let again = Machine::restore(machine.issued(), owners, written.values().cloned(), now);
            let again = again.map_err(TestCaseError::fail)?;
            let claims = |machine: &Machine<u8>| -> Vec<_> {
                machine.list().map(|l| (*l.key, l.owner, l.mode, l.fence)).collect()
            };
            prop_assert_eq!(claims(&again), claims(&machine));
        }
    }
}
