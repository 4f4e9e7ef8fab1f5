//! Packets over a unix socket, with deadlines.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg,
        socket,
    },
};

/// How long to wait before knocking again at a donor whose queue of connections is full.
const KNOCK_AGAIN: Duration = Duration::from_millis(5);

/// A new non-blocking packet socket.
pub(crate) fn packet_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

/// `path` as an address; a path of 108 bytes or more is none.
pub(crate) fn address(path: &Path) -> io::Result<UnixAddr> {
    UnixAddr::new(path).map_err(|error| match error {
        Errno::ENAMETOOLONG => io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path of a socket must be shorter than 108 bytes",
        ),
        other => other.into(),
    })
}

/// Connects to the socket at `path`; `Ok(None)` when the deadline passed first.
pub(crate) fn dial(path: &Path, deadline: Instant) -> io::Result<Option<OwnedFd>> {
    let address = address(path)?;
    let socket = packet_socket()?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(Some(socket)),
            Err(Errno::EINTR) => {}
            // The donor's queue is full. There is nothing to poll for until it is not.
            Err(Errno::EAGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(None);
                }
                thread::sleep(KNOCK_AGAIN.min(left));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends one packet with descriptors, without waiting: packets here are few and small, so a peer
/// whose buffer is full has stopped listening.
pub(crate) fn send(socket: BorrowedFd<'_>, packet: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(packet)],
        control,
        flags,
        None,
    )?;
    Ok(())
}

/// Waits until there is something to read, or the end; false when the deadline passed first.
pub(crate) fn wait_readable(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout_until(deadline)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Milliseconds until `deadline`, rounded up so that a poll does not spin before it, at most a
/// minute.
pub(crate) fn timeout_until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now());
    let ms = left.as_nanos().div_ceil(1_000_000).min(60_000);
    PollTimeout::try_from(ms).unwrap_or(PollTimeout::ZERO)
}
