//! Asking an engine's own programs, with an end to the wait and to what is read.

use std::{
    ffi::OsStr,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::Context as _;

use super::Release;
use crate::bounded;

/// The most that is taken of either stream.
const SAID_MAX: u64 = 4 << 20;

/// How long a program may take to say its version.
pub const SOON: Duration = Duration::from_secs(10);

/// What a program said.
#[derive(Debug)]
pub struct Answer {
    /// Whether it ended well.
    pub good: bool,
    /// Its standard output.
    pub said: String,
    /// Its standard error.
    pub complaint: String,
}

impl Answer {
    /// The last lines of what it complained of, for a message.
    pub fn why(&self) -> String {
        let text = match self.complaint.trim() {
            "" => self.said.trim(),
            text => text,
        };
        let lines: Vec<&str> = text.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }
}

/// Finds a program where the shell would, or where administrators' programs are.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Runs a program to its end.
///
/// # Errors
/// One that cannot be started, or that was not done in time and was killed.
pub fn ask<S: AsRef<OsStr>>(
    program: &Path,
    args: impl IntoIterator<Item = S>,
    limit: Duration,
) -> anyhow::Result<Answer> {
    let name = program.display();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = bounded::poll(limit, || match child.try_wait() {
        Ok(None) => None,
        other => Some(other),
    });
    let Some(status) = status else {
        let _ = child.kill();
        let _ = child.wait();
        anyhow::bail!("{name} was not done after {} s", limit.as_secs());
    };
    let status = status.with_context(|| format!("cannot wait for {name}"))?;
    // What it left running may hold the pipes open.
    let text = |reader: Option<thread::JoinHandle<String>>| {
        let reader = reader?;
        bounded::poll(SOON, || reader.is_finished().then_some(()))?;
        reader.join().ok()
    };
    Ok(Answer {
        good: status.is_some_and(|status| status.success()),
        said: text(out).unwrap_or_default(),
        complaint: text(err).unwrap_or_default(),
    })
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> Option<thread::JoinHandle<String>> {
    let mut pipe = pipe?;
    let read = move || {
        let mut bytes = Vec::new();
        let _ = (&mut pipe).take(SAID_MAX).read_to_end(&mut bytes);
        // What goes beyond is thrown away, so that the program does not wait for us.
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        String::from_utf8_lossy(&bytes).into_owned()
    };
    thread::Builder::new().name("ask".into()).spawn(read).ok()
}

/// The version of a program, if it is here and says it.
pub fn release(program: &Path) -> anyhow::Result<Release> {
    let answer = ask(program, ["--version"], SOON)?;
    Release::find(&answer.said)
        .with_context(|| format!("{} says no version: {}", program.display(), answer.why()))
}
