//! The data sets: made once, always the same bytes, read by every target.
//!
//! Shapes follow what images hold: many small files in a deep tree, a tree of names with little
//! behind them, one large file, and images of four sizes for pulls. Nothing is random but by seed.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use clap::Args;
use harbour_bench::{
    layout::{Compression, Image, Layer, Layout},
    sets::{self, Entry},
};
use serde::{Deserialize, Serialize};

use crate::{command, sandbox};

/// Changes whenever the same flags would give other bytes.
const VERSION: u32 = 1;
/// Images for pulls: tag, unpacked bytes at scale 1, share of each layer in percent.
const SIZES: [(&str, u64, &[u64]); 4] = [
    ("size-1m", 1_000_000, &[100]),
    ("size-5m", 5_000_000, &[60, 40]),
    ("size-130m", 130_000_000, &[60, 30, 10]),
    ("size-1200m", 1_200_000_000, &[50, 25, 15, 10]),
];
/// Smaller sets than this show nothing.
const SCALE_MIN: f64 = 0.001;

/// `harbour-bench data`
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to put them: a directory on ext4 with 12 GB free at scale 1
    dir: PathBuf,
    /// Size of everything: 1 is what the thresholds are for
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    scale: f64,
    /// A tar file of a root with /usr/bin/python3 in it, for the python3 workload
    #[arg(long, value_name = "TAR")]
    python_root: Option<PathBuf>,
}

/// What is in a data directory: `data.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Data {
    version: u32,
    /// Factor that the sets were made with.
    pub(crate) scale: f64,
    /// Whether the root of a Python system is among them.
    pub(crate) python: bool,
    /// Length of the large file.
    pub(crate) big_bytes: u64,
    /// Number of small files and their bytes.
    pub(crate) small: (u64, u64),
    /// Entries of the metadata set.
    pub(crate) meta_entries: u64,
    /// Images by tag.
    pub(crate) images: BTreeMap<String, Image>,
}

impl Data {
    /// Reads `data.json`.
    pub(crate) fn load(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("data.json");
        let text = fs::read(&path).with_context(|| {
            format!(
                "cannot read {}: run `harbour-bench data` first",
                path.display()
            )
        })?;
        let data: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        anyhow::ensure!(
            data.version == VERSION,
            "{} is of another version: make it again",
            path.display()
        );
        Ok(data)
    }

    /// The image with this tag.
    pub(crate) fn image(&self, tag: &str) -> anyhow::Result<&Image> {
        self.images
            .get(tag)
            .with_context(|| format!("no image {tag} in the data directory"))
    }

    /// Tags of the images for pulls, smallest first.
    pub(crate) fn sizes() -> [&'static str; 4] {
        SIZES.map(|(tag, _, _)| tag)
    }

    /// One line for reports.
    pub(crate) fn text(&self) -> String {
        format!(
            "scale {}: {} small files ({} MB), {} entries, large file of {} MiB, python {}",
            self.scale,
            self.small.0,
            self.small.1 / 1_000_000,
            self.meta_entries,
            self.big_bytes >> 20,
            self.python
        )
    }
}

/// Makes everything that is not there yet.
pub(crate) fn make(options: &Options) -> anyhow::Result<()> {
    let dir = &options.dir;
    anyhow::ensure!(
        options.scale.is_finite() && (SCALE_MIN..=10.0).contains(&options.scale),
        "--scale {} is not between {SCALE_MIN} and 10",
        options.scale
    );
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let kind = nix::sys::statfs::statfs(dir.as_path())?.filesystem_type();
    anyhow::ensure!(
        kind == nix::sys::statfs::EXT4_SUPER_MAGIC,
        "{} is not on ext4, which the thresholds compare with: choose another directory",
        dir.display()
    );
    if let Ok(data) = Data::load(dir)
        && data.scale == options.scale
        && data.python == options.python_root.is_some()
    {
        command::note(&format!("data is there already: {}", data.text()));
        return Ok(());
    }
    for old in [
        "data.json",
        "bench.squashfs",
        "bench.erofs",
        "small.list",
        "meta.list",
    ] {
        let _ = fs::remove_file(dir.join(old));
    }
    for old in ["oci", "ext4"] {
        sandbox::remove(&dir.join(old))?;
    }
    let (data, layers) = write_images(options)?;
    for layer in &layers {
        extract(&dir.join("oci"), layer, &dir.join("ext4"))?;
    }
    squash(dir)?;
    // Last: its presence says that all the rest is whole.
    fs::write(dir.join("data.json"), serde_json::to_vec_pretty(&data)?)?;
    command::note(&format!("made {}", data.text()));
    Ok(())
}

