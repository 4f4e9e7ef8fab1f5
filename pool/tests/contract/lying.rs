//! Donors that lie. The reader must say so, in time, and take no harm.

use std::{
    fs::File,
    io::IoSlice,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use harbour_pool::{
    shm::{
        ShmTransport,
        frames::{Answer, HELLO_LEN_BYTES, Hello, MAGIC, Refusal, Token, VERSION},
    },
    transport::{Access, Read, RegionId, RegionInfo, Transport, TransportError, Write},
};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind,
            listen, recv, sendmsg, socket,
        },
    },
};

use crate::suite::{fails_for_good, soon};

const MIB: u64 = 1 << 20;
const EPOCH: u64 = 77;

/// A listening packet socket.
fn listener(path: &Path) -> UnixListener {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(16).unwrap()).unwrap();
    fd.into()
}

fn packet(peer: &OwnedFd, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(
        peer.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .unwrap();
}

/// Runs a donor that reads one hello and then does `lie`, and a reader that connects to it.
fn meet(
    epoch: u64,
    access: Access,
    wait: Duration,
    lie: impl FnOnce(&OwnedFd) + Send,
) -> Result<ShmTransport, TransportError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("liar");
    let listener = listener(&path);
    thread::scope(|scope| {
        scope.spawn(move || {
            let peer: OwnedFd = listener.accept().unwrap().0.into();
            let mut hello = [0; HELLO_LEN_BYTES];
            assert_eq!(
                recv(peer.as_raw_fd(), &mut hello, MsgFlags::empty()).unwrap(),
                HELLO_LEN_BYTES
            );
            assert_eq!(
                Hello::parse(&hello).unwrap(),
                Hello {
                    access,
                    epoch,
                    token: Token::NONE
                }
            );
            lie(&peer);
            // Stays until the reader is gone, so that what it sees is the lie and not the end.
            let _end = recv(peer.as_raw_fd(), &mut hello, MsgFlags::empty());
        });
        ShmTransport::connect(&path, epoch, access, Token::NONE, Instant::now() + wait)
    })
}

