//! The command line of setup.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::setup::{Engine, Release};

/// `harbour setup`
#[derive(Debug, Args)]
#[command(
    after_help = "What changes is shown first, and kept: --undo puts every byte back. A second run finds nothing \
    to do.\n\n  harbour setup containerd --restart      show, ask, write, restart, try a pull\n  \
    harbour setup check containerd          try a pull later\n  harbour setup containerd --undo         as it was"
)]
pub struct Setup {
    /// What to do.
    #[command(subcommand)]
    pub command: SetupCommand,
}

/// Subcommands of `harbour setup`.
#[derive(Debug, Subcommand)]
pub enum SetupCommand {
    /// Have containerd's CRI, and whoever asks for it, use our snapshotter
    Containerd(Containerd),
    /// Have Docker keep images in containerd, with our snapshotter (Docker 24 and later)
    ///
    /// Images in Docker's own store are out of sight while this is so; they come back with --undo. For
    /// daemons that are to keep that store there is harbour docker attach.
    Docker(Docker),
    /// Add the mount to the image stores of Podman and CRI-O: root's, or those of the user who runs this
    Podman(Change),
    /// See whether an engine that was set up uses us, with a real pull
    Check(Check),
}

/// How an engine's configuration is changed.
#[derive(Clone, Debug, Default, Args)]
pub struct Change {
    /// Put back what was there before
    #[arg(long)]
    pub undo: bool,
    /// With --undo: also where somebody changed a file since. What it holds now is kept beside the records
    #[arg(long, requires = "undo")]
    pub force: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The engine's configuration file [default: where the engine looks for it]
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Restart the engine afterwards, by systemd
    #[arg(long)]
    pub restart: bool,
    /// Do not try a pull after a restart
    #[arg(long)]
    pub no_check: bool,
    /// Print a JSON report
    #[arg(long)]
    pub json: bool,
}

/// `harbour setup containerd`
#[derive(Clone, Debug, Args)]
pub struct Containerd {
    /// What is common to all.
    #[command(flatten)]
    pub change: Change,
    /// Its version, like 1.7 [default: what containerd --version says]
    #[arg(long, value_name = "VERSION")]
    pub containerd_version: Option<Release>,
}

/// `harbour setup docker`
#[derive(Clone, Debug, Args)]
pub struct Docker {
    /// What is common to all.
    #[command(flatten)]
    pub change: Change,
    /// The configuration file of the containerd that Docker uses
    #[arg(long, value_name = "FILE", default_value = crate::setup::containerd::DEFAULT_FILE)]
    pub containerd_config_file: PathBuf,
    /// Its version, like 1.7 [default: what containerd --version says]
    #[arg(long, value_name = "VERSION")]
    pub containerd_version: Option<Release>,
    /// Docker's version, like 26.1 [default: what dockerd --version says]
    #[arg(long, value_name = "VERSION")]
    pub docker_version: Option<Release>,
}

/// `harbour setup check`
#[derive(Clone, Debug, Args)]
pub struct Check {
    /// The engine
    #[arg(value_enum)]
    pub engine: Engine,
    /// An image to pull, best one that is in the pool [default: the smallest that is]
    pub image: Option<String>,
    /// Where containerd or dockerd listens [default: where it does by itself]
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
    /// Print a JSON report
    #[arg(long)]
    pub json: bool,
}
