//! A thousand short container tasks on five hosts, as Wharf's paper measures the cost at run time: each
//! task is a container that runs a small Python program and goes.
//!
//! Below the containers is a node's fast view of the image, or the layers in its mount, or copies of them
//! on the host's disk. All begin with empty caches, and take turns block by block, so that what else the
//! machine does falls on all. What left the registry until all hosts had the image is reported too.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::Context as _;
use harbour_bench::layout::{Image, Layer, Layout};

use crate::{
    Common, command,
    data::Data,
    fleet::{FIRST, Fleet},
    mounts::{self, Mounted},
    report::{MIB, Report, SECONDS},
    sandbox::{self, Place},
    targets::{DIRS, VIEW},
};

/// Containers over copies on the host's disk.
pub(crate) const COPIES: &str = "copies";
/// Until all tasks are done.
pub(crate) const TIME: &str = "1000 tasks";
/// What the hosts received for it.
const RECEIVED: &str = "received";
/// Who received it by way of the pool.
const POOLED: &str = "harbour";
const TARGETS: [&str; 3] = [VIEW, DIRS, COPIES];

const HOSTS: usize = 5;
/// Tasks of each host in a block.
const BLOCK: usize = 20;
const BLOCKS: usize = 10;
/// Room beside the content.
const SPARE_BYTES: u64 = 256 << 20;
/// What a task runs; `sys.argv[1]` is its number.
const PROGRAM: &str = "import collections, hashlib, json, sys\n\
    squares = sum(n * n for n in range(50_000))\n\
    words = collections.Counter(json.dumps({'task': sys.argv[1]}))\n\
    hashlib.sha256(repr(words).encode()).hexdigest()\n\
    print(squares + int(sys.argv[1]))\n";

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(3);
    let (blocks, block) = if common.quick {
        (1, 2)
    } else {
        (BLOCKS, BLOCK)
    };
    let mut report = Report::new("tasks", rounds, common.quick, &[COPIES]);
    let data = Data::load(&common.data)?;
    if !data.python {
        report.skip(TIME, "the data was made without --python-root");
        return Ok(report);
    }
    let layout = place.work.join("layout");
    let (image, layers) = make_image(&common.data.join("python.tar"), place, &layout)?;
    report.settings.insert(
        "tasks".to_owned(),
        format!("{} on {HOSTS} hosts", blocks * block * HOSTS),
    );
    report.settings.insert(
        "image".to_owned(),
        format!("{} MB compressed", image.blob_bytes / 1_000_000),
    );
    let hosts: Vec<usize> = (FIRST..FIRST + HOSTS).collect();
    let fleet = Fleet::new(common, place, HOSTS, &layout)?;
    let lend = (image.unpacked_bytes * 2 + SPARE_BYTES).next_multiple_of(16 << 20);
    let running = fleet.start(lend, &hosts, &["--fast-view", "auto"])?;
    let scene = Scene::open(&fleet, place, &image, &layers, &hosts, &mut report)?;
    for round in 0..rounds {
        mounts::drop_caches(lend)?;
        let mut seconds = [0.0; TARGETS.len()];
        for part in 0..blocks {
            let mut said = format!("round {} of {rounds}: block {}", round + 1, part + 1);
            // Who is first changes from block to block.
            for turn in 0..TARGETS.len() {
                let which = (turn + part) % TARGETS.len();
                let took = scene.block(which, block)?;
                seconds[which] += took;
                said += &format!(", {} {took:.2} s", TARGETS[which]);
            }
            command::note(&said);
        }
        for (target, seconds) in TARGETS.into_iter().zip(seconds) {
            report.add(TIME, "", target, SECONDS, seconds);
        }
    }
    drop(scene);
    fleet.stop(running, &hosts)?;
    Ok(report)
}

/// A Debian with Python, and the program on top of it.
fn make_image(python: &Path, place: &Place, dir: &Path) -> anyhow::Result<(Image, Vec<Layer>)> {
    let mut layout = Layout::create(dir)?;
    let why = || format!("cannot take {} for the Python root", python.display());
    let root = layout.import_tar(python).with_context(why)?;
    let tar = place.work.join("program.tar");
    let mut program = tar::Builder::new(File::create(&tar)?);
    let mut header = tar::Header::new_gnu();
    header.set_size(PROGRAM.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    program.append_data(&mut header, "task.py", PROGRAM.as_bytes())?;
    program.into_inner()?.sync_all()?;
    let layers = vec![root, layout.import_tar(&tar)?];
    let image = layout.image("i", &layers)?;
    layout.finish()?;
    Ok((image, layers))
}

/// One host's containers.
struct Host {
    /// Lower directories, the highest first, as [`TARGETS`] has them.
    lower: [String; TARGETS.len()],
    bundle: PathBuf,
}

struct Scene<'a> {
    place: &'a Place,
    hosts: Vec<Host>,
    _scratch: Mounted,
    /// Tasks so far: the names of containers.
    count: AtomicUsize,
}

