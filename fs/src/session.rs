//! The mount itself: making it, keeping the kernel's caches true, taking it away.
//!
//! The mount is made with mount(2) here and not by fuser, because taking it away needs more care
//! than fuser gives: a plain unmount that may be refused, a lazy one, and one that ends requests
//! that hang. That takes `CAP_SYS_ADMIN`; there is no path through `fusermount3`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fuser::{INodeNo, InitFlags, Notifier, Session, SessionACL};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount as mount_call, umount2},
};
use parking_lot::Mutex;

use crate::{
    adapter::{Adapter, Wishes},
    ahead::{Ahead, Store},
    control::Changes,
    inode::Node,
    ops::Fs,
};

/// Type of the file system as the kernel lists it; `mount` shows `harbour on … type fuse.harbour`.
pub const FS_TYPE: &str = "fuse.harbour";
const FS_NAME: &str = "harbour";
/// Largest read that the kernel may ask for, in bytes.
const READ_MAX: u32 = 1 << 20;
/// Dead mounts that may lie on top of each other where a new one is to be.
const STALE_MAX: usize = 8;
/// How long the threads of a session may take to end after the unmount.
const END_PATIENCE: Duration = Duration::from_secs(35);

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountConfig {
    /// Where; made when it is missing.
    pub mountpoint: PathBuf,
    /// Whether users other than the one that mounts may use it.
    pub allow_other: bool,
    /// Threads that serve the kernel.
    pub threads: usize,
    /// Requests that nobody waits for (read-ahead) that the kernel sends at a time.
    pub background: u16,
    /// How far the kernel reads ahead, in KiB.
    pub read_ahead_kb: u32,
    /// Whether permission checks take POSIX ACLs into account. Costs one request per file that is
    /// used by somebody who does not own it.
    pub acls: bool,
    /// Whether the kernel tells of every open. Large files of `.devices` are then read past its
    /// cache; everything else gets slower.
    pub opens: bool,
}

impl MountConfig {
    /// What a node mounts with.
    pub fn new(mountpoint: impl Into<PathBuf>) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            mountpoint: mountpoint.into(),
            allow_other: true,
            // A thread that waits for a donor on another host keeps no core busy.
            threads: (2 * cores).clamp(4, 16),
            background: 64,
            // Two requests: one is on its way over the network while the other one is checked.
            read_ahead_kb: 2 * READ_MAX / 1024,
            acls: true,
            opens: false,
        }
    }
}

/// Why a mount could not be made or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// `/dev/fuse` cannot be opened: no FUSE in this kernel, or not in this container.
    #[error("cannot open /dev/fuse (is the fuse module loaded, is the device in this container?)")]
    Device(#[source] io::Error),
    /// The place is not usable.
    #[error("cannot use {path} as mount point")]
    Place {
        /// The place.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another live mount of ours is there.
    #[error("{0} has a live harbour mount already; take it away first (harbour down, or umount)")]
    Taken(PathBuf),
    /// mount(2) failed.
    #[error("cannot mount at {path} (it takes root, or CAP_SYS_ADMIN)")]
    Mount {
        /// The place.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel and we did not come to terms.
    #[error("the kernel's FUSE and ours did not agree at {path}")]
    Handshake {
        /// The place.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// umount(2) failed.
    #[error("cannot unmount {path}")]
    Unmount {
        /// The place.
        path: PathBuf,
        /// Why; [`io::ErrorKind::ResourceBusy`] when somebody uses it.
        #[source]
        source: io::Error,
    },
    /// Unmounted, but threads still wait for something.
    #[error("{path} is unmounted, but its threads did not end in time")]
    Lingering {
        /// The place.
        path: PathBuf,
    },
}

/// A live mount. Dropping it unmounts, lazily if somebody uses it.
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    notifier: Notifier,
    thread: Mutex<Option<JoinHandle<io::Result<()>>>>,
    agreed: InitFlags,
}

/// How much force to unmount with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Refused while anything uses the mount.
    Plain,
    /// Out of sight at once; gone when the last user lets go.
    Lazy,
    /// Every request ends with an error now.
    Force,
}

/// Mounts `fs`.
pub fn mount(fs: Arc<Fs>, config: &MountConfig) -> Result<Mounted, MountError> {
    let mountpoint = prepare(&config.mountpoint)?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::Device)?;
    mount_device(&device, &mountpoint, config)?;
    match start(fs, device, &mountpoint, config) {
        Ok(mounted) => {
            if let Err(error) = set_read_ahead(&mountpoint, config.read_ahead_kb) {
                tracing::warn!(%error, "cannot set how far the kernel reads ahead; large reads will be slower");
            }
            Ok(mounted)
        }
        Err(source) => {
            // The device is closed, so nobody can hang in it.
            let _ = umount2(&mountpoint, MntFlags::MNT_DETACH);
            Err(MountError::Handshake {
                path: mountpoint,
                source,
            })
        }
    }
}

