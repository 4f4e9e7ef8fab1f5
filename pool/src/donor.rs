//! The donor: holds memory, lends it to readers on its host, and takes it back.
//!
//! A [`DonorServer`] keeps its regions as memfds that it never maps itself, and one thread that
//! answers readers on a unix socket ([`crate::shm::frames`] has the messages). After the answer it
//! takes no part in what they read and write; it only keeps the connection, to end it when the
//! epoch ends. The thread, its connections and the time that a silent one may take are bounded.
//!
//! Who may what: the mode of the socket decides who may connect at all, and of those only root and
//! the donor's own user get memory that they can write. The others get descriptors that were
//! opened for reading, of files that only those two may open again.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::{
    memory::{HugePages, Locked, Memory, MemoryError, REGION_ALIGN_BYTES},
    shm::{
        address_of,
        frames::{MAX_REGION_BYTES, MAX_REGIONS, Token},
    },
    transport::{RegionId, RegionInfo},
};

mod resize;
mod service;
mod socket_file;

use service::Service;
use socket_file::SocketFile;

/// A region is a multiple of this long, so that few regions hold what many packs are.
const REGION_STEP_BYTES: u64 = 16 << 20;
/// Regions that a donor begins with, at most, and one for what is left over.
const REGIONS_WANTED: u64 = 32;

/// What a donor lends and to whom.
#[derive(Clone, Debug)]
pub struct DonorConfig {
    /// Where to listen. A file `<socket>.lock` beside it keeps two donors apart.
    pub socket: PathBuf,
    /// Its name in logs and errors.
    pub name: String,
    /// Lengths of the regions in bytes: 1 to 64 positive multiples of [`REGION_ALIGN_BYTES`].
    pub regions: Vec<u64>,
    /// Whether to lend huge pages. Those are taken from the host at the start, whatever
    /// `populate` says.
    pub huge: HugePages,
    /// Take ordinary pages from the host at the start instead of as they are first written:
    /// a donor that cannot keep its promise then fails at once, and the memory is charged to the
    /// donor's cgroup instead of to the writers'.
    pub populate: bool,
    /// Keep the memory from being swapped out: takes all of it from the host at the start, huge
    /// pages or not. Memory that cannot be locked is lent all the same, with a warning.
    pub lock: bool,
    /// Epoch to begin with; `None` for a random one, which is what keeps locations of an earlier
    /// life from being taken for good.
    pub epoch: Option<u64>,
    /// Mode of the socket: 0600 for root and the donor's user, 0660 for a group of readers.
    pub socket_mode: u32,
    /// What readers must show; [`Token::NONE`] for nothing.
    pub token: Token,
    /// Connections at one time; one more is told to come back later.
    pub max_connections: usize,
    /// How long a connection may take to say what it wants.
    pub handshake_timeout: Duration,
}

impl DonorConfig {
    /// Regions of `lend_bytes` in all ([`region_lens`]), and defaults for the rest: huge pages where there are, memory taken as it is written, mode 0600, no token, 256
    /// connections, 2 seconds.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>, lend_bytes: u64) -> Self {
        Self {
            socket: socket.into(),
            name: name.into(),
            regions: region_lens(lend_bytes),
            huge: HugePages::Auto,
            populate: false,
            lock: false,
            epoch: None,
            socket_mode: 0o600,
            token: Token::NONE,
            max_connections: 256,
            handshake_timeout: Duration::from_secs(2),
        }
    }
}

/// The length of a region when up to `lend_bytes` are to be lent: a 32nd of that, in steps of
/// 16 MiB. Half of the regions that a donor may have are left for growing in other steps.
pub fn region_unit(lend_bytes: u64) -> u64 {
    let step = REGION_STEP_BYTES;
    let unit = (lend_bytes / REGIONS_WANTED)
        .div_ceil(step)
        .saturating_mul(step);
    unit.clamp(step, MAX_REGION_BYTES)
}

/// `lend_bytes`, rounded down to what can be lent, as regions of [`region_unit`] each; what is left
/// over is a smaller one.
pub fn region_lens(lend_bytes: u64) -> Vec<u64> {
    let all = lend_bytes - lend_bytes % REGION_ALIGN_BYTES;
    let unit = region_unit(all);
    let mut lens = vec![
        unit;
        usize::try_from(all / unit)
            .unwrap_or(usize::MAX)
            .min(MAX_REGIONS)
    ];
    if all % unit > 0 {
        lens.push(all % unit);
    }
    lens
}

