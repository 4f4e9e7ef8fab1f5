//! Hosts that pull one image at the same moment, as Wharf's paper measures it: the time until all of
//! them have it, and the bytes that leave the registry, beside as many independent copies.
//!
//! Each host is a network namespace; the registry's cable is limited. With us each host has a node of
//! its own, on a pool that begins empty, and has the image when its own mount shows it. `skopeo copy`
//! only stores the blobs, and unpacks nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_bench::{
    content::Texture,
    layout::{Compression, Layout},
    sets::{Entry, Kind},
};

use crate::{
    Common,
    command::{self, Daemon},
    mounts,
    report::{MIB, Report, SECONDS},
    sandbox::{self, Place},
};

mod net;
mod plot;

use net::{FIRST, Net, POOL, REGISTRY, address};

/// Pulls into a pool.
pub(crate) const OURS: &str = "harbour";
/// Independent copies.
pub(crate) const SKOPEO: &str = "skopeo";
pub(crate) const TIME: &str = "time";
pub(crate) const BYTES: &str = "bytes";

/// Hosts that pull.
const HOSTS: [usize; 5] = [1, 5, 10, 15, 20];
const QUICK_HOSTS: [usize; 2] = [1, 3];
/// The image: layers, and files of each.
const LAYERS: u64 = 10;
const FILES: u64 = 10;
const FILE_BYTES: u64 = 5_000_000;
const QUICK_FILE_BYTES: u64 = 100_000;
/// Room beside the content.
const SPARE_BYTES: u64 = 256 << 20;
const REGISTRY_PORT: u16 = 5000;
const METAD_PORT: u16 = 7480;
const DONOR_PORT: u16 = 7481;
/// Longest wait for a daemon.
const READY: Duration = Duration::from_secs(30);

/// The name of a series.
pub(crate) fn workload(what: &str, hosts: usize) -> String {
    format!("{what}, {hosts} host{}", if hosts == 1 { "" } else { "s" })
}

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(1);
    let mut report = Report::new("together", rounds, common.quick, &[SKOPEO]);
    let (hosts, file_bytes): (&[usize], _) = match common.quick {
        true => (&QUICK_HOSTS, QUICK_FILE_BYTES),
        false => (&HOSTS, FILE_BYTES),
    };
    let most = hosts.iter().copied().max().unwrap_or(1);
    let net = Net::lay(most)?;
    let image = make_image(&place.work.join("layout"), file_bytes)?;
    report.settings.insert(
        "image".to_owned(),
        format!(
            "{LAYERS} layers, {} MB compressed",
            image.blob_bytes / 1_000_000
        ),
    );
    let registry = Registry::start(&net, place)?;
    registry.push(&net, &place.work.join("layout"))?;
    let bench = Bench {
        common,
        place,
        net: &net,
        reference: registry.reference(),
        lend: (image.unpacked_bytes * 2 + SPARE_BYTES).next_multiple_of(16 << 20),
        manifest: image.manifest,
    };
    for round in 0..rounds {
        for count in hosts {
            command::note(&format!("round {} of {rounds}: {count} hosts", round + 1));
            for (target, pulls) in [(OURS, bench.ours(*count)), (SKOPEO, bench.copies(*count))] {
                match pulls {
                    Ok((seconds, sent)) => {
                        report.add(&workload(TIME, *count), "", target, SECONDS, seconds);
                        let mib = sent as f64 / f64::from(1 << 20);
                        report.add(&workload(BYTES, *count), "", target, MIB, mib);
                    }
                    Err(why) => report.skip(&format!("{count} hosts with {target}"), why),
                }
            }
        }
    }
    if let Some(json) = &common.json {
        plot::draw(&report, hosts, &json.with_extension("svg"))?;
    }
    Ok(report)
}

fn make_image(dir: &Path, len: u64) -> anyhow::Result<harbour_bench::layout::Image> {
    let mut layout = Layout::create(dir)?;
    let layers: anyhow::Result<Vec<_>> = (0..LAYERS)
        .map(|layer| {
            let files = (0..FILES).map(|file| Entry {
                path: format!("layer-{layer}-file-{file}"),
                kind: Kind::File {
                    len,
                    seed: layer * FILES + file,
                    texture: Texture::Random,
                },
            });
            layout.layer(&files.collect::<Vec<_>>(), Compression::Gzip(1))
        })
        .collect();
    let image = layout.image("i", &layers?)?;
    layout.finish()?;
    Ok(image)
}

struct Registry {
    _daemon: Daemon,
}

impl Registry {
    fn start(net: &Net, place: &Place) -> anyhow::Result<Self> {
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
        let daemon = Daemon::start(&mut serve, &place.work.join("registry.log"))?;
        Ok(Self { _daemon: daemon })
    }

    fn reference(&self) -> String {
        format!(
            "{}:{REGISTRY_PORT}/bench/together:latest",
            address(REGISTRY)
        )
    }

    /// Pushes the image from where the registry is: that cable is not limited.
    fn push(&self, net: &Net, layout: &Path) -> anyhow::Result<()> {
        let end = Instant::now() + READY;
        loop {
            let mut copy = net.on(REGISTRY, Path::new("skopeo"));
            copy.args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]);
            copy.arg(format!("oci:{}:i", layout.display()));
            copy.arg(format!("docker://{}", self.reference()));
            match command::run(&mut copy) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
        }
    }
}

