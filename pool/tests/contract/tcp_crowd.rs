//! Strangers, greedy readers and holders of wrong tokens at a donor's door to the network.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use harbour_pool::{
    donor::DonorConfig,
    tcp::{
        TcpTransport,
        frames::{
            Answer, GREETING_LEN_BYTES, Greeting, HEAD_LEN_BYTES, Hello, Purpose, Refusal,
            data::{REQUEST_LEN_BYTES, Request, Way},
        },
    },
    token::{Proof, RegionKey, Right, Token},
    transport::{Access, RegionId, TransportError},
};

use crate::{
    subjects::{Listening as _, Threaded, loopback},
    suite::{Subject, read, soon, write},
};

fn donor(change: impl FnOnce(&mut DonorConfig)) -> (Threaded, SocketAddr, Vec<RegionKey>) {
    let donor = Threaded::with(|config| {
        config.listen = loopback();
        change(config);
    });
    let (sockets, keys) = donor.tcp().unwrap();
    (donor, sockets[0], keys)
}

fn connect(
    at: SocketAddr,
    access: Access,
    keys: &[RegionKey],
) -> Result<TcpTransport, TransportError> {
    TcpTransport::connect(at, None, 0, access, keys, soon())
}

fn knock(at: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(at).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
}

fn hear_greeting(stream: &mut TcpStream) -> Greeting {
    let mut greeting = [0; GREETING_LEN_BYTES];
    stream.read_exact(&mut greeting).unwrap();
    Greeting::parse(&greeting).unwrap()
}

/// What the donor answers; `None` when it hangs up.
fn hear(stream: &mut TcpStream) -> Option<Answer> {
    let mut answer = vec![0; HEAD_LEN_BYTES];
    stream.read_exact(&mut answer).ok()?;
    answer.resize(Answer::len(&answer).unwrap(), 0);
    stream.read_exact(&mut answer[HEAD_LEN_BYTES..]).unwrap();
    Some(Answer::parse(&answer).unwrap())
}

fn hello(greeting: &Greeting, key: &RegionKey) -> Hello {
    let proof = Proof::new(
        &key.read.unwrap(),
        &greeting.nonce,
        key.region,
        Right::Read,
        greeting.epoch,
    );
    Hello {
        purpose: Purpose::Data,
        access: Access::Read,
        epoch: greeting.epoch,
        proofs: vec![(key.region, Right::Read, proof)],
    }
}

/// A raw connection that was welcomed.
fn admitted(at: SocketAddr, key: &RegionKey) -> TcpStream {
    let mut stream = knock(at);
    let greeting = hear_greeting(&mut stream);
    stream.write_all(&hello(&greeting, key).encode()).unwrap();
    assert!(matches!(hear(&mut stream), Some(Answer::Welcome { .. })));
    stream
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = soon();
    while !holds() {
        assert!(Instant::now() < limit, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn ten_thousand_strangers_do_not_disturb_a_reader() {
    let (subject, at, keys) = donor(|config| config.handshake_timeout = Duration::from_secs(1));
    write(
        &connect(at, Access::ReadWrite, &keys).unwrap(),
        0,
        0,
        &[42; 4096],
    )
    .unwrap();
    // Of another address than the crowd: what that may take is bounded for each.
    let own = subject.tcp().unwrap().0[1];
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let kept = connect(own, Access::Read, &keys).unwrap();
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(read(&kept, 0, 0, 4096).unwrap(), [42; 4096]);
                let fresh = connect(own, Access::Read, &keys).unwrap();
                assert_eq!(read(&fresh, 0, 0, 16).unwrap(), [42; 16]);
                rounds += 1;
            }
            rounds
        });
        let mut silent = std::collections::VecDeque::new();
        for stranger in 0..10_000_u32 {
            // The kernel's own queue may be full for a moment.
            let Ok(mut stream) = TcpStream::connect_timeout(&at, Duration::from_secs(5)) else {
                continue;
            };
            match stranger % 3 {
                0 => drop(stream.write_all(&[stranger as u8; 100])),
                1 => drop(stream.write_all(b"HRBRTCP\0\x01\0\x02\0")),
                _ => {}
            }
            silent.push_back(stream);
            // Descriptors of this process are bounded too.
            if silent.len() > 600 {
                silent.pop_front();
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 10);
    });
    eventually("slots are still held", || {
        subject.server(|server| server.stats().readers) <= 1
    });
    assert!(subject.server(|server| server.stats().turned_away) > 5000);
    assert!(connect(at, Access::Read, &keys).is_ok());
}

