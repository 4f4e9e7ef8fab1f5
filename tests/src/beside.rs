//! What goes on beside a cluster: donors more than its own, and somebody who does something all the
//! time.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::{
    cluster::{Cluster, binary},
    shell,
};

/// A donor beside that of the cluster, a failure domain of its own; gone when dropped.
#[derive(Debug)]
pub struct Donor {
    name: String,
    child: Child,
}

impl Donor {
    /// Starts one that lends `lend`; metad knows it a moment later.
    pub fn start(cluster: &Cluster, name: &str, lend: &str) -> Result<Self> {
        let run = cluster.dir().join(name);
        fs::create_dir(&run)?;
        let log = File::create(cluster.dir().join(format!("{name}.log")))?;
        let metad = format!("unix:{}", cluster.run_dir().join("metad.sock").display());
        let mut command = Command::new(binary());
        command.args(["donor", "--lend", lend, "--huge-pages", "never"]);
        command.args(["--donor-name", name, "--failure-domain", name]);
        command.args(["--metad", &metad, "--run-dir"]).arg(&run);
        command.arg("--state-dir").arg(run.join("state"));
        command
            .env_remove("HARBOUR_FAILPOINT")
            .env_remove("HARBOUR_CONFIG");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting donor {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    /// Its name at metad.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Donor {
    fn drop(&mut self) {
        shell::kill_group(&self.child, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Somebody who does something all the time: over when dropped, before the cluster is.
#[derive(Debug)]
pub struct Often {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Often {
    /// Begins, in a thread of its own.
    pub fn start(mut work: impl FnMut() + Send + 'static) -> Self {
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                work();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self {
            stop,
            rounds,
            thread: Some(thread),
        }
    }

    fn over(&mut self) -> thread::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), thread::JoinHandle::join)
    }

    /// Ends it, and tells how often it did its work.
    ///
    /// # Panics
    /// With `why`, when its work panicked.
    pub fn end(mut self, why: &str) -> u64 {
        assert!(self.over().is_ok(), "{why}");
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Often {
    fn drop(&mut self) {
        let _ = self.over();
    }
}
