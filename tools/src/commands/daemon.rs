//! What long-running subcommands share: pid files and parents.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
    unistd::Pid,
};

use super::Context;
use crate::failure::{self, Code};

/// Longest wait for a process that was killed to be gone.
const DYING_LIMIT: Duration = Duration::from_secs(3);
/// Between two looks at it.
const DYING_PAUSE: Duration = Duration::from_millis(10);

/// A pid file that is held locked while its process lives. The lock, not the number in it, tells
/// whether the process lives: a number may have been given to another process since.
pub(super) struct PidFile {
    _lock: Flock<fs::File>,
    path: PathBuf,
}

impl PidFile {
    /// Takes the file of `what`, or says which process has it.
    pub(super) fn take(context: &Context, what: &str) -> anyhow::Result<Self> {
        let path = context.places.pid_file(what);
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o644)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let mut lock = lock_after_the_dead(file, &path).map_err(|pid| {
            failure::failure(
                Code::Failed,
                format!(
                    "{what} already runs with {} (process {})",
                    context.places.run.display(),
                    pid.trim()
                ),
                "stop it with harbour down, or give another --run-dir, --state-dir and --mount",
            )
        })?;
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self { _lock: lock, path })
    }
}

/// Locks a pid file. One whose process was killed and is not gone yet, as its memory takes a moment to go
/// back, is waited for; of one that lives the number is given.
fn lock_after_the_dead(mut file: fs::File, path: &Path) -> Result<Flock<fs::File>, String> {
    let deadline = Instant::now() + DYING_LIMIT;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, _)) => file,
        };
        let pid = fs::read_to_string(path).unwrap_or_default();
        if Instant::now() >= deadline || !is_dying(pid.trim()) {
            return Err(pid);
        }
        thread::sleep(DYING_PAUSE);
    }
}

/// Whether a process has ended, or its first thread has and the others are about to.
fn is_dying(pid: &str) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    // The name before it may hold anything.
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.is_some_and(|state| state.starts_with(['Z', 'X']))
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The process that holds the pid file of `what`, if one does.
pub(super) fn holder(context: &Context, what: &str) -> Option<Pid> {
    let path = context.places.pid_file(what);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .ok()?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(_) => None,
        Err(_) => fs::read_to_string(&path)
            .ok()?
            .trim()
            .parse()
            .ok()
            .map(Pid::from_raw),
    }
}

/// Makes this process end when its parent does, so that a supervisor that is killed leaves nothing
/// behind.
pub(super) fn follow_parent(supervised: bool) -> anyhow::Result<()> {
    if !supervised {
        return Ok(());
    }
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("cannot follow the parent process")?;
    // The parent may have ended before that call.
    anyhow::ensure!(
        nix::unistd::getppid() != Pid::from_raw(1),
        "the supervisor has gone"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::process::Command;

    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living() {
        assert!(!is_dying(&std::process::id().to_string()));
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id().to_string();
        // It is a zombie until it is waited for.
        let limit = Instant::now() + Duration::from_secs(10);
        while !is_dying(&pid) {
            assert!(Instant::now() < limit, "it ends by itself");
            thread::sleep(DYING_PAUSE);
        }
        child.wait().unwrap();
    }

    #[test]
    fn who_lives_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        let open = || {
            let mut options = fs::OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true);
            options.open(&path).unwrap()
        };
        let mut held = lock_after_the_dead(open(), &path).unwrap();
        write!(held, "{}", std::process::id()).unwrap();
        let start = Instant::now();
        let named = lock_after_the_dead(open(), &path).unwrap_err();
        assert_eq!(named, std::process::id().to_string());
        assert!(start.elapsed() < DYING_LIMIT);
    }
}
