//! Configuration: one list of keys, read from TOML and from the command line.
//!
//! Each section below is at once a table of `harbour.toml` and a set of flags, so that no key can
//! exist in one and not in the other. A flag wins over the file, the file over the default.
//! Unknown keys are errors: a misspelt key that is silently ignored costs a user an evening.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use harbour_pool::{REGION_ALIGN_BYTES, connector::Preference, donor::region_unit, verbs::Devices};
use serde::Deserialize;

use crate::{advertise::Advertised, donor::policy::Limits, failure, size::Size};

mod places;
mod values;

pub use places::Places;
pub use values::{FastView, HugePages, Lend, OnStop, RdmaDevice, TransportChoice};

/// Where a configuration file is looked for when none is named.
pub const DEFAULT_FILE: &str = "/etc/harbour/harbour.toml";

/// The least that is worth lending.
const LEND_MIN_BYTES: u64 = 16 << 20;

/// Declares a section: every key optional in the file and on the command line.
macro_rules! section {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $key:ident: $type:ty,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Debug, Default, Args, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "snake_case")]
        pub struct $name { $($(#[$inner])* pub $key: Option<$type>,)* }

        impl $name {
            /// These values where they are set, `below`'s elsewhere.
            pub fn over(self, below: Self) -> Self {
                Self { $($key: self.$key.or(below.$key),)* }
            }
        }
    };
}

section! {
    /// Places that every subcommand needs.
    Paths {
        /// Data that survives a restart [default: /var/lib/harbour]
        #[arg(long, global = true, value_name = "DIR", env = "HARBOUR_STATE_DIR")]
        state_dir: PathBuf,
        /// Sockets, pid files and fast views [default: /run/harbour]
        #[arg(long, global = true, value_name = "DIR", env = "HARBOUR_RUN_DIR")]
        run_dir: PathBuf,
        /// Where the images appear [default: /harbour]
        #[arg(long, global = true, value_name = "DIR", env = "HARBOUR_MOUNT")]
        mount: PathBuf,
        /// Metadata daemon: unix:/PATH or https://HOST:PORT [default: unix:RUN_DIR/metad.sock]
        #[arg(long, global = true, value_name = "URL", env = "HARBOUR_METAD")]
        metad: String,
        /// How bytes travel between donors and this host: auto (shared memory on one host, verbs where both
        /// ends have RDMA, else tcp), or only shm, verbs, tcp [default: auto]
        #[arg(long, global = true, value_name = "KIND", env = "HARBOUR_TRANSPORT")]
        transport: TransportChoice,
        /// RDMA device of this host, as rdma link lists them, to lend and read by: auto (the one that has
        /// the address in question), none to do without RDMA, or a name [default: auto]
        #[arg(long, global = true, value_name = "NAME", env = "HARBOUR_RDMA_DEVICE")]
        rdma_device: RdmaDevice,
        /// This host's certificate for gRPC between hosts: ca.crt, host.crt, host.key, as harbour
        /// certs issue makes them [default: /etc/harbour/tls]
        #[arg(long, global = true, value_name = "DIR", env = "HARBOUR_TLS_DIR")]
        tls_dir: PathBuf,
        /// Let gRPC go between hosts in plain text: whoever is on the network can then read and
        /// change everything
        #[arg(long, global = true, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        insecure_metad: bool,
        /// Let bytes go between hosts under TLS alone: a donor of this host serves nobody without, and this
        /// host reads from no donor without; RDMA is not used
        #[arg(long, global = true, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        tls_data: bool,
    }
}

section! {
    /// The metadata daemon's keys.
    MetadKeys {
        /// Also answer gRPC on this TCP address, like 10.0.0.1:7480 or [::]:7480, under mutual TLS
        /// with the certificates in --tls-dir. On a loopback address only when that is given
        #[arg(long, value_name = "ADDR")]
        listen: std::net::SocketAddr,
        /// Serve /metrics for Prometheus, and /healthz, on this TCP address
        #[arg(long, value_name = "ADDR")]
        metrics: std::net::SocketAddr,
        /// Replicas of each pack of an image that was pulled with no number of its own, 1 to 16 [default: 1]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
        replicas: u32,
        /// One replica more for packs that are read often, up to this many, while memory is free; 0 for never [default: 0]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=16))]
        hot_replicas: u32,
        /// Most that is copied between donors, all together, in MiB a second; 0 for nothing [default: 128]
        #[arg(long, value_name = "MIB")]
        rebalance_mib_s: u32,
        /// A pull or copy between donors that was not heard of for this long is undone and its memory
        /// free again, in seconds, 2 to 600 [default: 15]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(2..=600))]
        lease_s: u32,
    }
}

section! {
    /// The donor's keys.
    DonorKeys {
        /// Memory to lend: a size like 8GiB, or auto for what the host can spare, more or less as time
        /// goes by [default: a quarter of what is available, at most 16GiB]
        #[arg(long, value_name = "SIZE|auto")]
        lend: Lend,
        /// Memory that the host keeps: what is lent goes back at once when less is available
        /// [default: 1GiB or a tenth of all memory, whichever is more; at most half of it]
        #[arg(long, value_name = "SIZE")]
        keep_free: Size,
        /// Never give memory back while the donor runs, whatever the host needs
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        lend_fixed: bool,
        /// Take all of the memory at the start and keep it from being swapped out
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        lock_memory: bool,
        /// When told to end: move what only this donor has to others first, or drop it
        /// [default: move for donor, drop for up]
        #[arg(long, value_name = "WHAT")]
        on_stop: OnStop,
        /// Longest that moving may take, in seconds [default: 60]
        #[arg(long, value_name = "SECONDS")]
        drain_s: u64,
        /// Name of this donor in the cluster [default: the host's name]
        #[arg(long, value_name = "NAME")]
        donor_name: String,
        /// What fails together with this donor: replicas of a pack go to different ones [default: the host's name]
        #[arg(long, value_name = "NAME")]
        failure_domain: String,
        /// Back the memory with huge pages: auto (when enough are free), never, require [default: auto]
        #[arg(long, value_name = "WHEN")]
        huge_pages: HugePages,
        /// As [`Paths::transport`], for what this donor reads from others.
        #[arg(skip)]
        transport: TransportChoice,
        /// As [`Paths::rdma_device`], for what is lent too.
        #[arg(skip)]
        rdma_device: RdmaDevice,
        /// `--listen` of `donor`, `--donor-listen` of `up`.
        #[arg(skip)]
        listen: Vec<SocketAddr>,
        /// `--advertise` of `donor`, `--donor-advertise` of `up`.
        #[arg(skip)]
        advertise: Vec<Advertised>,
    }
}

section! {
    /// The node's keys: the mount of one host.
    NodeKeys {
        /// Name of this node in the cluster [default: the host's name and the mount]
        #[arg(long, value_name = "NAME")]
        node_name: String,
        /// Threads that answer the kernel [default: twice the number of cores, 4 to 16]
        #[arg(long, value_name = "N")]
        threads: usize,
        /// Longest that a read may take before it fails with EIO, in seconds [default: 30]
        #[arg(long, value_name = "SECONDS")]
        read_deadline_s: u64,
        /// Mount images with the kernel's EROFS under RUN_DIR/view: auto or off [default: auto]
        #[arg(long, value_name = "WHEN")]
        fast_view: FastView,
        /// Serve containerd's snapshots too, as harbour snapshotter does [default: true]
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        snapshotter: bool,
        /// Do not check digests of what the pool gives. For benchmarks only: wrong bytes become visible
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        unsafe_no_verify: bool,
        /// As [`Paths::transport`].
        #[arg(skip)]
        transport: TransportChoice,
        /// As [`Paths::rdma_device`].
        #[arg(skip)]
        rdma_device: RdmaDevice,
    }
}

section! {
    /// The snapshotter's keys: what containerd calls.
    SnapshotterKeys {
        /// Socket that containerd calls [default: RUN_DIR/snapshotter.sock]
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Pull images into the pool that containerd wants and the pool does not have [default: true]
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        pull_missing: bool,
        /// Longest that containerd waits for such a pull before it fetches by itself, in seconds [default: 600]
        #[arg(long, value_name = "SECONDS")]
        pull_wait_s: u64,
        /// Serve /metrics for Prometheus, and /healthz, on this TCP address
        #[arg(long, value_name = "ADDR")]
        metrics: SocketAddr,
    }
}

section! {
    /// How images are fetched.
    PullKeys {
        /// Platform to take from an index, like linux/arm64 [default: this machine's]
        #[arg(long, value_name = "OS/ARCH")]
        platform: String,
        /// Layers fetched and unpacked at the same time [default: 2]
        #[arg(long, value_name = "N")]
        jobs: usize,
        /// Most entries that a layer may have [default: 2000000]
        #[arg(long, value_name = "N")]
        max_entries: u64,
        /// Most bytes that a layer may unpack to, holes not counted [default: 256GiB]
        #[arg(long, value_name = "SIZE")]
        max_unpacked: Size,
        /// Replicas of each pack of the image, 1 to 16, kept with the image [default: what metad was started with]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
        replicas: u32,
        /// Certificate authority to trust besides the system's, a PEM file
        #[arg(long, value_name = "FILE")]
        ca_file: PathBuf,
        /// As [`Paths::transport`].
        #[arg(skip)]
        transport: TransportChoice,
        /// As [`Paths::rdma_device`].
        #[arg(skip)]
        rdma_device: RdmaDevice,
    }
}

/// What the file says of one registry: the table `[registry."HOST"]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Asked in this order before the registry itself.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Plain HTTP and unknown certificates are accepted (as `pull --insecure`).
    #[serde(default)]
    pub insecure: bool,
}

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// As [`Paths::state_dir`].
    pub state_dir: Option<PathBuf>,
    /// As [`Paths::run_dir`].
    pub run_dir: Option<PathBuf>,
    /// As [`Paths::mount`].
    pub mount: Option<PathBuf>,
    /// As [`Paths::metad`]: the daemon to ask.
    pub metad_url: Option<String>,
    /// As [`Paths::transport`], for every part whose section does not say otherwise.
    pub transport: Option<TransportChoice>,
    /// As [`Paths::rdma_device`], for every part whose section does not say otherwise.
    pub rdma_device: Option<RdmaDevice>,
    /// As [`Paths::tls_dir`].
    pub tls_dir: Option<PathBuf>,
    /// As [`Paths::insecure_metad`].
    pub insecure_metad: Option<bool>,
    /// As [`Paths::tls_data`].
    pub tls_data: Option<bool>,
    /// `[metad]`
    pub metad: MetadKeys,
    /// `[donor]`
    pub donor: DonorKeys,
    /// `[node]`
    pub node: NodeKeys,
    /// `[snapshotter]`, also of the one in a node
    pub snapshotter: SnapshotterKeys,
    /// `[pull]`
    pub pull: PullKeys,
    /// `[registry."HOST"]`
    pub registry: BTreeMap<String, Registry>,
}

