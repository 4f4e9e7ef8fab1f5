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
    frames::{Answer, MAX_ANSWER_LEN_BYTES},
    map, socket,
};
use crate::{
    sys,
    transport::{Access, TransportError, refused, unreachable},
};

/// The watcher wakes at least this often, with nothing to do.
const WATCH: Duration = Duration::from_secs(60);

/// One connection's socket and, while it stands, the regions behind it.
#[derive(Debug)]
pub(super) struct Link {
    address: String,
    epoch: u64,
    access: Access,
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
    pub(super) fn new(
        address: String,
        epoch: u64,
        access: Access,
        socket: OwnedFd,
        regions: Regions,
    ) -> Self {
        Self {
            address,
            epoch,
            access,
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

    /// Starts the thread that follows what the donor lends and waits for the end of the connection.
    /// It holds the socket and ends when that is shut down.
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
            let mut packet = [0; MAX_ANSWER_LEN_BYTES + 1];
            let received = match sys::receive(self.socket(), &mut packet) {
                Ok(received) if received.len == 0 => return State::Closed,
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return State::Closed,
            };
            let bytes = packet.get(..received.len).unwrap_or_default();
            if let Err(end) = self.hear(bytes, received.fds) {
                return end;
            }
        }
    }

    /// Follows what the donor says of single regions; anything else is the end.
    fn hear(&self, packet: &[u8], fds: Vec<OwnedFd>) -> Result<(), State> {
        let misbehaved = |what: &str| State::Misbehaved(what.to_owned());
        let answer = Answer::parse(packet).map_err(|error| misbehaved(&error.to_string()))?;
        match answer {
            Answer::Revoked { epoch } if epoch != self.epoch => Err(State::Revoked(epoch)),
            Answer::Retired { epoch, regions } if epoch == self.epoch => {
                self.change(|before| Some(before.without(&regions)));
                Ok(())
            }
            Answer::Added { epoch, regions } if epoch == self.epoch => {
                let more = map(&regions, fds, self.access).map_err(|what| misbehaved(&what))?;
                if self.change(|before| before.with(more)) {
                    Ok(())
                } else {
                    Err(misbehaved("regions that cannot be added"))
                }
            }
            _ => Err(misbehaved("a message out of place")),
        }
    }

    /// Puts other regions in place of those there are; false when there is nothing to put.
    fn change(&self, change: impl FnOnce(&Regions) -> Option<Regions>) -> bool {
        // Only the watcher writes the state, so nothing happens between the two locks.
        let next = match &*self.state.read() {
            State::Up(before) => change(before),
            State::Closed | State::Revoked(_) | State::Misbehaved(_) => None,
        };
        let Some(next) = next else {
            return false;
        };
        let before = std::mem::replace(&mut *self.state.write(), State::Up(Arc::new(next)));
        // With the lock released: unmapping takes a while.
        drop(before);
        true
    }
}
