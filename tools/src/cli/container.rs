//! The command line of containers.

use std::path::PathBuf;

use clap::Args;

use crate::container::spec::{Volume, Wanted};

/// What is wanted of a container, beside what its image says.
#[derive(Clone, Debug, Args)]
pub struct Wish {
    /// Set a variable, NAME=VALUE; NAME alone takes it from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Run as this user, USER[:GROUP], names or numbers
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// Start in this directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// Run this program in place of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Show a directory or file of this host in the container, SOURCE:TARGET[:ro]
    #[arg(long, value_name = "SOURCE:TARGET")]
    pub volume: Vec<Volume>,
    /// Let nothing of the root be written
    #[arg(long)]
    pub read_only: bool,
    /// Give it no network but a loopback interface
    #[arg(long)]
    pub no_network: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// What to run in it [default: what the image says]
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

impl Wish {
    /// As the container's configuration wants it.
    pub fn wanted(self, hostname: String) -> Wanted {
        let variable = |text: String| match text.contains('=') {
            true => Some(text),
            false => Some(format!("{text}={}", std::env::var(&text).ok()?)),
        };
        Wanted {
            command: self.command,
            entrypoint: self.entrypoint,
            env: self.env.into_iter().filter_map(variable).collect(),
            dir: self.workdir,
            volumes: self.volume,
            read_only: self.read_only,
            terminal: self.tty,
            no_network: self.no_network,
            hostname,
            rootless: crate::container::rootless::inside(),
        }
    }
}

/// `harbour run`
#[derive(Debug, Args)]
pub struct Run {
    /// Name of the container [default: one that no other has]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// OCI runtime: runc, crun, or a path [default: the first of these that is installed]
    #[arg(long, value_name = "PROGRAM")]
    pub runtime: Option<PathBuf>,
    /// An image that is in the pool
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// What is wanted of it.
    #[command(flatten)]
    pub wish: Wish,
}

/// `harbour bundle`
#[derive(Debug, Args)]
pub struct Bundle {
    /// An image that is in the pool
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// A directory that is empty or does not exist
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// What is wanted of it.
    #[command(flatten)]
    pub wish: Wish,
}

/// `harbour mount`
#[derive(Debug, Args)]
pub struct Mount {
    /// Keep what is written in this directory, which stays [default: one below the state directory, until
    /// harbour umount]
    #[arg(long, value_name = "DIR", conflicts_with = "read_only")]
    pub upper: Option<PathBuf>,
    /// Without a writable layer
    #[arg(long)]
    pub read_only: bool,
    /// An image that is in the pool
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// Where to mount it: a directory
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// `harbour umount`
#[derive(Debug, Args)]
pub struct Umount {
    /// Also when something still uses it
    #[arg(short, long)]
    pub lazy: bool,
    /// Where `harbour mount` mounted images
    #[arg(required = true, value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
}
