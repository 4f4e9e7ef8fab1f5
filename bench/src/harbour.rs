//! Driving the command under test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use crate::{
    command::{self, Daemon},
    mounts,
    sandbox::{self, Place},
};

/// Longest wait for a daemon of ours.
const READY: Duration = Duration::from_secs(30);
/// Longest wait for an image, or a fast view of it, to appear after its pull.
const VIEW_WAIT: Duration = Duration::from_secs(10);
/// Time that a new node is given to come to rest.
const SETTLE: Duration = Duration::from_millis(300);
/// Room that a pool needs beside the content: indexes, slabs not filled to the brim.
const SPARE_BYTES: u64 = 512 << 20;

/// One `harbour up`: metad, donor and mount. Taken down on drop, and its state removed.
#[derive(Debug)]
pub(crate) struct Harbour {
    program: PathBuf,
    state: PathBuf,
    run: PathBuf,
    mount: PathBuf,
}

impl Harbour {
    /// Starts one that lends room for `bytes` of content. `name` tells instances apart.
    pub(crate) fn up(
        program: &Path,
        place: &Place,
        name: &str,
        bytes: u64,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let this = Self {
            program: program.to_owned(),
            state: place.work.join(format!("state-{name}")),
            run: place.short.join(format!("r-{name}")),
            mount: place.short.join(format!("m-{name}")),
        };
        for dir in [&this.state, &this.run, &this.mount] {
            sandbox::remove(dir)?;
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let lend = (bytes + bytes / 8 + SPARE_BYTES).next_multiple_of(16 << 20);
        // Daemons keep what they inherit open, so their output goes to a file and not to a pipe.
        let log = place.work.join(format!("up-{name}.log"));
        let file = File::create(&log)?;
        let mut up = this.command("up");
        up.args(["--detach", "--lend", &lend.to_string()])
            .args(flags);
        up.stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let status = up
            .status()
            .with_context(|| format!("cannot run {}", program.display()))?;
        command::succeeded(
            "harbour up",
            status,
            &fs::read_to_string(&log).unwrap_or_default(),
        )?;
        anyhow::ensure!(
            mounts::is_mount_point(&this.mount),
            "harbour up left nothing mounted"
        );
        Ok(this)
    }

    /// A subcommand with the flags that lead to this instance.
    pub(crate) fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(subcommand);
        for (flag, dir) in [
            ("--state-dir", &self.state),
            ("--run-dir", &self.run),
            ("--mount", &self.mount),
        ] {
            command.arg(flag).arg(dir);
        }
        // Somebody's configuration must not reach into a measurement.
        command
            .env_remove("HARBOUR_CONFIG")
            .env_remove("HARBOUR_METAD");
        command
    }

    /// The command that pulls `source`, from plain HTTP if need be.
    pub(crate) fn pull_command(&self, source: &str) -> Command {
        let mut pull = self.command("pull");
        pull.args(["--insecure", "--progress", "none", source]);
        pull
    }

    /// Pulls and returns the seconds it took.
    pub(crate) fn pull(&self, source: &str) -> anyhow::Result<f64> {
        command::timed(&mut self.pull_command(source), &mut |_| {})
            .with_context(|| format!("cannot pull {source}"))
    }

    /// Where it is mounted.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }

