//! Running other programs: always with a deadline, never with an unread pipe.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// Longest that any one program may run.
pub(crate) const DEADLINE: Duration = Duration::from_secs(900);
/// Output of a program kept for its caller; more is an error.
const OUTPUT_MAX: usize = 64 << 20;
/// End of the error output kept for messages.
const STDERR_MAX: usize = 4 << 10;

/// Writes a line of progress to standard error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes results to standard output; a closed pipe ends quietly.
pub(crate) fn say(text: &str) -> io::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Where `name` lies in `PATH` or the usual places of system programs.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Runs a program to its end and gives its standard output. A failure names the program and
/// quotes the end of its error output.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut too_long = false;
    timed(command, &mut |bytes| {
        too_long |= output.len() + bytes.len() > OUTPUT_MAX;
        if !too_long {
            output.extend_from_slice(bytes);
        }
    })?;
    anyhow::ensure!(
        !too_long,
        "{} printed more than {OUTPUT_MAX} bytes",
        name_of(command)
    );
    Ok(output)
}

/// Runs a program to its end, gives its standard output to `sink` as it comes, and returns the
/// seconds from before its start until it was waited for.
pub(crate) fn timed(command: &mut Command, sink: &mut dyn FnMut(&[u8])) -> anyhow::Result<f64> {
    let name = name_of(command);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let _watch = Watch::start(&child, DEADLINE);
    let mut errors = child.stderr.take().context("no pipe")?;
    let errors = thread::spawn(move || tail(&mut errors));
    let mut output = child.stdout.take().context("no pipe")?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => sink(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read from {name}")),
        }
    }
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for {name}"))?;
    let seconds = started.elapsed().as_secs_f64();
    let errors = errors.join().unwrap_or_default();
    succeeded(&name, status, &errors)?;
    Ok(seconds)
}

/// An error unless `status` is success.
pub(crate) fn succeeded(name: &str, status: ExitStatus, errors: &str) -> anyhow::Result<()> {
    anyhow::ensure!(status.success(), "{name}: {status}: {}", errors.trim());
    Ok(())
}

/// The name of the program that a command would run.
pub(crate) fn name_of(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program
        .file_name()
        .unwrap_or(program.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn tail(from: &mut impl io::Read) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let surplus = kept.len().saturating_sub(STDERR_MAX);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Kills a child's process group when it outlives its deadline.
pub(crate) struct Watch {
    _cancel: mpsc::Sender<()>,
}

impl Watch {
    /// Watches `child`, which leads its own process group, until the value is dropped.
    pub(crate) fn start(child: &Child, deadline: Duration) -> Self {
        let (cancel, cancelled) = mpsc::channel::<()>();
        let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
        thread::spawn(move || {
            if cancelled.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
        });
        Self { _cancel: cancel }
    }
}

/// A background program that is ended when this value is dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program; what it prints goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let name = name_of(command);
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        Ok(Self {
            name,
            child,
            log: log.to_owned(),
        })
    }

    /// Its process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` says so; an error when the program ends or `deadline` passes first.
    pub(crate) fn wait_ready(
        &mut self,
        deadline: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> anyhow::Result<()> {
        let end = Instant::now() + deadline;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!(
                    "{} ended early ({status}): {}",
                    self.name,
                    self.last_words()
                );
            }
            anyhow::ensure!(
                Instant::now() < end,
                "{} is not ready after {deadline:?}: {}",
                self.name,
                self.last_words()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        File::open(&self.log)
            .map(|mut file| tail(&mut file))
            .unwrap_or_default()
            .trim()
            .to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX));
        let _ = nix::sys::signal::kill(group, Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn output_errors_and_deadlines_come_back() {
        assert_eq!(
            run(Command::new("sh").args(["-c", "echo out; echo err >&2"])).unwrap(),
            b"out\n"
        );
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("sh") && error.contains("why"), "{error}");
        assert!(run(&mut Command::new("no-such-program-here")).is_err());
        let mut child = Command::new("sleep")
            .arg("60")
            .process_group(0)
            .spawn()
            .unwrap();
        let _watch = Watch::start(&child, Duration::from_millis(20));
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_daemon_that_ends_early_is_an_error_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(
            Command::new("sh").args(["-c", "echo no room; exit 1"]),
            &dir.path().join("log"),
        )
        .unwrap();
        let error = daemon
            .wait_ready(Duration::from_secs(10), || false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("no room"), "{error}");
    }
}
