//! `tcp`: the Transport contract over the network, for hosts that share neither memory nor RDMA.
//!
//! Not one-sided: threads of the donor's process copy between its memory and the sockets. A
//! [`TcpTransport`] is a handful of connections to one donor in one epoch. A batch has one of them
//! for itself; batches of several threads go over several. A connection that failed in any way is
//! closed, and the next batch makes a fresh one: whatever the old one still had under way can
//! reach nobody's memory.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    token::RegionKey,
    transport::{
        Access, Read, RegionId, RegionInfo, Transport, TransportError, TransportKind, Write,
        bounds, in_time, refused, unreachable,
    },
};

pub mod frames;
pub(crate) mod handshake;
mod link;
mod socket;
pub(crate) mod veil;

use frames::{
    Grant, Purpose,
    data::{MAX_REQUEST_BYTES, Outcome},
};
use handshake::{Target, open};
use link::{Fault, Link, Piece};
pub use veil::Veil;
use veil::Wire;

/// Connections of one transport at one time; a batch more waits for one.
const MAX_LINKS: usize = 4;

/// Connections to a donor that is reached over TCP.
#[derive(Debug)]
pub struct TcpTransport {
    peer: SocketAddr,
    address: String,
    epoch: u64,
    access: Access,
    keys: Vec<RegionKey>,
    /// TLS, for a donor that wants it.
    veil: Option<Veil>,
    /// What the donor said last that it lends and allows, by growing id.
    grants: RwLock<Arc<[Grant]>>,
    links: Mutex<Links>,
    /// A connection is free, or one fewer is open.
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Links {
    idle: Vec<Link>,
    /// Idle ones and those that batches have.
    open: usize,
}

/// A connection in the hands of one batch. Dropped, it is closed.
struct Held<'a> {
    transport: &'a TcpTransport,
    link: Option<Link>,
    /// It was made for this batch.
    fresh: bool,
    /// It is one fewer when this goes.
    counted: bool,
}

/// Where an operation reads or writes.
#[derive(Clone, Copy)]
struct Place {
    region: RegionId,
    offset: u64,
    len: usize,
}

impl TcpTransport {
    /// Connects to the donor that listens at `peer`. `epoch` is the one that the caller's locations
    /// are of, or 0 for whichever the donor is in; `keys` are the tokens that the caller holds; with a
    /// `veil` everything after the welcome goes under TLS, and without one nothing does.
    ///
    /// # Errors
    /// `Unreachable` when nobody answers there or the donor is busy, `WrongEpoch`, `Refused` when
    /// the donor does not accept the tokens or breaks the protocol, `Deadline`.
    pub fn connect(
        peer: SocketAddr,
        veil: Option<&Veil>,
        epoch: u64,
        access: Access,
        keys: &[RegionKey],
        deadline: Instant,
    ) -> Result<Self, TransportError> {
        in_time(deadline)?;
        let mut transport = Self {
            peer,
            address: address_of(peer, veil.is_some()),
            epoch,
            access,
            keys: keys.to_vec(),
            veil: veil.cloned(),
            grants: RwLock::new(Arc::new([])),
            links: Mutex::default(),
            freed: Condvar::new(),
        };
        let (link, epoch) = transport.open(deadline)?;
        transport.epoch = epoch;
        *transport.links.lock() = Links {
            idle: vec![link],
            open: 1,
        };
        Ok(transport)
    }

    /// Makes a connection.
    fn open(&self, deadline: Instant) -> Result<(Link, u64), TransportError> {
        let target = Target {
            peer: self.peer,
            address: &self.address,
            epoch: self.epoch,
            access: self.access,
            keys: &self.keys,
        };
        let opened = open(target, Purpose::Data, deadline)?;
        let wire = Wire::to_donor(opened.stream, self.veil.as_ref(), deadline)
            .map_err(|error| unreachable(&self.address, error))?
            .ok_or(TransportError::Deadline)?;
        *self.grants.write() = opened.regions.into();
        Ok((Link::new(wire), opened.epoch))
    }

    /// What the donor said last that it lends of what the tokens open, by growing id.
    pub fn regions(&self) -> Vec<RegionInfo> {
        self.grants.read().iter().map(|grant| grant.info).collect()
    }

