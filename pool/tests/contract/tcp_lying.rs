//! Donors that lie over TCP. The reader must say so, in time, take no harm, and go on over a fresh
//! connection once the donor tells the truth.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use harbour_pool::{
    tcp::{
        TcpTransport,
        frames::{
            Answer, Grant, Greeting, HEAD_LEN_BYTES, Hello, Refusal,
            data::{Outcome, REQUEST_LEN_BYTES, Reply, Request},
        },
    },
    token::{RegionKey, Token},
    transport::{Access, Read, RegionId, RegionInfo, Transport, TransportError, Write},
};

use crate::suite::{read, soon};

const MIB: u64 = 1 << 20;
const EPOCH: u64 = 77;

fn keys() -> [RegionKey; 1] {
    [RegionKey {
        region: RegionId(0),
        read: Some(Token([1; 32])),
        write: Some(Token([2; 32])),
    }]
}

fn greeting() -> Greeting {
    Greeting {
        epoch: EPOCH,
        nonce: [5; 32],
    }
}

fn grant(id: u32, read: bool, write: bool) -> Grant {
    Grant {
        info: RegionInfo {
            id: RegionId(id),
            len: 2 * MIB,
            huge_pages: false,
        },
        read,
        write,
    }
}

fn welcome(access: Access) -> Answer {
    Answer::Welcome {
        epoch: EPOCH,
        regions: vec![grant(0, true, access == Access::ReadWrite)],
        payload: Vec::new(),
    }
}

fn hear_hello(peer: &mut TcpStream) -> Option<Hello> {
    let mut hello = vec![0; HEAD_LEN_BYTES];
    peer.read_exact(&mut hello).ok()?;
    hello.resize(Hello::len(&hello).unwrap(), 0);
    peer.read_exact(&mut hello[HEAD_LEN_BYTES..]).ok()?;
    Some(Hello::parse(&hello).unwrap())
}

fn hear_request(peer: &mut TcpStream) -> Option<Request> {
    let mut request = [0; REQUEST_LEN_BYTES];
    peer.read_exact(&mut request).ok()?;
    Some(Request::parse(&request).unwrap())
}

/// Stays until the reader is gone, so that what it sees is the lie and not the end.
fn stay(peer: &mut TcpStream) {
    let _end = peer.read_to_end(&mut Vec::new());
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    (listener, at)
}

/// Connects to a donor that says `greeting` and, after the hello, `answer`.
fn meet(greeting: &[u8], answer: &[u8], wait: Duration) -> TransportError {
    let (listener, at) = listener();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = listener.accept().unwrap().0;
            peer.write_all(greeting).unwrap();
            if hear_hello(&mut peer).is_some() {
                // The reader may be gone already.
                let _sent = peer.write_all(answer);
                stay(&mut peer);
            }
        });
        let deadline = Instant::now() + wait;
        TcpTransport::connect(at, None, EPOCH, Access::Read, &keys(), deadline).unwrap_err()
    })
}

