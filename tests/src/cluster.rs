//! Running `harbour`: metad, a donor and a node as processes of their own, in directories of
//! their own, gone at the end whatever happened.

use std::{
    fs::File,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    fixtures, mounts,
    shell::{self, Output},
};

/// Until the cluster of another test is gone.
const TURN_LIMIT: Duration = Duration::from_secs(1500);
/// Until all parts answer.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Any subcommand but a pull.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// One pull, on a slow machine that does other things too.
const PULL_LIMIT: Duration = Duration::from_secs(300);
/// Until a part that was asked to end has ended.
const END_LIMIT: Duration = Duration::from_secs(15);
/// Lines of each log shown when something fails.
const LOG_LINES: usize = 25;

/// Name of a cluster's configuration file, when it has one.
const CONFIG: &str = "harbour.toml";

/// Until the mount shows what a pull committed.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);

/// The report of one pull.
#[derive(Clone, Debug, Deserialize)]
pub struct Pulled {
    /// First directory under `images/`.
    pub registry: String,
    /// Those below it.
    pub repository: String,
    /// The last of them.
    pub tag: String,
    /// Manifest digest, `sha256:…`.
    pub manifest: String,
    /// Layers in all.
    pub layers: u64,
    /// Layers that had to be fetched.
    pub fetched: u64,
    /// Bytes that came from the source.
    pub fetched_bytes: u64,
    /// Bytes that the pool had to take.
    pub stored_bytes: u64,
}

/// First 12 hex digits of a digest: the name that layers and images have in the mount.
pub fn short(digest: &str) -> &str {
    let hex = digest.split(':').next_back().unwrap_or(digest);
    &hex[..hex.len().min(12)]
}

/// A process of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The metadata daemon.
    Metad,
    /// The donor.
    Donor,
    /// The mount.
    Node,
}

impl Part {
    /// In the order in which they are started.
    pub const ALL: [Self; 3] = [Self::Metad, Self::Donor, Self::Node];

    /// The subcommand.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metad => "metad",
            Self::Donor => "donor",
            Self::Node => "node",
        }
    }
}

/// One host's worth of ImageHarbour.
#[derive(Debug)]
pub struct Cluster {
    dir: TempDir,
    lend: String,
    children: [Option<Child>; 3],
    _turn: Turn,
}

/// The right to run a cluster: one at a time on a machine, because each lends memory and uses
/// the cores, and because tests look at times.
#[derive(Debug)]
pub(crate) struct Turn {
    _file: Flock<File>,
    _thread: MutexGuard<'static, ()>,
}

