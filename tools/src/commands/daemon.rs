//! What long-running subcommands share: pid files and parents.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::PathBuf};

use anyhow::Context as _;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
    unistd::Pid,
};

use super::Context;
use crate::failure::{self, Code};

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
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, _)| {
            let pid = fs::read_to_string(&path).unwrap_or_default();
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
