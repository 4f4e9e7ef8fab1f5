//! `verbs`: one-sided RDMA over reliable connections. The donor's process takes no part in a read or
//! a write: its device answers.
//!
//! The library is opened at run time ([`crate::sys`] has all of it), so hosts without RDMA run the
//! same program; [`check`] says what is missing. A queue pair is set up over the donor's TCP
//! listener, where the caller proves the tokens of the regions it wants and gets their remote keys:
//! of a region whose write token it does not show, one that reads. The TCP connection then stays
//! open as the sign of life of both ends. A [`VerbsTransport`] has a few queue pairs to one donor in
//! one epoch, each used by one batch at a time; one that failed is replaced by a fresh one, whose
//! set-up also tells what became of the donor.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Instant,
};

use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    sys::verbs::Path,
    tcp::{
        frames::{Grant, Purpose},
        handshake::{Opened, Target, open},
    },
    token::{RegionKey, random_bytes},
    transport::{
        Access, Read, RegionId, RegionInfo, Transport, TransportError, TransportKind, Write,
        bounds, in_time, refused, unreachable,
    },
};

mod check;
mod device;
pub mod frames;
mod lane;
pub(crate) mod lender;
mod patience;
mod plan;

pub use check::{Finding, State, check};
pub use device::Devices;
use device::{Adapter, gid_of};
use frames::{Answer, End, RemoteKey, Request};
use lane::{Fault, Lane};
use plan::{Cursor, Place, Stream};

/// Queue pairs of one transport at one time; a batch more waits for one.
const MAX_LANES: usize = 4;
/// Reads that one queue pair has under way at one time, unless a device allows fewer.
const MAX_READS: u8 = 16;

/// Queue pairs to a donor.
#[derive(Debug)]
pub struct VerbsTransport {
    peer: SocketAddr,
    address: String,
    epoch: u64,
    access: Access,
    keys: Vec<RegionKey>,
    adapter: Adapter,
    /// What the donor said last that it lends and allows, by growing id.
    regions: RwLock<Arc<[Remote]>>,
    lanes: Mutex<Lanes>,
    /// A lane is free, or one fewer is open.
    freed: Condvar,
}

/// One region, over there.
#[derive(Clone, Copy, Debug)]
struct Remote {
    grant: Grant,
    key: RemoteKey,
}

#[derive(Debug, Default)]
struct Lanes {
    idle: Vec<Lane>,
    /// Idle ones and those that batches have.
    open: usize,
}

/// A lane in the hands of one batch. Dropped, it is ended.
struct Held<'a> {
    transport: &'a VerbsTransport,
    lane: Option<Lane>,
    /// It was made for this batch.
    fresh: bool,
    /// It is one fewer when this goes.
    counted: bool,
}

/// Where an operation reads or writes.
#[derive(Clone, Copy)]
struct Operation {
    region: RegionId,
    offset: u64,
    len: usize,
}

impl VerbsTransport {
    /// Connects to the donor that listens at `peer`. `device` is the name of the device to use; `None`
    /// for the one that has the address from which this host reaches the donor. `epoch` is the one
    /// that the caller's locations are of, or 0 for whichever the donor is in; `keys` are the tokens
    /// that the caller holds.
    ///
    /// # Errors
    /// `Unreachable` when nobody answers there, the donor is busy, or this host has no RDMA device
    /// for it; `WrongEpoch`; `Refused` when the donor has none, does not accept the tokens or breaks
    /// the protocol; `Deadline`.
    pub fn connect(
        peer: SocketAddr,
        device: Option<&str>,
        epoch: u64,
        access: Access,
        keys: &[RegionKey],
        deadline: Instant,
    ) -> Result<Self, TransportError> {
        in_time(deadline)?;
        let address = address_of(peer);
        let adapter = local_address(peer)
            .and_then(|from| Adapter::find(from, device).map_err(io::Error::other))
            .map_err(|error| unreachable(&address, error))?;
        let mut transport = Self {
            peer,
            address,
            epoch,
            access,
            keys: keys.to_vec(),
            adapter,
            regions: RwLock::new(Arc::new([])),
            lanes: Mutex::default(),
            freed: Condvar::new(),
        };
        let (lane, epoch) = transport.open(deadline)?;
        transport.epoch = epoch;
        *transport.lanes.lock() = Lanes {
            idle: vec![lane],
            open: 1,
        };
        Ok(transport)
    }

    /// What the donor said last that it lends of what the tokens open, by growing id.
    pub fn regions(&self) -> Vec<RegionInfo> {
        self.regions
            .read()
            .iter()
            .map(|region| region.grant.info)
            .collect()
    }

    /// What the connection may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Name of the device that is used here.
    pub fn device(&self) -> &str {
        &self.adapter.gid.device
    }

