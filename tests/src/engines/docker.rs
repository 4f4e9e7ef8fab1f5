//! Docker: a containerd and a dockerd with data, sockets and network of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::json;

use super::{
    Containerd, Net, Packages,
    containerd::{self, SNAPSHOTTER, client},
    disk_bytes,
    process::{self, Daemon},
    with_log,
};
use crate::shell::{self, Output};

/// Until it answers.
const START_LIMIT: Duration = Duration::from_secs(60);
/// One `docker`, pulls and builds included.
const DOCKER_LIMIT: Duration = Duration::from_secs(180);

/// Where a Docker keeps images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Store {
    /// Its data-root, unpacked by the overlay2 driver.
    Overlay2,
    /// containerd's image store, with containerd's own snapshotter.
    Containerd,
    /// containerd's image store, with the proxy snapshotter at this socket.
    Snapshotter(PathBuf),
}

/// What a Docker is to be.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Which.
    pub packages: &'a Packages,
    /// Where in the network.
    pub net: &'a Arc<Net>,
    /// Everything of it; short, because sockets lie in it.
    pub dir: &'a Path,
    /// `HOST:PORT` of the registry, which speaks plain HTTP.
    pub registry: &'a str,
    /// Where images are kept.
    pub store: Store,
}

/// A running Docker; it, its containers and its mounts are gone when this is dropped. Containers
/// have no network, and outlive a restart of the daemon.
#[derive(Debug)]
pub struct Dockerd {
    daemon: Option<Daemon>,
    containerd: Containerd,
    packages: Packages,
    net: Arc<Net>,
    dir: PathBuf,
}

impl Dockerd {
    /// Starts both daemons and waits until they answer. A data-root that lies in the directory
    /// already is used as it is.
    pub fn start(settings: &Settings<'_>) -> Result<Self> {
        let snapshotter = match &settings.store {
            Store::Snapshotter(socket) => Some(socket.as_path()),
            Store::Overlay2 | Store::Containerd => None,
        };
        fs::create_dir_all(settings.dir.join("home"))?;
        fs::write(settings.dir.join("daemon.json"), configuration(settings)?)?;
        let containerd = Containerd::start(&containerd::Settings {
            packages: settings.packages,
            net: settings.net,
            dir: &settings.dir.join("c"),
            registry: settings.registry,
            pause: "none",
            snapshotter,
        })?;
        let mut docker = Self {
            daemon: None,
            containerd,
            packages: settings.packages.clone(),
            net: Arc::clone(settings.net),
            dir: settings.dir.to_owned(),
        };
        docker.resume()?;
        Ok(docker)
    }

    /// Starts dockerd again after [`Self::stop`] or [`Self::kill`].
    pub fn resume(&mut self) -> Result<()> {
        let mut command = client(&self.packages, "dockerd", &self.dir.join("home"));
        command
            .arg("--config-file")
            .arg(self.dir.join("daemon.json"));
        // Drivers unpack in it, and this process's may be a file system that holds little.
        command.env_remove("TMPDIR");
        let mut daemon = Daemon::start("dockerd", &self.dir, self.net.command(&command))?;
        let answered = shell::until("dockerd answers", START_LIMIT, || {
            daemon.alive()?;
            let output = self.try_docker(&["version"])?;
            Ok(output.status.success().then_some(()))
        });
        answered.map_err(|error| with_log(&error, &daemon.end_of_log()))?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Ends dockerd as a service manager would and starts it again; containers go on.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.resume()
    }

    /// Ends dockerd; containers go on.
    pub fn stop(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.stop(Signal::SIGTERM),
            None => Ok(()),
        }
    }

    /// Kills dockerd; containers go on.
    pub fn kill(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.stop(Signal::SIGKILL),
            None => Ok(()),
        }
    }

    /// Process of dockerd.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// The daemon's data: images, containers, volumes.
    pub fn data_root(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Socket of its interface, as in `DOCKER_HOST=unix://…`.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("docker.sock")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("daemon.json")
    }

    /// The containerd under it.
    pub fn containerd(&mut self) -> &mut Containerd {
        &mut self.containerd
    }

    /// Runs `docker`, whatever comes of it.
    pub fn try_docker(&self, words: &[&str]) -> Result<Output> {
        let home = self.dir.join("home");
        let mut command = client(&self.packages, "docker", &home);
        command
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .args(words)
            .env("DOCKER_CONFIG", &home)
            // The other builder is a plugin that is no part of the packages.
            .env("DOCKER_BUILDKIT", "0")
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT");
        shell::run(&mut self.net.command(&command), DOCKER_LIMIT)
    }

    /// Runs `docker`, which has to succeed, for what it prints.
    pub fn docker(&self, words: &[&str]) -> Result<String> {
        let output = self.try_docker(words)?.ok();
        let output = output.map_err(|error| with_log(&error, &self.log()))?;
        Ok(output.text().trim().to_owned())
    }

    /// What a container of an image prints; the container is gone then.
    pub fn run(&self, image: &str) -> Result<String> {
        self.docker(&["run", "--rm", "--pull", "never", image])
    }

    /// All that both daemons keep.
    pub fn root(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Bytes on disk of all that both daemons keep, logs aside.
    pub fn disk_bytes(&self) -> Result<u64> {
        Ok(disk_bytes(&self.data_root())? + disk_bytes(&self.containerd.root())?)
    }

    /// The last that both have said.
    pub fn log(&self) -> String {
        let own = self
            .daemon
            .as_ref()
            .map_or_else(String::new, Daemon::end_of_log);
        format!("{own}\n{}", self.containerd.log())
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // Without this, containers would go on: that is what live restore is for.
        if self.daemon.is_some()
            && let Ok(all) = self.docker(&["ps", "--quiet"])
        {
            for container in all.lines() {
                let _ = self.try_docker(&["rm", "--force", container]);
            }
        }
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
        // Shims are containerd's, and its guard is dropped after this; mounts are below this.
        if let Err(error) = process::clear(&self.dir) {
            eprintln!("what dockerd left: {error:#}");
        }
    }
}

/// No bridge and no firewall: containers here have no network, and the machine's stays as it is.
fn configuration(settings: &Settings<'_>) -> Result<String> {
    let dir = settings.dir.display();
    let (major, _) = settings.packages.major_minor("docker.io")?;
    let mut config = json!({
        "containerd": format!("{dir}/c/ctd.sock"),
        "hosts": [format!("unix://{dir}/docker.sock")],
        "data-root": format!("{dir}/data"),
        "exec-root": format!("{dir}/exec"),
        "pidfile": format!("{dir}/docker.pid"),
        "insecure-registries": [settings.registry],
        "bridge": "none",
        "iptables": false,
        "ip6tables": false,
        "ip-forward": false,
        "userland-proxy": false,
        "live-restore": true,
    });
    if major < 23 {
        // Where it would write an identity for the whole machine otherwise.
        config["deprecated-key-path"] = json!(format!("{dir}/key.json"));
    }
    match &settings.store {
        Store::Overlay2 => config["storage-driver"] = json!("overlay2"),
        Store::Containerd => {
            config["features"] = json!({ "containerd-snapshotter": true });
        }
        Store::Snapshotter(_) => {
            config["features"] = json!({ "containerd-snapshotter": true });
            config["storage-driver"] = json!(SNAPSHOTTER);
        }
    }
    Ok(config.to_string())
}