/// Clears dead mounts away and sees that there is a directory.
fn prepare(path: &Path) -> Result<PathBuf, MountError> {
    let fail = |source| MountError::Place {
        path: path.to_owned(),
        source,
    };
    for _ in 0..STALE_MAX {
        match std::fs::metadata(path) {
            // What a mount answers whose server is gone.
            Err(error) if error.raw_os_error() == Some(Errno::ENOTCONN as i32) => {
                tracing::warn!(path = %path.display(), "taking a dead mount away");
                umount2(path, MntFlags::MNT_DETACH).map_err(|errno| fail(errno.into()))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(path).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
            Ok(metadata) if !metadata.is_dir() => {
                return Err(fail(io::ErrorKind::NotADirectory.into()));
            }
            Ok(_) => break,
        }
    }
    let path = path.canonicalize().map_err(fail)?;
    let mounts = crate::fastview::mounts().map_err(fail)?;
    if mounts
        .iter()
        .any(|mount| mount.target == path && mount.kind == FS_TYPE)
    {
        return Err(MountError::Taken(path));
    }
    Ok(path)
}

fn mount_device(device: &File, mountpoint: &Path, config: &MountConfig) -> Result<(), MountError> {
    let other = if config.allow_other {
        ",allow_other"
    } else {
        ""
    };
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let options = format!(
        "fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions{other}",
        device.as_raw_fd()
    );
    // Neither flag binds an overlay on top; they bind whoever walks in directly.
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_call(
        Some(FS_NAME),
        mountpoint,
        Some(FS_TYPE),
        flags,
        Some(options.as_str()),
    )
    .map_err(|errno| MountError::Mount {
        path: mountpoint.to_owned(),
        source: errno.into(),
    })
}

fn start(
    fs: Arc<Fs>,
    device: File,
    mountpoint: &Path,
    config: &MountConfig,
) -> io::Result<Mounted> {
    let mut flags = InitFlags::FUSE_DO_READDIRPLUS
        | InitFlags::FUSE_READDIRPLUS_AUTO
        | InitFlags::FUSE_CACHE_SYMLINKS
        | InitFlags::FUSE_PARALLEL_DIROPS
        | InitFlags::FUSE_ASYNC_DIO
        // Numbers stand for files for good, so handles to them do too.
        | InitFlags::FUSE_EXPORT_SUPPORT
        // Pages of files that change (.status, documents of a moved tag) go when their time does.
        | InitFlags::FUSE_AUTO_INVAL_DATA;
    if config.acls {
        flags |= InitFlags::FUSE_POSIX_ACL;
    }
    if config.allow_other {
        flags |= InitFlags::FUSE_ALLOW_IDMAP;
    }
    let agreed = Arc::new(Mutex::new(InitFlags::empty()));
    let store = Arc::new(OnceLock::new());
    let ahead = Ahead::start(Arc::downgrade(&fs), Arc::clone(&store))?;
    let adapter = Adapter {
        fs,
        wishes: Wishes {
            read_max: READ_MAX,
            background: config.background.max(1),
            flags,
        },
        agreed: Arc::clone(&agreed),
        no_open: false,
        no_opendir: false,
        opens: config.opens,
        ahead,
    };
    let acl = if config.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    let mut options = fuser::Config::default();
    options.acl = acl;
    options.n_threads = Some(config.threads.clamp(1, 64));
    options.clone_fd = config.threads > 1;
    let session = Session::from_fd(adapter, OwnedFd::from(device), acl, options)?;
    let notifier = session.notifier();
    // Set once, here.
    let _ = store.set(Box::new(Cache(notifier.clone())) as Box<dyn Store>);
    let thread = std::thread::Builder::new()
        .name("fs-session".into())
        .spawn(move || session.run())?;
    let agreed = *agreed.lock();
    tracing::info!(mountpoint = %mountpoint.display(), ?agreed, "mounted");
    Ok(Mounted {
        mountpoint: mountpoint.to_owned(),
        notifier,
        thread: Mutex::new(Some(thread)),
        agreed,
    })
}

/// The kernel's page cache of one mount.
struct Cache(Notifier);

impl Store for Cache {
    fn store(&self, node: Node, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.store(INodeNo(node.raw()), offset, bytes)
    }
}

/// Writes the read-ahead of the device that a mount is; statting it takes a session that runs.
fn set_read_ahead(mountpoint: &Path, kb: u32) -> io::Result<()> {
    let device = std::fs::metadata(mountpoint)?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    std::fs::write(
        format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
        kb.to_string(),
    )
}

impl Mounted {
    /// Where it is.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Names of the FUSE capabilities that were asked for and that the kernel has.
    pub fn capabilities(&self) -> Vec<&'static str> {
        self.agreed.iter_names().map(|(name, _)| name).collect()
    }

    /// Makes the kernel drop what is not true any more. Not to be called from a thread that serves
    /// the kernel: it may wait for requests under way.
    pub fn invalidate(&self, changes: &Changes) {
        for (parent, name) in &changes.entries {
            let name = std::ffi::OsStr::from_bytes(name.as_bytes());
            if let Err(error) = self.notifier.inval_entry(INodeNo(parent.raw()), name) {
                tracing::debug!(%error, ?parent, ?name, "the kernel did not drop a name");
            }
        }
        for node in &changes.nodes {
            if let Err(error) = self.notifier.inval_inode(INodeNo(node.raw()), 0, 0) {
                tracing::debug!(%error, ?node, "the kernel did not drop a node's state");
            }
        }
    }

    /// Whether the session still serves the kernel; not any more once somebody unmounted it.
    pub fn is_alive(&self) -> bool {
        self.thread
            .lock()
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Unmounts. After [`Unmount::Plain`] and [`Unmount::Force`] the session's threads have ended;
    /// a lazy one leaves them to serve those who still use it, for as long as this process lives.
    pub fn unmount(&self, how: Unmount) -> Result<(), MountError> {
        let flags = match how {
            Unmount::Plain => MntFlags::empty(),
            Unmount::Lazy => MntFlags::MNT_DETACH,
            Unmount::Force => MntFlags::MNT_DETACH | MntFlags::MNT_FORCE,
        };
        if self.is_alive() {
            umount2(&self.mountpoint, flags | MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| {
                MountError::Unmount {
                    path: self.mountpoint.clone(),
                    source: errno.into(),
                }
            })?;
        }
        if how == Unmount::Lazy {
            Ok(())
        } else {
            self.end()
        }
    }

    /// Waits for the session's threads.
    fn end(&self) -> Result<(), MountError> {
        let deadline = Instant::now() + END_PATIENCE;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return Err(MountError::Lingering {
                    path: self.mountpoint.clone(),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match self.thread.lock().take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => tracing::debug!(%error, "the session ended with an error"),
            Some(Err(_)) => tracing::error!("the session's thread panicked"),
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.is_alive() {
            return;
        }
        if self.unmount(Unmount::Plain).is_err()
            && let Err(error) = self.unmount(Unmount::Lazy)
        {
            tracing::warn!(%error, "left mounted");
        }
    }
}
