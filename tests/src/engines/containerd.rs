//! containerd with a root, a state and a socket of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{
    Cri, Net, Packages,
    process::{self, Daemon},
    with_log,
};
use crate::{
    layers::architecture,
    shell::{self, Output},
};

/// Until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// One `ctr`, pulls included.
const CTR_LIMIT: Duration = Duration::from_secs(120);
/// Name of the proxy plugin.
pub const SNAPSHOTTER: &str = "harbour";
/// Namespace of what the container runtime interface makes.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// What a containerd is to be.
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
    /// Image of the container that holds a pod together.
    pub pause: &'a str,
    /// Socket of a proxy snapshotter to use in place of its own.
    pub snapshotter: Option<&'a Path>,
}

/// A running containerd; it, its containers and its mounts are gone when this is dropped.
#[derive(Debug)]
pub struct Containerd {
    daemon: Option<Daemon>,
    packages: Packages,
    net: Arc<Net>,
    dir: PathBuf,
    snapshotter: &'static str,
}

impl Containerd {
    /// Writes a configuration of the form that this version reads, starts it and waits until it
    /// answers.
    pub fn start(settings: &Settings<'_>) -> Result<Self> {
        fs::create_dir_all(settings.dir)?;
        let (major, _) = settings.packages.major_minor("containerd")?;
        let text = match major {
            0 | 1 => version_2(settings),
            _ => version_3(settings)?,
        };
        fs::write(settings.dir.join("containerd.toml"), text)?;
        let mut containerd = Self {
            daemon: None,
            packages: settings.packages.clone(),
            net: Arc::clone(settings.net),
            dir: settings.dir.to_owned(),
            snapshotter: match settings.snapshotter {
                Some(_) => SNAPSHOTTER,
                None => "overlayfs",
            },
        };
        containerd.resume()?;
        Ok(containerd)
    }

    /// Starts it again after [`Self::stop`] or [`Self::kill`], on what it had.
    pub fn resume(&mut self) -> Result<()> {
        let mut command = self.packages.command("containerd");
        command
            .arg("--config")
            .arg(self.dir.join("containerd.toml"));
        let mut daemon = Daemon::start("containerd", &self.dir, self.net.command(&command))?;
        let answered = shell::until("containerd answers", START_LIMIT, || {
            daemon.alive()?;
            let output = self.try_ctr("default", &["version"])?;
            Ok(output.status.success().then_some(()))
        });
        answered.map_err(|error| with_log(&error, &daemon.end_of_log()))?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("ctd.sock")
    }

    /// The snapshotter that it was told to use, for `--snapshotter`.
    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter
    }

    /// Runs `ctr`, whatever comes of it.
    pub fn try_ctr(&self, namespace: &str, words: &[&str]) -> Result<Output> {
        let mut command = self.packages.command("ctr");
        command.arg("--address").arg(self.socket());
        command.args(["--namespace", namespace]).args(words);
        shell::run(&mut self.net.command(&command), CTR_LIMIT)
    }

    /// Runs `ctr`, which has to succeed, for what it prints.
    pub fn ctr(&self, namespace: &str, words: &[&str]) -> Result<String> {
        let output = self.try_ctr(namespace, words)?.ok();
        Ok(output
            .map_err(|error| with_log(&error, &self.log()))?
            .text())
    }

    /// What a container of an image in `namespace` prints; the container is gone then.
    pub fn run(&self, namespace: &str, image: &str, name: &str) -> Result<String> {
        let words = ["run", "--rm", "--snapshotter", self.snapshotter];
        let said = self.ctr(namespace, &[&words[..], &[image, name]].concat())?;
        Ok(said.trim().to_owned())
    }

    /// A client of the container runtime interface.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).map_err(|error| with_log(&error, &self.log()))
    }

    /// All that it keeps.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The last it has said.
    pub fn log(&self) -> String {
        self.daemon
            .as_ref()
            .map_or_else(String::new, Daemon::end_of_log)
    }

    /// Ends it as a service manager would; containers go on.
    pub fn stop(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.stop(Signal::SIGTERM),
            None => Ok(()),
        }
    }

    /// Kills it; containers go on.
    pub fn kill(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.stop(Signal::SIGKILL),
            None => Ok(()),
        }
    }

    /// Takes away every container of every namespace.
    fn end_tasks(&self) -> Result<()> {
        let namespaces = self.ctr("default", &["namespaces", "list", "-q"])?;
        for namespace in namespaces.lines() {
            let tasks = self.ctr(namespace, &["tasks", "list", "-q"])?;
            for task in tasks.lines() {
                self.try_ctr(namespace, &["tasks", "delete", "--force", task])?;
            }
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            let _ = self.end_tasks();
        }
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
        if let Err(error) = process::clear(&self.dir) {
            eprintln!("what containerd left: {error:#}");
        }
    }
}