#[test]
fn a_reader_that_never_reads_is_hung_up_on_and_holds_nobody() {
    let (subject, at, keys) = donor(|config| config.tcp.stall_timeout = Duration::from_millis(300));
    let honest = connect(at, Access::Read, &keys).unwrap();
    let greedy: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = admitted(at, &keys[0]);
            let asked: Vec<_> = (1..=64)
                .flat_map(|id| {
                    let request = Request {
                        id,
                        way: Way::Read,
                        region: RegionId(0),
                        offset: 0,
                        len: 1 << 20,
                    };
                    request.encode()
                })
                .collect();
            stream.write_all(&asked).unwrap();
            stream
        })
        .collect();
    let start = Instant::now();
    while subject.server(|server| server.stats().readers) > 1 {
        assert_eq!(read(&honest, 0, 0, 1 << 20).unwrap().len(), 1 << 20);
        assert!(start.elapsed() < Duration::from_secs(20), "still held");
    }
    drop(greedy);
}

#[test]
fn half_a_request_is_not_waited_for_without_end() {
    let (subject, at, keys) = donor(|config| config.tcp.stall_timeout = Duration::from_millis(200));
    let mut stream = admitted(at, &keys[0]);
    stream.write_all(&[1; REQUEST_LEN_BYTES / 2]).unwrap();
    eventually("half a request keeps its slot", || {
        subject.server(|server| server.stats().readers) == 0
    });
}

#[test]
fn garbage_after_the_welcome_ends_the_connection() {
    let (_subject, at, keys) = donor(|_| {});
    let good = Request {
        id: 1,
        way: Way::Read,
        region: RegionId(0),
        offset: 0,
        len: 8,
    };
    for bytes in [
        [0xFF; REQUEST_LEN_BYTES],
        Request { id: 2, ..good }.encode(),
    ] {
        let mut stream = admitted(at, &keys[0]);
        stream.write_all(&bytes).unwrap();
        let mut rest = Vec::new();
        let _end = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{rest:?}");
    }
}

#[test]
fn strangers_are_told_why() {
    let (_subject, at, keys) = donor(|_| {});
    type Change = fn(Hello) -> Vec<u8>;
    let cases: [(&str, Change, Refusal); 5] = [
        ("garbage", |_| vec![9; 100], Refusal::Malformed),
        (
            "another version",
            |hello| {
                let mut bytes = hello.encode();
                bytes[8] = 2;
                bytes
            },
            Refusal::Version,
        ),
        (
            "a proof of nothing",
            |mut hello| {
                hello.proofs[0].2 = Proof([0; 32]);
                hello.encode()
            },
            Refusal::Token,
        ),
        (
            "a right that was not proved",
            |mut hello| {
                hello.proofs[0].1 = Right::Write;
                hello.encode()
            },
            Refusal::Token,
        ),
        (
            "RDMA where there is none",
            |hello| {
                Hello {
                    purpose: Purpose::Verbs(vec![1]),
                    ..hello
                }
                .encode()
            },
            Refusal::Verbs,
        ),
    ];
    for (what, change, refusal) in cases {
        let mut stream = knock(at);
        let greeting = hear_greeting(&mut stream);
        stream
            .write_all(&change(hello(&greeting, &keys[0])))
            .unwrap();
        assert_eq!(hear(&mut stream), Some(Answer::Refused(refusal)), "{what}");
        assert_eq!(hear(&mut stream), None, "{what}");
    }
    // What was proved on one connection is worth nothing on another.
    let mut first = knock(at);
    let overheard = hello(&hear_greeting(&mut first), &keys[0]).encode();
    let mut second = knock(at);
    hear_greeting(&mut second);
    second.write_all(&overheard).unwrap();
    assert_eq!(hear(&mut second), Some(Answer::Refused(Refusal::Token)));
}

