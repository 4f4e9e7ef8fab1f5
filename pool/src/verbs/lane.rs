//! One queue pair of a reader with all that belongs to it, in the hands of one batch at a time.
//!
//! Bytes go through a buffer that was registered once: registering the caller's memory for every
//! batch would cost a system call and a page table walk each time, and a one-sided read that lands
//! after its deadline must not land in memory that the caller has back. The buffer is a ring, and
//! work on a reliable connection ends in its order, so the ring is all the book-keeping there is.
//! A batch that missed its deadline leaves its reads under way: they land in the ring, and their
//! space is free again when they have. Writes that missed it are stopped with the queue pair.

use std::{
    collections::VecDeque,
    io::{self, Read as _},
    net::TcpStream,
    os::fd::AsFd,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
};

use super::{
    device::Adapter,
    patience::Patience,
    plan::{Place, Plan, Stream},
};
use crate::{
    memory::{HugePages, Memory, REGION_ALIGN_BYTES},
    shm::socket::timeout_until,
    sys::{
        Mapping,
        verbs::{
            Completions, Direction, MAX_PIECES, MAX_POST, Outcome, Path, QueuePair, Registration,
            Rights, Work,
        },
    },
};

/// Pieces of work under way at one time.
const DEPTH: usize = 64;
/// The buffer of a lane.
const BUFFER_BYTES: u64 = REGION_ALIGN_BYTES;
/// Its end, which is not part of the ring: what is read behind writes lands there.
const SCRATCH_BYTES: usize = 4096;
const RING_BYTES: usize = BUFFER_BYTES as usize - SCRATCH_BYTES;
/// Looks for a completion, each with a moment for others behind it, between two looks at the clock, which
/// costs more than both on machines whose clock is a device.
const POLLS: u32 = 8;
/// For so long after the donor's device answered its end is taken for standing: between reads that follow
/// each other there is no time for a system call. Should it go meanwhile, who waits for the next answer
/// sees the connection end.
const LATELY: Duration = Duration::from_millis(1);

/// A connected queue pair.
#[derive(Debug)]
pub(super) struct Lane {
    // Before the buffer, which its work names; it keeps it alive by itself too.
    pair: QueuePair,
    completions: Arc<Completions>,
    buffer: Arc<Registration>,
    /// The sign of life of the donor's end.
    stream: Option<TcpStream>,
    under_way: VecDeque<UnderWay>,
    /// Bytes of the ring ever taken and ever given back.
    taken: u64,
    freed: u64,
    next_id: u64,
    came: Vec<(u64, Outcome)>,
    patience: Patience,
    /// When something came last.
    heard: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    id: u64,
    len: usize,
    /// False once the batch that asked for it has gone.
    wanted: bool,
}