/// Where things are, in every version's words.
fn places(version: u32, settings: &Settings<'_>) -> String {
    let dir = settings.dir.display();
    let mut text = format!(
        "version = {version}\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
         [grpc]\naddress = \"{dir}/ctd.sock\"\n"
    );
    if let Some(socket) = settings.snapshotter {
        let socket = socket.display();
        text.push_str(&format!(
            "[proxy_plugins.{SNAPSHOTTER}]\ntype = \"snapshot\"\naddress = \"{socket}\"\n"
        ));
    }
    text
}

/// containerd 1. Where tests run, the score of a pod may not be lowered below this process's.
fn version_2(settings: &Settings<'_>) -> String {
    let registry = settings.registry;
    let snapshotter = settings.snapshotter.map_or("overlayfs", |_| SNAPSHOTTER);
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "{}[{cri}]\nsandbox_image = \"{}\"\nrestrict_oom_score_adj = true\n\
         [{cri}.containerd]\nsnapshotter = \"{snapshotter}\"\ndisable_snapshot_annotations = false\n\
         [{cri}.registry.mirrors.\"{registry}\"]\nendpoint = [\"http://{registry}\"]\n",
        places(2, settings),
        settings.pause
    )
}

/// containerd 2, which ignores the words of the other where they are not its own.
fn version_3(settings: &Settings<'_>) -> Result<String> {
    let registry = settings.registry;
    let hosts = settings.dir.join("hosts");
    fs::create_dir_all(hosts.join(registry))?;
    let host = format!(
        "server = \"http://{registry}\"\n[host.\"http://{registry}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    fs::write(hosts.join(registry).join("hosts.toml"), host)?;
    let hosts = hosts.display();
    let snapshotter = settings.snapshotter.map_or("overlayfs", |_| SNAPSHOTTER);
    let exports = match settings.snapshotter {
        Some(_) => format!(
            "[proxy_plugins.{SNAPSHOTTER}.exports]\nenable_remote_snapshot_annotations = \"true\"\n"
        ),
        None => String::new(),
    };
    let images = "plugins.\"io.containerd.cri.v1.images\"";
    let transfer = "plugins.\"io.containerd.transfer.v1.local\"";
    Ok(format!(
        "{}{exports}[{images}]\nsnapshotter = \"{snapshotter}\"\n\
         disable_snapshot_annotations = false\n\
         [{images}.pinned_images]\nsandbox = \"{}\"\n\
         [plugins.\"io.containerd.cri.v1.runtime\"]\nrestrict_oom_score_adj = true\n\
         [{images}.registry]\nconfig_path = \"{hosts}\"\n\
         [{transfer}]\nconfig_path = \"{hosts}\"\n\
         [[{transfer}.unpack_config]]\nplatform = \"linux/{}\"\nsnapshotter = \"{snapshotter}\"\n",
        places(3, settings),
        settings.pause,
        architecture()
    ))
}

/// Settings of a command line client that must not read this machine's.
pub(super) fn client(packages: &Packages, program: &str, home: &Path) -> Command {
    let mut command = packages.command(program);
    command.env("HOME", home);
    command
}