    /// The merged tree of the image whose manifest has this digest. A mount may hear of a pull a
    /// moment after it: how long that took is told.
    pub(crate) fn root(&self, manifest: &str) -> anyhow::Result<PathBuf> {
        let started = Instant::now();
        let mut tries = 0;
        loop {
            match root_below(&self.mount, manifest) {
                Err(_) if started.elapsed() < VIEW_WAIT => tries += 1,
                Ok(_) if tries > 0 => {
                    let waited = started.elapsed().as_millis();
                    command::note(&format!(
                        "the mount showed the image {waited} ms after its pull"
                    ));
                    tries = 0;
                }
                done => return done,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The kernel's view of the same image, if this kernel can. The node mounts it a moment after
    /// the pull.
    pub(crate) fn view(&self, manifest: &str) -> anyhow::Result<PathBuf> {
        view_below(&self.run, manifest)
    }

    /// Process IDs of its daemons, from their pid files.
    pub(crate) fn daemons(&self) -> Vec<u32> {
        let files = fs::read_dir(&self.run).into_iter().flatten().flatten();
        files
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|e| e == "pid"))
            .filter_map(|path| {
                fs::read_to_string(path)
                    .ok()?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
            .collect()
    }

    /// Another node of the same pool with a mount of its own, which has seen nothing yet.
    pub(crate) fn second_node(&self, place: &Place, name: &str) -> anyhow::Result<Node> {
        let (run, mount) = (
            place.short.join(format!("r-{name}")),
            place.short.join(format!("m-{name}")),
        );
        let state = place.work.join(format!("state-{name}"));
        for dir in [&state, &run, &mount] {
            sandbox::remove(dir)?;
            fs::create_dir_all(dir)?;
        }
        let mut node = Command::new(&self.program);
        node.args(["node", "--node-name", name, "--fast-view", "off"]);
        node.arg("--metad")
            .arg(format!("unix:{}", self.run.join("metad.sock").display()));
        node.arg("--state-dir")
            .arg(&state)
            .arg("--run-dir")
            .arg(&run)
            .arg("--mount")
            .arg(&mount);
        node.env_remove("HARBOUR_CONFIG");
        let mut daemon = Daemon::start(&mut node, &place.work.join(format!("{name}.log")))?;
        let named =
            || fs::read_dir(mount.join("images")).is_ok_and(|mut names| names.next().is_some());
        daemon.wait_ready(READY, || mounts::is_mount_point(&mount) && named())?;
        // What it does besides at its start is not to run beside a measurement.
        std::thread::sleep(SETTLE);
        Ok(Node {
            mount,
            _daemon: daemon,
        })
    }
}

impl Drop for Harbour {
    fn drop(&mut self) {
        if let Err(error) = command::run(self.command("down").arg("--force")) {
            command::note(&format!("harbour down: {error:#}"));
        }
        for dir in [&self.state, &self.run] {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// A node started by [`Harbour::second_node`]; ended on drop.
#[derive(Debug)]
pub(crate) struct Node {
    mount: PathBuf,
    _daemon: Daemon,
}

impl Node {
    /// The mount.
    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }
}

/// Waits for the fast view of the image whose manifest has this digest, below a node's run directory.
pub(crate) fn view_below(run: &Path, manifest: &str) -> anyhow::Result<PathBuf> {
    let short = manifest.get(..12).context("no digest of a manifest")?;
    let view = run.join("view").join(short);
    let end = Instant::now() + VIEW_WAIT;
    while !mounts::is_mount_point(&view) {
        anyhow::ensure!(
            Instant::now() < end,
            "no fast view after {VIEW_WAIT:?}: it needs Linux 6.12 or later"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(view)
}

/// Finds the `rootfs` beside the `manifest.json` with this digest, whatever name the image has.
pub(crate) fn root_below(mount: &Path, manifest: &str) -> anyhow::Result<PathBuf> {
    let mut open = vec![(mount.join("images"), 0)];
    while let Some((dir, depth)) = open.pop() {
        let document = fs::read(dir.join("manifest.json"));
        if document.is_ok_and(|text| hex::encode(Sha256::digest(text)) == manifest) {
            return Ok(dir.join("rootfs"));
        }
        // A repository has any number of components, but not this many.
        if depth < 12 && !dir.join("rootfs").exists() {
            let below =
                fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
            open.extend(
                below
                    .flatten()
                    .filter(|e| e.path().is_dir())
                    .map(|e| (e.path(), depth + 1)),
            );
        }
    }
    anyhow::bail!(
        "no image with manifest {manifest} below {}",
        mount.display()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn finds_an_image_by_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("a.example/x/y/latest", "one"), ("local/z/t", "two")] {
            let image = dir.path().join("images").join(name);
            fs::create_dir_all(image.join("rootfs/images")).unwrap();
            fs::write(image.join("manifest.json"), text).unwrap();
        }
        let hex = hex::encode(Sha256::digest("two"));
        assert_eq!(
            root_below(dir.path(), &hex).unwrap(),
            dir.path().join("images/local/z/t/rootfs")
        );
        assert!(root_below(dir.path(), &hex::encode(Sha256::digest("three"))).is_err());
    }
}