    /// What the connection may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// A connection: an idle one, else a fresh one, else the next that is free.
    fn hold(&self, deadline: Instant) -> Result<Held<'_>, TransportError> {
        let mut links = self.links.lock();
        loop {
            if let Some(link) = links.idle.pop() {
                return Ok(Held {
                    transport: self,
                    link: Some(link),
                    fresh: false,
                    counted: true,
                });
            }
            if links.open < MAX_LINKS {
                links.open += 1;
                break;
            }
            if self.freed.wait_until(&mut links, deadline).timed_out() {
                return Err(TransportError::Deadline);
            }
        }
        drop(links);
        let mut held = Held {
            transport: self,
            link: None,
            fresh: true,
            counted: true,
        };
        held.link = Some(self.open(deadline)?.0);
        Ok(held)
    }

    /// Runs a batch over one connection, and once more over a fresh one when the first had died
    /// while it lay idle.
    fn over_a_link(
        &self,
        deadline: Instant,
        mut batch: impl FnMut(&mut Link) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut again = true;
        loop {
            let mut held = self.hold(deadline).map_err(Fault::Connecting)?;
            let Some(link) = held.link.as_mut() else {
                return Ok(());
            };
            match batch(link) {
                Ok(()) => {
                    held.give_back();
                    return Ok(());
                }
                Err(Fault::Lost { heard: false, .. }) if again && !held.fresh => {
                    // What killed one that lay idle killed the others.
                    let mut links = self.links.lock();
                    links.open -= links.idle.len();
                    links.idle.clear();
                    self.freed.notify_all();
                }
                Err(fault) => return Err(fault),
            }
            again = false;
        }
    }

    fn error(&self, fault: Fault, operation: impl Fn(usize) -> Option<Place>) -> TransportError {
        match fault {
            Fault::Connecting(error) => error,
            Fault::Deadline => TransportError::Deadline,
            Fault::Lost { source, .. } => unreachable(&self.address, source),
            Fault::Broke(reason) => refused(&self.address, reason),
            Fault::Denied(at, outcome) => match outcome {
                Outcome::WrongEpoch(actual) if actual != self.epoch => TransportError::WrongEpoch {
                    wanted: self.epoch,
                    actual,
                },
                Outcome::OutOfBounds => match operation(at) {
                    Some(place) => place.outside(),
                    None => refused(&self.address, OUT_OF_PLACE),
                },
                Outcome::NoRight => refused(&self.address, NO_RIGHT),
                Outcome::Failed => unreachable(
                    &self.address,
                    std::io::Error::other("the donor could not reach its memory"),
                ),
                _ => refused(&self.address, OUT_OF_PLACE),
            },
        }
    }

    /// Checks one operation against what the donor lends and allows.
    fn check(&self, grants: &[Grant], at: Place, write: bool) -> Result<(), TransportError> {
        let found = grants.binary_search_by_key(&at.region, |grant| grant.info.id);
        let grant = found.ok().and_then(|index| grants.get(index));
        bounds(
            at.region,
            grant.map(|grant| grant.info.len),
            at.offset,
            at.len,
        )?;
        match grant {
            Some(grant) if write && !grant.write || !write && !grant.read => {
                Err(refused(&self.address, NO_RIGHT))
            }
            _ => Ok(()),
        }
    }
}

const OUT_OF_PLACE: &str = "a reply out of place";
const NO_RIGHT: &str = "no token was shown that opens this region for that";

impl Transport for TcpTransport {
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        let grants = Arc::clone(&self.grants.read());
        for read in &*batch {
            self.check(&grants, Place::of_read(read), false)?;
        }
        let places: Vec<_> = batch.iter().map(Place::of_read).collect();
        let mut pieces = Vec::with_capacity(batch.len());
        let mut into = Vec::with_capacity(batch.len());
        for (operation, read) in batch.iter_mut().enumerate() {
            split(
                &mut pieces,
                operation,
                read.region,
                read.offset,
                read.into.len(),
            );
            if read.into.is_empty() {
                into.push(&mut *read.into);
            } else {
                into.extend(read.into.chunks_mut(MAX_REQUEST_BYTES));
            }
        }
        let done = self.over_a_link(deadline, |link| link.read(&pieces, &mut into, deadline));
        let operation = |at| places.get(at).copied();
        done.map_err(|fault| self.error(fault, operation))
    }

    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        if self.access != Access::ReadWrite {
            return Err(refused(
                &self.address,
                "the connection was made for reading only",
            ));
        }
        let grants = Arc::clone(&self.grants.read());
        let mut pieces = Vec::with_capacity(batch.len());
        let mut from = Vec::with_capacity(batch.len());
        for (operation, write) in batch.iter().enumerate() {
            self.check(&grants, Place::of_write(write), true)?;
            split(
                &mut pieces,
                operation,
                write.region,
                write.offset,
                write.from.len(),
            );
            if write.from.is_empty() {
                from.push(write.from);
            } else {
                from.extend(write.from.chunks(MAX_REQUEST_BYTES));
            }
        }
        let done = self.over_a_link(deadline, |link| link.write(&pieces, &from, deadline));
        let operation = |at| batch.get(at).map(Place::of_write);
        done.map_err(|fault| self.error(fault, operation))
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }
}

