//! The donor's door to the network: listens, greets, checks proofs, and gives every connection that
//! passed a thread of its own ([`session`]).
//!
//! One thread polls the listeners and all connections that have not shown their proofs yet; those
//! cost no thread, and there are at most [`MAX_WAITING`] of them. A thread for each connection that
//! has shown proofs is the fastest way to answer on few cores (nobody is between the socket and the
//! memory, and a blocked peer blocks itself alone), and their number has a cap for all and for each
//! address, so strangers and greedy readers take slots from themselves first.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use parking_lot::Mutex;

use super::{DonorError, Lent, Shared};
use crate::{
    shm::socket::timeout_until,
    tcp::frames::{Answer, Greeting, MAX_HELLO_LEN_BYTES, Purpose, Refusal},
    token::random_bytes,
};

mod admission;
mod listener;
mod session;

use admission::{Admitted, Waiting};
use listener::bound;
use session::Session;

/// Connections that have not shown their proofs yet.
const MAX_WAITING: usize = 256;
/// Connections accepted in one turn.
const ACCEPT_AT_ONCE: usize = 64;
/// How long to leave the door alone when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest sleep with nothing to do.
const IDLE: Duration = Duration::from_secs(60);

/// Bounds of what a donor does for readers on other hosts.
#[derive(Clone, Copy, Debug)]
pub struct TcpLimits {
    /// Connections that are served at one time.
    pub max_connections: usize,
    /// The same from one address.
    pub max_per_address: usize,
    /// A connection with nothing asked for so long is closed; readers make a new one.
    pub idle_timeout: Duration,
    /// How long a peer may take to accept one reply, or to send the bytes of one write.
    pub stall_timeout: Duration,
}

impl Default for TcpLimits {
    /// 512 connections, 128 of one address, closed after 5 minutes of silence or 10 s of stalling.
    fn default() -> Self {
        Self {
            max_connections: 512,
            max_per_address: 128,
            idle_timeout: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(10),
        }
    }
}

/// The door while it stands. Dropped, it closes, and ends every connection.
#[derive(Debug)]
pub(super) struct Door {
    addresses: Vec<SocketAddr>,
    room: Arc<Room>,
    thread: Option<JoinHandle<()>>,
}

/// What the door's thread and the sessions share.
#[derive(Debug)]
pub(super) struct Room {
    wake: EventFd,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    next: u64,
    running: HashMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    from: IpAddr,
    stream: TcpStream,
    /// It holds memory by other means than this stream, which must end with the epoch.
    verbs: bool,
    thread: Option<JoinHandle<()>>,
}

struct Keeper {
    shared: Arc<Shared>,
    room: Arc<Room>,
    listeners: Vec<TcpListener>,
    waiting: Vec<Waiting>,
    accept_after: Instant,
}

impl Door {
    /// Listens where the donor's configuration says; `None` when that is nowhere.
    pub(super) fn open(shared: &Arc<Shared>) -> Result<Option<Self>, DonorError> {
        let config = &shared.config;
        if config.listen.is_empty() {
            return Ok(None);
        }
        let mut listeners = Vec::with_capacity(config.listen.len());
        let mut addresses = Vec::with_capacity(config.listen.len());
        for address in &config.listen {
            let bound =
                bound(*address).and_then(|listener| listener.local_addr().map(|at| (listener, at)));
            let (listener, at) = bound.map_err(|source| DonorError::Listen {
                address: *address,
                source,
            })?;
            listeners.push(listener);
            addresses.push(at);
        }
        let io = |source| DonorError::Io {
            what: "starting to listen",
            path: config.socket.clone(),
            source,
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(|error| io(error.into()))?;
        let room = Arc::new(Room {
            wake,
            sessions: Mutex::default(),
        });
        let keeper = Keeper {
            shared: Arc::clone(shared),
            room: Arc::clone(&room),
            listeners,
            waiting: Vec::new(),
            accept_after: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("harbour-door".to_owned())
            .spawn(move || keeper.run());
        tracing::info!(name = config.name, ?addresses, "lending over TCP");
        Ok(Some(Self {
            addresses,
            room,
            thread: Some(thread.map_err(io)?),
        }))
    }

    /// Where it listens.
    pub(super) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connections that are served now.
    pub(super) fn readers(&self) -> usize {
        self.room.sessions.lock().running.len()
    }

    /// Ends the connections that reach memory of an epoch or a region that is over by other means
    /// than asking: those whose queue pairs were set up here. The others are told when they ask.
    pub(super) fn revoke(&self) {
        let sessions = self.room.sessions.lock();
        for running in sessions.running.values().filter(|running| running.verbs) {
            hang_up(&running.stream);
        }
    }
}

impl Drop for Door {
    /// To be dropped after the donor was told to stop.
    fn drop(&mut self) {
        self.room.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread at the donor's door panicked");
        }
        let threads: Vec<_> = {
            let mut sessions = self.room.sessions.lock();
            let running = sessions.running.values_mut();
            running
                .filter_map(|running| {
                    hang_up(&running.stream);
                    running.thread.take()
                })
                .collect()
        };
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread that served a reader panicked");
            }
        }
    }
}

