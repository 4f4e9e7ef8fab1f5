//! An unmodified Docker on the mount, beside the same Docker that pulls and unpacks for itself: pulls of an
//! image that is in the pool, the first start of a container on a host, later ones, and fifty at once.
//!
//! Both are the same programs with containerd's image store; one has `harbour snapshotter` for its layers and
//! one containerd's own overlayfs. They take turns round by round.

use std::{
    fs::{self, File},
    path::Path,
    time::Instant,
};

use anyhow::Context as _;
use harbour_bench::layout::{Image, Layer, Layout};
use harbour_tests::{
    cluster::{Cluster, Part},
    engines::{Site, Suite, disk_bytes, docker},
    layers::noise,
};

use crate::{
    Common, command,
    data::Data,
    mounts,
    report::{Better, MIB, Report, SECONDS, Unit, median},
    sandbox::Place,
};

/// Docker over the snapshotter.
pub(crate) const OURS: &str = "harbour";
/// Docker over containerd's own.
pub(crate) const PLAIN: &str = "overlayfs";
/// From `docker run` to the end of a program that prints a line, on an image that has been run.
pub(crate) const START: &str = "start";
/// All containers of [`MANY`] from the first call to the last end.
pub(crate) const AT_ONCE: &str = "50 containers";
/// What all processes of ours hold for each of those, the pool not counted.
pub(crate) const MEMORY: &str = "memory per container";
/// Sizes of images, compressed, in MB.
pub(crate) const SIZES: [&str; 2] = ["100m", "1000m"];

/// KiB, the fewer the better.
const KIB: Unit = Unit("KiB", Better::Lower);
/// Starts of one round.
const STARTS: usize = 7;
/// Containers at once, and images that they are of.
const MANY: usize = 50;
const IMAGES: usize = 10;
/// Memory to lend beside what images have.
const SPARE_BYTES: u64 = 512 << 20;
const PROGRAM: &str = "import json, sys\nprint(json.dumps({'said': 6 * 7}))\n";

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(5);
    let mut report = Report::new("engines", rounds, common.quick, &[PLAIN]);
    let data = Data::load(&common.data)?;
    if !data.python {
        report.skip(START, "the data was made without --python-root");
        return Ok(report);
    }
    let packages = match Suite::Trixie.packages() {
        Ok(packages) => packages,
        Err(error) => {
            report.skip(START, format!("no Docker to measure with: {error:#}"));
            return Ok(report);
        }
    };
    let docker = format!(
        "{}, containerd {}",
        packages.version("docker.io"),
        packages.version("containerd")
    );
    report.settings.insert("docker".to_owned(), docker);
    let scene = Scene::open(common, place, &packages)?;
    for size in 0..scene.images.len() {
        scene.pulls(size, rounds, &mut report)?;
    }
    scene.starts(rounds, &mut report)?;
    scene.at_once(rounds, common.quick, &mut report)?;
    Ok(report)
}

/// Both Dockers, and what they pull.
struct Scene {
    cluster: Cluster,
    site: Site,
    ours: docker::Dockerd,
    plain: docker::Dockerd,
    /// By [`SIZES`].
    images: Vec<Pulled>,
    many: Vec<String>,
    /// A small one that has nothing of the others.
    other: String,
    lent: u64,
}

struct Pulled {
    size: &'static str,
    name: String,
}