/// Writes the layout with all images; returns its description and the layers of `bench`.
fn write_images(options: &Options) -> anyhow::Result<(Data, Vec<Layer>)> {
    let dir = &options.dir;
    let scaled = |value: u64| ((value as f64 * options.scale) as u64).max(1);
    let mut layout = Layout::create(&dir.join("oci"))?;
    command::note("small files …");
    let (small, small_bytes) = set_layer(
        &mut layout,
        &sets::small_files(scaled(20_000)),
        Compression::Gzip(1),
        dir,
        "small",
    )?;
    command::note("metadata …");
    let meta_set = sets::metadata(scaled(50_000));
    let (meta, _) = set_layer(&mut layout, &meta_set, Compression::Gzip(1), dir, "meta")?;
    command::note("large file …");
    let big_bytes = scaled(1 << 30).next_multiple_of(1 << 20);
    let (big, _) = set_layer(
        &mut layout,
        &[sets::big_file(big_bytes)],
        Compression::None,
        dir,
        "big",
    )?;
    let mut bench = vec![small.clone(), meta, big.clone()];
    if let Some(tar) = &options.python_root {
        let why = || format!("cannot take {} for the Python root", tar.display());
        bench.push(layout.import_tar(tar).with_context(why)?);
    }
    let mut images = BTreeMap::from([
        ("bench".to_owned(), layout.image("bench", &bench)?),
        (
            "big".to_owned(),
            layout.image("big", std::slice::from_ref(&big))?,
        ),
    ]);
    for (number, (tag, bytes, shares)) in SIZES.into_iter().enumerate() {
        command::note(&format!("{tag} …"));
        let mut layers = Vec::new();
        for (place, share) in shares.iter().enumerate() {
            // Small images keep their size at any scale: they are small already.
            let bytes = if bytes > 10_000_000 {
                scaled(bytes)
            } else {
                bytes
            };
            let entries = sets::image_like(bytes * share / 100, (number * 16 + place) as u64);
            layers.push(layout.layer(&entries, Compression::Gzip(6))?);
        }
        images.insert(tag.to_owned(), layout.image(tag, &layers)?);
    }
    layout.finish()?;
    let data = Data {
        version: VERSION,
        scale: options.scale,
        python: options.python_root.is_some(),
        big_bytes,
        small: (small.files, small_bytes),
        meta_entries: meta_set.len() as u64,
        images,
    };
    Ok((data, bench))
}

/// Writes a layer and the list of names in it, one relative path a line.
fn set_layer(
    layout: &mut Layout,
    entries: &[Entry],
    compression: Compression,
    dir: &Path,
    name: &str,
) -> anyhow::Result<(Layer, u64)> {
    let layer = layout.layer(entries, compression)?;
    if name != "big" {
        let mut list = std::io::BufWriter::new(fs::File::create(dir.join(format!("{name}.list")))?);
        for entry in entries {
            if name == "meta" || matches!(entry.kind, sets::Kind::File { .. }) {
                writeln!(list, "{}", entry.path)?;
            }
        }
        list.flush()?;
    }
    let bytes = layer.unpacked_bytes;
    Ok((layer, bytes))
}

fn extract(oci: &Path, layer: &Layer, into: &Path) -> anyhow::Result<()> {
    command::note("extracting …");
    fs::create_dir_all(into)?;
    let blob = oci.join("blobs/sha256").join(&layer.blob);
    let unzip = if layer.gzip { "-xpzf" } else { "-xpf" };
    command::run(
        Command::new("tar")
            .arg("--numeric-owner")
            .arg(unzip)
            .arg(&blob)
            .arg("-C")
            .arg(into),
    )?;
    Ok(())
}

/// The same tree for squashfs and EROFS. Both uncompressed, as the pool is: what is compared is
/// the way to the bytes and not the price of inflating them.
fn squash(dir: &Path) -> anyhow::Result<()> {
    command::note("mksquashfs, mkfs.erofs …");
    if command::find("mksquashfs").is_some() {
        let plain = [
            "-noI",
            "-noD",
            "-noF",
            "-noX",
            "-no-progress",
            "-quiet",
            "-noappend",
        ];
        command::run(
            Command::new("mksquashfs")
                .arg(dir.join("ext4"))
                .arg(dir.join("bench.squashfs"))
                .args(plain),
        )?;
    }
    if command::find("mkfs.erofs").is_some() {
        command::run(
            Command::new("mkfs.erofs")
                .arg(dir.join("bench.erofs"))
                .arg(dir.join("ext4")),
        )?;
    }
    Ok(())
}
