//! Streams with deadlines. Every socket here is non-blocking on the reader's side.

use std::{
    io::{self, IoSlice, Read as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::socket::{MsgFlags, sendmsg},
};

use crate::shm::socket::timeout_until;

/// Connects; `Ok(None)` when the deadline passed first.
pub(crate) fn dial(peer: SocketAddr, deadline: Instant) -> io::Result<Option<TcpStream>> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(None);
    }
    match TcpStream::connect_timeout(&peer, left) {
        Ok(stream) => {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(Some(stream))
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut && Instant::now() >= deadline => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Waits for any of `events`, or the end; false when the deadline passed first.
pub(crate) fn wait(stream: &TcpStream, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::new(stream.as_fd(), events)];
        match poll(&mut fds, timeout_until(deadline)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends what the socket takes at once: 0 when it takes nothing.
pub(crate) fn send_some(stream: &TcpStream, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(stream.as_raw_fd(), parts, &[], flags, None);
    taken(sent.map_err(io::Error::from))
}

/// What was sent: 0 when nothing could be.
pub(crate) fn taken(sent: io::Result<usize>) -> io::Result<usize> {
    match sent {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(0)
        }
        other => other,
    }
}

/// Takes what a read gives: `None` when nothing is there yet, an error at the end.
pub(crate) fn received(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(0) => Err(io::ErrorKind::ConnectionReset.into()),
        Ok(len) => Ok(Some(len)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Sends all of `bytes`; false when the deadline passed first.
pub(crate) fn send_all(
    stream: &TcpStream,
    mut bytes: &[u8],
    deadline: Instant,
) -> io::Result<bool> {
    while !bytes.is_empty() {
        let sent = send_some(stream, &[IoSlice::new(bytes)])?;
        bytes = bytes.get(sent..).unwrap_or_default();
        if !bytes.is_empty() && !wait(stream, PollFlags::POLLOUT, deadline)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Fills `into`; false when the deadline passed first.
pub(crate) fn receive_all(
    mut stream: &TcpStream,
    into: &mut [u8],
    deadline: Instant,
) -> io::Result<bool> {
    let mut got = 0;
    while got < into.len() {
        if !wait(stream, PollFlags::POLLIN, deadline)? {
            return Ok(false);
        }
        let rest = into.get_mut(got..).unwrap_or_default();
        got += received(stream.read(rest))?.unwrap_or(0);
    }
    Ok(true)
}