impl Room {
    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::trace!(%error, "a wake was not counted");
        }
    }
}

impl Keeper {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.hang_up_on_the_silent();
            match self.wait() {
                Ok((doors, ready)) => {
                    // From the back, so that indices stay those of the poll.
                    for index in ready.into_iter().rev() {
                        self.hear(index);
                    }
                    for door in doors {
                        self.accept(door);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(name = self.shared.config.name, %error, "the donor cannot poll its door");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    fn hang_up_on_the_silent(&mut self) {
        let now = Instant::now();
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.until > now);
        let gone = before - self.waiting.len();
        self.shared
            .turned_away
            .fetch_add(gone as u64, Ordering::Relaxed);
    }

    /// Sleeps until something happens: which listeners have somebody, and who has spoken.
    fn wait(&self) -> nix::Result<(Vec<usize>, Vec<usize>)> {
        let now = Instant::now();
        let paused = (self.accept_after > now).then_some(self.accept_after);
        let until = self.waiting.iter().map(|waiting| waiting.until);
        let until = until.chain(paused).min().unwrap_or(now + IDLE);
        let door = if paused.is_some() {
            PollFlags::empty()
        } else {
            PollFlags::POLLIN
        };
        let mut fds = vec![PollFd::new(self.room.wake.as_fd(), PollFlags::POLLIN)];
        let listeners = self.listeners.iter();
        fds.extend(listeners.map(|listener| PollFd::new(listener.as_fd(), door)));
        let waiting = self.waiting.iter();
        fds.extend(waiting.map(|waiting| PollFd::new(waiting.stream.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, timeout_until(until.min(now + IDLE)))?;
        let happened = |fds: &[PollFd<'_>]| -> Vec<usize> {
            let any = fds.iter().map(|fd| fd.any().unwrap_or(true)).enumerate();
            any.filter_map(|(index, any)| any.then_some(index))
                .collect()
        };
        let (listeners, waiting) = fds.split_at(1 + self.listeners.len());
        if listeners.first().and_then(PollFd::any) == Some(true) {
            let _count = self.room.wake.read();
        }
        let doors = happened(listeners.get(1..).unwrap_or_default());
        let doors = if paused.is_some() { Vec::new() } else { doors };
        Ok((doors, happened(waiting)))
    }

    fn accept(&mut self, door: usize) {
        for _ in 0..ACCEPT_AT_ONCE {
            let Some(listener) = self.listeners.get(door) else {
                return;
            };
            match listener.accept() {
                Ok((stream, from)) => {
                    self.shared.accepted.fetch_add(1, Ordering::Relaxed);
                    if let Err(error) = self.greet(stream, from.ip().to_canonical()) {
                        tracing::debug!(%from, %error, "a connection ended before its greeting");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    tracing::warn!(name = self.shared.config.name, %error, "no connection can be accepted now");
                    self.accept_after = Instant::now() + ACCEPT_PAUSE;
                    return;
                }
            }
        }
    }

    fn greet(&mut self, mut stream: TcpStream, from: IpAddr) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let greeting = Greeting {
            epoch: self.shared.epoch.load(Ordering::Acquire),
            nonce: random_bytes()?,
        };
        // The buffer of a new connection has room for it.
        stream.write_all(&greeting.encode())?;
        self.make_room(from);
        self.waiting.push(Waiting {
            stream,
            from,
            until: Instant::now() + self.shared.config.handshake_timeout,
            greeting,
            hello: Vec::new(),
        });
        Ok(())
    }

    /// Lets go of who has waited longest, of the same address when that has more than its share.
    fn make_room(&mut self, from: IpAddr) {
        let mine = self.waiting.iter().filter(|waiting| waiting.from == from);
        let crowded = mine.count() >= self.shared.config.tcp.max_per_address;
        if !crowded && self.waiting.len() < MAX_WAITING {
            return;
        }
        let longest = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, waiting)| !crowded || waiting.from == from)
            .min_by_key(|(_, waiting)| waiting.until)
            .map(|(index, _)| index);
        if let Some(index) = longest {
            self.waiting.remove(index);
            self.shared.turned_away.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes what a connection has to say, and its proofs once they are all there.
    fn hear(&mut self, index: usize) {
        let Some(waiting) = self.waiting.get_mut(index) else {
            return;
        };
        let answer = match waiting.hear() {
            Ok(None) => return,
            Ok(Some(hello)) => self.shared.admit(&waiting.greeting, hello),
            Err(answer) => Err(answer),
        };
        let waiting = self.waiting.remove(index);
        let admitted = match answer {
            Ok(admitted) => admitted,
            Err(answer) => return self.turn_away(waiting, answer),
        };
        let from = waiting.from;
        if let Some(waiting) = self.serve(waiting, admitted) {
            tracing::debug!(%from, "no room for another reader");
            self.turn_away(waiting, Some(Answer::Refused(Refusal::Busy)));
        }
    }

    fn turn_away(&self, mut waiting: Waiting, answer: Option<Answer>) {
        self.shared.turned_away.fetch_add(1, Ordering::Relaxed);
        let Some(answer) = answer else {
            return;
        };
        // What lies unread when a socket is closed takes the answer with it.
        let mut rest = [0; MAX_HELLO_LEN_BYTES];
        let _rest = waiting.stream.read(&mut rest);
        if let Err(error) = waiting.stream.write_all(&answer.encode()) {
            tracing::debug!(%error, "a reader did not take its answer");
        }
    }

    /// Starts a connection's thread, or gives it back when there is no room for it.
    fn serve(&self, waiting: Waiting, admitted: Admitted) -> Option<Waiting> {
        let limits = self.shared.config.tcp;
        let mut sessions = self.room.sessions.lock();
        let same = sessions.running.values().filter(|r| r.from == waiting.from);
        if same.count() >= limits.max_per_address
            || sessions.running.len() >= limits.max_connections
        {
            return Some(waiting);
        }
        let Ok(stream) = waiting.stream.try_clone() else {
            return Some(waiting);
        };
        let id = sessions.next;
        sessions.next += 1;
        let verbs = admitted.purpose != Purpose::Data;
        let (shared, room) = (Arc::clone(&self.shared), Arc::clone(&self.room));
        let from = waiting.from;
        let Waiting { stream: own, .. } = waiting;
        let thread = thread::Builder::new()
            .name("harbour-serve".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                let ended = Session::run(
                    &shared,
                    own,
                    admitted.epoch,
                    admitted.grants,
                    admitted.purpose,
                );
                if let Err(error) = ended {
                    tracing::debug!(%from, %error, "a connection ended");
                }
                room.sessions.lock().running.remove(&id);
            });
        match thread {
            Ok(thread) => {
                sessions.running.insert(
                    id,
                    Running {
                        from,
                        stream,
                        verbs,
                        thread: Some(thread),
                    },
                );
            }
            Err(error) => tracing::warn!(%error, "no thread for another reader"),
        }
        None
    }
}

/// Wakes whoever waits on the connection.
fn hang_up(stream: &TcpStream) {
    if let Err(error) = stream.shutdown(Shutdown::Both) {
        tracing::trace!(%error, "a connection was already shut down");
    }
}
