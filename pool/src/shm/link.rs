//! Whether a connection still stands.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::RwLock;

use super::{
    Regions,
    frames::{Answer, HEAD_LEN_BYTES},
    socket,
};
use crate::{
    sys,
    transport::{TransportError, refused, unreachable},
};

/// The watcher wakes at least this often, with nothing to do.
const WATCH: Duration = Duration::from_secs(60);

/// One connection's socket and, while it stands, the regions behind it.
#[derive(Debug)]
pub(super) struct Link {
    address: String,
    epoch: u64,
    socket: OwnedFd,
    state: RwLock<State>,
}

#[derive(Debug)]
enum State {
    Up(Arc<Regions>),
    /// The donor closed, died, or the connection broke.
    Closed,
    /// The donor is in this epoch now.
    Revoked(u64),
    /// The donor sent what it may not.
    Misbehaved(String),
}

impl Link {
    pub(super) fn new(address: String, epoch: u64, socket: OwnedFd, regions: Regions) -> Self {
        Self {
            address,
            epoch,
            socket,
            state: RwLock::new(State::Up(Arc::new(regions))),
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The regions, to be held for one batch. Costs one uncontended lock and no system call.
    pub(super) fn regions(&self) -> Result<Arc<Regions>, TransportError> {
        match &*self.state.read() {
            State::Up(regions) => Ok(Arc::clone(regions)),
            State::Closed => Err(unreachable(
                &self.address,
                io::ErrorKind::ConnectionReset.into(),
            )),
            State::Revoked(actual) => Err(TransportError::WrongEpoch {
                wanted: self.epoch,
                actual: *actual,
            }),
            State::Misbehaved(reason) => Err(refused(&self.address, reason.as_str())),
        }
    }

    /// Starts the thread that waits for the end of the connection. It holds the socket and ends
    /// when that is shut down.
    pub(super) fn watch(self: &Arc<Self>) -> io::Result<JoinHandle<()>> {
        let link = Arc::clone(self);
        thread::Builder::new()
            .name("harbour-shm".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                let end = link.wait_for_end();
                tracing::debug!(
                    address = link.address,
                    ?end,
                    "a connection to a donor ended"
                );
                let before = std::mem::replace(&mut *link.state.write(), end);
                // Here, with the lock released, or at the end of the last batch that is under way, the
                // mappings go.
                drop(before);
            })
    }

    fn wait_for_end(&self) -> State {
        loop {
            match socket::wait_readable(self.socket(), Instant::now() + WATCH) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(_) => return State::Closed,
            }
            let mut packet = [0; HEAD_LEN_BYTES + 1];
            return match sys::receive(self.socket(), &mut packet) {
                Ok(received) if received.len == 0 => State::Closed,
                Ok(received) => self.ended_by(packet.get(..received.len).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => State::Closed,
            };
        }
    }

    fn ended_by(&self, packet: &[u8]) -> State {
        match Answer::parse(packet) {
            Ok(Answer::Revoked { epoch }) if epoch != self.epoch => State::Revoked(epoch),
            Ok(_) => State::Misbehaved("a message out of place".to_owned()),
            Err(error) => State::Misbehaved(error.to_string()),
        }
    }
}
