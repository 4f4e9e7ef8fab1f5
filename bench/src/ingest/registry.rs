//! Debian's registry on loopback, in the sandbox's own network.

use std::{fs, net::TcpStream, process::Command, time::Duration};

use crate::{
    command::{self, Daemon},
    sandbox::Place,
};

/// The network is the sandbox's own, so no port is taken.
const ADDRESS: &str = "127.0.0.1:5000";

/// A registry; ended on drop.
pub(crate) struct Registry {
    _daemon: Daemon,
}

impl Registry {
    /// Starts an empty one.
    pub(crate) fn start(place: &Place) -> anyhow::Result<Self> {
        let program = command::find("docker-registry").ok_or_else(|| {
            anyhow::anyhow!("docker-registry is not installed (package docker-registry)")
        })?;
        let config = place.work.join("registry.yml");
        let root = place.work.join("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {ADDRESS}}}\n",
            root.display()
        );
        fs::write(&config, text)?;
        let mut serve = Command::new(program);
        serve.arg("serve").arg(&config);
        let mut daemon = Daemon::start(&mut serve, &place.work.join("registry.log"))?;
        daemon.wait_ready(Duration::from_secs(20), || {
            TcpStream::connect(ADDRESS).is_ok()
        })?;
        Ok(Self { _daemon: daemon })
    }

    /// Copies an image into it.
    pub(crate) fn push(&self, source: &str, name: &str) -> anyhow::Result<()> {
        let mut copy = Command::new("skopeo");
        copy.args([
            "--insecure-policy",
            "copy",
            "-q",
            "--dest-tls-verify=false",
            source,
        ]);
        copy.arg(format!("docker://{}", self.reference(name)));
        command::run(&mut copy).map(drop)
    }

    /// How an image in it is called.
    pub(crate) fn reference(&self, name: &str) -> String {
        format!("{ADDRESS}/bench/{name}:latest")
    }
}