    /// Makes a lane and joins it to one that the donor makes.
    fn open(&self, deadline: Instant) -> Result<(Lane, u64), TransportError> {
        let failed = |error| unreachable(&self.address, error);
        let mut lane = Lane::new(&self.adapter).map_err(failed)?;
        let psn = u32::from_le_bytes(random_bytes().map_err(failed)?) & 0xFF_FFFF;
        let request = Request(End {
            number: lane.number(),
            psn,
            mtu: self.adapter.mtu,
            reads: self.adapter.limits.reads_asked.clamp(1, MAX_READS),
            gid: self.adapter.gid.bytes,
            peer_gid: gid_of(self.peer.ip()),
        });
        let target = Target {
            peer: self.peer,
            address: &self.address,
            epoch: self.epoch,
            access: self.access,
            keys: &self.keys,
        };
        let opened = open(target, Purpose::Verbs(request.encode()), deadline)?;
        let answer = Answer::parse(&opened.payload)
            .map_err(|error| refused(&self.address, format!("it answers {error}")))?;
        let regions =
            join(&opened, &answer, &request.0).map_err(|reason| refused(&self.address, reason))?;
        let path = Path {
            port: self.adapter.gid.port,
            gid_index: self.adapter.gid.index,
            peer_gid: answer.end.gid,
            peer_number: answer.end.number,
            peer_psn: answer.end.psn,
            psn,
            mtu: answer.end.mtu,
            reads_asked: answer.end.reads,
            reads_answered: 0,
        };
        lane.connect(&path, opened.stream).map_err(failed)?;
        *self.regions.write() = regions.into();
        Ok((lane, opened.epoch))
    }

    /// A lane: an idle one that still stands, else a fresh one, else the next that is free.
    fn hold(&self, deadline: Instant) -> Result<Held<'_>, TransportError> {
        let mut lanes = self.lanes.lock();
        loop {
            while let Some(lane) = lanes.idle.pop() {
                if lane.stands().is_ok() {
                    return Ok(Held {
                        transport: self,
                        lane: Some(lane),
                        fresh: false,
                        counted: true,
                    });
                }
                lanes.open -= 1;
            }
            if lanes.open < MAX_LANES {
                lanes.open += 1;
                break;
            }
            if self.freed.wait_until(&mut lanes, deadline).timed_out() {
                return Err(TransportError::Deadline);
            }
        }
        drop(lanes);
        let mut held = Held {
            transport: self,
            lane: None,
            fresh: true,
            counted: true,
        };
        held.lane = Some(self.open(deadline)?.0);
        Ok(held)
    }

    /// Checks every operation against what the donor lends now.
    fn places(&self, operations: &[Operation], write: bool) -> Result<Vec<Place>, TransportError> {
        let regions = Arc::clone(&self.regions.read());
        let mut denied = None;
        let mut places = Vec::with_capacity(operations.len());
        for operation in operations {
            let Operation {
                region,
                offset,
                len,
            } = *operation;
            let found = regions.binary_search_by_key(&region, |remote| remote.grant.info.id);
            let remote = found.ok().and_then(|index| regions.get(index));
            bounds(
                region,
                remote.map(|remote| remote.grant.info.len),
                offset,
                len,
            )?;
            let Some(remote) = remote else { continue };
            let allowed = if write {
                remote.grant.write
            } else {
                remote.grant.read
            };
            if !allowed {
                denied.get_or_insert(region);
            }
            places.push(Place {
                address: remote.key.address.wrapping_add(offset),
                key: remote.key.key,
                len,
            });
        }
        match denied {
            Some(region) => {
                let what = if write { "written" } else { "read" };
                Err(refused(
                    &self.address,
                    format!("no token lets {region:?} be {what}"),
                ))
            }
            None => Ok(places),
        }
    }

    /// Runs a batch over a lane, and once more over a fresh one when the first had died before or
    /// its keys no longer open what they did.
    fn over_a_lane(
        &self,
        operations: &[Operation],
        write: bool,
        deadline: Instant,
        mut batch: impl FnMut(&mut Lane, &[Place]) -> Result<(), Fault>,
    ) -> Result<(), TransportError> {
        let mut again = true;
        loop {
            let mut held = self.hold(deadline)?;
            let places = match self.places(operations, write) {
                Ok(places) => places,
                Err(error) => {
                    held.give_back();
                    return Err(error);
                }
            };
            let Some(lane) = held.lane.as_mut() else {
                return Ok(());
            };
            match batch(lane, &places) {
                Ok(()) => {
                    held.give_back();
                    return Ok(());
                }
                Err(Fault::Deadline) => {
                    if write {
                        held.stop();
                    } else {
                        lane.abandon();
                        held.give_back();
                    }
                    return Err(TransportError::Deadline);
                }
                Err(Fault::Denied) if again => {}
                Err(Fault::Denied) => {
                    return Err(refused(
                        &self.address,
                        "its device does not take the keys that it gave",
                    ));
                }
                Err(Fault::Lost(error)) if again && !held.fresh => {
                    tracing::debug!(address = self.address, %error, "a queue pair is lost; trying a fresh one");
                }
                Err(Fault::Lost(error)) => return Err(unreachable(&self.address, error)),
            }
            again = false;
        }
    }
}

