//! Namespaces around a measurement: mount, network and process IDs.
//!
//! Engines under test mount file systems, start daemons and write firewall rules. In namespaces of
//! their own all of that is taken away by the kernel at the end, whatever the end was: a clean
//! exit, an error, ctrl-C or SIGKILL. Three processes of this binary are involved:
//!
//! - the *outer* one, which waits and removes the directories afterwards;
//! - process 1 of the namespaces, which only reaps orphans;
//! - the *inner* one, which measures.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::wait::{WaitStatus, wait},
    unistd::Pid,
};

use crate::command;

/// Tells a process of this binary which of the three it is.
const STAGE: &str = "HARBOUR_BENCH_STAGE";
/// Tells the inner process its short directory.
const SHORT: &str = "HARBOUR_BENCH_SHORT";
/// How long the inner process has to end after ctrl-C before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Directories of one run; the outer process removes them.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// For sockets and mount points: a short path, because socket addresses and mount options
    /// have narrow limits.
    pub(crate) short: PathBuf,
    /// For bulk: on the same disk as the data sets.
    pub(crate) work: PathBuf,
}

/// What became of [`enter`].
pub(crate) enum Entered {
    /// This is the inner process: measure.
    Inside(Place),
    /// The inner process has run and ended with this code.
    Finished(ExitCode),
}

/// Goes into the sandbox. `data` must exist; `data`/work belongs to this run alone.
pub(crate) fn enter(data: &Path) -> anyhow::Result<Entered> {
    let work = data.join("work");
    match std::env::var(STAGE).as_deref() {
        Ok("inside") => {
            let short = std::env::var_os(SHORT).context("the sandbox lost its short directory")?;
            command::run(std::process::Command::new("ip").args(["link", "set", "lo", "up"]))?;
            Ok(Entered::Inside(Place {
                short: short.into(),
                work,
            }))
        }
        Ok("init") => init().map(Entered::Finished),
        _ => outer(data, &work).map(Entered::Finished),
    }
}

fn this_command(stage: &str) -> anyhow::Result<Vec<std::ffi::OsString>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut words = vec![
        "env".into(),
        format!("{STAGE}={stage}").into(),
        program.into_os_string(),
    ];
    words.extend(std::env::args_os().skip(1));
    Ok(words)
}

/// Process 1: starts the inner process and reaps whatever daemons leave behind.
fn init() -> anyhow::Result<ExitCode> {
    let words = this_command("inside")?;
    let child = std::process::Command::new(&words[0])
        .args(&words[1..])
        .spawn()?;
    let child = Pid::from_raw(i32::try_from(child.id())?);
    loop {
        match wait().context("cannot wait for the measuring process")? {
            WaitStatus::Exited(pid, code) if pid == child => {
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
            }
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                return Ok(ExitCode::from(
                    128 + u8::try_from(signal as i32).unwrap_or(0),
                ));
            }
            _ => {}
        }
    }
}

fn outer(data: &Path, work: &Path) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "measuring mounts file systems: run as root"
    );
    let lock = std::fs::File::create(data.join(".lock")).with_context(|| {
        format!(
            "{} is not a data directory: run `harbour-bench data`",
            data.display()
        )
    })?;
    lock.try_lock()
        .with_context(|| format!("another run uses {}", data.display()))?;
    remove(work)?;
    std::fs::create_dir(work).with_context(|| format!("cannot create {}", work.display()))?;
    let short = tempfile::Builder::new().prefix("hb-").tempdir_in("/tmp")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(supervise(short.path()))?;
    // The namespaces are gone, and with them every mount below these directories.
    remove(work)?;
    Ok(code)
}

async fn supervise(short: &Path) -> anyhow::Result<ExitCode> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut child = tokio::process::Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
        ])
        .args(["--mount-proc", "--kill-child=KILL"])
        .args(this_command("init")?)
        .env(SHORT, short)
        .spawn()
        .context("cannot run setpriv and unshare (package util-linux)")?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        status = child.wait() => {
            let code = status?.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            return Ok(ExitCode::from(code));
        }
        // A terminal gives ctrl-C to the inner process as well, so it is ending already.
        _ = interrupt.recv() => {
            let _ = tokio::time::timeout(GRACE, child.wait()).await;
        }
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    let _ = child.kill().await;
    Ok(ExitCode::from(130))
}

/// Removes a directory tree that may not exist.
pub(crate) fn remove(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
