//! What the kernel says of this host's memory, and of the cgroup that this process is in.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// A cgroup without a limit says a number beyond any memory (version 1).
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// Where to look; a test has a tree of its own.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    /// Directories of this process's cgroup and those above it, with the names of their files.
    groups: Vec<(PathBuf, &'static Files)>,
    /// Time stalled until the last look, and when that was.
    last: Option<(u64, Duration)>,
}

/// Names of a cgroup's files.
#[derive(Debug)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// The part of the usage that the kernel can take back, in `memory.stat`.
    reclaimable: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: "inactive_file",
};

impl Host {
    /// The host below `root`, which is `/` but for tests.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            groups: groups(root),
            last: None,
        }
    }

    /// All memory that there is for this process, in bytes: the host's, or the tightest limit.
    pub fn total(&self) -> Option<u64> {
        let host = self.meminfo("MemTotal:")?;
        let limits = self
            .groups
            .iter()
            .filter_map(|(dir, files)| limit(dir, files));
        Some(limits.fold(host, u64::min))
    }

    /// Bytes that can be used without anything being swapped out or failing.
    pub fn available(&self) -> Option<u64> {
        let host = self.meminfo("MemAvailable:")?;
        let left = self.groups.iter().filter_map(|(dir, files)| {
            let used = number(&dir.join(files.usage))?;
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let free = field(&stat, files.reclaimable).unwrap_or(0).min(used);
            Some(limit(dir, files)?.saturating_sub(used - free))
        });
        Some(left.fold(host, u64::min))
    }

    /// Part of the time since the last call in which something waited for memory; `None` the first
    /// time, and where the kernel does not say (no PSI).
    pub fn stalled(&mut self, now: Duration) -> Option<f64> {
        let text = fs::read_to_string(self.root.join("proc/pressure/memory")).ok()?;
        let some = text.lines().find(|line| line.starts_with("some "))?;
        let total_us: u64 = some.split("total=").nth(1)?.trim().parse().ok()?;
        let (before_us, then) = self.last.replace((total_us, now))?;
        let passed = now.checked_sub(then).filter(|passed| !passed.is_zero())?;
        let waited = Duration::from_micros(total_us.saturating_sub(before_us));
        Some((waited.as_secs_f64() / passed.as_secs_f64()).min(1.0))
    }

    /// Whether the kernel says what waits for memory.
    pub fn has_pressure(&self) -> bool {
        fs::read_to_string(self.root.join("proc/pressure/memory")).is_ok()
    }

    fn meminfo(&self, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.root.join("proc/meminfo")).ok()?;
        field(&text, key).map(|kib| kib.saturating_mul(1024))
    }
}

/// The memory cgroups that bind this process, innermost first.
fn groups(root: &Path) -> Vec<(PathBuf, &'static Files)> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, Some(names), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (top, files) = if names.is_empty() {
            ("sys/fs/cgroup", &V2)
        } else if names.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", &V1)
        } else {
            continue;
        };
        let top = root.join(top);
        // In a container the path may be the host's, and the mount's top the cgroup itself.
        for dir in Path::new(path.trim_start_matches('/')).ancestors() {
            let dir = top.join(dir);
            if dir.join(files.usage).exists() {
                found.push((dir, files));
            }
        }
    }
    found
}

fn limit(dir: &Path, files: &Files) -> Option<u64> {
    number(&dir.join(files.limit)).filter(|limit| *limit < NO_LIMIT_BYTES)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind `key` in a file of lines.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(name, _)| *name == key)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().expect("a directory");
        let meminfo = "MemTotal:       16777216 kB\nMemFree: 5 kB\nMemAvailable:    8388608 kB\n";
        for (name, text) in [("proc/meminfo", meminfo)].iter().chain(files) {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            fs::write(path, text).expect("a file");
        }
        let host = Host::new(dir.path());
        (dir, host)
    }

    #[test]
    fn a_host_without_cgroups_or_pressure() {
        let (_dir, mut host) = host(&[]);
        assert_eq!(
            (host.total(), host.available()),
            (Some(16 * GIB), Some(8 * GIB))
        );
        assert!(!host.has_pressure());
        assert_eq!(host.stalled(Duration::from_secs(1)), None);
    }

    #[test]
    fn the_tightest_cgroup_counts() {
        let two = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/a/memory.current", "3221225472\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 5\ninactive_file 1073741824\n",
            ),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "5\n"),
        ];
        let (_dir, host_two) = host(&two);
        assert_eq!(
            (host_two.total(), host_two.available()),
            (Some(4 * GIB), Some(2 * GIB))
        );
        let one = [
            (
                "proc/self/cgroup",
                "3:cpu:/x\n5:memory:/docker/elsewhere\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "2147483648\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "total_inactive_file 0\n",
            ),
        ];
        let (_dir, host_one) = host(&one);
        assert_eq!(
            (host_one.total(), host_one.available()),
            (Some(GIB), Some(0))
        );
        let (_dir, none) = host(&[
            ("proc/self/cgroup", "5:memory:/\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ]);
        assert_eq!(none.total(), Some(16 * GIB));
    }

    #[test]
    fn stalls_are_shares_of_the_time_between_two_looks() {
        let name = "proc/pressure/memory";
        let line = |total: u64| {
            format!(
                "some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\nfull avg10=0.00 total=9\n"
            )
        };
        let (dir, mut host) = host(&[(name, &line(1_000_000))]);
        let at = Duration::from_millis;
        assert!(host.has_pressure());
        assert_eq!(host.stalled(at(0)), None);
        fs::write(dir.path().join(name), line(1_025_000)).expect("a file");
        assert_eq!(host.stalled(at(100)), Some(0.25));
        assert_eq!(host.stalled(at(100)), None, "no time has passed");
        fs::write(dir.path().join(name), line(0)).expect("a file");
        assert_eq!(host.stalled(at(200)), Some(0.0));
    }
}
