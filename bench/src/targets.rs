//! What workloads run on: our two doors and what a user would pick instead.

use std::{
    any::Any,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    command::{self, Daemon},
    mounts::{self, Mounted},
    report::Report,
    sandbox::Place,
};

/// The merged tree through FUSE.
pub(crate) const DIRS: &str = "harbour-dirs";
/// The same image mounted by the kernel's EROFS.
pub(crate) const VIEW: &str = "harbour-view";
/// What most ratios are against.
pub(crate) const EXT4: &str = "ext4";
/// Files of ext4 that no cache has, see [`crate::unread`].
pub(crate) const UNREAD: &str = "ext4-unread";
/// The other one.
pub(crate) const SQUASHFUSE: &str = "squashfuse_ll";

/// The tree in memory: the limit.
pub(crate) const TMPFS: &str = "tmpfs";

/// Longest wait for a FUSE program to serve.
const READY: Duration = Duration::from_secs(20);

/// The data sets, readable at `root`.
pub(crate) struct Target {
    /// Name in reports.
    pub(crate) name: String,
    /// The directory that holds `small/`, `meta/` and `big.bin`.
    pub(crate) root: PathBuf,
    /// Whether it is asked for itself, and not only for the overlay on it.
    pub(crate) measured: bool,
    /// What keeps it mounted.
    _held: Vec<Box<dyn Any>>,
}

/// `ours`, the references, and an overlay over each. What this machine cannot have is noted in
/// `report`; `wanted` chooses by name when it is not empty.
pub(crate) fn build(
    data: &Path,
    place: &Place,
    ours: Vec<(&str, PathBuf)>,
    wanted: &[String],
    report: &mut Report,
) -> Vec<Target> {
    let want = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let overlay_of = |name: &str| format!("overlay-{name}");
    let mut targets = Vec::new();
    for (name, root) in ours {
        targets.push(Target {
            name: name.to_owned(),
            root,
            measured: want(name),
            _held: Vec::new(),
        });
    }
    for name in [EXT4, TMPFS, SQUASHFUSE, "erofsfuse", "erofs"] {
        if !want(name) && !want(&overlay_of(name)) {
            continue;
        }
        match reference(name, data, place) {
            Ok((root, held)) => {
                targets.push(Target {
                    name: name.to_owned(),
                    root,
                    measured: want(name),
                    _held: held,
                });
            }
            Err(why) => report.skip(name, why),
        }
    }
    for below in 0..targets.len() {
        let name = overlay_of(&targets[below].name);
        if !want(&name) {
            continue;
        }
        match overlay(&name, &targets[below].root, place) {
            Ok((root, held)) => targets.push(Target {
                name,
                root,
                measured: true,
                _held: held,
            }),
            Err(why) => report.skip(&name, why),
        }
    }
    targets.retain(|target| target.measured || !target._held.is_empty());
    targets
}

type Held = Vec<Box<dyn Any>>;

fn reference(name: &str, data: &Path, place: &Place) -> anyhow::Result<(PathBuf, Held)> {
    let root = place.short.join(name);
    let held: Held = match name {
        EXT4 => return Ok((data.join("ext4"), Vec::new())),
        TMPFS => {
            let mounted = Mounted::tmpfs(&root)?;
            command::run(
                Command::new("cp")
                    .arg("-a")
                    .arg(data.join("ext4/."))
                    .arg(&root),
            )?;
            vec![Box::new(mounted)]
        }
        "erofs" => vec![Box::new(Mounted::erofs(&data.join("bench.erofs"), &root)?)],
        program => {
            let image = if program == "erofsfuse" {
                "bench.erofs"
            } else {
                "bench.squashfs"
            };
            vec![Box::new(served(program, &data.join(image), &root, place)?)]
        }
    };
    Ok((root, held))
}

/// Starts a FUSE program that serves `image` in the foreground, with its default options.
fn served(program: &str, image: &Path, root: &Path, place: &Place) -> anyhow::Result<Daemon> {
    let found = command::find(program);
    let program_path = found.ok_or_else(|| anyhow::anyhow!("{program} is not installed"))?;
    anyhow::ensure!(image.exists(), "{} was not made", image.display());
    std::fs::create_dir_all(root)?;
    let mut daemon = Daemon::start(
        Command::new(program_path).arg("-f").arg(image).arg(root),
        &place.work.join(format!("{program}.log")),
    )?;
    daemon.wait_ready(READY, || mounts::is_mount_point(root))?;
    Ok(daemon)
}

/// A writable overlay, as a container has it, with its upper layer in memory.
fn overlay(name: &str, lower: &Path, place: &Place) -> anyhow::Result<(PathBuf, Held)> {
    let root = place.short.join(name);
    let scratch = place.short.join(format!("s-{name}"));
    let memory = Mounted::tmpfs(&scratch)?;
    let mounted = Mounted::overlay(lower, &scratch, &root)?;
    Ok((root, vec![Box::new(mounted), Box::new(memory)]))
}