/// A donor could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum DonorError {
    /// The configuration makes no sense.
    #[error("donor {name}: {what}")]
    Config {
        /// Name of the donor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// Somebody else answers on the socket.
    #[error("another donor is alive on {}", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket lies where the socket should be; it was left alone.
    #[error("{} is there and not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Memory could not be had.
    #[error("donor {name} cannot lend its memory")]
    Memory {
        /// Name of the donor.
        name: String,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// A system call failed.
    #[error("{what} failed for {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The socket or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Numbers of a donor since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DonorStats {
    /// Readers that hold its memory now.
    pub readers: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Connections turned away: no hello in time, garbage, wrong token or access, no room.
    pub turned_away: u64,
}

/// A running donor. Dropping it stops it.
#[derive(Debug)]
pub struct DonorServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Keeps [`DonorServer::renew`] from running twice at a time.
    renewing: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    config: DonorConfig,
    /// `None` between two epochs.
    lent: RwLock<Option<Arc<Lent>>>,
    epoch: AtomicU64,
    /// Changes of what is lent in one epoch, and how many of those every reader was told.
    changes: AtomicU64,
    told: Mutex<u64>,
    telling: Condvar,
    stop: AtomicBool,
    wake: EventFd,
    readers: AtomicU64,
    accepted: AtomicU64,
    turned_away: AtomicU64,
}

/// What is lent in one epoch. A region that comes or goes makes a new one of these.
#[derive(Debug)]
struct Lent {
    epoch: u64,
    /// By growing id.
    regions: Vec<Arc<Lending>>,
    /// Id of the next region: none is used twice in an epoch.
    next: u32,
}

impl Lent {
    /// The region of this id.
    fn get(&self, id: RegionId) -> Option<&Lending> {
        let found = self
            .regions
            .binary_search_by_key(&id, |region| region.info.id);
        let region = found.ok().and_then(|index| self.regions.get(index));
        region.map(Arc::as_ref)
    }
}

#[derive(Debug)]
struct Lending {
    info: RegionInfo,
    /// Keeps its pages from being swapped out, where that was asked for; let go before the memory
    /// is given back.
    locked: Mutex<Option<Locked>>,
    memory: Memory,
    read_only: OwnedFd,
}

impl DonorServer {
    /// Takes the memory, listens, and returns once readers can connect.
    ///
    /// # Errors
    /// See [`DonorError`]. [`DonorError::InUse`] when another donor lives on the same socket; the
    /// socket of a dead one is replaced.
    pub fn start(config: DonorConfig) -> Result<Self, DonorError> {
        check(&config)?;
        let epoch = match config.epoch {
            Some(epoch) => epoch,
            None => random_epoch()?,
        };
        // The socket first: two donors at once must not both take the memory.
        let (file, listener) = SocketFile::bind(&config.socket, config.socket_mode)?;
        let lent = lend(&config, epoch, &config.regions)?;
        let path = config.socket.clone();
        let io = |what, source| DonorError::Io {
            what,
            path: path.clone(),
            source,
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(|error| io("eventfd", error.into()))?;
        let shared = Arc::new(Shared {
            config,
            lent: RwLock::new(Some(Arc::new(lent))),
            epoch: AtomicU64::new(epoch),
            changes: AtomicU64::new(0),
            told: Mutex::new(0),
            telling: Condvar::new(),
            stop: AtomicBool::new(false),
            wake,
            readers: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
        });
        file.listen(&listener)
            .map_err(|source| io("listen", source))?;
        let service = Service::new(Arc::clone(&shared), listener, file);
        let thread = thread::Builder::new()
            .name("harbour-donor".to_owned())
            .spawn(move || service.run());
        let thread = thread.map_err(|source| io("starting a thread", source))?;
        tracing::info!(name = shared.config.name, epoch, socket = %path.display(), "lending memory");
        Ok(Self {
            shared,
            thread: Some(thread),
            renewing: Mutex::new(()),
        })
    }

    /// The epoch: not 0, below 2^63.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// What it lends, by growing id; nothing while [`DonorServer::renew`] is at work or after it
    /// failed.
    pub fn regions(&self) -> Vec<RegionInfo> {
        let lent = self.shared.lent.read().clone();
        lent.iter()
            .flat_map(|lent| &lent.regions)
            .map(|region| region.info)
            .collect()
    }

    /// Where readers on this host find it: `"shm:/run/harbour/donor.sock"`.
    pub fn address(&self) -> String {
        address_of(&self.shared.config.socket)
    }

    /// The configuration it was started with.
    pub fn config(&self) -> &DonorConfig {
        &self.shared.config
    }

    /// Numbers since the start.
    pub fn stats(&self) -> DonorStats {
        DonorStats {
            readers: self.shared.readers.load(Ordering::Relaxed),
            accepted: self.shared.accepted.load(Ordering::Relaxed),
            turned_away: self.shared.turned_away.load(Ordering::Relaxed),
        }
    }

    /// False once the thread that answers readers is gone, which only a bug or [`Self::stop`]
    /// brings about.
    pub fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Takes all memory back at once, asking nobody, and lends `regions` (lengths in bytes) in a
    /// new epoch, which is returned. Readers are told and disconnected; the host has the memory
    /// again even while they still map it (huge pages: once they no longer do). The new regions
    /// are new memory: a writer of the old epoch that has not noticed yet writes to files that
    /// nobody is told of any more.
    ///
    /// # Errors
    /// When the new regions cannot be had. The old ones are gone then too, and the donor lends
    /// nothing until a later call succeeds.
    pub fn renew(&self, regions: &[u64]) -> Result<u64, DonorError> {
        let _alone = self.renewing.lock();
        let config = &self.shared.config;
        check_regions(&config.name, regions)?;
        let epoch = random_epoch()?;
        let before = self.shared.lent.write().take();
        self.shared.epoch.store(epoch, Ordering::Release);
        self.shared.wake();
        if let Some(before) = before {
            resize::give_back(&config.name, &before.regions);
        }
        let lent = lend(config, epoch, regions)?;
        *self.shared.lent.write() = Some(Arc::new(lent));
        tracing::info!(
            name = config.name,
            epoch,
            "took memory back; a new epoch begins"
        );
        Ok(epoch)
    }

    /// Stops answering, disconnects everybody, removes the socket. The memory goes back to the
    /// host as readers notice.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(
                name = self.shared.config.name,
                "the donor's thread panicked"
            );
        }
    }
}

