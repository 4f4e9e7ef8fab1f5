//! The donor: holds memory, lends it to readers on its host, and takes it back.
//!
//! A [`DonorServer`] keeps its regions as memfds, mapped only where something is written to or sent
//! from them over a network, and one thread that answers readers on a unix socket
//! ([`crate::shm::frames`] has the messages). After the answer it
//! takes no part in what they read and write; it only keeps the connection, to end it when the
//! epoch ends. The thread, its connections and the time that a silent one may take are bounded.
//! Readers on other hosts come through a door of their own (`donor/tcp.rs`).
//!
//! Who may what: the mode of the socket decides who may connect at all, and of those only root and
//! the donor's own user get memory that they can write. The others get descriptors that were
//! opened for reading, of files that only those two may open again.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
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
    memory::{HugePages, REGION_ALIGN_BYTES},
    shm::{
        address_of,
        frames::{MAX_REGION_BYTES, MAX_REGIONS},
    },
    tcp::Veil,
    token::{RegionKey, Token, random_bytes},
    transport::RegionInfo,
    verbs::{Devices, lender::Lender},
};

mod error;
mod lent;
mod resize;
mod service;
mod socket_file;
mod tcp;

pub use error::DonorError;
use lent::lend;
pub(crate) use lent::{Lending, Lent};
pub use lent::{region_lens, region_unit};
use service::Service;
use socket_file::SocketFile;
use tcp::Door;
pub use tcp::TcpLimits;

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
    /// What readers on this host must show; [`Token::NONE`] for nothing.
    pub token: Token,
    /// Where to listen for readers on other hosts; none for readers on this host alone. Those show
    /// the tokens of [`DonorServer::keys`].
    pub listen: Vec<SocketAddr>,
    /// The devices over which to lend to them by RDMA too, where one has such an address; all memory
    /// is then held.
    pub rdma: Devices,
    /// Bounds of what is done for readers on other hosts.
    pub tcp: TcpLimits,
    /// Bytes for them go under TLS, and to nobody without; over RDMA they would not.
    pub veil: Option<Veil>,
    /// Connections at one time; one more is told to come back later.
    pub max_connections: usize,
    /// How long a connection may take to say what it wants.
    pub handshake_timeout: Duration,
}

impl DonorConfig {
    /// Regions of `lend_bytes` in all ([`region_lens`]), and defaults for the rest: huge pages
    /// where there are, memory taken as it is written, mode 0600, no token, 256 connections on this
    /// host, none from others, 2 seconds.
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
            listen: Vec::new(),
            rdma: Devices::Any,
            tcp: TcpLimits::default(),
            veil: None,
            max_connections: 256,
            handshake_timeout: Duration::from_secs(2),
        }
    }
}

/// Numbers of a donor since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DonorStats {
    /// Connections of readers that it serves now.
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
    door: Option<Door>,
    /// Keeps [`DonorServer::renew`] from running twice at a time.
    renewing: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    config: DonorConfig,
    /// `None` between two epochs.
    lent: RwLock<Option<Arc<Lent>>>,
    /// Sets up queue pairs for readers on other hosts, where this host has RDMA.
    verbs: Option<Arc<Lender>>,
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
        let verbs = Lender::open(&config).map(Arc::new);
        let lent = lend(&config, verbs.as_deref(), epoch, &config.regions)?;
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
            verbs,
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
        let door = Door::open(&shared)?;
        let service = Service::new(Arc::clone(&shared), listener, file);
        let thread = thread::Builder::new()
            .name("harbour-donor".to_owned())
            .spawn(move || service.run());
        let thread = thread.map_err(|source| io("starting a thread", source))?;
        tracing::info!(name = shared.config.name, epoch, socket = %path.display(), "lending memory");
        Ok(Self {
            shared,
            thread: Some(thread),
            door,
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

    /// The tokens that open its regions, by growing id: for metad, and for nobody's log.
    pub fn keys(&self) -> Vec<RegionKey> {
        let lent = self.shared.lent.read().clone();
        lent.iter()
            .flat_map(|lent| &lent.regions)
            .map(|region| region.key)
            .collect()
    }

    /// Where it listens for readers on other hosts, as bound: ports that were 0 are known here,
    /// addresses that mean all of a host's still mean that.
    pub fn listening(&self) -> &[SocketAddr] {
        self.door.as_ref().map_or(&[], Door::addresses)
    }

    /// The addresses of this host at which it lends over RDMA.
    pub fn rdma_addresses(&self) -> Vec<IpAddr> {
        (self.shared.verbs.iter())
            .flat_map(|lender| lender.addresses())
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
            readers: self.shared.readers.load(Ordering::Relaxed)
                + self.door.as_ref().map_or(0, |door| door.readers() as u64),
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
        if let Some(door) = &self.door {
            door.revoke();
        }
        if let Some(before) = before {
            resize::give_back(&config.name, &before.regions);
        }
        let lent = lend(config, self.shared.verbs.as_deref(), epoch, regions)?;
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
        self.door = None;
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
    let bytes = random(random_bytes)?;
    Ok((u64::from_le_bytes(bytes) >> 1).max(1))
}

fn random<T>(draw: impl FnOnce() -> io::Result<T>) -> Result<T, DonorError> {
    draw().map_err(|source| DonorError::Io {
        what: "reading random bytes",
        path: "/dev/urandom".into(),
        source,
    })
}

#[cfg(test)]
mod tests;
