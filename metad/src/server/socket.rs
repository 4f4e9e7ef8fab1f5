//! The unix socket's name: nobody else's is taken, ours is removed at the end.

use std::{
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::net::{UnixListener, UnixStream};

use super::ServerError;

/// Longest that a live socket is given to accept.
const PROBE: Duration = Duration::from_secs(2);

/// A listener and its name.
#[derive(Debug)]
pub(super) struct UnixSocket {
    pub(super) listener: UnixListener,
    pub(super) name: SocketName,
}

/// Removes the name when dropped, if it is still this socket's.
#[derive(Debug)]
pub(super) struct SocketName {
    path: PathBuf,
    inode: (u64, u64),
}

impl UnixSocket {
    /// Listens at `path` with these permission bits.
    pub(super) async fn bind(path: &Path, mode: u32) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Socket {
            path: path.into(),
            source,
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        check_free(path).await?;
        // Bound under another name and renamed, so that it never shows with other permissions.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let _ = std::fs::remove_file(&temporary);
        let bound = UnixListener::bind(&temporary)
            .map_err(failed)
            .and_then(|listener| {
                std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode))
                    .map_err(failed)?;
                let inode = inode(&temporary).map_err(failed)?;
                std::fs::rename(&temporary, path).map_err(failed)?;
                Ok(Self {
                    listener,
                    name: SocketName {
                        path: path.into(),
                        inode,
                    },
                })
            });
        if bound.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        bound
    }
}

/// Refuses a name that somebody listens on, or that is no socket.
async fn check_free(path: &Path) -> Result<(), ServerError> {
    let taken = |reason: &str| ServerError::SocketTaken {
        path: path.into(),
        reason: reason.into(),
    };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(ServerError::Socket {
                path: path.into(),
                source,
            });
        }
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(taken("something that is no socket has this name"));
        }
        Ok(_) => {}
    }
    match tokio::time::timeout(PROBE, UnixStream::connect(path)).await {
        Ok(Err(e))
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Ok(Err(source)) => Err(ServerError::Socket {
            path: path.into(),
            source,
        }),
        Ok(Ok(_)) | Err(_) => Err(taken(
            "another process listens on it: stop that one, or choose another path",
        )),
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

impl Drop for SocketName {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
