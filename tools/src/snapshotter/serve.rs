//! The socket that containerd calls, and the pages that tell how it goes.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

use super::{
    figures::Figures, proto::v1::snapshots_server::SnapshotsServer, service::Service, store::Store,
};
use crate::{
    failure::{self, Code},
    stop::Stop,
};

/// Longest that a live socket is given to accept.
const PROBE: Duration = Duration::from_secs(2);

/// Longest message, in bytes: a key, a parent and labels.
const MESSAGE_MAX: usize = 1 << 20;

/// Calls at a time on one connection.
const CALLS_MAX: usize = 256;

/// How often the page is looked at.
const PAGE_EVERY: Duration = Duration::from_millis(250);

/// A socket under its name, which goes with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    name: Name,
}

#[derive(Debug)]
struct Name {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Name {
    fn drop(&mut self) {
        // Not another one's that has taken its place.
        if inode(&self.path).is_ok_and(|now| now == self.inode) {
            drop(fs::remove_file(&self.path));
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

impl Socket {
    /// Listens at `path`, for root alone: who calls has mounts made.
    ///
    /// # Errors
    /// Somebody listens there, something else is there, or what the file system says.
    pub async fn bind(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let why = || format!("cannot listen at {shown}");
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(why)?;
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(why),
            Ok(meta) if !meta.file_type().is_socket() => {
                anyhow::bail!("cannot listen at {shown}: it is no socket")
            }
            Ok(_) => match tokio::time::timeout(PROBE, UnixStream::connect(path)).await {
                // Left by one that was killed.
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => {
                    return Err(failure::failure(
                        Code::Failed,
                        format!("another snapshotter listens at {shown}"),
                        "one for each host: harbour node has one, unless its key snapshotter is false",
                    ));
                }
            },
        }
        // Under another name first, so that it never shows with other permissions.
        let fresh = path.with_extension(format!("{}", std::process::id()));
        drop(fs::remove_file(&fresh));
        let listener = UnixListener::bind(&fresh).with_context(why)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).with_context(why)?;
        let inode = inode(&fresh).with_context(why)?;
        fs::rename(&fresh, path).with_context(why)?;
        let path = path.to_owned();
        Ok(Self {
            listener,
            name: Name { path, inode },
        })
    }

    /// Answers until `stop`; then what is being answered is, and nothing else.
    ///
    /// # Errors
    /// What the server says.
    pub async fn serve(self, service: Service, stop: &Stop) -> anyhow::Result<()> {
        let Self { listener, name } = self;
        let server = SnapshotsServer::new(service)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(usize::MAX);
        let served = tonic::transport::Server::builder()
            .concurrency_limit_per_connection(CALLS_MAX)
            .add_service(server)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.wait())
            .await;
        drop(name);
        served.context("the snapshotter ended")
    }
}

/// Keeps `path` in step with what is counted, until `stop`.
pub async fn keep_page(path: &Path, figures: &Figures, store: &Arc<Store>, stop: &Stop) {
    let mut last = String::new();
    loop {
        let (all, layers) = store.counts();
        let text = figures.page(all, layers).to_string();
        if text != last {
            let fresh = path.with_extension("json.new");
            let written = fs::write(&fresh, &text).and_then(|()| fs::rename(&fresh, path));
            if let Err(error) = written {
                tracing::debug!(%error, "the page cannot be written");
            }
            last = text;
        }
        if stop.within(PAGE_EVERY).await {
            drop(fs::remove_file(path));
            return;
        }
    }
}
