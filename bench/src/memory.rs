//! How much memory processes take while they run.
//!
//! A puller that maps the pool's memory has every page that it touched in its resident set
//! (`RssShmem`), though the memory is the donor's. So three figures are taken: the largest `VmHWM`
//! of any one process, which counts the mapped pool; the peak of all private memory (`RssAnon`);
//! and the peak of everything but shared memory (`RssAnon` + `RssFile`), which is what a pull
//! costs beyond the pool. Source: proc_pid_status(5).

use std::{
    collections::HashMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Time between two looks.
const PERIOD: Duration = Duration::from_millis(10);
/// Looks between two searches for new children.
const SEARCH_EVERY: u32 = 3;

/// Peaks, in KiB. Sums over processes are sums at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peak {
    /// Largest `VmHWM` of one process.
    pub(crate) hwm_kib: u64,
    /// Peak of the sum of `RssAnon`.
    pub(crate) anon_kib: u64,
    /// Peak of the sum of `RssAnon` and `RssFile`.
    pub(crate) beyond_pool_kib: u64,
}

/// Looks at processes and their descendants until it is asked for the result.
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Peak>,
}

impl Sampler {
    /// Starts looking at these processes.
    pub(crate) fn start(roots: Vec<u32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut peak = Peak::default();
            let mut family = roots.clone();
            let mut look = 0;
            while !flag.load(Ordering::Acquire) {
                if look % SEARCH_EVERY == 0 {
                    family = descendants(&roots);
                }
                look += 1;
                peak.look(&family);
                thread::sleep(PERIOD);
            }
            peak
        });
        Self { stop, thread }
    }

    /// The peaks so far.
    pub(crate) fn finish(self) -> Peak {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

impl Peak {
    fn look(&mut self, pids: &[u32]) {
        let (mut anon, mut beyond) = (0, 0);
        for status in pids
            .iter()
            .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok())
        {
            self.hwm_kib = self.hwm_kib.max(field(&status, "VmHWM:"));
            let own = field(&status, "RssAnon:");
            anon += own;
            beyond += own + field(&status, "RssFile:");
        }
        self.anon_kib = self.anon_kib.max(anon);
        self.beyond_pool_kib = self.beyond_pool_kib.max(beyond);
    }
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// These processes and all below them.
fn descendants(roots: &[u32]) -> Vec<u32> {
    let mut parents: HashMap<u32, u32> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The name in brackets may hold anything, so fields are counted from its end.
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            parents.insert(pid, parent);
        }
    }
    let mut family = roots.to_vec();
    let mut next = 0;
    while next < family.len() {
        let of = family[next];
        next += 1;
        for (pid, parent) in &parents {
            if *parent == of && !family.contains(pid) {
                family.push(*pid);
            }
        }
    }
    family
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn sees_a_grandchild_grow() {
        // The inner shell holds 64 MiB in a variable for a moment.
        let script = "sh -c 'x=$(head -c 67108864 /dev/zero | tr \"\\\\0\" x); sleep 0.5; test -n \"$x\"'; true";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let sampler = Sampler::start(vec![child.id()]);
        assert!(child.wait().unwrap().success());
        let peak = sampler.finish();
        assert!(peak.anon_kib > 60 << 10, "{peak:?}");
        assert!(peak.beyond_pool_kib >= peak.anon_kib, "{peak:?}");
    }
}
