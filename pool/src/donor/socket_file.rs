//! The donor's socket as a file: taken only from the dead, given its mode before anyone can
//! connect, removed at the end if it is still ours.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{Backlog, bind, listen},
};

use super::DonorError;
use crate::shm::socket;

/// Connections that the kernel holds for the donor's thread.
const BACKLOG: i32 = 128;
/// How long to knock at a socket that somebody without our lock may be listening on.
const KNOCK: Duration = Duration::from_millis(200);

/// A bound socket file, with the lock that says whose it is.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode of the socket.
    identity: (u64, u64),
    _lock: Flock<File>,
}

impl SocketFile {
    /// Binds, replacing the socket of a dead donor. Nobody can connect until
    /// [`SocketFile::listen`].
    pub(super) fn bind(path: &Path, mode: u32) -> Result<(Self, UnixListener), DonorError> {
        let io = |what| {
            move |source| DonorError::Io {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let address = socket::address(path).map_err(io("naming the socket"))?;
        let lock = lock(path)?;
        remove_dead(path)?;
        let socket: OwnedFd = socket::packet_socket().map_err(io("socket"))?;
        bind(socket.as_raw_fd(), &address)
            .map_err(io::Error::from)
            .map_err(io("bind"))?;
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io("chmod"))?;
        let bound = fs::symlink_metadata(path).map_err(io("stat"))?;
        let file = Self {
            path: path.to_owned(),
            identity: (bound.dev(), bound.ino()),
            _lock: lock,
        };
        Ok((file, UnixListener::from(socket)))
    }

    /// Lets readers in.
    pub(super) fn listen(&self, listener: &UnixListener) -> io::Result<()> {
        Ok(listen(listener, Backlog::new(BACKLOG)?)?)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Still under the lock, so no other donor can have put its own there in between.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|now| (now.dev(), now.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the donor's socket was left behind");
        }
    }
}

/// Takes `<path>.lock`, which the kernel lets go of however its holder ends. The file stays: to
/// remove it would let two donors lock two files of one name.
fn lock(path: &Path) -> Result<Flock<File>, DonorError> {
    let mut name = OsString::from(path);
    name.push(".lock");
    let name = PathBuf::from(name);
    let io = |what, source| DonorError::Io {
        what,
        path: name.clone(),
        source,
    };
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options
        .open(&name)
        .map_err(|source| io("opening the lock", source))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => DonorError::InUse(path.to_owned()),
        other => io("flock", other.into()),
    })
}

/// Removes a socket that nobody listens on. Called with the lock held, so what is there belongs to
/// a donor that died, or to somebody who knows nothing of the lock.
fn remove_dead(path: &Path) -> Result<(), DonorError> {
    let io = |what| {
        move |source| DonorError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("stat")(error)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(DonorError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match socket::dial(path, Instant::now() + KNOCK) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // It answers, its queue is full, or it speaks another kind of socket (EPROTOTYPE).
        _ => return Err(DonorError::InUse(path.to_owned())),
    }
    tracing::info!(path = %path.display(), "replacing the socket of a donor that died");
    fs::remove_file(path).map_err(io("removing the dead socket"))
}
