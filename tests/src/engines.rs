//! Real engines for tests and benches: containerd and Docker of several Debian suites, each with
//! directories, sockets and a network namespace of its own, gone at the end whatever happened.
//!
//! A [`Site`] is what an engine needs around it: a registry that has the test images, a network
//! namespace, and the one way from there to the registry, which counts what passes. A test of an
//! engine is one or more [`row`]s of the matrix that `tests/engines` prints.

use std::{
    fmt,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::{layers::Layout, registry::Registry};

pub mod containerd;
pub mod cri;
pub mod docker;
pub mod gate;
pub mod images;
pub mod net;
pub mod packages;
pub mod podman;
mod process;

pub use containerd::Containerd;
pub use cri::Cri;
pub use docker::Dockerd;
pub use gate::Gate;
pub use images::{Image, Images};
pub use net::Net;
pub use packages::{Packages, Suite};
pub use podman::Podman;

/// Why this machine cannot have an engine: no failure, and no pass either.
#[derive(Debug)]
pub struct NotHere(pub String);

impl fmt::Display for NotHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotHere {}

/// When a row is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// By every run of the tests.
    Always,
    /// Only with `HARBOUR_ENGINES=all`, which `tests/engines` sets.
    Matrix,
}

/// One row of the matrix under way.
#[derive(Debug, Default)]
pub struct Row {
    version: String,
}

impl Row {
    /// Says which version it is that runs.
    pub fn version(&mut self, version: &str) {
        version.clone_into(&mut self.version);
    }
}

/// Whether all rows are wanted.
pub fn all() -> bool {
    std::env::var_os("HARBOUR_ENGINES").is_some_and(|wanted| wanted == "all")
}

/// Runs one row of the matrix and says on standard output how it went, past what the test harness
/// keeps to itself: `row: NAME | VERSION | passed`, `FAILED` or `not run: WHY`.
///
/// # Panics
/// When the row failed.
#[allow(clippy::panic)]
pub fn row(name: &str, when: When, body: impl FnOnce(&mut Row) -> Result<()>) {
    let mut row = Row::default();
    if when == When::Matrix && !all() {
        return say(name, &row, "not run: only tests/engines runs it");
    }
    match catch_unwind(AssertUnwindSafe(|| body(&mut row))) {
        Ok(Ok(())) => say(name, &row, "passed"),
        Ok(Err(error)) => match error.downcast_ref::<NotHere>() {
            Some(NotHere(why)) => say(name, &row, &format!("not run: {why}")),
            None => {
                say(name, &row, "FAILED");
                panic!("{name}: {error:?}")
            }
        },
        Err(panic) => {
            say(name, &row, "FAILED");
            std::panic::resume_unwind(panic)
        }
    }
}

/// The harness has begun a line when a test runs alone: so a line is begun here.
fn say(name: &str, row: &Row, result: &str) {
    let version = match row.version.as_str() {
        "" => "-",
        version => version,
    };
    let result = result.lines().next().unwrap_or_default();
    let line = format!("\nrow: {name} | {version} | {result}\n");
    let _ = std::io::stdout().write_all(line.as_bytes());
}

/// A registry with the test images, and a network namespace for an engine.
#[derive(Debug)]
pub struct Site {
    /// The only way from the namespace to the registry.
    pub gate: Gate,
    /// Where engines run.
    pub net: Arc<Net>,
    /// What it has, and what containers of that print.
    pub images: Images,
    /// The registry, in the network of this process.
    pub registry: Registry,
    dir: TempDir,
}

impl Site {
    /// Starts a registry, pushes the test images, and opens the way to it.
    pub fn start() -> Result<Self> {
        // Paths in it go into socket addresses and mount options: so it is short.
        let dir = tempfile::Builder::new()
            .prefix("engine.")
            .rand_bytes(8)
            .tempdir_in("/tmp")?;
        let registry = Registry::start()?;
        let mut layout = Layout::create(&dir.path().join("layout"))?;
        let images = Images::write(&mut layout)?;
        images.push(&layout, &registry.host())?;
        let net = Arc::new(Net::new()?);
        let address = registry.host();
        let address = address.parse().with_context(|| address)?;
        let gate = Gate::open(&net, address)?;
        Ok(Self {
            gate,
            net,
            images,
            registry,
            dir,
        })
    }

    /// A directory for engines.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Reference of a test image, the same for engines and for `harbour`.
    pub fn reference(&self, image: &Image) -> String {
        format!("{}/{}", self.registry.host(), image.name())
    }
}

/// What went wrong, and below it what the engine said meanwhile.
fn with_log(error: &anyhow::Error, log: &str) -> anyhow::Error {
    anyhow::anyhow!("{error:#}\n{log}")
}

/// Bytes that the files below `dir` take on its disk; what is mounted there counts for nothing.
pub fn disk_bytes(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let top = std::fs::symlink_metadata(dir).with_context(|| dir.display().to_string())?;
    let mut sum = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        // An engine at work takes files away under a walk.
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let Ok(entry) = entry else { continue };
            let Ok(found) = entry.metadata() else {
                continue;
            };
            if found.dev() != top.dev() {
                continue;
            }
            sum += found.blocks() * 512;
            if found.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    Ok(sum)
}
