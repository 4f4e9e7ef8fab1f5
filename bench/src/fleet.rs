//! Hosts of a cluster as network namespaces: one has the registry behind a slow cable, one has metad and
//! the pool's memory, the others have a node each.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    Common,
    command::{self, Daemon},
    harbour::view_below,
    mounts,
    sandbox::{self, Place},
};

mod net;

use net::{Net, POOL, REGISTRY, address};

pub(crate) use net::FIRST;

const REGISTRY_PORT: u16 = 5000;
const METAD_PORT: u16 = 7480;
const DONOR_PORT: u16 = 7481;
/// Longest wait for a daemon.
const READY: Duration = Duration::from_secs(30);
/// Directories of a host's daemons, each behind a flag of the same name.
const DIRS: [(&str, &str); 3] = [
    ("--state-dir", "state"),
    ("--run-dir", "run"),
    ("--mount", "mount"),
];

/// The hosts, and a registry that serves one image.
pub(crate) struct Fleet<'a> {
    common: &'a Common,
    place: &'a Place,
    net: Net,
    /// The image, as `registry:port/repository:tag`.
    pub(crate) reference: String,
    _registry: Daemon,
}

/// metad, the donor and nodes, which end with this.
pub(crate) struct Running {
    /// First: they let go of the pool.
    _nodes: Vec<Daemon>,
    _donor: Daemon,
    _metad: Daemon,
}

impl<'a> Fleet<'a> {
    /// Lays cables to so many hosts beside registry and pool, and serves the image `i` of a layout.
    pub(crate) fn new(
        common: &'a Common,
        place: &'a Place,
        hosts: usize,
        layout: &Path,
    ) -> anyhow::Result<Self> {
        let net = Net::lay(hosts)?;
        let registry = start_registry(&net, place)?;
        let fleet = Self {
            common,
            place,
            net,
            reference: format!("{}:{REGISTRY_PORT}/bench/image:latest", address(REGISTRY)),
            _registry: registry,
        };
        fleet.push(layout)?;
        Ok(fleet)
    }

