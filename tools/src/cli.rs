//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{advertise::Advertised, config};

pub mod container;
pub mod docker;
pub mod setup;
pub mod snapshotter;

use container::{Bundle, Mount, Run, Umount};
use docker::DockerArgs;
use setup::Setup;
use snapshotter::SnapshotterArgs;

/// Unpacks container images once, keeps them in memory that hosts lend, and serves them as
/// directories.
#[derive(Debug, Parser)]
#[command(
    name = "harbour",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Start here:\n  harbour up -d              metad, a donor and the mount on this host\n  \
        harbour pull debian:12     fetch and unpack an image into the pool\n  \
        ls /harbour/images         the tree\n  harbour down               stop\n\n\
        Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 a daemon does not answer, 5 refused\n\
        (bad digest, manifest, layer), 6 no space, 130 interrupted.\n\
        Configuration: /etc/harbour/harbour.toml; every long flag is a key there."
)]
pub struct Cli {
    /// Places.
    #[command(flatten)]
    pub paths: config::Paths,
    /// Configuration file [default: /etc/harbour/harbour.toml when it exists]
    #[arg(long, global = true, value_name = "FILE", env = "HARBOUR_CONFIG")]
    pub config: Option<PathBuf>,
    /// Say more; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run metad, a donor and the mount on this host
    Up(Up),
    /// Stop what `up` started
    Down(Down),
    /// Fetch an image and unpack it into the pool
    ///
    /// Pulls of one cluster share the work: each claims the layers that are missing, one after the other,
    /// and leaves to others what they hold already, showing how far they are. Each layer leaves the
    /// registry once, and the next in line takes over from a host that dies. Ctrl-C hands over at once.
    Pull(Pull),
    /// List images
    Images(Listing),
    /// List layers
    Layers(Listing),
    /// Take images out of the catalogue
    Rm(Rm),
    /// Show what runs, what is stored and how full the pool is
    Status(Listing),
    /// Count everything again and compare it with the allocator's books
    ///
    /// metad reads every row of its store (donors, regions, extents, quarantine, copies, packs,
    /// objects, references, pins) in one snapshot and compares the sums and the free map that follow
    /// with those in its memory at the same instant, while pulls and reads go on. Exit code 1 when
    /// something differs: each difference is named.
    Audit(Listing),
    /// Tell where the bytes of a file under the mount come from
    Why(Why),
    /// Run a container of an image, without an engine
    ///
    /// The image has to be in the pool (harbour pull). Its root is the image with a writable layer on top,
    /// which goes with the container; a runtime (runc or crun) does the rest. It is on this host's network,
    /// or on none. Who is not root gets it in a user namespace, where files of the image are nobody's: they
    /// can be read, and written are /tmp, /var/tmp and volumes. The exit code is that of the command, or the runtime's when it could not be started.
    Run(Run),
    /// Make an OCI bundle of an image, for a runtime
    ///
    /// DIR gets config.json, made of the image's own, and rootfs, where the image is mounted with a writable
    /// layer on top (in DIR too). Afterwards: runc run --bundle DIR NAME; then umount DIR/rootfs.
    Bundle(Bundle),
    /// Mount an image with a writable layer on top
    Mount(Mount),
    /// Take such a mount away, and what was written to it
    Umount(Umount),
    /// Give images of the pool to a Docker daemon with the overlay2 store
    Docker(DockerArgs),
    /// Have a container engine of this host use the mount: write its configuration, or take that back
    Setup(Setup),
    /// Check this host and say what is wrong and how to mend it
    Doctor(Listing),
    /// Lend memory of this host to the pool
    Donor(DonorArgs),
    /// List donors
    Donors(Listing),
    /// List locks that pulls hold or wait for at metad
    ///
    /// Who holds a layer fetches and unpacks it for the whole cluster; who waits has it the moment that
    /// the holder commits, or takes over when the holder ends without. Who holds an image merges its
    /// layers and commits it. DONE is how far the holder says that it has come.
    Locks(Listing),
    /// Run the metadata daemon
    Metad(MetadArgs),
    /// Mount the images on this host
    Node(NodeArgs),
    /// Serve containerd's snapshots on this host: containers start from layers of the mount
    ///
    /// containerd, Kubernetes and Docker (with the containerd image store) call it on a unix socket. Of images
    /// that are in the pool they fetch manifest and config alone; what is not there is pulled into the pool
    /// first, for the whole cluster. When pool, metad or registry cannot serve, containerd fetches and unpacks
    /// by itself, which a line in the log and a counter tell. harbour node and harbour up do the same.
    Snapshotter(SnapshotterArgs),
    /// Make and look at the certificates with which hosts know each other
    Certs(CertsArgs),
    /// Print a completion script for a shell
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each subcommand
    Man {
        /// Directory to write them to.
        dir: PathBuf,
    },
}