impl Scene {
    fn open(
        common: &Common,
        place: &Place,
        packages: &harbour_tests::engines::Packages,
    ) -> anyhow::Result<Self> {
        let site = Site::start()?;
        let layout_dir = place.work.join("layout");
        let (made, many) = make_images(
            &common.data.join("python.tar"),
            place,
            &layout_dir,
            common.quick,
        )?;
        let bytes: u64 = made.iter().map(|image| image.unpacked_bytes).sum();
        let lent = (bytes * 2 + SPARE_BYTES).next_multiple_of(64 << 20);
        let cluster = Cluster::start(&format!("{}MiB", lent >> 20))?;
        let host = site.registry.host();
        let name = |tag: &str| format!("{host}/bench/{tag}:1");
        for tag in SIZES
            .iter()
            .copied()
            .map(str::to_owned)
            .chain(many.iter().cloned())
        {
            let from = format!("oci:{}:{tag}", layout_dir.display());
            let to = format!("docker://{}", name(&tag));
            let mut copy = std::process::Command::new("skopeo");
            copy.args(["copy", "--quiet", "--dest-tls-verify=false", &from, &to]);
            command::run(&mut copy)?;
            cluster.pull(&name(&tag))?;
        }
        let start = |name: &str, store| {
            docker::Dockerd::start(&docker::Settings {
                packages,
                net: &site.net,
                dir: &site.dir().join(name),
                registry: &host,
                store,
            })
        };
        let socket = cluster.run_dir().join("snapshotter.sock");
        let ours = start("o", docker::Store::Snapshotter(socket))?;
        let plain = start("p", docker::Store::Containerd)?;
        let other = site.reference(&site.images.three);
        cluster.pull(&other)?;
        for docker in [&ours, &plain] {
            docker.docker(&["pull", "--quiet", &other])?;
        }
        let images = SIZES.into_iter().map(|size| Pulled {
            size,
            name: name(size),
        });
        Ok(Self {
            images: images.collect(),
            many: many.iter().map(|tag| name(tag)).collect(),
            other,
            cluster,
            site,
            ours,
            plain,
            lent,
        })
    }