/// Why a batch failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The deadline passed first.
    Deadline,
    /// The donor's device did not let it happen.
    Denied,
    /// The connection is gone.
    Lost(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

impl Lane {
    /// A lane that is not connected yet.
    pub(super) fn new(adapter: &Adapter) -> io::Result<Self> {
        let memory =
            Memory::new(BUFFER_BYTES, HugePages::Never, false).map_err(io::Error::other)?;
        let mapping = Arc::new(Mapping::new(&memory, true)?);
        let buffer = Arc::new(Registration::new(&adapter.domain, mapping, Rights::Local)?);
        let completions = Completions::new(adapter.domain.device(), DEPTH as u32)?;
        let depth = adapter.limits.work.min(DEPTH as u32);
        let pair = QueuePair::new(
            &adapter.domain,
            &completions,
            Some(Arc::clone(&buffer)),
            depth,
        )?;
        Ok(Self {
            pair,
            completions,
            buffer,
            stream: None,
            under_way: VecDeque::new(),
            taken: 0,
            freed: 0,
            next_id: 0,
            came: Vec::new(),
            patience: Patience::default(),
            heard: None,
        })
    }

    /// Number of its queue pair.
    pub(super) fn number(&self) -> u32 {
        self.pair.number()
    }

    /// Connects it to the other end, which is alive for as long as `stream` is open.
    pub(super) fn connect(&mut self, path: &Path, stream: TcpStream) -> io::Result<()> {
        // Nobody reaches into this process.
        self.pair.connect(path, Rights::Local)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Whether the donor's end still stood a moment ago: its device has answered, or the connection
    /// is asked.
    pub(super) fn stands(&self) -> io::Result<()> {
        match self.heard {
            Some(heard) if heard.elapsed() < LATELY => Ok(()),
            _ => self.listen(),
        }
    }

    /// Whether the connection to the donor is still open.
    fn listen(&self) -> io::Result<()> {
        let mut byte = [0];
        let Some(mut stream) = self.stream.as_ref() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        match stream.read(&mut byte) {
            Ok(0) => Err(io::ErrorKind::ConnectionReset.into()),
            Ok(_) => Err(io::Error::other("words on a connection of queue pairs")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads `places` into `stream`, which has as many bytes.
    pub(super) fn read(
        &mut self,
        places: &[Place],
        mut stream: Stream<'_, '_>,
        deadline: Instant,
    ) -> Result<(), Fault> {
        let mut plan = Plan::new(places);
        loop {
            let posted = self.post(&mut plan, Direction::Read, None)?;
            if !posted && self.under_way.is_empty() {
                return Ok(());
            }
            self.wait(deadline)?;
            self.settle(|lane, start, len| lane.copy(&mut stream, start, len))?;
        }
    }

    /// Writes `stream` to `places`, which have as many bytes, and one read behind the last: it is
    /// answered when everything before it is in the donor's memory.
    pub(super) fn write(
        &mut self,
        places: &[Place],
        mut stream: Stream<'_, '_>,
        deadline: Instant,
    ) -> Result<(), Fault> {
        let last = places.iter().rev().find(|place| place.len > 0);
        let mut fence = last.map(|last| Place { len: 1, ..*last });
        let mut plan = Plan::new(places);
        loop {
            let posted = self.post(&mut plan, Direction::Write, Some(&mut stream))?;
            if plan.peek().is_none()
                && self.under_way.len() < DEPTH
                && let Some(fence) = fence.take()
            {
                let id = self.enter(0);
                let work = Work {
                    id,
                    direction: Direction::Read,
                    pieces: [(RING_BYTES, 1), (0, 0)],
                    address: fence.address,
                    key: fence.key,
                };
                self.pair.post(&[work])?;
            }
            if !posted && self.under_way.is_empty() && fence.is_none() {
                return Ok(());
            }
            self.wait(deadline)?;
            self.settle(|_, _, _| Ok(()))?;
        }
    }

    /// What is under way is of no use any more: reads end in the ring by themselves.
    pub(super) fn abandon(&mut self) {
        for work in &mut self.under_way {
            work.wanted = false;
        }
    }

    /// Ends it, so that nothing that was posted reaches the donor any more.
    pub(super) fn stop(self) {
        if let Err(error) = self.pair.stop() {
            tracing::debug!(%error, "a queue pair could not be stopped");
        }
    }

    /// Posts as much of `plan` as there is room for; whether that was anything.
    fn post(
        &mut self,
        plan: &mut Plan<'_>,
        direction: Direction,
        mut from: Option<&mut Stream<'_, '_>>,
    ) -> Result<bool, Fault> {
        let mut any = false;
        loop {
            let mut work = Vec::new();
            while work.len() < MAX_POST && self.under_way.len() < DEPTH {
                let free = RING_BYTES as u64 - (self.taken - self.freed);
                let Some(piece) = plan.peek().filter(|piece| piece.len as u64 <= free) else {
                    break;
                };
                plan.take();
                let start = self.taken;
                if let Some(stream) = &mut from {
                    self.copy(stream, start, piece.len)?;
                }
                let id = self.enter(piece.len);
                work.push(Work {
                    id,
                    direction,
                    pieces: parts(start, piece.len),
                    address: piece.address,
                    key: piece.key,
                });
            }
            if work.is_empty() {
                return Ok(any);
            }
            any = true;
            self.pair.post(&work)?;
            if work.len() < MAX_POST {
                return Ok(any);
            }
        }
    }

    fn enter(&mut self, len: usize) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.taken += len as u64;
        self.under_way.push_back(UnderWay {
            id,
            len,
            wanted: true,
        });
        id
    }

    /// Copies between the caller's memory and `len` bytes of the ring.
    fn copy(&self, stream: &mut Stream<'_, '_>, start: u64, len: usize) -> io::Result<()> {
        for (offset, len) in parts(start, len) {
            if !stream.transfer(self.buffer.mapping(), offset, len) {
                return Err(io::Error::other("a batch with fewer bytes than its plan"));
            }
        }
        Ok(())
    }

    /// Takes what came: `arrived` for each piece that somebody wants, with its place in the ring.
    fn settle(
        &mut self,
        mut arrived: impl FnMut(&Self, u64, usize) -> io::Result<()>,
    ) -> Result<(), Fault> {
        let mut came = std::mem::take(&mut self.came);
        for (id, outcome) in came.drain(..) {
            match outcome {
                Outcome::Done => {}
                Outcome::Denied => return Err(Fault::Denied),
                Outcome::Silent => return Err(Fault::Lost(io::ErrorKind::TimedOut.into())),
                Outcome::Flushed => return Err(Fault::Lost(io::ErrorKind::ConnectionReset.into())),
                Outcome::Failed(status) => {
                    let error = format!("work ended with status {status}");
                    return Err(Fault::Lost(io::Error::other(error)));
                }
            }
            let Some(work) = self.under_way.pop_front().filter(|work| work.id == id) else {
                return Err(Fault::Lost(io::Error::other("work ended out of order")));
            };
            if work.wanted {
                arrived(self, self.freed, work.len)?;
            }
            self.freed += work.len as u64;
        }
        self.came = came;
        Ok(())
    }

    /// Waits until something came, which is then in `came`.
    fn wait(&mut self, deadline: Instant) -> Result<(), Fault> {
        let start = Instant::now();
        // With one processor nothing can come while this is awake.
        let awake = match several_processors() {
            true => self.patience.awake(),
            false => Duration::ZERO,
        };
        let mut armed = false;
        let mut polls = 0_u32;
        loop {
            if self.completions.poll(&mut self.came)? > 0 {
                let now = Instant::now();
                self.patience.learn(awake, now - start);
                self.heard = Some(now);
                return Ok(());
            }
            polls += 1;
            if !awake.is_zero() && !armed && !polls.is_multiple_of(POLLS) {
                thread::yield_now();
                continue;
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Fault::Deadline);
            }
            if now - start < awake {
                thread::yield_now();
            } else if armed {
                self.sleep(deadline)?;
                armed = false;
            } else {
                self.completions.arm()?;
                armed = true;
            }
        }
    }

    /// Sleeps until there is an event, the donor is gone, or the deadline.
    fn sleep(&self, deadline: Instant) -> Result<(), Fault> {
        let Some(stream) = self.stream.as_ref() else {
            return Err(Fault::Lost(io::ErrorKind::NotConnected.into()));
        };
        let mut fds = [
            PollFd::new(self.completions.as_fd(), PollFlags::POLLIN),
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout_until(deadline)) {
            Ok(0) | Err(Errno::EINTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(Fault::Lost(error.into())),
        }
        let [event, end] = fds.map(|fd| fd.any().unwrap_or(true));
        if event {
            self.completions.drain()?;
        } else if end {
            self.listen()?;
        }
        Ok(())
    }
}

/// The place of `len` bytes in the ring, whose end continues at its beginning.
fn parts(start: u64, len: usize) -> [(usize, usize); MAX_PIECES] {
    let offset = usize::try_from(start % RING_BYTES as u64).unwrap_or(0);
    let first = len.min(RING_BYTES - offset);
    [(offset, first), (0, len - first)]
}

/// Asked once: the answer takes several files to read.
fn several_processors() -> bool {
    static SEVERAL: OnceLock<bool> = OnceLock::new();
    *SEVERAL.get_or_init(|| thread::available_parallelism().is_ok_and(|count| count.get() > 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_closes() {
        let ring = RING_BYTES as u64;
        assert_eq!(parts(0, 10), [(0, 10), (0, 0)]);
        assert_eq!(parts(5 * ring + 7, 10), [(7, 10), (0, 0)]);
        assert_eq!(parts(ring - 4, 10), [(RING_BYTES - 4, 4), (0, 6)]);
        assert_eq!(parts(ring - 10, 10), [(RING_BYTES - 10, 10), (0, 0)]);
        assert_eq!(parts(0, RING_BYTES), [(0, RING_BYTES), (0, 0)]);
    }
}
