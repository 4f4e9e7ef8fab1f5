//! Who may do what with a donor's memory. These tests need root, to become somebody else.

use std::{
    fs::OpenOptions,
    io::IoSliceMut,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::Path,
    process::Command,
};

use harbour_pool::{
    shm::{
        ShmTransport,
        frames::{Hello, Token},
    },
    transport::{Access, TransportError},
};
use nix::{
    fcntl::OFlag,
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
        recvmsg, send, socket,
    },
    unistd::{Uid, close},
};

use crate::{
    subjects::{Process, Threaded, reachable_binary},
    suite::{Subject, read, soon, write},
};

/// Debian's nobody.
const STRANGER: u32 = 65534;
/// Tells this test binary to be the stranger, at the socket that it names.
const GUEST: &str = "HARBOUR_TEST_GUEST";

/// Runs one test of this binary as a stranger, with `socket` in its environment.
fn as_a_stranger(test: &str, socket: &Path) {
    assert!(
        Uid::effective().is_root(),
        "this test needs root, to become another user"
    );
    // The stranger must be able to reach both the binary and the socket.
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(reachable_binary(dir.path()));
    command
        .args(["--exact", test, "--nocapture"])
        .env(GUEST, socket)
        .current_dir("/");
    let output = command.uid(STRANGER).gid(STRANGER).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

fn open_to_all() -> Threaded {
    let subject = Threaded::with(|config| config.socket_mode = 0o666);
    let dir = subject.socket();
    std::fs::set_permissions(dir.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
    subject
}

#[test]
fn strangers_read_and_never_write() {
    let subject = open_to_all();
    let writer = subject.connect(0, Access::ReadWrite).unwrap();
    write(&*writer, 0, 0, b"lent").unwrap();
    as_a_stranger("rights::stranger", &subject.socket());
    assert_eq!(read(&*writer, 0, 0, 4).unwrap(), b"lent");
}

/// Not a test: the stranger of the one above.
#[test]
fn stranger() {
    let Some(socket) = std::env::var_os(GUEST) else {
        return;
    };
    let socket = Path::new(&socket);
    assert_eq!(Uid::effective().as_raw(), STRANGER);
    let error =
        ShmTransport::connect(socket, 0, Access::ReadWrite, Token::NONE, soon()).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    let transport = ShmTransport::connect(socket, 0, Access::Read, Token::NONE, soon()).unwrap();
    assert_eq!(read(&transport, 0, 0, 4).unwrap(), b"lent");
    try_to_write(socket, false);
}

#[test]
fn the_socket_keeps_strangers_out() {
    let subject = Threaded::new();
    std::fs::set_permissions(
        subject.socket().parent().unwrap(),
        PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let mode = std::fs::metadata(subject.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    as_a_stranger("rights::kept_out", &subject.socket());
}

/// Not a test: the stranger of the one above.
#[test]
fn kept_out() {
    let Some(socket) = std::env::var_os(GUEST) else {
        return;
    };
    let error = ShmTransport::connect(Path::new(&socket), 0, Access::Read, Token::NONE, soon())
        .unwrap_err();
    let TransportError::Unreachable { source, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn root_and_the_donors_user_write() {
    assert!(
        Uid::effective().is_root(),
        "this test needs root, to become another user"
    );
    let subject = Threaded::new();
    write(&*subject.connect(0, Access::ReadWrite).unwrap(), 0, 0, &[1]).unwrap();
}

#[test]
fn a_read_only_descriptor_is_one_even_for_its_owner() {
    try_to_write(&Threaded::new().socket(), true);
}

#[test]
fn a_donor_needs_no_root() {
    assert!(
        Uid::effective().is_root(),
        "this test needs root, to become another user"
    );
    let subject = Process::as_user(Some(STRANGER));
    let root = subject.connect(0, Access::ReadWrite).unwrap();
    write(&*root, 0, 0, &[5; 8]).unwrap();
    assert_eq!(read(&*root, 0, 0, 8).unwrap(), [5; 8]);
}

/// Takes a reader's descriptor as it came. What was opened for reading only can be neither written
/// nor mapped for writing (`pool/src/memory/tests.rs` tries each); what is left is to open it again.
fn try_to_write(path: &Path, may_reopen: bool) {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    let hello = Hello {
        access: Access::Read,
        epoch: 0,
        token: Token::NONE,
    }
    .encode();
    send(fd.as_raw_fd(), &hello, MsgFlags::empty()).unwrap();
    let memory = first_descriptor(&fd);
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{memory}")).unwrap();
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .unwrap()
        .trim();
    let flags = OFlag::from_bits_retain(i32::from_str_radix(flags, 8).unwrap());
    assert_eq!(flags & OFlag::O_ACCMODE, OFlag::O_RDONLY);
    let again = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{memory}"));
    assert_eq!(again.is_ok(), may_reopen, "{again:?}");
    close(memory).unwrap();
}

fn first_descriptor(socket: &OwnedFd) -> RawFd {
    let mut bytes = [0; 2048];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut control = nix::cmsg_space!([RawFd; 8]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .unwrap();
    let fds = message.cmsgs().unwrap().find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.unwrap();
    for fd in &fds[1..] {
        close(*fd).unwrap();
    }
    fds[0]
}