#[test]
fn handshakes() {
    let good = greeting().encode();
    let changed = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        bytes
    };
    let regions = |regions: &[Grant]| Answer::Welcome {
        epoch: EPOCH,
        regions: regions.to_vec(),
        payload: Vec::new(),
    };
    let with_payload = Answer::Welcome {
        epoch: EPOCH,
        regions: Vec::new(),
        payload: vec![1],
    };
    let other_epoch = Answer::Welcome {
        epoch: EPOCH + 1,
        regions: Vec::new(),
        payload: Vec::new(),
    };
    let garbage = vec![7; 64];
    for (what, greeting, answer, reason) in [
        ("no greeting", changed(0, 0), Vec::new(), "magic"),
        ("another version", changed(8, 9), Vec::new(), "version 9"),
        ("garbage", good, garbage, "magic"),
        ("payload", good, with_payload.encode(), "payload"),
        ("epoch", good, other_epoch.encode(), "lends 78"),
        (
            "same epoch",
            good,
            Answer::WrongEpoch { actual: EPOCH }.encode(),
            "calls wrong",
        ),
        (
            "unproved",
            good,
            regions(&[grant(1, true, false)]).encode(),
            "nobody asked",
        ),
        (
            "write",
            good,
            regions(&[grant(0, true, true)]).encode(),
            "nobody asked",
        ),
        (
            "token",
            good,
            Answer::Refused(Refusal::Token).encode(),
            "wrong token",
        ),
    ] {
        match meet(&greeting, &answer, Duration::from_secs(10)) {
            TransportError::Refused { reason: said, .. } => {
                assert!(said.contains(reason), "{what}: {said}");
                assert!(!said.contains("01, 01") && !said.contains("0101"), "{said}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    let busy = meet(
        &good,
        &Answer::Refused(Refusal::Busy).encode(),
        Duration::from_secs(10),
    );
    assert!(
        matches!(busy, TransportError::Unreachable { .. }),
        "{busy:?}"
    );
    let moved = meet(
        &good,
        &Answer::WrongEpoch { actual: 5 }.encode(),
        Duration::from_secs(10),
    );
    assert!(
        matches!(
            moved,
            TransportError::WrongEpoch {
                wanted: EPOCH,
                actual: 5
            }
        ),
        "{moved:?}"
    );
    for (greeting, answer) in [
        (&good[..10], &[][..]),
        (&good[..], &[][..]),
        (&good[..], &good[..8]),
    ] {
        let start = Instant::now();
        let silent = meet(greeting, answer, Duration::from_millis(80));
        assert!(matches!(silent, TransportError::Deadline), "{silent:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

/// A transport to a donor that lets the first connection in and then does `lie` with it, and serves
/// honestly whoever comes next: reads give bytes of value 9, writes succeed.
fn lied_to<T>(
    access: Access,
    lie: impl FnOnce(&mut TcpStream) + Send,
    then: impl FnOnce(TcpTransport) -> T,
) -> T {
    let (listener, at) = listener();
    thread::scope(|scope| {
        scope.spawn(move || {
            let admit = || {
                let mut peer = listener.accept().unwrap().0;
                peer.write_all(&greeting().encode()).unwrap();
                hear_hello(&mut peer)?;
                peer.write_all(&welcome(access).encode()).unwrap();
                Some(peer)
            };
            lie(&mut admit().unwrap());
            let Some(mut peer) = admit() else {
                return;
            };
            while let Some(request) = hear_request(&mut peer) {
                let id = request.id;
                let outcome = Outcome::Data(request.len);
                peer.write_all(&Reply { id, outcome }.encode()).unwrap();
                peer.write_all(&vec![9; request.len as usize]).unwrap();
            }
        });
        let transport = TcpTransport::connect(at, None, EPOCH, access, &keys(), soon()).unwrap();
        let result = then(transport);
        // Lets the honest turn end where no test has taken it.
        drop(TcpStream::connect(at));
        result
    })
}

fn reply(id: u64, outcome: Outcome) -> Vec<u8> {
    Reply { id, outcome }.encode().to_vec()
}

/// Reads twice 8 bytes over a donor that answers with `bytes`, then once more.
fn answered_with(bytes: Vec<u8>) -> TransportError {
    let lie = |peer: &mut TcpStream| {
        hear_request(peer).unwrap();
        hear_request(peer).unwrap();
        peer.write_all(&bytes).unwrap();
        stay(peer);
    };
    lied_to(Access::Read, lie, |transport| {
        let (mut a, mut b) = ([0; 8], [0; 8]);
        let at = |offset, into| Read {
            region: RegionId(0),
            offset,
            into,
        };
        let error = transport
            .read(&mut [at(0, &mut a[..]), at(100, &mut b[..])], soon())
            .unwrap_err();
        // The same transport goes on, over a connection on which nothing of this is left.
        assert_eq!(read(&transport, 0, 0, 8).unwrap(), [9; 8]);
        error
    })
}

#[test]
fn replies_that_are_none_of_the_oldest_request() {
    let data = |id| [reply(id, Outcome::Data(8)), vec![id as u8; 8]].concat();
    for (what, bytes, reason) in [
        (
            "reordered",
            [data(2), data(1)].concat(),
            "replies to request 2, 1 is next",
        ),
        (
            "duplicated",
            [data(1), data(1)].concat(),
            "replies to request 1, 2 is next",
        ),
        ("from nowhere", data(77), "replies to request 77"),
        ("too long", reply(1, Outcome::Data(9)), "Data(9)"),
        ("too short", reply(1, Outcome::Data(7)), "Data(7)"),
        ("no data", reply(1, Outcome::Done), "Done"),
        ("garbage", vec![0xFF; 24], "kind"),
        (
            "wrong right epoch",
            reply(1, Outcome::WrongEpoch(EPOCH)),
            "out of place",
        ),
        ("no right", reply(1, Outcome::NoRight), "token"),
    ] {
        match answered_with(bytes) {
            TransportError::Refused { reason: said, .. } => {
                assert!(said.contains(reason), "{what}: {said}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    let epoch = answered_with(reply(1, Outcome::WrongEpoch(78)));
    assert!(
        matches!(
            epoch,
            TransportError::WrongEpoch {
                wanted: EPOCH,
                actual: 78
            }
        ),
        "{epoch:?}"
    );
    let second = answered_with([data(1), reply(2, Outcome::OutOfBounds)].concat());
    let TransportError::OutOfBounds { offset, len, .. } = second else {
        panic!("{second:?}")
    };
    assert_eq!((offset, len), (100, 8), "of the operation that it was");
    let failed = answered_with(reply(1, Outcome::Failed));
    assert!(
        matches!(failed, TransportError::Unreachable { .. }),
        "{failed:?}"
    );
}

#[test]
fn a_reply_that_breaks_off_is_an_unreachable_donor() {
    let lie = |peer: &mut TcpStream| {
        let request = hear_request(peer).unwrap();
        peer.write_all(&reply(request.id, Outcome::Data(request.len)))
            .unwrap();
        peer.write_all(&[3; 100]).unwrap();
    };
    lied_to(Access::Read, lie, |transport| {
        let error = read(&transport, 0, 0, 4096).unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
        assert_eq!(read(&transport, 0, 0, 4096).unwrap(), [9; 4096]);
    });
}

#[test]
fn a_reply_that_comes_late_reaches_nobody() {
    let (late, told) = std::sync::mpsc::channel();
    let lie = move |peer: &mut TcpStream| {
        let request = hear_request(peer).unwrap();
        peer.write_all(&reply(request.id, Outcome::Data(request.len)))
            .unwrap();
        told.recv().unwrap();
        let _sent = peer.write_all(&vec![3; request.len as usize]);
    };
    lied_to(Access::Read, lie, |transport| {
        let mut into = vec![0x55; 4096];
        let mut batch = [Read {
            region: RegionId(0),
            offset: 0,
            into: &mut into,
        }];
        let start = Instant::now();
        let error = transport
            .read(&mut batch, start + Duration::from_millis(60))
            .unwrap_err();
        assert!(matches!(error, TransportError::Deadline), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
        late.send(()).unwrap();
        // The next batch is answered by the next connection, and the bytes of the first never come.
        assert_eq!(read(&transport, 0, 0, 4096).unwrap(), [9; 4096]);
        assert_eq!(into, [0x55; 4096]);
    });
}

#[test]
fn a_donor_that_takes_no_bytes_does_not_hold_a_writer() {
    let (done, told) = std::sync::mpsc::channel::<()>();
    let lie = move |_: &mut TcpStream| assert!(told.recv().is_err());
    lied_to(Access::ReadWrite, lie, |transport| {
        let bytes = vec![1; 2 << 20];
        let batch: Vec<_> = (0..16)
            .map(|_| Write {
                region: RegionId(0),
                offset: 0,
                from: &bytes,
            })
            .collect();
        let start = Instant::now();
        let error = transport
            .write(&batch, start + Duration::from_millis(100))
            .unwrap_err();
        assert!(matches!(error, TransportError::Deadline), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(done);
    });
}
