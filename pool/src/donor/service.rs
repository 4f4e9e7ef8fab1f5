//! The thread that answers readers: one poll loop over the listener and at most
//! `max_connections` connections.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials},
    unistd::Uid,
};

use super::{Lending, Lent, Shared, socket_file::SocketFile};
use crate::{
    shm::{
        frames::{Answer, FrameError, HELLO_LEN_BYTES, Hello, Refusal},
        socket,
    },
    transport::{Access, RegionInfo},
};

/// Connections accepted in one turn, so that a crowd at the door does not keep those inside
/// waiting.
const ACCEPT_AT_ONCE: usize = 64;
/// How long to leave the door alone when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest sleep with nothing to do.
const IDLE: Duration = Duration::from_secs(60);
/// Bytes of a packet that are looked at: one more than a hello.
const PACKET: usize = HELLO_LEN_BYTES + 1;

pub(super) struct Service {
    shared: Arc<Shared>,
    listener: UnixListener,
    clients: Vec<Client>,
    accept_after: Instant,
    /// Last, so that the socket file goes after the listener.
    _file: SocketFile,
}

struct Client {
    socket: OwnedFd,
    stage: Stage,
}

enum Stage {
    /// Has until then to say what it wants.
    Silent { until: Instant },
    /// Holds this memory.
    Reader { held: Arc<Lent>, access: Access },
    /// To be closed.
    Done,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>, listener: UnixListener, file: SocketFile) -> Self {
        Self {
            shared,
            listener,
            clients: Vec::new(),
            accept_after: Instant::now(),
            _file: file,
        }
    }

    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.tell();
            self.hang_up_on_the_silent();
            self.forget_the_done();
            match self.wait() {
                Ok((accept, ready)) => {
                    for index in ready {
                        self.serve(index);
                    }
                    if accept {
                        self.accept();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(name = self.shared.config.name, %error, "the donor cannot poll");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Ends the connections of epochs that are over, and tells the others which regions came and
    /// went.
    fn tell(&mut self) {
        // Read before what is lent: whoever waits for this number sees it only once that is told.
        let change = self.shared.changes.load(Ordering::Acquire);
        let epoch = self.shared.epoch.load(Ordering::Acquire);
        let lent = self.shared.lent.read().clone();
        for client in &mut self.clients {
            client.follow(epoch, lent.as_ref());
        }
        self.shared.told(change);
    }

    fn hang_up_on_the_silent(&mut self) {
        let now = Instant::now();
        for client in &mut self.clients {
            if matches!(client.stage, Stage::Silent { until } if until <= now) {
                client.stage = Stage::Done;
                self.shared.turned_away.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn forget_the_done(&mut self) {
        self.clients
            .retain(|client| !matches!(client.stage, Stage::Done));
        let readers = self
            .clients
            .iter()
            .filter(|client| matches!(client.stage, Stage::Reader { .. }))
            .count();
        self.shared.readers.store(readers as u64, Ordering::Relaxed);
    }

    /// Sleeps until something happens: whether somebody is at the door, and who has spoken.
    fn wait(&self) -> nix::Result<(bool, Vec<usize>)> {
        let now = Instant::now();
        let silent = self.clients.iter().filter_map(|client| match client.stage {
            Stage::Silent { until } => Some(until),
            Stage::Reader { .. } | Stage::Done => None,
        });
        let paused = (self.accept_after > now).then_some(self.accept_after);
        let until = silent
            .chain(paused)
            .min()
            .unwrap_or(now + IDLE)
            .min(now + IDLE);
        let door = if paused.is_some() {
            PollFlags::empty()
        } else {
            PollFlags::POLLIN
        };
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), door),
        ];
        fds.extend(
            self.clients
                .iter()
                .map(|client| PollFd::new(client.socket.as_fd(), PollFlags::POLLIN)),
        );
        poll(&mut fds, socket::timeout_until(until))?;
        let mut happened = fds.iter().map(|fd| fd.any().unwrap_or(true));
        if happened.next() == Some(true) {
            // Non-blocking; that it was read already is no loss.
            let _count = self.shared.wake.read();
        }
        let accept = happened.next() == Some(true) && paused.is_none();
        let ready = happened
            .enumerate()
            .filter_map(|(index, any)| any.then_some(index))
            .collect();
        Ok((accept, ready))
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_AT_ONCE {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(name = self.shared.config.name, %error, "no reader can be accepted now");
                    self.accept_after = Instant::now() + ACCEPT_PAUSE;
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        self.shared.accepted.fetch_add(1, Ordering::Relaxed);
        let until = Instant::now() + self.shared.config.handshake_timeout;
        let client = Client {
            socket,
            stage: Stage::Silent { until },
        };
        if self.clients.len() < self.shared.config.max_connections {
            self.clients.push(client);
            return;
        }
        self.shared.turned_away.fetch_add(1, Ordering::Relaxed);
        // An honest reader speaks as soon as it is connected, so whoever has been silent longest
        // is the one to lose its slot.
        let silent = self
            .clients
            .iter_mut()
            .filter_map(|client| match client.stage {
                Stage::Silent { until } => Some((until, client)),
                Stage::Reader { .. } | Stage::Done => None,
            });
        match silent.min_by_key(|(until, _)| *until) {
            Some((_, slot)) => *slot = client,
            None => {
                client.say(&Answer::Refused(Refusal::Busy), &[]);
            }
        }
    }

    /// Takes what a connection has to say: its hello, or its end.
    fn serve(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        let mut packet = [0; PACKET];
        // MSG_TRUNC gives the packet's real length. There is no room for descriptors, so the
        // kernel drops any that come along.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let len = match recv(client.socket.as_raw_fd(), &mut packet, flags) {
            Ok(len) => len,
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => 0,
        };
        let stage = std::mem::replace(&mut client.stage, Stage::Done);
        // A reader has nothing more to say than that it is gone, and a packet of no bytes looks
        // the same.
        if len == 0 || !matches!(stage, Stage::Silent { .. }) {
            return;
        }
        let bytes = packet.get(..len.min(PACKET)).unwrap_or_default();
        match self.shared.answer(bytes, &client.socket) {
            Ok((lent, access)) => client.stage = client.welcome(lent, access),
            Err(answer) => {
                self.shared.turned_away.fetch_add(1, Ordering::Relaxed);
                client.say(&answer, &[]);
            }
        }
    }
}

impl Shared {
    /// What a hello is worth: memory, or the answer that says why not.
    fn answer(&self, hello: &[u8], peer: &OwnedFd) -> Result<(Arc<Lent>, Access), Answer> {
        let hello = Hello::parse(hello).map_err(|error| {
            Answer::Refused(match error {
                FrameError::Version(_) => Refusal::Version,
                _ => Refusal::Malformed,
            })
        })?;
        if !hello.token.matches(&self.config.token) {
            return Err(Answer::Refused(Refusal::Token));
        }
        if hello.access == Access::ReadWrite && !may_write(peer) {
            return Err(Answer::Refused(Refusal::Access));
        }
        let lent = self
            .lent
            .read()
            .clone()
            .filter(|lent| !lent.regions.is_empty())
            .ok_or(Answer::Refused(Refusal::Busy))?;
        if hello.epoch != 0 && hello.epoch != lent.epoch {
            return Err(Answer::WrongEpoch { actual: lent.epoch });
        }
        Ok((lent, hello.access))
    }
}

impl Client {
    fn welcome(&self, lent: Arc<Lent>, access: Access) -> Stage {
        let answer = Answer::Welcome {
            epoch: lent.epoch,
            regions: infos(&lent.regions),
        };
        if self.say(&answer, &descriptors(&lent.regions, access)) {
            Stage::Reader { held: lent, access }
        } else {
            Stage::Done
        }
    }

    /// Tells a reader what has changed since it was last told. One that does not take it has
    /// stopped listening, and loses its connection.
    fn follow(&mut self, epoch: u64, lent: Option<&Arc<Lent>>) {
        let Stage::Reader { held, access } = &self.stage else {
            return;
        };
        let access = *access;
        if held.epoch != epoch {
            self.say(&Answer::Revoked { epoch }, &[]);
            self.stage = Stage::Done;
            return;
        }
        let Some(lent) = lent.filter(|lent| lent.epoch == epoch && !Arc::ptr_eq(lent, held)) else {
            return;
        };
        let lent = Arc::clone(lent);
        let gone = held.regions.iter().map(|region| region.info.id);
        let gone: Vec<_> = gone.filter(|id| lent.get(*id).is_none()).collect();
        let came = lent.regions.iter();
        let came: Vec<_> = came
            .filter(|region| held.get(region.info.id).is_none())
            .cloned()
            .collect();
        let took = (gone.is_empty()
            || self.say(
                &Answer::Retired {
                    epoch,
                    regions: gone,
                },
                &[],
            ))
            && (came.is_empty()
                || self.say(
                    &Answer::Added {
                        epoch,
                        regions: infos(&came),
                    },
                    &descriptors(&came, access),
                ));
        self.stage = if took {
            Stage::Reader { held: lent, access }
        } else {
            Stage::Done
        };
    }

    /// Whether the peer took it.
    fn say(&self, answer: &Answer, fds: &[RawFd]) -> bool {
        let sent = socket::send(self.socket.as_fd(), &answer.encode(), fds);
        if let Err(error) = &sent {
            tracing::debug!(%error, "a reader did not take its answer");
        }
        sent.is_ok()
    }
}

fn infos(regions: &[Arc<Lending>]) -> Vec<RegionInfo> {
    regions.iter().map(|region| region.info).collect()
}

fn descriptors(regions: &[Arc<Lending>], access: Access) -> Vec<RawFd> {
    let fds = regions.iter().map(|region| match access {
        Access::Read => region.read_only.as_raw_fd(),
        Access::ReadWrite => region.memory.as_fd().as_raw_fd(),
    });
    fds.collect()
}

/// Root and the donor's own user could open the memory through /proc anyway.
fn may_write(peer: &OwnedFd) -> bool {
    getsockopt(peer, PeerCredentials)
        .is_ok_and(|who| who.uid() == 0 || who.uid() == Uid::effective().as_raw())
}