impl Held<'_> {
    /// The batch ended well: the next may have the connection.
    fn give_back(mut self) {
        if let Some(link) = self.link.take() {
            self.transport.links.lock().idle.push(link);
            self.transport.freed.notify_one();
            self.counted = false;
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.transport.links.lock().open -= 1;
            self.transport.freed.notify_one();
        }
    }
}

impl Place {
    fn of_read(read: &Read<'_>) -> Self {
        Self {
            region: read.region,
            offset: read.offset,
            len: read.into.len(),
        }
    }

    fn of_write(write: &Write<'_>) -> Self {
        Self {
            region: write.region,
            offset: write.offset,
            len: write.from.len(),
        }
    }

    fn outside(self) -> TransportError {
        TransportError::OutOfBounds {
            region: self.region,
            offset: self.offset,
            len: self.len as u64,
        }
    }
}

/// Adds the requests that an operation takes: one at least, so that a donor that is gone shows.
fn split(pieces: &mut Vec<Piece>, operation: usize, region: RegionId, offset: u64, len: usize) {
    let mut at = 0;
    loop {
        let step = (len - at).min(MAX_REQUEST_BYTES);
        pieces.push(Piece {
            operation,
            region,
            offset: offset + at as u64,
            // At most `MAX_REQUEST_BYTES`.
            len: step as u32,
        });
        at += step;
        if at == len {
            return;
        }
    }
}

/// Instead of the transport's name in addresses of donors that want TLS.
const VEILED: &str = "tls";

/// The form in which a donor's TCP socket appears in addresses: `"tcp:192.0.2.1:7481"`,
/// `"tcp:[2001:db8::1]:7481"`; `"tls:192.0.2.1:7481"` where bytes go under TLS.
pub fn address_of(peer: SocketAddr, veiled: bool) -> String {
    let name = if veiled {
        VEILED
    } else {
        TransportKind::Tcp.name()
    };
    format!("{name}:{peer}")
}

/// The socket in an address of the form that [`address_of`] gives, and whether it wants TLS; `None`
/// for other transports and for names: looking those up has no deadline, so donors say where they
/// are in numbers.
pub fn peer_of(address: &str) -> Option<(SocketAddr, bool)> {
    let (name, peer) = address.split_once(':')?;
    let veiled = name == VEILED;
    if !veiled && name != TransportKind::Tcp.name() {
        return None;
    }
    Some((peer.parse().ok()?, veiled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_there_and_back() {
        for text in [
            "tcp:192.0.2.1:7481",
            "tcp:[2001:db8::1]:7481",
            "tls:192.0.2.1:7481",
        ] {
            let (peer, veiled) = peer_of(text).unwrap();
            assert_eq!(address_of(peer, veiled), text);
        }
        for text in [
            "tcp:host:7481",
            "tcp:192.0.2.1",
            "tcp:",
            "tls:",
            "tlss:192.0.2.1:1",
            "tcp",
            "shm:/x",
            "tcp:::1:5",
        ] {
            assert_eq!(peer_of(text), None, "{text}");
        }
    }

    #[test]
    fn long_operations_are_split_and_empty_ones_are_not_lost() {
        let lens = |len| -> Vec<(u64, u32)> {
            let mut pieces = Vec::new();
            split(&mut pieces, 3, RegionId(1), 7, len);
            pieces
                .iter()
                .map(|piece| (piece.offset, piece.len))
                .collect()
        };
        const MIB: u32 = 1 << 20;
        assert_eq!(lens(0), [(7, 0)]);
        assert_eq!(lens(MIB as usize), [(7, MIB)]);
        assert_eq!(lens(MIB as usize + 1), [(7, MIB), (7 + u64::from(MIB), 1)]);
    }
}