impl File {
    /// Reads `path`, or [`DEFAULT_FILE`] when none is named and it exists.
    pub fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let (path, named) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        toml::from_str(&text).map_err(|error| {
            failure::failure(
                failure::Code::Usage,
                format!("{}: {}", path.display(), error.to_string().trim_end()),
                "the keys are listed in: harbour help, harbour help metad, … (each flag is a key)",
            )
        })
    }

    /// The places in the file.
    pub fn paths(&self) -> Paths {
        Paths {
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone(),
            mount: self.mount.clone(),
            metad: self.metad_url.clone(),
            // Not here: a section's key stands between the flag and this one.
            transport: None,
            rdma_device: None,
            tls_dir: self.tls_dir.clone(),
            insecure_metad: self.insecure_metad,
            tls_data: self.tls_data,
        }
    }

    /// Which transports may be used: by the flag, else by the part's section, else by the file.
    pub fn preference(
        &self,
        flag: Option<TransportChoice>,
        section: Option<TransportChoice>,
    ) -> Preference {
        let choice = flag.or(section).or(self.transport);
        choice.map_or(Preference::Auto, TransportChoice::preference)
    }

    /// Which RDMA devices may be used: by the flag, else by the part's section, else by the file.
    pub fn devices(&self, flag: Option<&RdmaDevice>, section: Option<&RdmaDevice>) -> Devices {
        let choice = flag.or(section).or(self.rdma_device.as_ref());
        choice.map_or(Devices::Any, |choice| choice.0.clone())
    }
}

