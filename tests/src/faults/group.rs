//! A memory cgroup for each donor: its limit is how much memory the donor's host has. And one for
//! the container, so that nothing of it is left.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// Where cgroups are, version 1 and 2.
const TOPS: [(&str, &Files); 2] = [("/sys/fs/cgroup/memory", &V1), ("/sys/fs/cgroup", &V2)];
/// Beginning of the names of ours, before the process ID of the test and the number of the host.
const PREFIX: &str = "harbour-faults.";

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    unlimited: "-1",
};
const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    unlimited: "max",
};

/// Names of a cgroup's files.
#[derive(Debug)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    unlimited: &'static str,
}

/// One cgroup, gone when dropped and empty, and when the process is killed.
#[derive(Debug)]
pub(super) struct Group {
    dir: PathBuf,
    files: &'static Files,
    _reaper: Reaper,
}

impl Group {
    /// Makes the group of the donor on `host`.
    pub(super) fn make(host: usize) -> Result<Self> {
        sweep();
        for (top, files) in TOPS {
            let dir = Path::new(top).join(format!("{PREFIX}{}.{host}", std::process::id()));
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = Self {
                files,
                _reaper: Reaper::of(std::slice::from_ref(&dir))?,
                dir,
            };
            if group.dir.join(files.limit).exists() {
                return Ok(group);
            }
        }
        bail!("no cgroup with a memory limit can be made: squeezing a donor takes one")
    }

    /// The file that takes processes in.
    pub(super) fn processes(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Leaves so many bytes to use.
    pub(super) fn leave(&self, bytes: u64) -> Result<()> {
        let used: u64 = fs::read_to_string(self.dir.join(self.files.usage))?
            .trim()
            .parse()?;
        self.limit(&(used + bytes).to_string())
    }

    /// Takes the limit away.
    pub(super) fn lift(&self) -> Result<()> {
        self.limit(self.files.unlimited)
    }

    fn limit(&self, text: &str) -> Result<()> {
        let file = self.dir.join(self.files.limit);
        fs::write(&file, text).with_context(|| format!("writing {text} to {}", file.display()))
    }
}

/// The container's cgroup: by its path below each hierarchy, and what removes it.
#[derive(Debug)]
pub(super) struct Pen {
    pub(super) path: String,
    _reaper: Reaper,
}

impl Pen {
    /// A path that no other test has. The container's engine makes the groups.
    pub(super) fn choose() -> Result<Self> {
        let name = format!("{PREFIX}{}.pen", std::process::id());
        let dirs: Vec<_> = hierarchies().iter().map(|top| top.join(&name)).collect();
        Ok(Self {
            path: format!("/{name}"),
            _reaper: Reaper::of(&dirs)?,
        })
    }
}

/// A shell that removes groups at the end of its input, which comes when this is dropped or when
/// the process has ended, however it did. What is in them may take a moment to end.
#[derive(Debug)]
struct Reaper(Child);

impl Reaper {
    fn of(dirs: &[PathBuf]) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let script = "trap '' INT TERM HUP; read -r _; for _ in $(seq 50); do \
                      rmdir \"$@\" 2>/dev/null; left=; for dir; do [ ! -d \"$dir\" ] || left=1; done; \
                      [ -n \"$left\" ] || exit 0; sleep 0.1; done";
        Command::new("sh")
            .args(["-c", script, "sh"])
            .args(dirs)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot run sh")
            .map(Self)
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Where the trees of cgroups begin: one of version 2, several of version 1.
fn hierarchies() -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let below = fs::read_dir(top).into_iter().flatten().flatten();
    let below = below.map(|entry| entry.path()).filter(|path| {
        // Not the groups of version 2 that lie at the top.
        path.join("cgroup.procs").exists() && !top.join("cgroup.procs").exists()
    });
    std::iter::once(top.to_owned()).chain(below).collect()
}

/// Removes what tests left that are gone, reapers and all.
fn sweep() {
    let tops = hierarchies();
    let entries = tops
        .iter()
        .flat_map(|top| fs::read_dir(top).into_iter().flatten().flatten());
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let test = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('.').next());
        if test.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