fn refused(lie: impl FnOnce(&OwnedFd) + Send) -> String {
    match meet(EPOCH, Access::Read, Duration::from_secs(10), lie) {
        Err(TransportError::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

fn memfd(len: u64, seals: SealFlag) -> OwnedFd {
    let fd = memfd_create(c"liar", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file.into()
}

fn good_memfd() -> OwnedFd {
    memfd(
        2 * MIB,
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL,
    )
}

fn welcome(lens: &[u64]) -> Vec<u8> {
    let regions = (0..).zip(lens).map(|(id, len)| RegionInfo {
        id: RegionId(id),
        len: *len,
        huge_pages: false,
    });
    Answer::Welcome {
        epoch: EPOCH,
        regions: regions.collect(),
    }
    .encode()
}

/// What it sends, what it passes along, and what the reader says.
fn told(bytes: Vec<u8>, fds: Vec<OwnedFd>) -> String {
    refused(move |peer| {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        packet(peer, &bytes, &raw);
    })
}

#[test]
fn the_truth_is_believed() {
    let listener_dir = tempfile::tempdir().unwrap();
    let path = listener_dir.path().join("honest");
    let listener = listener(&path);
    thread::scope(|scope| {
        let donor = scope.spawn(move || {
            let peer: OwnedFd = listener.accept().unwrap().0.into();
            packet(&peer, &welcome(&[2 * MIB]), &[good_memfd().as_raw_fd()]);
            peer
        });
        let transport =
            ShmTransport::connect(&path, EPOCH, Access::Read, Token::NONE, soon()).unwrap();
        let mut into = [1; 8];
        transport
            .read(
                &mut [Read {
                    region: RegionId(0),
                    offset: 2 * MIB - 8,
                    into: &mut into,
                }],
                soon(),
            )
            .unwrap();
        assert_eq!(into, [0; 8]);
        drop(donor.join().unwrap());
        assert!(matches!(
            fails_for_good(&transport),
            TransportError::Unreachable { .. }
        ));
    });
}

#[test]
fn memory_that_is_not_what_it_is_said_to_be() {
    let ordinary = || OwnedFd::from(tempfile::tempfile().unwrap());
    let short = || memfd(MIB, SealFlag::F_SEAL_SHRINK);
    let open = || memfd(2 * MIB, SealFlag::F_SEAL_GROW);
    let directory = || OwnedFd::from(File::open("/").unwrap());
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let one = [2 * MIB];
    let two = [2 * MIB, 2 * MIB];
    for (what, lens, fds, says) in [
        (
            "size lie",
            &one[..],
            vec![short()],
            "a memfd of 1048576 bytes announced as 2097152",
        ),
        (
            "huge size lie",
            &[1 << 46][..],
            vec![good_memfd()],
            "announced as 70368744177664",
        ),
        (
            "not sealed",
            &one,
            vec![open()],
            "not sealed against shrinking",
        ),
        (
            "ordinary file",
            &one,
            vec![ordinary()],
            "not sealed against shrinking|not a memfd",
        ),
        (
            "directory",
            &one,
            vec![directory()],
            "not a memfd|not sealed",
        ),
        ("device", &one, vec![null()], "not a memfd|not sealed"),
        (
            "no descriptor",
            &one,
            vec![],
            "1 regions with 0 descriptors",
        ),
        (
            "too few",
            &two,
            vec![good_memfd()],
            "2 regions with 1 descriptors",
        ),
        (
            "too many",
            &one,
            vec![good_memfd(), good_memfd()],
            "1 regions with 2 descriptors",
        ),
        (
            "second one bad",
            &two,
            vec![good_memfd(), short()],
            "region 1 is a memfd of",
        ),
        (
            "all that fit",
            &one,
            (0..253).map(|_| good_memfd()).collect(),
            "1 regions with 253 descriptors",
        ),
    ] {
        let reason = told(welcome(lens), fds);
        assert!(
            says.split('|').any(|says| reason.contains(says)),
            "{what}: {reason}"
        );
    }
}

#[test]
fn descriptors_of_liars_are_closed() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let memfds = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = links.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        links
            .filter(|link| link.to_string_lossy().contains("memfd:leak-check"))
            .count()
    };
    for _ in 0..20 {
        let mark = || memfd_create(c"leak-check", MFdFlags::MFD_CLOEXEC).unwrap();
        told(welcome(&[2 * MIB]), (0..50).map(|_| mark()).collect());
        told(vec![0; 12], (0..50).map(|_| mark()).collect());
        told(vec![0; 5000], (0..50).map(|_| mark()).collect());
    }
    assert_eq!(memfds(), 0, "of {} descriptors", count());
}

#[test]
fn words_that_are_none() {
    let good = welcome(&[2 * MIB]);
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let revoked = Answer::Revoked { epoch: 5 }.encode();
    let same = Answer::WrongEpoch { actual: EPOCH }.encode();
    let other = Answer::Welcome {
        epoch: EPOCH + 1,
        regions: vec![RegionInfo {
            id: RegionId(0),
            len: 2 * MIB,
            huge_pages: false,
        }],
    };
    for (what, bytes, says) in [
        ("garbage", vec![0xAB; 48], "magic"),
        ("one byte", vec![7], "a message of 1 bytes"),
        ("half a head", good[..16].to_vec(), "a message of 16 bytes"),
        ("half a table", good[..40].to_vec(), "a message of 40 bytes"),
        ("too long", vec![0; 100_000], "a message longer than any"),
        ("another version", changed(8, 9), "protocol version 9"),
        ("another kind", changed(10, 77), "kind 77|a message of"),
        ("no regions", changed(12, 0), "number of regions 0"),
        ("65 regions", changed(12, 65), "number of regions 65"),
        ("odd length", changed(40, 1), "region length"),
        ("flags", changed(36, 2), "region flags 2"),
        ("reserved", changed(24, 1), "reserved bytes"),
        (
            "a hello",
            MAGIC.into_iter().chain(VERSION.to_le_bytes()).collect(),
            "a message of 10 bytes",
        ),
        ("revoked at once", revoked, "out of place"),
        ("the right epoch is wrong", same, "out of place"),
        (
            "another epoch",
            other.encode(),
            "asked for epoch 77 it lends epoch 78",
        ),
        (
            "refused",
            Answer::Refused(Refusal::Token).encode(),
            "wrong token",
        ),
    ] {
        let reason = told(bytes, vec![good_memfd()]);
        assert!(
            says.split('|').any(|says| reason.contains(says)),
            "{what}: {reason}"
        );
    }
}

#[test]
fn silence_ends_at_the_deadline() {
    let start = Instant::now();
    let result = meet_silent(Duration::from_millis(100));
    assert!(
        matches!(result, Err(TransportError::Deadline)),
        "{result:?}"
    );
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(100) && took < Duration::from_secs(5),
        "{took:?}"
    );
}

/// A donor that accepts nobody: the kernel completes the connection, and that is all.
fn meet_silent(wait: Duration) -> Result<ShmTransport, TransportError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("silent");
    let _listener = listener(&path);
    ShmTransport::connect(
        &path,
        EPOCH,
        Access::Read,
        Token::NONE,
        Instant::now() + wait,
    )
}