#[test]
fn tokens_open_what_they_are_for_and_nothing_else() {
    let (_subject, at, keys) = donor(|_| {});
    let wrong = RegionKey {
        read: Some(Token([7; 32])),
        ..keys[0]
    };
    let none = RegionKey {
        region: RegionId(0),
        read: None,
        write: None,
    };
    for keys in [&[wrong][..], &[wrong, keys[1]], &[none], &[]] {
        let error = connect(at, Access::Read, keys).unwrap_err();
        assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    }
    // One region of two.
    let one = connect(at, Access::ReadWrite, &keys[..1]).unwrap();
    write(&one, 0, 0, &[1]).unwrap();
    let error = read(&one, 1, 0, 1).unwrap_err();
    assert!(
        matches!(error, TransportError::OutOfBounds { .. }),
        "{error:?}"
    );
    // To read alone, on a connection that would write.
    let reading = RegionKey {
        write: None,
        ..keys[0]
    };
    let reader = connect(at, Access::ReadWrite, &[reading]).unwrap();
    assert_eq!(read(&reader, 0, 0, 1).unwrap(), [1]);
    let error = write(&reader, 0, 0, &[2]).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    // A region that is lent no more is passed over, not held against whoever knew it.
    let stale = RegionKey {
        region: RegionId(40),
        ..keys[0]
    };
    let still = connect(at, Access::Read, &[keys[0], stale]).unwrap();
    assert_eq!(read(&still, 0, 0, 1).unwrap(), [1]);
}

#[test]
fn slots_are_bounded_for_all_and_for_each_address() {
    for by_address in [false, true] {
        let (_subject, at, keys) = donor(|config| {
            if by_address {
                config.tcp.max_per_address = 3;
            } else {
                config.tcp.max_connections = 3;
            }
        });
        let mut held: Vec<_> = (0..3)
            .map(|_| connect(at, Access::Read, &keys).unwrap())
            .collect();
        let error = connect(at, Access::Read, &keys).unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
        held.pop();
        eventually("a slot stays taken", || {
            connect(at, Access::Read, &keys).is_ok()
        });
        for transport in held {
            read(&transport, 0, 0, 8).unwrap();
        }
    }
}

#[test]
fn a_connection_that_lay_idle_too_long_is_replaced_unnoticed() {
    let (subject, at, keys) = donor(|config| config.tcp.idle_timeout = Duration::from_millis(100));
    let transport = connect(at, Access::ReadWrite, &keys).unwrap();
    for round in 0..2 {
        write(&transport, 0, 0, &[round]).unwrap();
        eventually("an idle connection keeps its slot", || {
            subject.server(|server| server.stats().readers) == 0
        });
        assert_eq!(read(&transport, 0, 0, 1).unwrap(), [round]);
    }
}

#[test]
fn many_threads_share_a_handful_of_connections() {
    let (subject, at, keys) = donor(|_| {});
    let transport = connect(at, Access::ReadWrite, &keys).unwrap();
    thread::scope(|scope| {
        for thread in 0..16_u8 {
            let transport = &transport;
            scope.spawn(move || {
                let offset = u64::from(thread) * 65_536;
                for round in 0..50 {
                    write(transport, 0, offset, &[thread ^ round; 5000]).unwrap();
                    assert_eq!(
                        read(transport, 0, offset, 5000).unwrap(),
                        [thread ^ round; 5000]
                    );
                }
            });
        }
    });
    assert!(subject.server(|server| server.stats().readers) <= 4);
}

#[test]
fn an_epoch_that_ends_takes_nothing_from_those_that_come() {
    let (subject, at, old) = donor(|_| {});
    let before = connect(at, Access::Read, &old).unwrap();
    let epoch = subject.renew();
    let error = read(&before, 0, 0, 1).unwrap_err();
    assert!(
        matches!(error, TransportError::WrongEpoch { actual, .. } if actual == epoch),
        "{error:?}"
    );
    // Old tokens open nothing of the new epoch.
    let error = connect(at, Access::Read, &old).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    let keys = subject.tcp().unwrap().1;
    assert_eq!(
        read(&connect(at, Access::Read, &keys).unwrap(), 0, 0, 1).unwrap(),
        [0]
    );
}
