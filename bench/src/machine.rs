//! The machine and the code that a report is of.

use std::{
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// What a reader needs to judge the figures. Names no host and no path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Cores that are online.
    pub(crate) cores: usize,
    /// Processor model.
    pub(crate) processor: String,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// Kernel release.
    pub(crate) kernel: String,
    /// Distribution.
    pub(crate) system: String,
    /// Commit of the sources, `+` after it when there were changes.
    pub(crate) commit: String,
    /// Start of the run.
    pub(crate) started_unix_s: u64,
    /// Load average over one minute at the start: other people's work.
    pub(crate) load: String,
}

impl Machine {
    /// Looks around.
    pub(crate) fn describe() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name))
                .map(|rest| {
                    rest.trim_start_matches([' ', '\t', ':', '='])
                        .trim_matches('"')
                        .to_owned()
                })
                .unwrap_or_else(|| "unknown".to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            processor: field(&read("/proc/cpuinfo"), "model name"),
            memory_mib: memory
                .split(' ')
                .next()
                .and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or(0)
                / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: field(&read("/etc/os-release"), "PRETTY_NAME"),
            commit: commit(),
            started_unix_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or("")
                .to_owned(),
        }
    }

    /// Two lines for a table's head.
    pub(crate) fn text(&self) -> String {
        format!(
            "{} cores ({}), {} MiB, Linux {}, {}.\nCommit {}, load {} at the start.\n",
            self.cores,
            self.processor,
            self.memory_mib,
            self.kernel,
            self.system,
            self.commit,
            self.load
        )
    }
}

fn commit() -> String {
    let git = |args: &[&str]| {
        Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(args)
            .output()
            .ok()
            .filter(|output| output.status.success())
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) => {
            // Reports of the run before do not make the code another one.
            let changed = git(&["status", "--porcelain", "--", ":/", ":!/bench/results"])
                .is_some_and(|text| !text.is_empty());
            if changed { commit + "+" } else { commit }
        }
        None => "unknown".to_owned(),
    }
}