struct Bench<'a> {
    common: &'a Common,
    place: &'a Place,
    net: &'a Net,
    reference: String,
    /// Memory of the pool in bytes.
    lend: u64,
    manifest: String,
}

impl Bench<'_> {
    fn dir(&self, host: usize, what: &str) -> PathBuf {
        // Sockets and mounts want short paths.
        match what {
            "state" => self.place.work.join(format!("state-{host}")),
            _ => self.place.short.join(format!("{what}-{host}")),
        }
    }

    /// `harbour` on a host.
    fn harbour(&self, host: usize, args: &[&str]) -> Command {
        let mut command = self.net.on(host, &self.common.harbour);
        command.env_remove("HARBOUR_CONFIG").args(args);
        command.arg("--insecure-metad");
        for (flag, what) in [
            ("--state-dir", "state"),
            ("--run-dir", "run"),
            ("--mount", "mount"),
        ] {
            command.arg(flag).arg(self.dir(host, what));
        }
        if args.first() != Some(&"metad") {
            let metad = format!("http://{}:{METAD_PORT}", address(POOL));
            command.args(["--metad", &metad]);
        }
        command
    }

    fn daemon(&self, host: usize, args: &[&str]) -> anyhow::Result<Daemon> {
        for what in ["state", "run", "mount"] {
            fs::create_dir_all(self.dir(host, what))?;
        }
        let name = format!("together-{}-{host}.log", args.first().unwrap_or(&"harbour"));
        let log = self.place.work.join(name);
        Daemon::start(&mut self.harbour(host, args), &log)
    }

    /// Seconds until `count` hosts that have nothing show the image, and the bytes that the registry
    /// sent.
    fn ours(&self, count: usize) -> anyhow::Result<(f64, u64)> {
        let listen = format!("{}:{METAD_PORT}", address(POOL));
        let mut metad = self.daemon(POOL, &["metad", "--listen", &listen])?;
        let socket = self.dir(POOL, "run").join("metad.sock");
        metad.wait_ready(READY, || socket.exists())?;
        let (lend, listen) = (
            self.lend.to_string(),
            format!("{}:{DONOR_PORT}", address(POOL)),
        );
        let donor = [
            "donor",
            "--lend",
            &lend,
            "--listen",
            &listen,
            "--on-stop",
            "drop",
        ];
        let mut donor = self.daemon(POOL, &donor)?;
        donor.wait_ready(READY, || {
            let list = command::run(&mut self.harbour(POOL, &["donors", "--json"]));
            let donors: serde_json::Value =
                serde_json::from_slice(&list.unwrap_or_default()).unwrap_or_default();
            donors[0]["live"] == true
        })?;
        let hosts: Vec<usize> = (FIRST..FIRST + count).collect();
        let mut nodes = Vec::new();
        for host in &hosts {
            let name = format!("h{host}");
            let node = [
                "node",
                "--node-name",
                &name,
                "--transport",
                "tcp",
                "--fast-view",
                "off",
            ];
            nodes.push(self.daemon(*host, &node)?);
        }
        for (node, host) in nodes.iter_mut().zip(&hosts) {
            let mount = self.dir(*host, "mount");
            node.wait_ready(READY, || mounts::is_mount_point(&mount))?;
        }
        mounts::drop_caches(self.lend)?;
        let pull = |host: usize| {
            let mut pull = self.harbour(host, &["pull", "--insecure", "--progress", "none"]);
            pull.args(["--transport", "tcp", &self.reference]);
            command::run(&mut pull).map(drop)
        };
        let measured = self.at_once(&hosts, pull)?;
        for host in &hosts {
            let mount = self.dir(*host, "mount");
            crate::harbour::root_below(&mount, &self.manifest)
                .with_context(|| format!("host {host} does not show the image"))?;
        }
        // Nodes first: they let go of the pool.
        drop((nodes, donor, metad));
        for host in hosts.into_iter().chain([POOL]) {
            for what in ["state", "run", "mount"] {
                sandbox::remove(&self.dir(host, what))?;
            }
        }
        Ok(measured)
    }

    /// The same for as many independent copies of its blobs.
    fn copies(&self, count: usize) -> anyhow::Result<(f64, u64)> {
        let hosts: Vec<usize> = (FIRST..FIRST + count).collect();
        let into = |host: usize| self.place.work.join(format!("copy-{host}"));
        mounts::drop_caches(self.lend)?;
        let copy = |host: usize| {
            let mut copy = self.net.on(host, Path::new("skopeo"));
            copy.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false"]);
            copy.arg(format!("docker://{}", self.reference));
            copy.arg(format!("dir:{}", into(host).display()));
            command::run(&mut copy).map(drop)
        };
        let measured = self.at_once(&hosts, copy);
        for host in hosts {
            sandbox::remove(&into(host))?;
        }
        measured
    }

    /// Runs `work` for all hosts at the same moment: seconds until the last is done, and the bytes that
    /// left the registry meanwhile.
    fn at_once(
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
