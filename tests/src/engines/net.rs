//! A network namespace for an engine: its firewall rules, bridges and forwarding end with it, and
//! the machine's own network is never touched.

use std::{
    fs::File,
    net::{SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::shell;

const UP_LIMIT: Duration = Duration::from_secs(10);

/// A network namespace in which the loopback interface is up; gone when the last one in it is.
#[derive(Debug)]
pub struct Net {
    namespace: File,
}

impl Net {
    /// Makes one.
    pub fn new() -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "engines run in namespaces: run this as root"
        );
        // A namespace is a thread's: this one makes it, keeps a file of it, and ends.
        apart(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            shell::check("ip", ["link", "set", "lo", "up"], UP_LIMIT)?;
            let namespace = File::open("/proc/thread-self/ns/net")?;
            Ok(Self { namespace })
        })
    }

    /// `program` with the environment of `like`, in this namespace. It dies with the thread that
    /// starts it.
    pub fn command(&self, like: &Command) -> Command {
        let own = format!(
            "--net=/proc/{}/fd/{}",
            std::process::id(),
            self.namespace.as_raw_fd()
        );
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter", &own]);
        command.arg(like.get_program()).args(like.get_args());
        for (key, value) in like.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        if let Some(dir) = like.get_current_dir().map(Path::to_owned) {
            command.current_dir(dir);
        }
        command
    }

    /// A listener in this namespace, which this process can serve.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        apart(|| {
            setns(&self.namespace, CloneFlags::CLONE_NEWNET)
                .context("entering the engine's network")?;
            TcpListener::bind(address).with_context(|| format!("listening at {address}"))
        })
    }
}

/// Runs `work` on a thread that ends with it, and what it does to itself too.
fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(_) => bail!("the thread in the engine's network panicked"),
    })
}
