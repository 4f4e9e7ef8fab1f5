//! `shm`: a donor's memfds, mapped by the reader. Truly one-sided: after the handshake the donor's
//! process is not asked again.
//!
//! The connection stays open for as long as the memory may be used. A thread of its own waits on
//! it; when the donor closes it, dies, or takes its memory back, the thread marks the connection
//! and lets go of the mappings, so that the host gets its memory even from readers that are idle.
//! It does the same for single regions that the donor takes back, and maps those that it adds.
//!
//! A mapping of a donor's memory can still fault where no copy may fail: on a memory error of the
//! hardware, and on huge pages that a donor punches out while this process reads them (ours never
//! does) when the host has no other. Both end the process with SIGBUS. Who can connect a reader to
//! a donor of its own making must be trusted that far.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use nix::sys::socket::{Shutdown, shutdown};

use crate::{
    memory::Memory,
    sys::{self, Mapping},
    transport::{
        Access, Read, RegionId, RegionInfo, Transport, TransportError, TransportKind, Write,
        bounds, in_time, refused, unreachable,
    },
};

pub mod frames;
mod link;
pub(crate) mod socket;

use frames::{Answer, Hello, MAX_ANSWER_LEN_BYTES, MAX_REGIONS, Refusal, Token};
use link::Link;

/// The deadline is looked at after every so many bytes, half a millisecond's worth of copying: a
/// clock costs as much as copying 512 bytes, too much for every operation of a long batch.
const STEP_BYTES: usize = 4 << 20;

/// A connection to a donor on this host.
#[derive(Debug)]
pub struct ShmTransport {
    link: Arc<Link>,
    epoch: u64,
    access: Access,
    watcher: Option<JoinHandle<()>>,
}

impl ShmTransport {
    /// Connects to the donor whose socket is at `path`. `epoch` is the one that the caller's
    /// locations are of, or 0 for whichever the donor is in.
    ///
    /// # Errors
    /// `Unreachable` when nobody answers there or the donor is busy, `WrongEpoch`, `Refused` when
    /// the donor refuses, breaks the protocol, or passes something that is not the memory it
    /// announces, `Deadline`.
    pub fn connect(
        path: &Path,
        epoch: u64,
        access: Access,
        token: Token,
        deadline: Instant,
    ) -> Result<Self, TransportError> {
        in_time(deadline)?;
        let address = address_of(path);
        let lost = |source| unreachable(&address, source);
        let socket = socket::dial(path, deadline)
            .map_err(lost)?
            .ok_or(TransportError::Deadline)?;
        let hello = Hello {
            access,
            epoch,
            token,
        };
        socket::send(socket.as_fd(), &hello.encode(), &[]).map_err(lost)?;
        if !socket::wait_readable(socket.as_fd(), deadline).map_err(lost)? {
            return Err(TransportError::Deadline);
        }
        // One byte more than the longest answer, so that a longer one shows.
        let mut packet = [0; MAX_ANSWER_LEN_BYTES + 1];
        let received = sys::receive(socket.as_fd(), &mut packet).map_err(lost)?;
        if received.len == 0 {
            return Err(lost(io::ErrorKind::ConnectionReset.into()));
        }
        if received.truncated {
            return Err(refused(&address, "a message longer than any"));
        }
        let bytes = packet.get(..received.len).unwrap_or_default();
        let answer = Answer::parse(bytes).map_err(|error| refused(&address, error.to_string()))?;
        let (actual, regions) = welcome(answer, epoch, &address)?;
        let mapped =
            map(&regions, received.fds, access).map_err(|reason| refused(&address, reason))?;
        let link = Arc::new(Link::new(address, actual, access, socket, Regions(mapped)));
        let watcher = link
            .watch()
            .map_err(|error| unreachable(link.address(), error))?;
        Ok(Self {
            link,
            epoch: actual,
            access,
            watcher: Some(watcher),
        })
    }

