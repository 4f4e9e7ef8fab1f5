//! One connection for data, used by one batch at a time.
//!
//! Bytes of a reply are read straight to where the oldest request wants them, together with the
//! heads of the replies: what a head turns out to say is checked before the batch can succeed, and
//! destinations are unspecified when it fails. After any error the connection is dropped, so that
//! nothing of an unfinished batch is ever taken for a part of the next.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    time::Instant,
};

use nix::{poll::PollFlags, sys::socket::MsgFlags};

use super::{
    frames::data::{Outcome, REPLY_LEN_BYTES, REQUEST_LEN_BYTES, Reply, Request, Way},
    socket,
    veil::Wire,
};
use crate::{
    transport::{RegionId, TransportError},
    wire::FrameError,
};

/// Requests under way at one time. Their heads, and the replies of writes, fit any socket's buffer
/// many times over, so neither side can wait for the other for ever.
const WINDOW: usize = 64;
/// Replies or requests whose parts go into one system call.
const PARTS: usize = 16;

/// One request's worth of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Index of the operation in its batch.
    pub(super) operation: usize,
    pub(super) region: RegionId,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// Why a batch did not end well.
#[derive(Debug)]
pub(super) enum Fault {
    Deadline,
    /// There was no connection to be had.
    Connecting(TransportError),
    /// The connection broke; `heard` when any reply had come in this batch.
    Lost {
        source: io::Error,
        heard: bool,
    },
    /// The donor broke the protocol.
    Broke(String),
    /// What the donor says of this operation.
    Denied(usize, Outcome),
}

/// A connection with no request under way.
#[derive(Debug)]
pub(super) struct Link {
    wire: Wire,
    /// Number of the next request.
    next: u64,
}

/// Where a batch stands.
struct Progress<'a> {
    pieces: &'a [Piece],
    /// Number of the first request.
    first: u64,
    /// Requests that were made.
    asked: usize,
    /// Requests that were answered.
    done: usize,
    deadline: Instant,
    heard: bool,
}

impl Link {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire, next: 1 }
    }

    /// Reads every piece into the destination of the same index.
    pub(super) fn read(
        &mut self,
        pieces: &[Piece],
        into: &mut [&mut [u8]],
        deadline: Instant,
    ) -> Result<(), Fault> {
        let mut progress = self.begin(pieces, deadline);
        let mut out = Vec::with_capacity(WINDOW.min(pieces.len()) * REQUEST_LEN_BYTES);
        let mut sent = 0;
        let mut inbox = Inbox::default();
        while progress.done < pieces.len() {
            while progress.has_room() {
                out.extend(progress.request(Way::Read).unwrap_or_default());
            }
            if sent < out.len() {
                let rest = out.get(sent..).unwrap_or_default();
                let some = send_some(&mut self.wire, &[IoSlice::new(rest)]);
                sent += some.map_err(|error| progress.lost(error))?;
            }
            if sent == out.len() {
                out.clear();
                sent = 0;
            }
            if !inbox.take(&mut self.wire, into, &mut progress)? {
                progress.wait(&self.wire, !out.is_empty())?;
            } else if Instant::now() > deadline {
                // Bytes that trickle in never make it wait.
                return Err(Fault::Deadline);
            }
        }
        Ok(())
    }

    /// Writes every piece from the source of the same index.
    pub(super) fn write(
        &mut self,
        pieces: &[Piece],
        from: &[&[u8]],
        deadline: Instant,
    ) -> Result<(), Fault> {
        let mut progress = self.begin(pieces, deadline);
        let mut outbox = Outbox::default();
        let mut replies = Replies::default();
        while progress.done < pieces.len() {
            outbox.send(&mut self.wire, from, &mut progress)?;
            // What TLS has deciphered already no socket tells of.
            if !replies.take(&mut self.wire, &mut progress)? {
                progress.wait(&self.wire, outbox.wants_more(&progress))?;
            } else if Instant::now() > deadline {
                return Err(Fault::Deadline);
            }
        }
        Ok(())
    }

    fn begin<'a>(&mut self, pieces: &'a [Piece], deadline: Instant) -> Progress<'a> {
        let first = self.next;
        self.next += pieces.len() as u64;
        Progress {
            pieces,
            first,
            asked: 0,
            done: 0,
            deadline,
            heard: false,
        }
    }
}