impl DonorKeys {
    /// What the donor is to lend and what the host is to keep, on a host with `total` bytes of
    /// memory of which `available` are.
    pub fn limits(&self, total: u64, available: u64) -> anyhow::Result<Limits> {
        let floor = self
            .keep_free
            .map_or((total / 10).max(1 << 30).min(total / 2), |size| size.0);
        let most = match self.lend {
            Some(Lend::Size(size)) => {
                anyhow::ensure!(
                    size.0 >= LEND_MIN_BYTES,
                    "--lend {size} is too little: lend at least 16MiB"
                );
                size.0
            }
            Some(Lend::Auto) => total.saturating_sub(floor).max(LEND_MIN_BYTES),
            None => (available / 4).clamp(64 << 20, 16 << 30),
        };
        let most = most - most % REGION_ALIGN_BYTES;
        Ok(Limits {
            floor,
            most,
            unit: region_unit(most),
        })
    }

    /// Longest that moving what only this donor has may take; `None` when that is not asked for.
    pub fn drain(&self) -> Option<Duration> {
        let limit = Duration::from_secs(self.drain_s.unwrap_or(60).min(86_400));
        (self.on_stop != Some(OnStop::Drop)).then_some(limit)
    }
}

impl NodeKeys {
    /// Threads that answer the kernel.
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        self.threads
            .unwrap_or((2 * cores).clamp(4, 16))
            .clamp(1, 64)
    }

    /// Longest time of one read.
    pub fn read_deadline(&self) -> Duration {
        Duration::from_secs(self.read_deadline_s.unwrap_or(30).clamp(1, 3600))
    }
}