impl Turn {
    pub(crate) fn take() -> Result<Self> {
        static THREAD: Mutex<()> = Mutex::new(());
        let thread = THREAD.lock().unwrap_or_else(PoisonError::into_inner);
        let path = std::env::temp_dir().join("harbour-tests.lock");
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        let deadline = Instant::now() + TURN_LIMIT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    return Ok(Self {
                        _file: file,
                        _thread: thread,
                    });
                }
                Err((back, _)) => file = back,
            }
            ensure!(
                Instant::now() < deadline,
                "another test holds {} for {TURN_LIMIT:?}",
                path.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Cluster {
    /// Starts all parts with `lend` memory, like `"256MiB"`, and waits until the mount serves.
    pub fn start(lend: &str) -> Result<Self> {
        let mut cluster = Self::empty(lend)?;
        for part in Part::ALL {
            cluster.start_part(part, None)?;
        }
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// The same with a configuration file of this content.
    pub fn configured(lend: &str, toml: &str) -> Result<Self> {
        let mut cluster = Self::empty(lend)?;
        cluster.configure(toml)?;
        for part in Part::ALL {
            cluster.start_part(part, None)?;
        }
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// Directories of a cluster in which nothing runs yet.
    pub fn empty(lend: &str) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "whole-system tests mount file systems: run them as root"
        );
        ensure!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: load the kernel's fuse module"
        );
        let turn = Turn::take()?;
        // Paths in it go into socket addresses (108 bytes) and mount options: so it is short.
        let dir = tempfile::Builder::new()
            .prefix("harbour.")
            .rand_bytes(8)
            .tempdir_in("/tmp")?;
        for name in ["state", "run", "mnt"] {
            std::fs::create_dir(dir.path().join(name))?;
        }
        Ok(Self {
            dir,
            lend: lend.to_owned(),
            children: [None, None, None],
            _turn: turn,
        })
    }

    /// Top of everything that belongs to it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Sockets, pid files, fast views.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The mount.
    pub fn mount(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Gives every command of this cluster a configuration file.
    pub fn configure(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(self.dir.path().join(CONFIG), text)?)
    }

    /// Everything that a part has said.
    pub fn log(&self, part: Part) -> String {
        let text = std::fs::read(self.log_path(part)).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// `harbour` with the flags that mean this cluster.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(binary());
        let config = self.dir.path().join(CONFIG);
        if config.exists() {
            command.arg("--config").arg(config);
        }
        command
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .arg("--run-dir")
            .arg(self.run_dir())
            .arg("--mount")
            .arg(self.mount())
            .args(args)
            .env_remove("HARBOUR_FAILPOINT")
            .env_remove("HARBOUR_CONFIG")
            .env_remove("HARBOUR_TRANSPORT")
            .env("RUST_BACKTRACE", "1");
        command
    }

    /// Runs a subcommand to its end, whatever that is.
    pub fn run<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        shell::run(&mut self.command(args), COMMAND_LIMIT)
    }

    /// Runs a subcommand that has to succeed.
    pub fn harbour<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        self.run(args)?.ok().with_context(|| self.logs())
    }

    /// Pulls, whatever comes of it.
    pub fn try_pull(&self, reference: &str) -> Result<Output> {
        shell::run(
            &mut self.command(["pull", "--insecure", reference]),
            PULL_LIMIT,
        )
        .with_context(|| self.logs())
    }

    /// Pulls; that has to succeed.
    pub fn pull(&self, reference: &str) -> Result<Pulled> {
        let mut command = self.command(["pull", "--insecure", "--json", reference]);
        let output = shell::run(&mut command, PULL_LIMIT)
            .and_then(Output::ok)
            .with_context(|| self.logs())?;
        let reports: Vec<Pulled> = serde_json::from_slice(&output.stdout).with_context(|| {
            format!("`{}` printed no report: {}", output.command, output.text())
        })?;
        let [report] =
            <[Pulled; 1]>::try_from(reports).map_err(|r| anyhow::anyhow!("{} reports", r.len()))?;
        Ok(report)
    }

    /// Directory of a pulled image, above its `rootfs`.
    pub fn image_dir(&self, image: &Pulled) -> PathBuf {
        self.mount()
            .join("images")
            .join(&image.registry)
            .join(&image.repository)
            .join(&image.tag)
    }

    /// The merged view of a pulled image, once the mount shows it.
    pub fn rootfs(&self, image: &Pulled) -> Result<PathBuf> {
        let path = self.image_dir(image).join("rootfs");
        shell::until("the mount shows the image", APPEAR_LIMIT, || {
            Ok(path.exists().then_some(()))
        })
        .with_context(|| format!("{}\n{}", path.display(), self.logs()))?;
        Ok(path)
    }

    /// Directory of a layer in the form of an overlay's lower directory.
    pub fn layer(&self, diff_id: &str) -> PathBuf {
        self.mount().join("layers").join(short(diff_id))
    }

    /// The EROFS file of a layer (by diff ID) or an image (by manifest digest).
    pub fn erofs(&self, digest: &str) -> PathBuf {
        self.mount()
            .join("erofs")
            .join(format!("{}.erofs", short(digest)))
    }

    /// The fast view of a layer or an image, once it is mounted.
    pub fn view(&self, digest: &str) -> Result<PathBuf> {
        let path = self.run_dir().join("view").join(short(digest));
        shell::until("the fast view is mounted", APPEAR_LIMIT, || {
            Ok(mounts::below(&path)?
                .iter()
                .any(|m| m.kind == "erofs")
                .then_some(()))
        })
        .with_context(|| format!("{}\n{}", path.display(), self.logs()))?;
        Ok(path)
    }

    /// A listing (`images`, `layers`, `status`, …) as JSON.
    pub fn json(&self, listing: &str) -> Result<Value> {
        let output = self.harbour([listing, "--json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`{}` printed no JSON", output.command))
    }

    /// One number of metad's status.
    pub fn book(&self, key: &str) -> Result<u64> {
        let status = self.json("status")?;
        status["metad"][key]
            .as_u64()
            .with_context(|| format!("status has no metad.{key}: {status}"))
    }

    /// Starts one part, armed with a failpoint (`NAME=abort`) when given.
    pub fn start_part(&mut self, part: Part, failpoint: Option<&str>) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path(part))?;
        let mut command = self.command([part.name()]);
        if part == Part::Donor {
            command.args(["--lend", &self.lend, "--huge-pages", "never"]);
        }
        if let Some(failpoint) = failpoint {
            command.env("HARBOUR_FAILPOINT", failpoint);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {} {}", binary().display(), part.name()))?;
        self.children[part as usize] = Some(child);
        Ok(())
    }

    /// Kills one part with SIGKILL and waits until it is gone.
    pub fn kill(&mut self, part: Part) -> Result<()> {
        if let Some(mut child) = self.children[part as usize].take() {
            shell::kill_group(&child, Signal::SIGKILL);
            child.wait()?;
        }
        if part == Part::Node {
            // What a killed file system leaves is a mount that answers ENOTCONN.
            mounts::detach_below(self.dir.path())?;
        }
        Ok(())
    }

    /// Kills the donor, starts another in its place and waits until metad has taken that one: what
    /// the first held is lost.
    pub fn replace_donor(&mut self) -> Result<()> {
        let before = self.live_donor()?;
        self.kill(Part::Donor)?;
        self.start_part(Part::Donor, None)?;
        self.wait_donor(before)
    }

    /// Waits until metad knows a live donor of another epoch than `before`.
    pub fn wait_donor(&self, before: Option<String>) -> Result<()> {
        shell::until("metad takes the new donor", READY_LIMIT, || {
            let now = self.live_donor()?;
            Ok((now.is_some() && now != before).then_some(()))
        })
        .with_context(|| self.logs())
    }

    /// Epoch of the live donor, if there is one.
    pub fn live_donor(&self) -> Result<Option<String>> {
        let donors = self.json("donors")?;
        let live = donors
            .as_array()
            .into_iter()
            .flatten()
            .find(|d| d["live"] == true);
        Ok(live.map(|d| d["epoch"].to_string()))
    }

    /// Whether a part has ended by itself.
    pub fn ended(&mut self, part: Part) -> Result<bool> {
        Ok(match &mut self.children[part as usize] {
            Some(child) => child.try_wait()?.is_some(),
            None => true,
        })
    }

    /// Process ID of a part.
    pub fn pid(&self, part: Part) -> Option<u32> {
        self.children[part as usize].as_ref().map(Child::id)
    }

    /// Waits until the mount serves, metad answers and a donor is known.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = shell::until("the mount serves", READY_LIMIT, || {
            for part in Part::ALL {
                if self.children[part as usize].is_some() && self.ended(part)? {
                    bail!("{} ended by itself", part.name());
                }
            }
            let output = self.run(["status", "--json"])?;
            let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            Ok((output.status.success() && status["node"]["ready"] == true).then_some(()))
        });
        ready.with_context(|| self.logs())
    }

    /// Ends of all logs, for messages.
    pub fn logs(&self) -> String {
        let mut shown = String::from("logs of the cluster:");
        for part in Part::ALL {
            let text = std::fs::read(self.log_path(part)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<_> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                shown.push_str(&format!("\n  {}: {line}", part.name()));
            }
        }
        shown
    }

    /// Ends all parts as a user would, the mount first, and fails when one has to be killed.
    pub fn stop(&mut self) -> Result<()> {
        for part in Part::ALL.into_iter().rev() {
            let Some(mut child) = self.children[part as usize].take() else {
                continue;
            };
            shell::kill_group(&child, Signal::SIGTERM);
            let ended = shell::wait(&mut child, Instant::now() + END_LIMIT)?;
            ensure!(
                ended.is_some(),
                "{} did not end within {END_LIMIT:?}\n{}",
                part.name(),
                self.logs()
            );
        }
        Ok(())
    }

    fn log_path(&self, part: Part) -> PathBuf {
        self.dir.path().join(format!("{}.log", part.name()))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for part in Part::ALL.into_iter().rev() {
            if let Some(mut child) = self.children[part as usize].take() {
                shell::kill_group(&child, Signal::SIGKILL);
                let _ = child.wait();
            }
        }
        if let Err(error) = mounts::detach_below(self.dir.path()) {
            eprintln!("leftover mounts: {error:#}");
        }
        if std::thread::panicking() && std::env::var_os("HARBOUR_TEST_KEEP").is_some() {
            eprintln!("kept: {}", self.dir.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}

/// The binary under test: `$HARBOUR_BIN`, or beside the test binaries in the target directory.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("HARBOUR_BIN") {
        return path.into();
    }
    // target/debug/deps/name-hash -> target/debug/harbour
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own
        .parent()
        .and_then(Path::parent)
        .map(|dir| dir.join("harbour"));
    beside
        .filter(|b| b.exists())
        .unwrap_or_else(|| fixtures::checkout().join("target/debug/harbour"))
}