impl Progress<'_> {
    fn has_room(&self) -> bool {
        self.asked < self.pieces.len() && self.asked - self.done < WINDOW
    }

    /// The next request's head.
    fn request(&mut self, way: Way) -> Option<[u8; REQUEST_LEN_BYTES]> {
        let piece = self.pieces.get(self.asked)?;
        let request = Request {
            id: self.first + self.asked as u64,
            way,
            region: piece.region,
            offset: piece.offset,
            len: piece.len,
        };
        self.asked += 1;
        Some(request.encode())
    }

    fn lost(&self, source: io::Error) -> Fault {
        Fault::Lost {
            source,
            heard: self.heard,
        }
    }

    /// Sleeps until there is something to read, or to write when `sending`.
    fn wait(&self, wire: &Wire, sending: bool) -> Result<(), Fault> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, sending || wire.sending());
        match socket::wait(wire.stream(), events, self.deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Fault::Deadline),
            Err(error) => Err(self.lost(error)),
        }
    }

    /// Checks the head of a reply against the oldest request plus `ahead`.
    fn check(&self, head: &[u8; REPLY_LEN_BYTES], ahead: usize, way: Way) -> Result<(), Fault> {
        let broke = |error: FrameError| Fault::Broke(format!("it replies with {error}"));
        let reply = Reply::parse(head).map_err(broke)?;
        let index = self.done + ahead;
        let expected = self.first + index as u64;
        let Some(piece) = self.pieces.get(index).filter(|_| index < self.asked) else {
            return Err(Fault::Broke("it replies to nothing".to_owned()));
        };
        if reply.id != expected {
            let what = format!("it replies to request {}, {expected} is next", reply.id);
            return Err(Fault::Broke(what));
        }
        match (way, reply.outcome) {
            (Way::Read, Outcome::Data(len)) if len == piece.len => Ok(()),
            (Way::Write, Outcome::Done) => Ok(()),
            (_, outcome @ (Outcome::Data(_) | Outcome::Done)) => Err(Fault::Broke(format!(
                "it replies {outcome:?} to a {way:?} of {} bytes",
                piece.len
            ))),
            (_, outcome) => Err(Fault::Denied(piece.operation, outcome)),
        }
    }
}

/// Sends what the socket takes at once: 0 when it takes nothing.
fn send_some(wire: &mut Wire, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    socket::taken(wire.send(parts, MsgFlags::MSG_DONTWAIT))
}

/// Replies to reads, on their way to where they belong.
#[derive(Default)]
struct Inbox {
    /// Heads of the next replies; of the first, bytes may be there already.
    heads: [[u8; REPLY_LEN_BYTES]; PARTS],
    /// Bytes of the oldest reply that have come, head included.
    got: usize,
}

impl Inbox {
    /// Takes what has come; false when nothing has.
    fn take(
        &mut self,
        wire: &mut Wire,
        into: &mut [&mut [u8]],
        progress: &mut Progress<'_>,
    ) -> Result<bool, Fault> {
        let waiting = (progress.asked - progress.done).min(PARTS);
        let mut parts = Vec::with_capacity(2 * waiting);
        let destinations = into.iter_mut().skip(progress.done);
        for (index, (head, to)) in self
            .heads
            .iter_mut()
            .zip(destinations)
            .take(waiting)
            .enumerate()
        {
            let got = if index == 0 { self.got } else { 0 };
            let head = head.get_mut(got..).unwrap_or_default();
            let to = to.get_mut(got.saturating_sub(REPLY_LEN_BYTES)..);
            parts.push(IoSliceMut::new(head));
            parts.push(IoSliceMut::new(to.unwrap_or_default()));
        }
        let len = socket::received(wire.read_vectored(&mut parts));
        let Some(mut len) = len.map_err(|error| progress.lost(error))? else {
            return Ok(false);
        };
        progress.heard = true;
        let mut finished = 0;
        while len > 0 {
            let (Some(head), Some(piece)) = (
                self.heads.get(finished),
                progress.pieces.get(progress.done + finished),
            ) else {
                return Err(Fault::Broke("it replies to nothing".to_owned()));
            };
            let whole = REPLY_LEN_BYTES + piece.len as usize;
            let step = len.min(whole - self.got);
            let had_head = self.got >= REPLY_LEN_BYTES;
            self.got += step;
            len -= step;
            if !had_head && self.got >= REPLY_LEN_BYTES {
                progress.check(head, finished, Way::Read)?;
            }
            if self.got == whole {
                self.got = 0;
                finished += 1;
            }
        }
        // A head that has come in part must be where the next call looks for it.
        if finished > 0
            && let Some(part) = self.heads.get(finished).copied()
            && let Some(first) = self.heads.first_mut()
        {
            *first = part;
        }
        progress.done += finished;
        Ok(true)
    }
}

