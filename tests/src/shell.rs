//! Running other programs: always with a deadline, never on a terminal, output kept for messages.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// How often a child is looked at while waiting for it.
const POLL: Duration = Duration::from_millis(5);

/// How much of each stream a message shows.
const SHOWN_BYTES: usize = 6000;

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error, lossily as text.
    pub stderr: String,
    /// Wall time.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// An error with everything that was printed, unless the program succeeded.
    pub fn ok(self) -> Result<Self> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}\n{}{}",
                self.command,
                self.status,
                end_of(&self.text()),
                end_of(&self.stderr)
            );
        }
        Ok(self)
    }
}

/// Runs `command` to its end; its whole process group is killed at the deadline.
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    let line = line(command);
    // Files, not pipes: a child that prints more than a pipe holds must not wait for us, nor a
    // daemon that it left behind keep us waiting for the end of the stream.
    let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting `{line}`"))?;
    let status = wait(&mut child, started + limit)?;
    let elapsed = started.elapsed();
    let (stdout, stderr) = (read_all(&mut out)?, read_all(&mut err)?);
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let Some(status) = status else {
        bail!(
            "`{line}` was not done after {limit:?}\n{}{}",
            end_of(&String::from_utf8_lossy(&stdout)),
            end_of(&stderr)
        );
    };
    Ok(Output {
        command: line,
        status,
        stdout,
        stderr,
        elapsed,
    })
}

/// [`run`] of a program and its arguments, which has to succeed.
pub fn check<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
    limit: Duration,
) -> Result<Output> {
    run(Command::new(program).args(args), limit)?.ok()
}

/// Waits for `child` until `deadline`, then kills its process group. `None` when it was killed.
pub fn wait(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            kill_group(child, Signal::SIGKILL);
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// Sends `signal` to a child started as the leader of its own group, and to all it started.
pub fn kill_group(child: &Child, signal: Signal) {
    if let Ok(id) = i32::try_from(child.id()) {
        // The group may be gone already: that is what is wanted.
        let _ = killpg(Pid::from_raw(id), signal);
    }
}

/// Asks `probe` until it gives something or `limit` has passed.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not so after {limit:?}");
        }
        thread::sleep(POLL);
    }
}

/// The last part of what a program printed, for a message.
fn end_of(text: &str) -> &str {
    let from = text.len().saturating_sub(SHOWN_BYTES);
    text.get(text.ceil_char_boundary(from)..).unwrap_or(text)
}

fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

fn read_all(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
