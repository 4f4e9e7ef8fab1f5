//! The command line of `harbour docker`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::docker::{daemon::Commands, root::DAEMON_JSON};

/// `harbour docker`
#[derive(Debug, Args)]
#[command(
    after_help = "A daemon reads its data-root when it starts. While one runs, attach and detach note what is \
    wanted, and it is done at the next of these:\n  harbour docker apply            while the daemon is stopped\n  \
    harbour docker apply --restart  which stops and starts it; with live-restore containers run on\n  \
    ExecStartPre=-/usr/bin/harbour docker apply   in a drop-in of docker.service: at each of its starts\n\
    For a Docker that keeps images in containerd, see harbour snapshotter instead."
)]
pub struct DockerArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: Docker,
}

impl DockerArgs {
    /// Whether it goes on until it is stopped.
    pub fn follows(&self) -> bool {
        matches!(&self.command, Docker::Attach(attach) if attach.watch)
    }
}

/// Subcommands of `harbour docker`.
#[derive(Debug, Subcommand)]
pub enum Docker {
    /// Give images of the pool to Docker, with their layers in the mount
    ///
    /// Nothing is copied: a layer's directory in the data-root is a link into this host's mount. Layers that
    /// Docker has itself are used as they are. `docker rmi` and `docker image prune` take such an image away
    /// like any other, and it stays away until it is attached again.
    Attach(Attach),
    /// Take such images away from Docker, with what nothing else of Docker's uses
    Detach(Detach),
    /// List images that were given to Docker, and how far each is
    List(List),
    /// Do what attach and detach could not do while the daemon ran, and mend what was interrupted
    Apply(Apply),
}

/// Which Docker.
#[derive(Clone, Debug, Args)]
pub struct Where {
    /// Docker's data-root [default: as its configuration says, else /var/lib/docker]
    #[arg(long, value_name = "DIR")]
    pub data_root: Option<PathBuf>,
    /// Docker's configuration file
    #[arg(long, value_name = "FILE", default_value = DAEMON_JSON)]
    pub daemon_json: PathBuf,
    /// Socket of the running daemon, unix:///PATH [default: /run/docker.sock]
    #[arg(long, value_name = "ADDRESS", env = "DOCKER_HOST")]
    pub docker_host: Option<String>,
}

/// Whether and how a running daemon is started again.
#[derive(Clone, Debug, Args)]
pub struct Restart {
    /// Stop a running daemon, do it, and start the daemon again; refused when containers would end
    #[arg(long)]
    pub restart: bool,
    /// What stops the daemon
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = "systemctl stop docker.socket docker.service"
    )]
    pub stop_command: String,
    /// What starts it
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = "systemctl start docker.service"
    )]
    pub start_command: String,
}

impl Restart {
    /// How, if it is wanted.
    pub fn commands(&self) -> Option<Commands> {
        self.restart.then(|| Commands {
            stop: self.stop_command.clone(),
            start: self.start_command.clone(),
        })
    }
}

/// `harbour docker attach`
#[derive(Debug, Args)]
pub struct Attach {
    /// Images that are in the pool; with --watch patterns like 'debian:*' [default: all images]
    #[arg(required_unless_present = "watch", value_name = "IMAGE")]
    pub images: Vec<String>,
    /// Go on until stopped: keep Docker in step with the catalogue
    ///
    /// Images that come are attached, those that go are detached. With --restart the daemon is started
    /// again for it, at most once in half a minute.
    #[arg(long)]
    pub watch: bool,
    /// Let docker save and docker push work: reads each layer's blob once from where the image came from
    #[arg(long)]
    pub tar_split: bool,
    /// Which Docker.
    #[command(flatten)]
    pub at: Where,
    /// Its restart.
    #[command(flatten)]
    pub restart: Restart,
}

/// `harbour docker detach`
#[derive(Debug, Args)]
pub struct Detach {
    /// Images, named as for attach or by their names in Docker
    #[arg(required_unless_present = "all", value_name = "IMAGE")]
    pub images: Vec<String>,
    /// All that were attached
    #[arg(long, conflicts_with = "images")]
    pub all: bool,
    /// Which Docker.
    #[command(flatten)]
    pub at: Where,
}

/// `harbour docker list`
#[derive(Debug, Args)]
pub struct List {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Which Docker.
    #[command(flatten)]
    pub at: Where,
}

/// `harbour docker apply`
#[derive(Debug, Args)]
pub struct Apply {
    /// Which Docker.
    #[command(flatten)]
    pub at: Where,
    /// Its restart.
    #[command(flatten)]
    pub restart: Restart,
}