/// Requests to write, on their way out.
#[derive(Default)]
struct Outbox {
    /// Heads that were not sent whole yet with the index of their piece, oldest first.
    queue: VecDeque<(usize, [u8; REQUEST_LEN_BYTES])>,
    /// Bytes of the oldest that were sent, head included.
    sent: usize,
}

impl Outbox {
    fn wants_more(&self, progress: &Progress<'_>) -> bool {
        !self.queue.is_empty() || progress.has_room()
    }

    /// Sends what the socket takes at once.
    fn send(
        &mut self,
        wire: &mut Wire,
        from: &[&[u8]],
        progress: &mut Progress<'_>,
    ) -> Result<(), Fault> {
        loop {
            while self.queue.len() < PARTS && progress.has_room() {
                let index = progress.asked;
                if let Some(head) = progress.request(Way::Write) {
                    self.queue.push_back((index, head));
                }
            }
            if self.queue.is_empty() {
                return Ok(());
            }
            let mut parts = Vec::with_capacity(2 * self.queue.len());
            let mut skip = self.sent;
            for (index, head) in &self.queue {
                let body = from.get(*index).copied().unwrap_or_default();
                parts.push(IoSlice::new(head.get(skip..).unwrap_or_default()));
                let skipped = skip.saturating_sub(REQUEST_LEN_BYTES);
                parts.push(IoSlice::new(body.get(skipped..).unwrap_or_default()));
                skip = 0;
            }
            let some = send_some(wire, &parts);
            let sent = some.map_err(|error| progress.lost(error))?;
            if sent == 0 {
                return Ok(());
            }
            self.sent += sent;
            while let Some((index, _)) = self.queue.front() {
                let whole = REQUEST_LEN_BYTES + from.get(*index).map_or(0, |body| body.len());
                if self.sent < whole {
                    break;
                }
                self.sent -= whole;
                self.queue.pop_front();
            }
        }
    }
}

/// Replies to writes.
#[derive(Default)]
struct Replies {
    bytes: [[u8; REPLY_LEN_BYTES]; PARTS],
    got: usize,
}

impl Replies {
    /// Takes what has come; false when nothing has.
    fn take(&mut self, wire: &mut Wire, progress: &mut Progress<'_>) -> Result<bool, Fault> {
        let room = self.bytes.as_flattened_mut();
        let len = socket::received(wire.read(room.get_mut(self.got..).unwrap_or_default()));
        let Some(len) = len.map_err(|error| progress.lost(error))? else {
            return Ok(false);
        };
        progress.heard = true;
        self.got += len;
        let whole = self.got / REPLY_LEN_BYTES;
        for (ahead, head) in self.bytes.iter().take(whole).enumerate() {
            progress.check(head, ahead, Way::Write)?;
        }
        if let (1.., Some(part)) = (whole, self.bytes.get(whole).copied())
            && let Some(first) = self.bytes.first_mut()
        {
            *first = part;
        }
        self.got -= whole * REPLY_LEN_BYTES;
        progress.done += whole;
        Ok(true)
    }
}