#[test]
fn a_full_queue_ends_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let _listener = listener(&path);
    let connect = || {
        let wait = Instant::now() + Duration::from_millis(20);
        ShmTransport::connect(&path, EPOCH, Access::Read, Token::NONE, wait).unwrap_err()
    };
    // The backlog is 16; connections that were given up still fill it.
    for _ in 0..40 {
        assert!(matches!(connect(), TransportError::Deadline));
    }
}

#[test]
fn hanging_up_is_unreachable() {
    let error = meet(EPOCH, Access::Read, Duration::from_secs(10), |peer| {
        nix::sys::socket::shutdown(peer.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
    });
    assert!(
        matches!(error, Err(TransportError::Unreachable { .. })),
        "{error:?}"
    );
    let busy = meet(EPOCH, Access::Read, Duration::from_secs(10), |peer| {
        packet(peer, &Answer::Refused(Refusal::Busy).encode(), &[]);
    });
    assert!(
        matches!(busy, Err(TransportError::Unreachable { .. })),
        "{busy:?}"
    );
}

#[test]
fn memory_sealed_against_writing_fails_the_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sealed");
    let listener = listener(&path);
    thread::scope(|scope| {
        scope.spawn(move || {
            let peer: OwnedFd = listener.accept().unwrap().0.into();
            let fd = memfd(2 * MIB, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE);
            packet(&peer, &welcome(&[2 * MIB]), &[fd.as_raw_fd()]);
            let _hello = recv(peer.as_raw_fd(), &mut [0; 64], MsgFlags::empty());
            let _end = recv(peer.as_raw_fd(), &mut [0; 64], MsgFlags::empty());
        });
        let transport =
            ShmTransport::connect(&path, EPOCH, Access::ReadWrite, Token::NONE, soon()).unwrap();
        let batch = [Write {
            region: RegionId(0),
            offset: 0,
            from: &[1; 4],
        }];
        let error = transport.write(&batch, soon()).unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
        let mut into = [1; 4];
        transport
            .read(
                &mut [Read {
                    region: RegionId(0),
                    offset: 0,
                    into: &mut into,
                }],
                soon(),
            )
            .unwrap();
        assert_eq!(into, [0; 4]);
    });
}

#[test]
fn talk_after_the_welcome_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    for (what, bytes, refused) in [
        ("garbage", vec![1; 20], true),
        ("a second welcome", welcome(&[2 * MIB]), true),
        (
            "its own epoch again",
            Answer::Revoked { epoch: EPOCH }.encode(),
            true,
        ),
        ("a revocation", Answer::Revoked { epoch: 5 }.encode(), false),
    ] {
        let path = dir.path().join(what);
        let listener = listener(&path);
        thread::scope(|scope| {
            scope.spawn(move || {
                let peer: OwnedFd = listener.accept().unwrap().0.into();
                let _hello = recv(peer.as_raw_fd(), &mut [0; 64], MsgFlags::empty());
                packet(&peer, &welcome(&[2 * MIB]), &[good_memfd().as_raw_fd()]);
                packet(&peer, &bytes, &[]);
            });
            let transport =
                ShmTransport::connect(&path, EPOCH, Access::Read, Token::NONE, soon()).unwrap();
            match fails_for_good(&transport) {
                TransportError::Refused { .. } => assert!(refused, "{what}"),
                TransportError::WrongEpoch {
                    wanted: EPOCH,
                    actual: 5,
                } => assert!(!refused, "{what}"),
                other => panic!("{what}: {other:?}"),
            }
        });
    }
}
