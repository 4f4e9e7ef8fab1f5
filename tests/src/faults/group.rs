//! A memory cgroup for each donor: its limit is how much memory the donor's host has.

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
    reaper: Child,
}

impl Group {
    /// Makes the group of the donor on `host`.
    pub(super) fn make(host: usize) -> Result<Self> {
        for (top, files) in TOPS {
            let top = Path::new(top);
            sweep(top);
            let dir = top.join(format!("{PREFIX}{}.{host}", std::process::id()));
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            let reaper = reaper(&dir).inspect_err(|_| drop(fs::remove_dir(&dir)))?;
            let group = Self { dir, files, reaper };
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

impl Drop for Group {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

/// A shell that removes the group at the end of its input, which comes when this process has ended,
/// however it did. What is in the group may take a moment to end.
fn reaper(dir: &Path) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let script = "trap '' INT TERM HUP; read -r _; for _ in $(seq 50); do \
                  rmdir \"$0\" 2>/dev/null && exit; [ -d \"$0\" ] || exit; sleep 0.1; done";
    Command::new("sh")
        .args(["-c", script])
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot run sh")
}

/// Removes what tests left that are gone, reapers and all.
fn sweep(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let test = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('.').next());
        if test.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
