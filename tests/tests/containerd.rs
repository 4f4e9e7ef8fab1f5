//! containerd and Docker over the snapshotter: rows of the matrix of `tests/engines`.
//!
//! Every row pulls what the pool has and runs it, then takes parts away under the engine: containers
//! must print the right line each time, and neither the registry nor the disk may notice.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    cluster::{Cluster, Part},
    engines::{Image, Packages, Row, Site, Suite, When, disk_bytes, row},
    shell,
};

#[path = "containerd/ctr.rs"]
mod ctr;
#[path = "containerd/docker.rs"]
mod docker;
#[path = "containerd/pods.rs"]
mod pods;
#[path = "containerd/two.rs"]
mod two;

/// What a pull may move that finds its layers in the pool.
const MOVED_MAX: u64 = 100_000;
/// What it may leave on the disk.
const STORED_MAX: u64 = 1_000_000;
/// Until the socket answers.
const SOCKET_LIMIT: Duration = Duration::from_secs(20);

#[test]
fn containerd_1_6_runs_pods() {
    row("containerd 1.6, CRI", When::Always, |row| {
        pods::life(row, Suite::Bookworm)
    });
}

#[test]
fn containerd_1_7_runs_pods() {
    row("containerd 1.7, CRI", When::Always, |row| {
        pods::life(row, Suite::Trixie)
    });
}

#[test]
fn containerd_2_1_runs_pods() {
    row("containerd 2.1, CRI", When::Matrix, |row| {
        pods::life(row, Suite::Sid)
    });
}

#[test]
fn containerd_2_1_pulls_by_ctr() {
    row("containerd 2.1, ctr", When::Matrix, |row| {
        ctr::life(row, Suite::Sid)
    });
}

#[test]
fn docker_26_1_runs_on_the_snapshotter() {
    row("Docker 26.1, snapshotter", When::Always, |row| {
        docker::life(row, Suite::Trixie)
    });
}

#[test]
fn docker_28_runs_on_the_snapshotter() {
    row("Docker 28, snapshotter", When::Matrix, |row| {
        docker::life(row, Suite::Sid)
    });
}

#[test]
fn containerd_and_docker_share_a_mount() {
    row("containerd 1.7 beside Docker 26.1", When::Matrix, |row| {
        two::beside(row, Suite::Trixie)
    });
}

/// A cluster whose pool has the images that engines are to pull, and a registry that has one more.
struct Scene {
    packages: Packages,
    cluster: Cluster,
    site: Site,
}

/// What a pull cost.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    moved: u64,
    stored: u64,
}

impl Scene {
    fn new(row: &mut Row, suite: Suite, package: &str) -> Result<Self> {
        let packages = suite.packages()?;
        row.version(packages.version(package));
        let site = Site::start()?;
        let registry = site.registry.host();
        let plain = format!("[registry.\"{registry}\"]\ninsecure = true\n");
        let cluster = Cluster::configured("256MiB", &plain)?;
        for image in [&site.images.three, &site.images.tall] {
            cluster.pull(&site.reference(image))?;
        }
        let scene = Self {
            packages,
            cluster,
            site,
        };
        scene.wait_socket()?;
        Ok(scene)
    }

    /// The snapshotter's.
    fn socket(&self) -> std::path::PathBuf {
        self.cluster.run_dir().join("snapshotter.sock")
    }

    fn wait_socket(&self) -> Result<()> {
        let socket = self.socket();
        let there = shell::until("the snapshotter listens", SOCKET_LIMIT, || {
            let stream = std::os::unix::net::UnixStream::connect(&socket);
            Ok(stream.is_ok().then_some(()))
        });
        there.with_context(|| self.cluster.logs())
    }

    /// Disk of the engine and of the snapshotter, without containerd's own database: that doubles when
    /// it is full, whatever it is filled with.
    fn stored(&self, engine: &Path) -> Result<u64> {
        let own = self.cluster.dir().join("state/snapshotter");
        let own = if own.exists() { disk_bytes(&own)? } else { 0 };
        let mut books = 0;
        for root in [engine.to_owned(), engine.join("c/root")] {
            let file = root.join("io.containerd.metadata.v1.bolt/meta.db");
            books += std::fs::metadata(file).map_or(0, |found| found.blocks() * 512);
        }
        Ok((own + disk_bytes(engine)?).saturating_sub(books))
    }

    /// What `pull` costs an engine that keeps all it has below `engine`.
    fn cost(&self, engine: &Path, pull: impl FnOnce() -> Result<()>) -> Result<Cost> {
        let (moved, stored) = (self.site.gate.bytes(), self.stored(engine)?);
        let started = std::time::Instant::now();
        pull()?;
        Ok(Cost {
            seconds: started.elapsed().as_secs_f64(),
            moved: self.site.gate.bytes() - moved,
            stored: self.stored(engine)?.saturating_sub(stored),
        })
    }

    /// A node that is killed, as all in it: the mount, the fast views and the snapshotter.
    fn node_dies(&mut self) -> Result<()> {
        self.cluster.kill(Part::Node)?;
        self.cluster.start_part(Part::Node, None)?;
        self.cluster.wait_ready()?;
        self.wait_socket()
    }
}

impl Cost {
    /// Nothing but the manifest and the config came, and nothing was unpacked.
    fn is_small(self, image: &Image) -> Result<()> {
        ensure!(
            self.moved < MOVED_MAX,
            "{} bytes of {} came from the registry",
            self.moved,
            image.bytes
        );
        ensure!(
            self.stored < STORED_MAX,
            "{} bytes of disk for an image of {}",
            self.stored,
            image.bytes
        );
        Ok(())
    }

    /// Layers came from the registry.
    fn is_plain(self, image: &Image) -> Result<()> {
        ensure!(
            self.moved >= image.bytes,
            "{} bytes of {} came from the registry",
            self.moved,
            image.bytes
        );
        Ok(())
    }

    /// Says how it compares.
    fn beside(self, plain: Self, what: &str) {
        eprintln!(
            "figures: {what}: pull {:.3} s, {} bytes moved, {} stored; plain {:.3} s, {}, {}: {:.2} of it",
            self.seconds,
            self.moved,
            self.stored,
            plain.seconds,
            plain.moved,
            plain.stored,
            self.seconds / plain.seconds
        );
    }
}