impl Drop for DonorServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            // EAGAIN: the counter is at its end, so a wake is pending anyway.
            tracing::trace!(%error, "a wake was not counted");
        }
    }
}

fn lend(config: &DonorConfig, epoch: u64, lens: &[u64]) -> Result<Lent, DonorError> {
    let memory = |source| DonorError::Memory {
        name: config.name.clone(),
        source,
    };
    let mut regions = Vec::with_capacity(lens.len());
    let mut next = 0;
    for len in lens.iter().copied() {
        let region = Lending::new(config, RegionId(next), len).map_err(memory)?;
        regions.push(Arc::new(region));
        next += 1;
    }
    Ok(Lent {
        epoch,
        regions,
        next,
    })
}

impl Lending {
    /// Takes the memory of one region.
    fn new(config: &DonorConfig, id: RegionId, len: u64) -> Result<Self, MemoryError> {
        let memory = Memory::new(len, config.huge, config.populate)?;
        let read_only = memory.read_only().map_err(|source| MemoryError::Call {
            call: "opening /proc/self/fd",
            len,
            source,
        })?;
        let locked = config.lock.then(|| Locked::take(&memory)).flatten();
        let info = RegionInfo {
            id,
            len,
            huge_pages: memory.huge_pages(),
        };
        Ok(Self {
            info,
            locked: Mutex::new(locked),
            memory,
            read_only,
        })
    }
}

fn check(config: &DonorConfig) -> Result<(), DonorError> {
    let wrong = |what: &str| {
        Err(DonorError::Config {
            name: config.name.clone(),
            what: what.to_owned(),
        })
    };
    if config.epoch == Some(0) {
        return wrong("epoch 0 means none");
    }
    if config.max_connections == 0 {
        return wrong("no connections at all");
    }
    if config.socket_mode & !0o777 != 0 {
        return wrong("the socket's mode has bits beyond 0777");
    }
    check_regions(&config.name, &config.regions)
}

fn check_regions(name: &str, regions: &[u64]) -> Result<(), DonorError> {
    let wrong = |what: String| {
        Err(DonorError::Config {
            name: name.to_owned(),
            what,
        })
    };
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return wrong(format!(
            "{} regions, must be 1 to {MAX_REGIONS}",
            regions.len()
        ));
    }
    for len in regions {
        if *len == 0 || *len > MAX_REGION_BYTES || !len.is_multiple_of(REGION_ALIGN_BYTES) {
            let what =
                format!("a region of {len} bytes, must be a multiple of {REGION_ALIGN_BYTES}");
            return wrong(what);
        }
    }
    Ok(())
}

/// Random, not 0, and below 2^63 so that signed databases hold it.
fn random_epoch() -> Result<u64, DonorError> {
    let path = Path::new("/dev/urandom");
    let io = |source| DonorError::Io {
        what: "reading random bytes",
        path: path.to_owned(),
        source,
    };
    let mut bytes = [0; 8];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(io)?;
    Ok((u64::from_le_bytes(bytes) >> 1).max(1))
}

#[cfg(test)]
mod tests;