/// The host's name, or "localhost".
pub fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_and_kept() {
        let gib = 1 << 30;
        let keys = |lend: Option<&str>, keep_free: Option<u64>| DonorKeys {
            lend: lend.map(|text| text.parse().expect("valid")),
            keep_free: keep_free.map(Size),
            ..DonorKeys::default()
        };
        for (lend, keep, total, floor, most) in [
            (Some("8GiB"), None, 64 * gib, 64 * gib / 10, 8 * gib),
            (Some("1GiB"), None, 4 * gib, gib, gib),
            (Some("1GiB"), None, gib, gib / 2, gib),
            (Some("auto"), Some(gib), 4 * gib, gib, 3 * gib),
            (None, Some(5), 4 * gib, 5, gib / 2),
        ] {
            let limits = keys(lend, keep).limits(total, 2 * gib).expect("valid");
            assert_eq!((limits.floor, limits.most), (floor, most), "{lend:?}");
        }
        assert!(keys(Some("1MiB"), None).limits(gib, gib).is_err());
        let file: File = toml::from_str("[donor]\nlend = 'auto'\non_stop = 'drop'").expect("valid");
        assert_eq!(file.donor.lend, Some(Lend::Auto));
        assert_eq!(file.donor.drain(), None);
    }

    #[test]
    fn unknown_keys_are_errors_and_flags_win() {
        let file: File = toml::from_str(
            "state_dir = '/s'\nrdma_device = 'rxe0'\nmetad_url = 'https://[::1]:1'\ntls_dir = '/t'\ninsecure_metad = false\n[donor]\nlend = '2GiB'\nhuge_pages = 'never'\n\
             [registry.\"docker.io\"]\nmirrors = ['m:5000']\ninsecure = true\n",
        )
        .expect("valid");
        let flags = DonorKeys {
            lend: Some(Lend::Size(Size(1 << 30))),
            ..DonorKeys::default()
        };
        let merged = flags.over(file.donor.clone());
        assert_eq!(merged.lend, Some(Lend::Size(Size(1 << 30))));
        assert_eq!(merged.huge_pages, Some(HugePages::Never));
        assert_eq!(file.paths().state_dir, Some("/s".into()));
        let places = Places::new(file.paths()).expect("absolute");
        assert_eq!((places.tls_named, places.tls), (true, "/t".into()));
        assert!(file.registry["docker.io"].insecure);
        let (flag, off) = ("mlx5_1".parse().ok(), "none".parse().ok());
        let named = |name: &str| Devices::Named(name.to_owned());
        assert_eq!(file.devices(None, None), named("rxe0"));
        assert_eq!(file.devices(None, off.as_ref()), Devices::Off);
        assert_eq!(file.devices(flag.as_ref(), off.as_ref()), named("mlx5_1"));
        for bad in [
            "stat_dir = '/s'",
            "rdma_device = 'a b'",
            "[donor]\nlended = 1",
            "[registry.x]\nmirror = 1",
            "[nodes]\n",
        ] {
            assert!(toml::from_str::<File>(bad).is_err(), "{bad}");
        }
    }
}