impl Held<'_> {
    /// Its lane can be used again.
    fn give_back(mut self) {
        if let Some(lane) = self.lane.take() {
            self.counted = false;
            self.transport.lanes.lock().idle.push(lane);
            self.transport.freed.notify_one();
        }
    }

    /// Its work must not go on.
    fn stop(mut self) {
        if let Some(lane) = self.lane.take() {
            lane.stop();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // The queue pair goes before its place is free.
        drop(self.lane.take());
        if self.counted {
            self.transport.lanes.lock().open -= 1;
            self.transport.freed.notify_one();
        }
    }
}

impl Transport for VerbsTransport {
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        let operations: Vec<_> = batch
            .iter()
            .map(|read| Operation {
                region: read.region,
                offset: read.offset,
                len: read.into.len(),
            })
            .collect();
        self.over_a_lane(&operations, false, deadline, |lane, places| {
            lane.read(places, Stream::Into(batch, Cursor::default()), deadline)
        })
    }

    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        if self.access != Access::ReadWrite {
            let reason = "the connection was made for reading only";
            return Err(refused(&self.address, reason));
        }
        let operations: Vec<_> = batch
            .iter()
            .map(|write| Operation {
                region: write.region,
                offset: write.offset,
                len: write.from.len(),
            })
            .collect();
        self.over_a_lane(&operations, true, deadline, |lane, places| {
            lane.write(places, Stream::From(batch, Cursor::default()), deadline)
        })
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kind(&self) -> TransportKind {
        TransportKind::Verbs
    }
}

/// The form in which a donor's listener appears in addresses: `"verbs:10.0.0.7:7070"`.
pub fn address_of(peer: SocketAddr) -> String {
    format!("{}:{peer}", TransportKind::Verbs)
}

/// The socket in an address of the form that [`address_of`] gives, or `None` for other transports.
pub fn peer_of(address: &str) -> Option<SocketAddr> {
    let socket = address.strip_prefix(TransportKind::Verbs.name())?;
    socket.strip_prefix(':')?.parse().ok()
}

/// Why this host cannot reach a donor there by RDMA; `None` when it has a device that may. Opens
/// nothing.
pub(crate) fn obstacle(peer: SocketAddr, devices: &Devices) -> Option<String> {
    if *devices == Devices::Off {
        return Some("RDMA is turned off here".to_owned());
    }
    let all = device::names();
    if all.is_empty() {
        return Some("this host has no RDMA device".to_owned());
    }
    let from = match local_address(peer) {
        Ok(from) => from,
        Err(error) => return Some(format!("no route to {}: {error}", peer.ip())),
    };
    if device::choose(from, devices.name()).is_some() {
        return None;
    }
    Some(match devices.name() {
        Some(name) if !all.iter().any(|known| known == name) => {
            format!(
                "this host has no RDMA device {name}, only {}",
                all.join(", ")
            )
        }
        Some(name) => format!("{name} has no address of the kind of {}", peer.ip()),
        None => format!(
            "this host reaches {} from {from}, which no RDMA device has (there is {})",
            peer.ip(),
            all.join(", ")
        ),
    })
}

/// Whether the kernel lists an RDMA device on this host.
pub(crate) fn any_device() -> bool {
    !device::names().is_empty()
}

/// From which of its addresses this host would send to `peer`.
fn local_address(peer: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a datagram socket asks the routes and sends nothing.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// Puts together what a welcome grants and what its payload says. The error says what is wrong.
fn join(opened: &Opened, answer: &Answer, request: &End) -> Result<Vec<Remote>, String> {
    let end = &answer.end;
    if end.mtu > request.mtu || end.reads > request.reads {
        return Err(format!(
            "packets of {} and {} reads where {} and {} were offered",
            end.mtu, end.reads, request.mtu, request.reads
        ));
    }
    if end.peer_gid != request.gid {
        return Err("an answer to another end".to_owned());
    }
    let granted = opened.regions.iter().map(|grant| grant.info.id);
    if !granted.eq(answer.keys.iter().map(|key| key.region)) {
        return Err("keys of other regions than it grants".to_owned());
    }
    let pairs = opened.regions.iter().zip(&answer.keys);
    Ok(pairs
        .map(|(grant, key)| Remote {
            grant: *grant,
            key: *key,
        })
        .collect())
}