    /// What the donor lends now, as far as this reader has been told, by growing id; nothing once
    /// the connection is dead.
    pub fn regions(&self) -> Vec<RegionInfo> {
        let regions = self.link.regions();
        regions.map_or_else(
            |_| Vec::new(),
            |regions| regions.0.iter().map(|region| region.info).collect(),
        )
    }

    /// What this connection may do.
    pub fn access(&self) -> Access {
        self.access
    }
}

impl Transport for ShmTransport {
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        let regions = self.link.regions()?;
        for read in &*batch {
            bounds(
                read.region,
                regions.len_of(read.region),
                read.offset,
                read.into.len(),
            )?;
        }
        let mut pace = Pace::new(deadline);
        for read in batch {
            let Some(region) = regions.get(read.region) else {
                continue;
            };
            let mut at = bounds(
                read.region,
                Some(region.memory.len()),
                read.offset,
                read.into.len(),
            )?;
            for step in read.into.chunks_mut(STEP_BYTES) {
                pace.before(step.len())?;
                if !region.mapping.copy_out(at, step) {
                    return Err(outside(read.region, at, step.len()));
                }
                at += step.len();
            }
        }
        Ok(())
    }

    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        in_time(deadline)?;
        if self.access != Access::ReadWrite {
            return Err(refused(
                self.link.address(),
                "the connection was made for reading only",
            ));
        }
        let regions = self.link.regions()?;
        for write in batch {
            bounds(
                write.region,
                regions.len_of(write.region),
                write.offset,
                write.from.len(),
            )?;
        }
        let mut pace = Pace::new(deadline);
        for write in batch {
            let Some(region) = regions.get(write.region) else {
                continue;
            };
            let mut at = bounds(
                write.region,
                Some(region.memory.len()),
                write.offset,
                write.from.len(),
            )?;
            for step in write.from.chunks(STEP_BYTES) {
                pace.before(step.len())?;
                region.put(write.region, at, step, self.link.address())?;
                at += step.len();
            }
        }
        Ok(())
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn kind(&self) -> TransportKind {
        TransportKind::Shm
    }
}

impl Drop for ShmTransport {
    fn drop(&mut self) {
        // Wakes the watcher, which then ends; the donor sees the end of the connection.
        if let Err(error) = shutdown(self.link.socket().as_raw_fd(), Shutdown::Both) {
            tracing::trace!(%error, "a connection was already shut down");
        }
        if let Some(watcher) = self.watcher.take()
            && watcher.join().is_err()
        {
            tracing::error!(
                address = self.link.address(),
                "the watcher of a connection panicked"
            );
        }
    }
}

/// Looks at the clock now and then while bytes move.
struct Pace {
    deadline: Instant,
    since_look: usize,
}

impl Pace {
    fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            since_look: 0,
        }
    }

    /// To be called before every step of at most [`STEP_BYTES`].
    fn before(&mut self, step: usize) -> Result<(), TransportError> {
        if self.since_look >= STEP_BYTES {
            self.since_look = 0;
            in_time(self.deadline)?;
        }
        self.since_look += step;
        Ok(())
    }
}

/// One region, here.
#[derive(Debug)]
struct Mapped {
    info: RegionInfo,
    memory: Memory,
    mapping: Mapping,
}

/// All regions of a donor, by growing id.
#[derive(Debug)]
struct Regions(Vec<Arc<Mapped>>);

impl Regions {
    fn get(&self, id: RegionId) -> Option<&Mapped> {
        self.0
            .binary_search_by_key(&id, |region| region.info.id)
            .ok()
            .and_then(|index| self.0.get(index))
            .map(Arc::as_ref)
    }

    fn len_of(&self, id: RegionId) -> Option<u64> {
        self.get(id).map(|region| region.memory.len())
    }

    /// Those that are left without `gone`.
    fn without(&self, gone: &[RegionId]) -> Self {
        let left = self
            .0
            .iter()
            .filter(|region| !gone.contains(&region.info.id));
        Self(left.cloned().collect())
    }

