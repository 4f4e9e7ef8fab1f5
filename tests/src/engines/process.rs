//! A daemon with a log, and what it leaves behind.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{mounts, shell};

/// Until a daemon that was asked to end has ended.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Until what was killed is gone.
const GONE_LIMIT: Duration = Duration::from_secs(5);
/// Lines of a log shown when something fails.
const LOG_LINES: usize = 25;

/// A daemon; killed when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts `command`, which becomes the daemon itself, with its log in `dir`.
    pub(super) fn start(name: &'static str, dir: &Path, mut command: Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name, log, child })
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails when it has ended by itself.
    pub(super) fn alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}\n{}", self.name, self.end_of_log()),
        }
    }

    /// The last it has said.
    pub(super) fn end_of_log(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
        format!("log of {}:\n  {}", self.name, last.join("\n  "))
    }

    /// Sends a signal and waits until it has ended; kills it when that takes too long.
    pub(super) fn stop(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        // It may end by itself in between: that is what is wanted.
        let _ = kill(pid, signal);
        let deadline = Instant::now() + END_LIMIT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!(
                    "{} did not end within {END_LIMIT:?}\n{}",
                    self.name,
                    self.end_of_log()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills what engines leave below `dir`: shims that have its path among their words with all that
/// runs under them, and then the mounts.
pub(super) fn clear(dir: &Path) -> Result<()> {
    for shim in with_word(dir) {
        let family = family(shim);
        for pid in family.into_iter().rev() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    shell::until("shims are gone", GONE_LIMIT, || {
        Ok(with_word(dir).is_empty().then_some(()))
    })?;
    mounts::detach_below(dir)
}

/// Processes that were started with a path below `dir`, but this one.
fn with_word(dir: &Path) -> Vec<i32> {
    let prefix = dir.as_os_str().as_encoded_bytes();
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let shim = line.split(|b| *b == 0).next().unwrap_or_default();
        if !String::from_utf8_lossy(shim).contains("containerd-shim") {
            continue;
        }
        let words = line.split(|b| *b == 0);
        if pid as u32 != own && words.into_iter().any(|word| word.starts_with(prefix)) {
            found.push(pid);
        }
    }
    found
}

/// A process and all below it, the eldest first.
fn family(pid: i32) -> Vec<i32> {
    let mut family = vec![pid];
    let mut at = 0;
    while let Some(pid) = family.get(at).copied() {
        at += 1;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            family.extend(
                children
                    .split_whitespace()
                    .filter_map(|c| c.parse::<i32>().ok()),
            );
        }
    }
    family
}