    fn dockers(&self) -> [(&'static str, &docker::Dockerd); 2] {
        [(OURS, &self.ours), (PLAIN, &self.plain)]
    }

    /// Bytes on the disk of an engine, and of what ours keeps for it.
    fn disk(&self, target: &str, docker: &docker::Dockerd) -> anyhow::Result<u64> {
        let own = match target {
            OURS => disk_bytes(&self.cluster.dir().join("state/snapshotter"))?,
            _ => 0,
        };
        Ok(docker.disk_bytes()? + own)
    }

    /// Nothing of the images is in a cache, and the engine is one that is in use: the programs of Docker are
    /// read again from the disk by a container of another image.
    fn cold(&self, docker: &docker::Dockerd) -> anyhow::Result<()> {
        mounts::drop_caches(self.lent)?;
        docker.run(&self.other).map(drop)
    }

    /// Pull, first start, and away with it again.
    fn pulls(&self, size: usize, rounds: u32, report: &mut Report) -> anyhow::Result<()> {
        let Pulled { size, name } = &self.images[size];
        for round in 0..rounds {
            let mut said = format!("{size}, round {} of {rounds}:", round + 1);
            for (target, docker) in self.dockers() {
                self.cold(docker)?;
                let (sent, disk) = (self.site.gate.bytes(), self.disk(target, docker)?);
                let begun = Instant::now();
                docker.docker(&["pull", "--quiet", name])?;
                let pull = begun.elapsed().as_secs_f64();
                let sent = self.site.gate.bytes() - sent;
                let disk = self.disk(target, docker)?.saturating_sub(disk);
                check(&docker.run(name)?)?;
                let first = begun.elapsed().as_secs_f64();
                docker.docker(&["rmi", name])?;
                report.add(&format!("pull {size}"), "", target, SECONDS, pull);
                report.add(&format!("first start {size}"), "", target, SECONDS, first);
                report.add(
                    &format!("received {size}"),
                    "",
                    target,
                    KIB,
                    sent as f64 / 1024.0,
                );
                report.add(
                    &format!("disk {size}"),
                    "",
                    target,
                    KIB,
                    disk as f64 / 1024.0,
                );
                said += &format!(" {target} {pull:.2} s, first start {first:.2} s;");
            }
            command::note(&said);
        }
        Ok(())
    }

    /// Starts on an image that has run before.
    fn starts(&self, rounds: u32, report: &mut Report) -> anyhow::Result<()> {
        let name = &self.images[0].name;
        for (_, docker) in self.dockers() {
            docker.docker(&["pull", "--quiet", name])?;
            check(&docker.run(name)?)?;
        }
        for round in 0..rounds {
            let mut took = [const { Vec::new() }; 2];
            for turn in 0..STARTS {
                for which in [turn % 2, (turn + 1) % 2] {
                    let (_, docker) = self.dockers()[which];
                    let begun = Instant::now();
                    check(&docker.run(name)?)?;
                    took[which].push(begun.elapsed().as_secs_f64());
                }
            }
            let mut said = format!("starts, round {} of {rounds}:", round + 1);
            for ((target, _), took) in self.dockers().into_iter().zip(&took) {
                report.add(START, "", target, SECONDS, median(took));
                said += &format!(" {target} {:.3} s", median(took));
            }
            command::note(&said);
        }
        Ok(())
    }

    /// Containers of ten images, all at once.
    fn at_once(&self, rounds: u32, quick: bool, report: &mut Report) -> anyhow::Result<()> {
        let count = if quick { IMAGES } else { MANY };
        for (_, docker) in self.dockers() {
            for name in &self.many {
                docker.docker(&["pull", "--quiet", name])?;
            }
        }
        for round in 0..rounds {
            let mut said = format!("{count} at once, round {} of {rounds}:", round + 1);
            for (target, docker) in self.dockers() {
                self.cold(docker)?;
                let begun = Instant::now();
                let outcome: anyhow::Result<()> = std::thread::scope(|scope| {
                    let run = |number: usize| check(&docker.run(&self.many[number % IMAGES])?);
                    let running: Vec<_> = (0..count)
                        .map(|number| scope.spawn(move || run(number)))
                        .collect();
                    let panicked = |_| Err(anyhow::anyhow!("a thread panicked"));
                    running
                        .into_iter()
                        .try_for_each(|one| one.join().unwrap_or_else(panicked))
                });
                outcome.with_context(|| format!("{count} containers at once on {target}"))?;
                let took = begun.elapsed().as_secs_f64();
                report.add(AT_ONCE, "", target, SECONDS, took);
                said += &format!(" {target} {took:.2} s");
                if target == OURS {
                    let held = self.held()? as f64 / count as f64;
                    report.add(MEMORY, "", OURS, MIB, held / f64::from(1 << 20));
                }
            }
            command::note(&said);
        }
        Ok(())
    }

    /// Bytes that our processes hold, without the memory that the donor lends and all map.
    fn held(&self) -> anyhow::Result<u64> {
        let mut kib = 0;
        for part in Part::ALL {
            let pid = self.cluster.pid(part).context("a part of ours ended")?;
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            for line in status.lines() {
                let own = ["RssAnon:", "RssFile:"]
                    .iter()
                    .any(|key| line.starts_with(key));
                let value = line.split_whitespace().nth(1);
                kib += value
                    .filter(|_| own)
                    .and_then(|kib| kib.parse().ok())
                    .unwrap_or(0);
            }
        }
        Ok(kib * 1024)
    }
}

fn check(said: &str) -> anyhow::Result<()> {
    anyhow::ensure!(said == "{\"said\": 42}", "a container printed {said:?}");
    Ok(())
}

/// A Debian with Python and a program on top of it, with as much noise as makes the two sizes; and ten more
/// with a layer of their own each.
fn make_images(
    python: &Path,
    place: &Place,
    dir: &Path,
    quick: bool,
) -> anyhow::Result<(Vec<Image>, Vec<String>)> {
    let mut layout = Layout::create(dir)?;
    let why = || format!("cannot take {} for the Python root", python.display());
    let root = layout.import_tar(python).with_context(why)?;
    let program = layer(&mut layout, place, "task.py", PROGRAM.as_bytes())?;
    let mut images = Vec::new();
    for (size, megabytes) in SIZES.into_iter().zip([100_u64, 1000]) {
        let all = if quick { megabytes / 10 } else { megabytes } * 1_000_000;
        let left = all.saturating_sub(root.blob_bytes);
        let noise = noise(megabytes, usize::try_from(left)?);
        let noise = layer(&mut layout, place, "noise", &noise)?;
        images.push(layout.runnable(size, &[root.clone(), noise, program.clone()], COMMAND)?);
    }
    let mut many = Vec::new();
    for number in 0..IMAGES {
        let own = layer(&mut layout, place, "own", number.to_string().as_bytes())?;
        let tag = format!("many-{number}");
        images.push(layout.runnable(&tag, &[root.clone(), own, program.clone()], COMMAND)?);
        many.push(tag);
    }
    layout.finish()?;
    Ok((images, many))
}

/// What the images run.
const COMMAND: &[&str] = &["python3", "/task.py"];

fn layer(layout: &mut Layout, place: &Place, name: &str, content: &[u8]) -> anyhow::Result<Layer> {
    let path = place.work.join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&path)?);
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    tar.append_data(&mut header, name, content)?;
    tar.into_inner()?.sync_all()?;
    layout.import_tar(&path)
}