    /// These and `more`; `None` when an id is not greater than all before it, or there are too many.
    fn with(&self, more: Vec<Arc<Mapped>>) -> Option<Self> {
        let all: Vec<_> = self.0.iter().cloned().chain(more).collect();
        let growing = all.is_sorted_by(|a, b| a.info.id < b.info.id);
        (growing && all.len() <= MAX_REGIONS).then_some(Self(all))
    }
}

impl Mapped {
    fn put(
        &self,
        id: RegionId,
        at: usize,
        from: &[u8],
        address: &str,
    ) -> Result<(), TransportError> {
        if self.memory.huge_pages() {
            return if self.mapping.copy_in(at, from) {
                Ok(())
            } else {
                Err(outside(id, at, from.len()))
            };
        }
        let start = at as u64;
        self.memory.prepare(
            &self.mapping,
            start..start.saturating_add(from.len() as u64),
        );
        self.memory
            .write_at(from, start)
            .map_err(|source| unreachable(address, source))
    }
}

/// The form in which a donor's socket appears in addresses: `"shm:/run/harbour/donor.sock"`.
pub fn address_of(path: &Path) -> String {
    format!("{}:{}", TransportKind::Shm, path.display())
}

/// The path in an address of the form that [`address_of`] gives, or `None` for other transports.
pub fn path_of(address: &str) -> Option<PathBuf> {
    address
        .strip_prefix(TransportKind::Shm.name())?
        .strip_prefix(':')
        .map(PathBuf::from)
}

fn outside(region: RegionId, at: usize, len: usize) -> TransportError {
    TransportError::OutOfBounds {
        region,
        offset: at as u64,
        len: len as u64,
    }
}

fn welcome(
    answer: Answer,
    wanted: u64,
    address: &str,
) -> Result<(u64, Vec<RegionInfo>), TransportError> {
    match answer {
        Answer::Welcome { epoch, regions } if wanted == 0 || wanted == epoch => {
            Ok((epoch, regions))
        }
        Answer::Welcome { epoch, .. } => Err(refused(
            address,
            format!("asked for epoch {wanted} it lends epoch {epoch}"),
        )),
        Answer::WrongEpoch { actual } if actual != wanted => {
            Err(TransportError::WrongEpoch { wanted, actual })
        }
        Answer::Refused(Refusal::Busy) => {
            let busy = io::Error::new(io::ErrorKind::WouldBlock, Refusal::Busy.to_string());
            Err(unreachable(address, busy))
        }
        Answer::Refused(refusal) => Err(refused(address, refusal.to_string())),
        Answer::WrongEpoch { .. }
        | Answer::Revoked { .. }
        | Answer::Retired { .. }
        | Answer::Added { .. } => Err(refused(address, "an answer out of place")),
    }
}

/// Checks and maps what came with a welcome or an addition. The error says what is wrong with it.
fn map(
    regions: &[RegionInfo],
    fds: Vec<std::os::fd::OwnedFd>,
    access: Access,
) -> Result<Vec<Arc<Mapped>>, String> {
    if fds.len() != regions.len() {
        return Err(format!(
            "{} regions with {} descriptors",
            regions.len(),
            fds.len()
        ));
    }
    let mut mapped = Vec::with_capacity(regions.len());
    for (region, fd) in regions.iter().zip(fds) {
        let name = region.id.0;
        let memory =
            Memory::received(fd, region.len).map_err(|what| format!("region {name} is {what}"))?;
        // Ordinary pages are written through the file; only huge ones need a writable mapping.
        let writable = access == Access::ReadWrite && memory.huge_pages();
        let mapping = Mapping::new(&memory, writable)
            .map_err(|error| format!("region {name} cannot be mapped: {error}"))?;
        mapped.push(Arc::new(Mapped {
            info: *region,
            memory,
            mapping,
        }));
    }
    Ok(mapped)
}