    /// Pushes the image from where the registry is: that cable is not limited.
    fn push(&self, layout: &Path) -> anyhow::Result<()> {
        let end = Instant::now() + READY;
        loop {
            let mut copy = self.skopeo_copy(REGISTRY);
            copy.arg("--dest-tls-verify=false");
            copy.arg(format!("oci:{}:i", layout.display()));
            copy.arg(format!("docker://{}", self.reference));
            match command::run(&mut copy) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    fn skopeo_copy(&self, host: usize) -> Command {
        let mut copy = self.net.on(host, Path::new("skopeo"));
        copy.args(["--insecure-policy", "copy", "-q"]);
        copy
    }

    /// A copy of the image's blobs by a host, into a directory.
    pub(crate) fn copy(&self, host: usize, into: &Path) -> Command {
        let mut copy = self.skopeo_copy(host);
        copy.arg("--src-tls-verify=false");
        copy.arg(format!("docker://{}", self.reference));
        copy.arg(format!("dir:{}", into.display()));
        copy
    }

    fn dir(&self, host: usize, what: &str) -> PathBuf {
        // Sockets and mounts want short paths.
        match what {
            "state" => self.place.work.join(format!("state-{host}")),
            _ => self.place.short.join(format!("{what}-{host}")),
        }
    }

    /// Where a host's node is mounted.
    pub(crate) fn mount(&self, host: usize) -> PathBuf {
        self.dir(host, "mount")
    }

    /// A host's fast view of the image whose manifest has this digest, once it is there.
    pub(crate) fn view(&self, host: usize, manifest: &str) -> anyhow::Result<PathBuf> {
        view_below(&self.dir(host, "run"), manifest)
    }

    /// `harbour` on a host.
    fn harbour(&self, host: usize, args: &[&str]) -> Command {
        let mut command = self.net.on(host, &self.common.harbour);
        command.env_remove("HARBOUR_CONFIG").args(args);
        command.arg("--insecure-metad");
        for (flag, what) in DIRS {
            command.arg(flag).arg(self.dir(host, what));
        }
        if args.first() != Some(&"metad") {
            let metad = format!("http://{}:{METAD_PORT}", address(POOL));
            command.args(["--metad", &metad]);
        }
        command
    }

    /// A pull of the image by a host.
    pub(crate) fn pull(&self, host: usize) -> Command {
        let mut pull = self.harbour(host, &["pull", "--insecure", "--progress", "none"]);
        pull.args(["--transport", "tcp", &self.reference]);
        pull
    }

    fn daemon(&self, host: usize, args: &[&str]) -> anyhow::Result<Daemon> {
        for (_, what) in DIRS {
            fs::create_dir_all(self.dir(host, what))?;
        }
        let name = format!("{}-{host}.log", args.first().unwrap_or(&"harbour"));
        let log = self.place.work.join(name);
        Daemon::start(&mut self.harbour(host, args), &log)
    }

    /// Starts metad and a donor of so many bytes, and nodes with these flags on `hosts`.
    pub(crate) fn start(
        &self,
        lend: u64,
        hosts: &[usize],
        flags: &[&str],
    ) -> anyhow::Result<Running> {
        let listen = format!("{}:{METAD_PORT}", address(POOL));
        let mut metad = self.daemon(POOL, &["metad", "--listen", &listen])?;
        let socket = self.dir(POOL, "run").join("metad.sock");
        metad.wait_ready(READY, || socket.exists())?;
        let (lend, listen) = (lend.to_string(), format!("{}:{DONOR_PORT}", address(POOL)));
        let donor = ["donor", "--lend", &lend, "--listen", &listen];
        let mut donor = self.daemon(POOL, &[&donor[..], &["--on-stop", "drop"]].concat())?;
        donor.wait_ready(READY, || {
            let list = command::run(&mut self.harbour(POOL, &["donors", "--json"]));
            let donors: serde_json::Value =
                serde_json::from_slice(&list.unwrap_or_default()).unwrap_or_default();
            donors[0]["live"] == true
        })?;
        let mut nodes = Vec::new();
        for host in hosts {
            let name = format!("h{host}");
            let node = ["node", "--node-name", &name, "--transport", "tcp"];
            let node = [&node, flags].concat();
            nodes.push(self.daemon(*host, &node)?);
        }
        for (node, host) in nodes.iter_mut().zip(hosts) {
            let mount = self.mount(*host);
            node.wait_ready(READY, || mounts::is_mount_point(&mount))?;
        }
        Ok(Running {
            _nodes: nodes,
            _donor: donor,
            _metad: metad,
        })
    }

    /// Ends what was started, and removes what it left.
    pub(crate) fn stop(&self, running: Running, hosts: &[usize]) -> anyhow::Result<()> {
        drop(running);
        for host in hosts.iter().chain([&POOL]) {
            for (_, what) in DIRS {
                sandbox::remove(&self.dir(*host, what))?;
            }
        }
        Ok(())
    }

    /// Runs `work` for all hosts at the same moment: seconds until the last is done, and the bytes that
    /// left the registry meanwhile.
    pub(crate) fn at_once(
        &self,
        hosts: &[usize],
        work: impl Fn(usize) -> anyhow::Result<()> + Sync,
    ) -> anyhow::Result<(f64, u64)> {
        let before = self.net.sent()?;
        let started = Instant::now();
        thread::scope(|scope| {
            let work = &work;
            let hosts = hosts.iter().map(|host| scope.spawn(move || work(*host)));
            let running: Vec<_> = hosts.collect();
            running.into_iter().try_for_each(|host| {
                let panicked = |_| Err(anyhow::anyhow!("a thread panicked"));
                host.join().unwrap_or_else(panicked)
            })
        })?;
        let seconds = started.elapsed().as_secs_f64();
        Ok((seconds, self.net.sent()? - before))
    }
}

fn start_registry(net: &Net, place: &Place) -> anyhow::Result<Daemon> {
    let program = command::find("docker-registry")
        .context("docker-registry is not installed (package docker-registry)")?;
    let config = place.work.join("registry.yml");
    let root = place.work.join("registry");
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: \"{}:{REGISTRY_PORT}\"}}\n",
        root.display(),
        address(REGISTRY)
    );
    fs::write(&config, text)?;
    let mut serve = net.on(REGISTRY, &program);
    serve.arg("serve").arg(&config);
    Daemon::start(&mut serve, &place.work.join("registry.log"))
}
