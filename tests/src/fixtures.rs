//! The test images: built by `tests/fixtures/make` on first use and kept in a cache.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::shell;

/// First builds install packages from a mirror; later ones only look at stamps.
const BUILD_LIMIT: Duration = Duration::from_secs(1500);

/// Images with a tag in the OCI layout, and so with trees by the judges.
pub const IMAGES: &[&str] = &[
    "base", "python", "app", "web", "science", "many", "odd", "wide", "zstd",
];

/// One layer as the second judge extracted it.
#[derive(Debug, Deserialize)]
pub struct Layer {
    /// `sha256:…` of the uncompressed tar.
    pub diff_id: String,
    /// First 12 hex digits: its directory's name.
    pub dir: String,
    /// Directories that no entry of the layer names, as hex of their path's bytes.
    implied: Vec<String>,
}

impl Layer {
    /// Directories that no entry of the layer names.
    pub fn implied(&self) -> Result<BTreeSet<Vec<u8>>> {
        self.implied
            .iter()
            .map(|h| hex::decode(h).context("layers.json: implied"))
            .collect()
    }
}

#[derive(Deserialize)]
struct Layers {
    manifest: String,
    layers: Vec<Layer>,
}

/// What the judges made of one image.
#[derive(Debug)]
pub struct Judged {
    /// Manifest digest, `sha256:…`.
    pub manifest: String,
    /// The root file system as `umoci unpack` writes it.
    pub umoci: PathBuf,
    /// Extracted layers, from the bottom up.
    pub layers: Vec<Layer>,
    layer_dir: PathBuf,
}

impl Judged {
    /// Directory of one extracted layer, in the form overlayfs takes.
    pub fn layer(&self, layer: &Layer) -> PathBuf {
        self.layer_dir.join(&layer.dir)
    }

    /// All extracted layers, topmost first, as overlayfs wants them.
    pub fn lowers(&self) -> Vec<PathBuf> {
        self.layers.iter().rev().map(|l| self.layer(l)).collect()
    }
}

/// The checkout.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// Where images are kept.
pub fn cache() -> PathBuf {
    match std::env::var_os("HARBOUR_TEST_CACHE") {
        Some(dir) => dir.into(),
        None => checkout().join("target/fixtures"),
    }
}

/// Builds `names` where they are missing.
pub fn build(names: &[&str]) -> Result<()> {
    make([], names)
}

/// Builds one image and has the judges unpack it.
pub fn judged(name: &str) -> Result<Judged> {
    make(["trees"], &[name])?;
    let tree = cache().join("trees").join(name);
    let text = std::fs::read(tree.join("layers.json"))
        .with_context(|| format!("{}/layers.json", tree.display()))?;
    let layers: Layers = serde_json::from_slice(&text).context("layers.json")?;
    ensure!(!layers.layers.is_empty(), "{name} has no layers");
    Ok(Judged {
        manifest: layers.manifest,
        umoci: tree.join("umoci/rootfs"),
        layers: layers.layers,
        layer_dir: tree.join("layers"),
    })
}

/// Builds `names` and pushes them to a registry as `harbour/NAME:1`.
pub fn push(registry: &str, names: &[&str]) -> Result<()> {
    make(["push", registry], names)
}

fn make<const N: usize>(verb: [&str; N], names: &[&str]) -> Result<()> {
    let script = checkout().join("tests/fixtures/make");
    let mut command = Command::new(script);
    command.arg("--cache").arg(cache()).args(verb).args(names);
    shell::run(&mut command, BUILD_LIMIT)?
        .ok()
        .context("making the test images")?;
    Ok(())
}
