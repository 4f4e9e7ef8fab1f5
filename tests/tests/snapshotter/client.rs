//! A client of the service, and containerd's way to mount what it answers.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use harbour::snapshotter::proto::{
    types::Mount,
    v1::{self, snapshots_client::SnapshotsClient},
};
use harbour_tests::shell;
use tokio::runtime::Runtime;
use tonic::{Code, Request, Status, transport::Channel};

/// Until the service answers, and any call.
const LIMIT: Duration = Duration::from_secs(30);

/// Any mount.
const MOUNT_LIMIT: Duration = Duration::from_secs(20);

/// Blocking calls of one service.
pub(crate) struct Client {
    runtime: Runtime,
    channel: SnapshotsClient<Channel>,
}

/// Labels that keep a snapshot from containerd's own collection, as the cases of containerd have them.
pub(crate) fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    owned
        .chain([("containerd.io/gc.root".to_owned(), "now".to_owned())])
        .collect()
}

macro_rules! call {
    ($self:ident, $method:ident, $request:expr) => {{
        let mut channel = $self.channel.clone();
        let mut request = Request::new($request);
        request.set_timeout(LIMIT);
        $self
            .runtime
            .block_on(async move { channel.$method(request).await })
            .map(tonic::Response::into_inner)
    }};
}

impl Client {
    /// Connects to the socket below this run directory as soon as it is there.
    pub(crate) fn connect(run: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = format!("unix://{}", run.join("snapshotter.sock").display());
        let channel = shell::until("the snapshotter answers", LIMIT, || {
            let endpoint = tonic::transport::Endpoint::from_shared(address.clone())?;
            Ok(runtime.block_on(endpoint.connect()).ok())
        })
        .unwrap();
        Self {
            runtime,
            channel: SnapshotsClient::new(channel),
        }
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.prepare_with(key, parent, labels(&[]))
    }

    pub(crate) fn prepare_with(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let request = v1::PrepareSnapshotRequest {
            snapshotter: "harbour".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        Ok(call!(self, prepare, request)?.mounts)
    }

    pub(crate) fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.view_with(key, parent, labels(&[]))
    }

    pub(crate) fn view_with(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, Status> {
        let request = v1::ViewSnapshotRequest {
            snapshotter: "harbour".to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        Ok(call!(self, view, request)?.mounts)
    }

    pub(crate) fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let (snapshotter, key) = ("harbour".to_owned(), key.to_owned());
        Ok(call!(self, mounts, v1::MountsRequest { snapshotter, key })?.mounts)
    }

    pub(crate) fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        self.commit_with(name, key, labels(&[]))
    }

    pub(crate) fn commit_with(
        &self,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let request = v1::CommitSnapshotRequest {
            snapshotter: "harbour".to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
            parent: String::new(),
        };
        call!(self, commit, request)
    }

    pub(crate) fn remove(&self, key: &str) -> Result<(), Status> {
        let (snapshotter, key) = ("harbour".to_owned(), key.to_owned());
        call!(self, remove, v1::RemoveSnapshotRequest { snapshotter, key })
    }

    pub(crate) fn stat(&self, key: &str) -> Result<v1::Info, Status> {
        let (snapshotter, key) = ("harbour".to_owned(), key.to_owned());
        let reply = call!(self, stat, v1::StatSnapshotRequest { snapshotter, key })?;
        Ok(reply.info.unwrap())
    }

    pub(crate) fn update(&self, info: v1::Info, paths: &[&str]) -> Result<v1::Info, Status> {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let request = v1::UpdateSnapshotRequest {
            snapshotter: "harbour".to_owned(),
            info: Some(info),
            update_mask: (!paths.is_empty()).then_some(prost_types::FieldMask { paths }),
        };
        Ok(call!(self, update, request)?.info.unwrap())
    }

    /// By name.
    pub(crate) fn list(&self, filters: &[&str]) -> Result<BTreeMap<String, v1::Info>, Status> {
        let request = v1::ListSnapshotsRequest {
            snapshotter: "harbour".to_owned(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let mut channel = self.channel.clone();
        self.runtime.block_on(async move {
            let mut pages = channel.list(request).await?.into_inner();
            let mut all = BTreeMap::new();
            while let Some(page) = pages.message().await? {
                all.extend(page.info.into_iter().map(|info| (info.name.clone(), info)));
            }
            Ok(all)
        })
    }

    pub(crate) fn usage(&self, key: &str) -> Result<v1::UsageResponse, Status> {
        let (snapshotter, key) = ("harbour".to_owned(), key.to_owned());
        call!(self, usage, v1::UsageRequest { snapshotter, key })
    }

    pub(crate) fn cleanup(&self) -> Result<(), Status> {
        let snapshotter = "harbour".to_owned();
        call!(self, cleanup, v1::CleanupRequest { snapshotter })
    }
}

/// The code of a failure.
pub(crate) fn code<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Code {
    outcome.unwrap_err().code()
}

/// What a snapshot's mounts show, until it is dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// Mounts it at `dir` as containerd does: where options do not fit a page, lower directories are named
    /// from the one that they all lie in.
    pub(crate) fn new(dir: &Path, mounts: &[Mount]) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let [mount] = mounts else {
            panic!("one mount is wanted: {mounts:?}");
        };
        if mount.r#type == "bind" {
            // A bind takes its flags the second time only.
            let mode = if mount.options.contains(&"ro".to_owned()) {
                "ro"
            } else {
                "rw"
            };
            let at = dir.display().to_string();
            shell::check("mount", ["--rbind", &mount.source, &at], MOUNT_LIMIT).unwrap();
            let remount = format!("remount,bind,{mode}");
            shell::check("mount", ["-o", &remount, &at], MOUNT_LIMIT).unwrap();
        } else {
            let mut command = Command::new("mount");
            command.args(["-t", &mount.r#type, &mount.source]).arg(dir);
            let mut options = mount.options.join(",");
            if options.len() >= 4096 {
                let lower = mount
                    .options
                    .iter()
                    .find_map(|o| o.strip_prefix("lowerdir="))
                    .unwrap();
                let all: Vec<&Path> = lower.split(':').map(Path::new).collect();
                let shared = all[0]
                    .ancestors()
                    .find(|at| all.iter().all(|dir| dir.starts_with(at)));
                let shared = shared.unwrap();
                let prefix = format!("{}/", shared.display());
                options = options.replace(lower, &lower.replace(&prefix, ""));
                command.current_dir(shared);
            }
            command.arg("-o").arg(options);
            shell::run(&mut command, MOUNT_LIMIT).unwrap().ok().unwrap();
        }
        Self(dir.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        assert!(done.is_ok() || std::thread::panicking(), "{done:?}");
    }
}