impl<'a> Scene<'a> {
    /// Brings the image to all hosts, both ways, and notes what that took from the registry.
    fn open(
        fleet: &Fleet<'_>,
        place: &'a Place,
        image: &Image,
        layers: &[Layer],
        hosts: &[usize],
        report: &mut Report,
    ) -> anyhow::Result<Self> {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let pull = |host: usize| command::run(&mut fleet.pull(host)).map(drop);
        let (_, sent) = fleet.at_once(hosts, pull)?;
        report.add(RECEIVED, "", POOLED, MIB, mib(sent));
        let local = |host: usize| place.work.join(format!("local-{host}"));
        let blobs = |host: usize| place.work.join(format!("blobs-{host}"));
        let copy = |host: usize| command::run(&mut fleet.copy(host, &blobs(host))).map(drop);
        let (_, sent) = fleet.at_once(hosts, copy)?;
        report.add(RECEIVED, "", COPIES, MIB, mib(sent));
        for host in hosts {
            for layer in layers {
                unpack(
                    &blobs(*host).join(&layer.blob),
                    &local(*host).join(&layer.diff_id),
                )?;
            }
            sandbox::remove(&blobs(*host))?;
        }
        let scratch = Mounted::tmpfs(&place.short.join("scratch"))?;
        let made = hosts.iter().map(|host| {
            let shown = fleet.mount(*host).join("layers");
            let view = fleet.view(*host, &image.manifest)?;
            let lower = [
                view.display().to_string(),
                lower(layers.iter().map(|layer| shown.join(&layer.diff_id[..12]))),
                lower(layers.iter().map(|layer| local(*host).join(&layer.diff_id))),
            ];
            let bundle = place.short.join(format!("bundle-{host}"));
            fs::create_dir_all(&bundle)?;
            Ok(Host { lower, bundle })
        });
        Ok(Self {
            place,
            hosts: made.collect::<anyhow::Result<_>>()?,
            _scratch: scratch,
            count: AtomicUsize::new(0),
        })
    }

    /// Seconds until every host has run so many tasks, one after the other.
    fn block(&self, which: usize, tasks: usize) -> anyhow::Result<f64> {
        let started = std::time::Instant::now();
        std::thread::scope(|scope| {
            let running: Vec<_> = self
                .hosts
                .iter()
                .map(|host| {
                    scope.spawn(move || (0..tasks).try_for_each(|_| self.task(host, which)))
                })
                .collect();
            running.into_iter().try_for_each(|host| {
                let panicked = |_| Err(anyhow::anyhow!("a thread panicked"));
                host.join().unwrap_or_else(panicked)
            })
        })?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// A container from its overlay to its end.
    fn task(&self, host: &Host, which: usize) -> anyhow::Result<()> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let scratch = self.place.short.join(format!("scratch/{number}"));
        fs::create_dir(&scratch)?;
        let (target, lower) = (TARGETS[which], &host.lower[which]);
        let root = host.bundle.join("rootfs");
        let overlay = Mounted::overlay(Path::new(lower), &scratch, &root)?;
        fs::write(
            host.bundle.join("config.json"),
            serde_json::to_vec(&specification(number))?,
        )?;
        let mut run = Command::new("runc");
        run.arg("--root").arg(self.place.short.join("runc"));
        run.args(["run", "--bundle"]).arg(&host.bundle);
        run.arg(format!("task-{number}"));
        let said = command::run(&mut run).with_context(|| format!("a task on {target}"))?;
        drop(overlay);
        fs::remove_dir_all(&scratch)?;
        let squares: usize = (0..50_000_usize).map(|n| n * n).sum();
        let right = format!("{}\n", squares + number);
        anyhow::ensure!(
            said == right.as_bytes(),
            "a task on {target} printed {:?} in place of {right:?}",
            String::from_utf8_lossy(&said)
        );
        Ok(())
    }
}

/// Paths of lower directories as an overlay takes them, from the lowest first.
fn lower(layers: impl DoubleEndedIterator<Item = PathBuf>) -> String {
    let paths: Vec<String> = layers
        .rev()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(":")
}

fn unpack(blob: &Path, into: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(into)?;
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "-xpzf"]).arg(blob);
    command::run(tar.arg("-C").arg(into)).map(drop)
}

/// A container's configuration: OCI runtime specification 1.0, config.
fn specification(number: usize) -> serde_json::Value {
    let spaces = ["pid", "mount", "ipc", "uts", "network"];
    let spaces: Vec<_> = spaces
        .iter()
        .map(|kind| serde_json::json!({"type": kind}))
        .collect();
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/usr/bin:/bin"],
            "args": ["/usr/bin/python3", "/task.py", number.to_string()],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "task",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": spaces},
    })
}