/// `harbour up`
#[derive(Debug, Args)]
pub struct Up {
    /// Go to the background once the mount serves
    #[arg(short, long)]
    pub detach: bool,
    /// Longest time to wait until the mount serves, in seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub wait_s: u64,
    /// Keys of the metadata daemon.
    #[command(flatten)]
    pub metad: config::MetadKeys,
    /// Keys of the donor.
    #[command(flatten)]
    pub donor: config::DonorKeys,
    /// Lend to other hosts too, on this TCP address; may be given several times (key `listen`)
    #[arg(long, value_name = "ADDR")]
    pub donor_listen: Vec<SocketAddr>,
    /// Where other hosts find the donor, IP or IP:PORT, when that is not where it listens
    /// (key `advertise`)
    #[arg(long, value_name = "IP[:PORT]")]
    pub donor_advertise: Vec<Advertised>,
    /// Keys of the node.
    #[command(flatten)]
    pub node: config::NodeKeys,
}

/// `harbour down`
#[derive(Debug, Args)]
pub struct Down {
    /// Do not wait for open files: detach the mounts and end the processes
    #[arg(long)]
    pub force: bool,
    /// Longest time to wait, in seconds
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub wait_s: u64,
}

/// When a progress display is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Progress {
    /// Bars on a terminal, lines elsewhere.
    Auto,
    /// Plain lines.
    Plain,
    /// Nothing.
    None,
}

/// `harbour pull`
#[derive(Debug, Args)]
#[command(
    after_help = "Images: debian:12, registry.example.org/team/app@sha256:…, \
    oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF], or the path of such a file or directory."
)]
pub struct Pull {
    /// Images to fetch
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// Every tag of these repositories, which are then given without tag or digest
    ///
    /// What cannot be pulled (a signature beside an image, say) is passed over with an error; the exit
    /// code tells.
    #[arg(long, short = 'a')]
    pub all_tags: bool,
    /// Accept plain HTTP and unknown certificates from the registry
    #[arg(long)]
    pub insecure: bool,
    /// How progress is shown
    #[arg(long, value_enum, default_value_t = Progress::Auto)]
    pub progress: Progress,
    /// Print a JSON report
    #[arg(long)]
    pub json: bool,
    /// Keys of pulls.
    #[command(flatten)]
    pub keys: config::PullKeys,
}

/// A listing.
#[derive(Debug, Args)]
pub struct Listing {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `harbour rm`
#[derive(Debug, Args)]
pub struct Rm {
    /// Images to take away
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// Print a JSON report
    #[arg(long)]
    pub json: bool,
}

/// `harbour why`
#[derive(Debug, Args)]
pub struct Why {
    /// Files below the mount or a fast view
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `harbour donor`
#[derive(Debug, Args)]
pub struct DonorArgs {
    /// Keys of the donor.
    #[command(flatten)]
    pub keys: config::DonorKeys,
    /// Lend to other hosts too, on this TCP address, like 192.0.2.1:7481, [::]:7481; may be given several
    /// times [default: to this host alone]
    #[arg(long, value_name = "ADDR")]
    pub listen: Vec<SocketAddr>,
    /// Where other hosts find this donor, when that is not where it listens; may be given several times
    /// [default: the addresses of --listen; for 0.0.0.0 and [::], the one that metad is reached from]
    #[arg(long, value_name = "IP[:PORT]")]
    pub advertise: Vec<Advertised>,
    /// End when the parent ends.
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// `harbour metad`
#[derive(Debug, Args)]
pub struct MetadArgs {
    /// Keys of the metadata daemon.
    #[command(flatten)]
    pub keys: config::MetadKeys,
    /// End when the parent ends.
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// `harbour node`
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Keys of the node.
    #[command(flatten)]
    pub keys: config::NodeKeys,
    /// End when the parent ends.
    #[arg(long, hide = true)]
    pub supervised: bool,
}

/// `harbour certs`
#[derive(Debug, Args)]
#[command(
    after_help = "On one host, which need not be metad's:\n  harbour certs init\n  \
    harbour certs issue alpha beta gamma\nThen give each host its own:\n  \
    scp -r /etc/harbour/ca/hosts/beta beta:/etc/harbour/tls\n\
    To renew one, issue it again and copy it again: running processes take it at the next connection."
)]
pub struct CertsArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: Certs,
}

/// Subcommands of `harbour certs`.
#[derive(Debug, Subcommand)]
pub enum Certs {
    /// Make the cluster's own certificate authority
    Init(CertsDir),
    /// Make certificates and keys for hosts, each in DIR/hosts/NAME
    Issue(CertsIssue),
    /// List certificates of the authority and of this host: for whom, and until when
    Show(CertsShow),
}

/// Where the authority is.
#[derive(Debug, Args)]
pub struct CertsDir {
    /// Directory of the authority
    #[arg(long, value_name = "DIR", default_value = "/etc/harbour/ca")]
    pub dir: PathBuf,
}

/// `harbour certs issue`
#[derive(Debug, Args)]
pub struct CertsIssue {
    /// Names or addresses by which hosts are called
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Another name or address of the same host; only with one NAME
    #[arg(long = "san", value_name = "NAME")]
    pub sans: Vec<String>,
    /// Days until they end, at most to the end of the authority itself
    #[arg(long, default_value_t = 365, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// The authority.
    #[command(flatten)]
    pub at: CertsDir,
}

/// `harbour certs show`
#[derive(Debug, Args)]
pub struct CertsShow {
    /// The authority.
    #[command(flatten)]
    pub at: CertsDir,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
