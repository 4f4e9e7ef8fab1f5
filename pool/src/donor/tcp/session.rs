//! One connection of a reader on another host: its requests in order, each answered from the memory
//! that is lent at that moment. A region that was given back is out of bounds, an epoch that is
//! over is said to be, and neither keeps memory from going back to the host while a reader is idle.
//!
//! Long reads are sent straight from the region's mapping. Short ones are copied behind the head of
//! their reply, and replies leave together once no further request lies here. `sendfile` from the
//! region's pages was measured at half the speed (ARCHITECTURE.md). Writes are copied through a
//! buffer that stays in the processor's cache.

use std::{
    io::{self, IoSlice},
    net::TcpStream,
    os::fd::AsFd as _,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use nix::sys::socket::MsgFlags;

use super::{Lent, Shared};
use crate::{
    sys::Mapping,
    tcp::{
        frames::{
            Answer, Grant, Purpose, Refusal,
            data::{Outcome, REPLY_LEN_BYTES, REQUEST_LEN_BYTES, Reply, Request, Way},
        },
        veil::Wire,
    },
};

/// Bytes of requests that are read at one time.
const INPUT_BYTES: usize = 256 << 10;
/// Replies are sent at the latest when so many bytes of them lie here.
const OUTPUT_BYTES: usize = 256 << 10;
/// Reads of at least so many bytes are sent from the region itself: below it the copy costs less than
/// the system call that it saves.
const DIRECT_BYTES: usize = 64 << 10;
/// A blocked call comes back after so long at the latest, to look at the time.
const TICK: Duration = Duration::from_secs(1);
/// The same where only the end of a connection is waited for.
const IDLE: Duration = Duration::from_secs(60);

/// A connection under way.
pub(super) struct Session<'a> {
    shared: &'a Shared,
    wire: Wire,
    epoch: u64,
    grants: Vec<Grant>,
    /// Number of the next request.
    next: u64,
    input: Vec<u8>,
    /// Where in `input` the bytes are that were received and not looked at.
    at: std::ops::Range<usize>,
    /// Of [`OUTPUT_BYTES`]; what was sent stays in it, so that nothing is zeroed twice.
    output: Vec<u8>,
    /// How much of `output` is to be sent.
    filled: usize,
}

