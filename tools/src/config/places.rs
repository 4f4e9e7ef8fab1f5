//! Where things are on this host.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{Paths, RdmaDevice, TransportChoice};

/// Resolved places.
#[derive(Clone, Debug)]
pub struct Places {
    /// Survives a restart.
    pub state: PathBuf,
    /// Sockets and pid files.
    pub run: PathBuf,
    /// The mount.
    pub mount: PathBuf,
    /// Metad's address.
    pub metad: String,
    /// Which transports may be used, where a flag says so.
    pub transport: Option<TransportChoice>,
    /// Which RDMA device, where a flag says so.
    pub rdma_device: Option<RdmaDevice>,
    /// Certificates of this host.
    pub tls: PathBuf,
    /// Whether somebody named that directory.
    pub tls_named: bool,
    /// Whether gRPC may go between hosts in plain text.
    pub insecure_metad: bool,
    /// Whether bytes have to go between hosts under TLS.
    pub tls_data: bool,
}

impl Places {
    /// Defaults where nothing is set; relative paths are taken from the current directory.
    pub fn new(paths: Paths) -> anyhow::Result<Self> {
        let absolute = |path: Option<PathBuf>, default: &str| {
            let path = path.unwrap_or_else(|| default.into());
            std::path::absolute(&path).with_context(|| format!("cannot resolve {}", path.display()))
        };
        let run = absolute(paths.run_dir, "/run/harbour")?;
        Ok(Self {
            metad: paths
                .metad
                .unwrap_or_else(|| format!("unix:{}", run.join("metad.sock").display())),
            state: absolute(paths.state_dir, "/var/lib/harbour")?,
            mount: absolute(paths.mount, "/harbour")?,
            transport: paths.transport,
            rdma_device: paths.rdma_device,
            tls_named: paths.tls_dir.is_some(),
            tls: absolute(paths.tls_dir, "/etc/harbour/tls")?,
            insecure_metad: paths.insecure_metad.unwrap_or(false),
            tls_data: paths.tls_data.unwrap_or(false),
            run,
        })
    }

    /// Metad's unix socket on this host.
    pub fn metad_socket(&self) -> PathBuf {
        self.run.join("metad.sock")
    }

    /// The socket on which containerd calls the snapshotter.
    pub fn snapshotter_socket(&self) -> PathBuf {
        self.run.join("snapshotter.sock")
    }

    /// The donor's data socket on this host.
    pub fn donor_socket(&self) -> PathBuf {
        self.run.join("donor.sock")
    }

    /// Where the files are served that fast views are mounted from.
    pub fn devices(&self) -> PathBuf {
        self.run.join("devices")
    }

    /// Where the fast views are mounted.
    pub fn views(&self) -> PathBuf {
        self.run.join("view")
    }

    /// Where the donor notes its epoch, for the one after it.
    pub fn donor_epoch(&self) -> PathBuf {
        self.run.join("donor.epoch")
    }

    /// Where the process ID of `what` is kept.
    pub fn pid_file(&self, what: &str) -> PathBuf {
        self.run.join(format!("{what}.pid"))
    }

    /// Makes the directories that are ours, readable by root alone where they hold secrets or data.
    pub fn create(&self) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        for (dir, mode) in [(&self.state, 0o700), (&self.run, 0o755)] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(dir)
                .with_context(|| format!("cannot create {}", dir.display()))?;
        }
        Ok(())
    }

    /// These places as flags for a child process.
    pub fn flags(&self) -> Vec<std::ffi::OsString> {
        let mut flags: Vec<std::ffi::OsString> = vec![
            "--state-dir".into(),
            self.state.clone().into(),
            "--run-dir".into(),
            self.run.clone().into(),
            "--mount".into(),
            self.mount.clone().into(),
            "--metad".into(),
            self.metad.clone().into(),
        ];
        if let Some(transport) = self.transport {
            flags.extend(["--transport".into(), transport.name().into()]);
        }
        if let Some(device) = &self.rdma_device {
            flags.extend(["--rdma-device".into(), device.to_string().into()]);
        }
        if self.tls_named {
            flags.extend(["--tls-dir".into(), self.tls.clone().into()]);
        }
        if self.insecure_metad {
            flags.push("--insecure-metad".into());
        }
        if self.tls_data {
            flags.push("--tls-data".into());
        }
        flags
    }
}
