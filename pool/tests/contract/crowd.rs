//! Strangers at a donor's socket.

use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use harbour_pool::{
    shm::ShmTransport,
    shm::frames::{Answer, Hello, Refusal, Token},
    transport::{Access, TransportError},
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::{
    subjects::Threaded,
    suite::{Subject, read, soon, write},
};

/// A packet socket connected to `path`, which does not wait for ever.
fn knock(path: &Path) -> OwnedFd {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    let wait = nix::sys::time::TimeVal::new(10, 0);
    setsockopt(&fd, ReceiveTimeout, &wait).unwrap();
    fd
}

fn say(fd: &OwnedFd, bytes: &[u8]) {
    // The donor may have hung up already.
    let _sent = send(fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL);
}

/// What the donor answers; `None` when it hangs up.
fn hear(fd: &OwnedFd) -> Option<Answer> {
    let mut bytes = [0; 2048];
    match recv(fd.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
        Ok(0) | Err(nix::errno::Errno::ECONNRESET) => None,
        Ok(len) => Some(Answer::parse(&bytes[..len]).unwrap()),
        Err(error) => panic!("the donor neither answers nor hangs up: {error}"),
    }
}

#[test]
fn a_thousand_strangers_do_not_disturb_a_reader() {
    const SEED: [u8; 32] = *b"a thousand strangers, one reader";
    let subject = Threaded::with(|config| config.handshake_timeout = Duration::from_secs(1));
    let path = subject.socket();
    let writer = subject.connect(0, Access::ReadWrite).unwrap();
    write(&*writer, 0, 0, &[42; 4096]).unwrap();
    let done = AtomicBool::new(false);
    let mut silent = Vec::new();
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let kept = subject.connect(0, Access::Read).unwrap();
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(read(&*kept, 0, 0, 4096).unwrap(), [42; 4096]);
                let fresh = subject.connect(0, Access::Read).unwrap();
                assert_eq!(read(&*fresh, 0, 0, 16).unwrap(), [42; 16]);
                rounds += 1;
            }
            rounds
        });
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &SEED);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let garbage = prop::collection::vec(any::<u8>(), 0..300);
        for stranger in 0..1000 {
            let fd = knock(&path);
            let mut bytes = garbage.new_tree(&mut runner).unwrap().current();
            match stranger % 4 {
                // Words, and gone before the answer.
                0 => say(&fd, &bytes),
                // Words that begin well.
                1 => {
                    let hello = Hello {
                        access: Access::Read,
                        epoch: 0,
                        token: Token::NONE,
                    }
                    .encode();
                    bytes.splice(0..bytes.len().min(12), hello[..12].iter().copied());
                    say(&fd, &bytes);
                }
                // A welcome guest that goes on talking.
                2 => {
                    say(
                        &fd,
                        &Hello {
                            access: Access::Read,
                            epoch: 0,
                            token: Token::NONE,
                        }
                        .encode(),
                    );
                    say(&fd, &bytes);
                }
                // Silence.
                _ => silent.push(fd),
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
    for fd in silent {
        assert_eq!(hear(&fd), None);
    }
    let limit = soon();
    while subject.server(|server| server.stats().readers) > 1 {
        assert!(Instant::now() < limit, "a slot is still held");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(subject.server(|server| server.is_running()));
    assert!(subject.server(|server| server.stats().accepted) >= 1000);
}

#[test]
fn strangers_are_told_why() {
    let token = Token([3; 32]);
    let subject = Threaded::with(|config| config.token = token);
    let hello = Hello {
        access: Access::Read,
        epoch: 0,
        token,
    };
    let version = {
        let mut bytes = hello.encode();
        bytes[8] = 1;
        bytes
    };
    let long = [hello.encode().as_slice(), &[0]].concat();
    for (what, bytes, answer) in [
        ("garbage", vec![9; 64], Refusal::Malformed),
        (
            "half a hello",
            hello.encode()[..32].to_vec(),
            Refusal::Malformed,
        ),
        ("too long", long, Refusal::Malformed),
        ("very long", vec![0; 60_000], Refusal::Malformed),
        ("another version", version.to_vec(), Refusal::Version),
        (
            "no token",
            Hello {
                token: Token::NONE,
                ..hello
            }
            .encode()
            .to_vec(),
            Refusal::Token,
        ),
        (
            "wrong token",
            Hello {
                token: Token([4; 32]),
                ..hello
            }
            .encode()
            .to_vec(),
            Refusal::Token,
        ),
    ] {
        let fd = knock(&subject.socket());
        say(&fd, &bytes);
        assert_eq!(hear(&fd), Some(Answer::Refused(answer)), "{what}");
        assert_eq!(hear(&fd), None, "{what}");
    }
    let deadline = soon();
    ShmTransport::connect(&subject.socket(), 0, Access::Read, token, deadline).unwrap();
    let error = ShmTransport::connect(&subject.socket(), 0, Access::Read, Token::NONE, deadline)
        .unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    assert_eq!(subject.server(|server| server.stats().turned_away), 8);
}

#[test]
fn the_silent_lose_their_slots_to_those_who_speak() {
    let subject = Threaded::with(|config| {
        config.max_connections = 4;
        config.handshake_timeout = Duration::from_secs(600);
    });
    let silent: Vec<_> = (0..50).map(|_| knock(&subject.socket())).collect();
    let readers: Vec<_> = (0..4)
        .map(|_| subject.connect(0, Access::Read).unwrap())
        .collect();
    // All slots hold readers now: the next is told to come back, and the silent are gone.
    let error = subject.connect(0, Access::Read).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
    for fd in &silent {
        assert_eq!(hear(fd), None);
    }
    for reader in &readers {
        read(&**reader, 0, 0, 8).unwrap();
    }
    drop(readers);
    let limit = soon();
    while subject.connect(0, Access::Read).is_err() {
        assert!(
            Instant::now() < limit,
            "slots of readers that left stay taken"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_silent_are_hung_up_on() {
    let subject = Threaded::with(|config| config.handshake_timeout = Duration::from_millis(50));
    let start = Instant::now();
    let fd = knock(&subject.socket());
    assert_eq!(hear(&fd), None);
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(50) && took < Duration::from_secs(5),
        "{took:?}"
    );
}

#[test]
fn streams_cannot_connect_at_all() {
    let subject = Threaded::new();
    let error = UnixStream::connect(subject.socket()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EPROTOTYPE));
}