impl<'a> Session<'a> {
    /// Welcomes a reader that proved `grants` and serves it until it leaves or breaks the protocol.
    pub(super) fn run(
        shared: &'a Shared,
        stream: TcpStream,
        epoch: u64,
        grants: Vec<Grant>,
        purpose: Purpose,
    ) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let limits = shared.config.tcp;
        let tick = TICK.min(limits.idle_timeout).min(limits.stall_timeout);
        stream.set_read_timeout(Some(tick))?;
        stream.set_write_timeout(Some(tick))?;
        let mut session = Self {
            shared,
            wire: Wire::Plain(stream),
            epoch,
            grants,
            next: 1,
            input: Vec::new(),
            at: 0..0,
            // Zeroed memory that is not touched until it is used costs none.
            output: vec![0; OUTPUT_BYTES],
            filled: 0,
        };
        match purpose {
            Purpose::Data => {
                session.welcome(Vec::new())?;
                session.veil()?.serve()
            }
            Purpose::Verbs(request) => session.verbs(&request),
        }
    }

    /// Begins TLS, where this donor serves nobody without.
    fn veil(mut self) -> io::Result<Self> {
        let config = &self.shared.config;
        let (Wire::Plain(stream), Some(veil)) = (&self.wire, &config.veil) else {
            return Ok(self);
        };
        let deadline = Instant::now() + config.handshake_timeout;
        let wire = Wire::to_reader(stream.try_clone()?, veil, deadline)?;
        self.wire = wire.ok_or(io::ErrorKind::TimedOut)?;
        Ok(self)
    }

    fn serve(mut self) -> io::Result<()> {
        self.input = vec![0; INPUT_BYTES];
        while let Some(head) = self.request()? {
            let request = Request::parse(&head).map_err(io::Error::other)?;
            if request.id != self.next {
                return Err(io::Error::other("a request out of order"));
            }
            self.next += 1;
            let deadline = Instant::now() + self.shared.config.tcp.stall_timeout;
            match request.way {
                Way::Read => self.read(request, deadline)?,
                Way::Write => self.write(request, deadline)?,
            }
        }
        Ok(())
    }

    /// Sets up queue pairs and stays until the reader hangs up.
    fn verbs(&mut self, request: &[u8]) -> io::Result<()> {
        let lent = self.shared.lent.read().clone();
        let lent = lent.filter(|lent| lent.epoch == self.epoch);
        let made = match (&self.shared.verbs, lent) {
            (Some(hook), Some(lent)) => hook.set_up(&lent, &self.grants, request),
            _ => Err("the epoch is over".to_owned()),
        };
        let alive = match made {
            Ok(made) => {
                self.welcome(made.answer)?;
                made.alive
            }
            Err(reason) => {
                tracing::warn!(
                    name = self.shared.config.name,
                    reason,
                    "no RDMA for a reader"
                );
                return self.answer(&Answer::Refused(Refusal::Verbs));
            }
        };
        // Nothing but its end is to come, and a thread that wakes takes time from readers.
        self.wire.stream().set_read_timeout(Some(IDLE))?;
        let mut byte = [0];
        let end = loop {
            match self.wire.read(&mut byte) {
                Err(error) if again(&error) => {}
                Ok(0) => break Ok(()),
                Ok(_) => break Err(io::Error::other("words on a connection of queue pairs")),
                Err(error) => break Err(error),
            }
        };
        drop(alive);
        end
    }

    fn welcome(&mut self, payload: Vec<u8>) -> io::Result<()> {
        self.answer(&Answer::Welcome {
            epoch: self.epoch,
            regions: self.grants.clone(),
            payload,
        })
    }

    fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        self.put(&answer.encode());
        self.flush(false, Instant::now() + self.shared.config.tcp.stall_timeout)
    }

    /// The head of the next request; `None` when the reader is gone or was silent for too long.
    fn request(&mut self) -> io::Result<Option<[u8; REQUEST_LEN_BYTES]>> {
        let limits = self.shared.config.tcp;
        let since = Instant::now();
        loop {
            let here = self.input.get(self.at.clone()).unwrap_or_default();
            if let Some(head) = here.first_chunk::<REQUEST_LEN_BYTES>() {
                let head = *head;
                self.at.start += REQUEST_LEN_BYTES;
                return Ok(Some(head));
            }
            let begun = !here.is_empty();
            self.flush(false, Instant::now() + limits.stall_timeout)?;
            match self.receive() {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(error) if again(&error) => {
                    if begun && since.elapsed() > limits.stall_timeout {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    if since.elapsed() > limits.idle_timeout {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives behind what is here already; false at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        // What is here is less than a head.
        self.input.copy_within(self.at.clone(), 0);
        self.at = 0..self.at.len();
        let room = self.input.get_mut(self.at.end..).unwrap_or_default();
        let len = self.wire.read(room)?;
        self.at.end += len;
        Ok(len > 0)
    }

    /// What stands in the way of a request, with the memory when nothing does.
    fn find(&self, request: &Request) -> Result<Arc<Lent>, Outcome> {
        let lent = self.shared.lent.read().clone();
        let lent = lent.filter(|lent| lent.epoch == self.epoch);
        let Some(lent) = lent else {
            return Err(Outcome::WrongEpoch(
                self.shared.epoch.load(Ordering::Acquire),
            ));
        };
        let grant = self
            .grants
            .binary_search_by_key(&request.region, |grant| grant.info.id);
        let grant = grant.ok().and_then(|index| self.grants.get(index));
        let (Some(grant), Some(region)) = (grant, lent.get(request.region)) else {
            return Err(Outcome::OutOfBounds);
        };
        let allowed = match request.way {
            Way::Read => grant.read,
            Way::Write => grant.write,
        };
        let end = request.offset.checked_add(u64::from(request.len));
        match end {
            Some(end) if end <= region.info.len && allowed => Ok(lent),
            Some(end) if end <= region.info.len => Err(Outcome::NoRight),
            _ => Err(Outcome::OutOfBounds),
        }
    }

    fn read(&mut self, request: Request, deadline: Instant) -> io::Result<()> {
        let lent = match self.find(&request) {
            Ok(lent) => lent,
            Err(outcome) => return self.reply(request.id, outcome, deadline),
        };
        let Some(region) = lent.get(request.region) else {
            return self.reply(request.id, Outcome::OutOfBounds, deadline);
        };
        let len = request.len as usize;
        self.reply(request.id, Outcome::Data(request.len), deadline)?;
        if len >= DIRECT_BYTES
            && self.wire.is_plain()
            && let Some(mapping) = region.mapping()
        {
            return self.direct(mapping, request.offset, len, deadline);
        }
        let mut offset = request.offset;
        let mut left = len;
        while left > 0 {
            let step = left.min(OUTPUT_BYTES - self.filled);
            let into = self.filled..self.filled + step;
            let into = self.output.get_mut(into).unwrap_or_default();
            region.memory.read_at(into, offset)?;
            self.filled += step;
            offset += step as u64;
            left -= step;
            if self.filled == OUTPUT_BYTES {
                self.flush(left > 0, deadline)?;
            }
        }
        Ok(())
    }

    /// Sends what lies in the output and behind it `len` bytes of a region, straight from there.
    fn direct(
        &mut self,
        mapping: &Mapping,
        offset: u64,
        len: usize,
        deadline: Instant,
    ) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let whole = self.filled + len;
        let mut sent = 0;
        while sent < whole {
            let head = self.output.get(sent.min(self.filled)..self.filled);
            let skip = sent.saturating_sub(self.filled);
            let socket = self.wire.stream().as_fd();
            let head = head.unwrap_or_default();
            match mapping.send(
                socket,
                head,
                start + skip,
                len - skip,
                MsgFlags::MSG_NOSIGNAL,
            ) {
                Ok(some) => sent += some,
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
            if sent < whole && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.filled = 0;
        Ok(())
    }

    fn write(&mut self, request: Request, deadline: Instant) -> io::Result<()> {
        let found = self.find(&request);
        let mut outcome = found.as_ref().err().copied().unwrap_or(Outcome::Done);
        let region = found
            .as_ref()
            .ok()
            .and_then(|lent| lent.get(request.region));
        let mut offset = request.offset;
        let mut left = request.len as usize;
        // What is not written is taken all the same: the next request is behind it.
        while left > 0 {
            if self.at.is_empty() {
                // Replies to earlier writes need not wait for this one.
                self.flush(false, deadline)?;
                match self.receive() {
                    Ok(true) => {}
                    Ok(false) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) if again(&error) && Instant::now() < deadline => continue,
                    Err(error) => return Err(error),
                }
            }
            let step = left.min(self.at.len());
            let from = self.at.start..self.at.start + step;
            let from = self.input.get(from).unwrap_or_default();
            if let (Outcome::Done, Some(region)) = (outcome, region)
                && let Err(error) = region.write_at(from, offset)
            {
                tracing::warn!(name = self.shared.config.name, %error, "lent memory cannot be written");
                outcome = Outcome::Failed;
            }
            self.at.start += step;
            offset += step as u64;
            left -= step;
        }
        self.reply(request.id, outcome, deadline)
    }

    fn reply(&mut self, id: u64, outcome: Outcome, deadline: Instant) -> io::Result<()> {
        if self.filled + REPLY_LEN_BYTES > OUTPUT_BYTES {
            self.flush(true, deadline)?;
        }
        self.put(&Reply { id, outcome }.encode());
        Ok(())
    }

    /// Puts bytes for which there is room into the output.
    fn put(&mut self, bytes: &[u8]) {
        let to = self.filled..self.filled + bytes.len();
        if let Some(to) = self.output.get_mut(to) {
            to.copy_from_slice(bytes);
            self.filled += bytes.len();
        }
    }

    /// Sends what lies in the output; `more` follows at once.
    fn flush(&mut self, more: bool, deadline: Instant) -> io::Result<()> {
        let mut flags = MsgFlags::empty();
        if more {
            flags |= MsgFlags::from_bits_retain(nix::libc::MSG_MORE);
        }
        let mut sent = 0;
        while sent < self.filled {
            let rest = self.output.get(sent..self.filled).unwrap_or_default();
            match self.wire.send(&[IoSlice::new(rest)], flags) {
                Ok(some) => sent += some,
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
            if sent < self.filled && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        while self.wire.sending() {
            self.wire.push()?;
            if self.wire.sending() && Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.filled = 0;
        Ok(())
    }
}

/// A blocked call came back with nothing.
fn again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
