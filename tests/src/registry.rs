//! Debian's `docker-registry` on an ephemeral port of the loopback interface.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{fixtures, shell};

const START_LIMIT: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 5;

/// A running registry; it and all it stores are gone when this is dropped.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    address: SocketAddr,
    dir: TempDir,
}

impl Registry {
    /// Starts an empty one and waits until it answers.
    pub fn start() -> Result<Self> {
        // The port is free when asked for and may be taken a moment later: so several attempts.
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match Self::attempt() {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        bail!("docker-registry: {:#}", last.context("never tried")?)
    }

    /// Starts one and pushes test images into it.
    pub fn with(names: &[&str]) -> Result<Self> {
        let registry = Self::start()?;
        fixtures::push(&registry.host(), names)?;
        Ok(registry)
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Reference of a test image in this registry.
    pub fn image(&self, name: &str) -> String {
        format!("{}/harbour/{name}:1", self.address)
    }

    fn attempt() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("harbour-registry.")
            .tempdir()?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}/data}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: {address}}}\n",
            dir.path().display()
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config)?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("starting docker-registry (package docker-registry)")?;
        let mut registry = Self {
            child,
            address,
            dir,
        };
        shell::until("docker-registry answers", START_LIMIT, || {
            registry.answers()
        })?;
        Ok(registry)
    }

    fn answers(&mut self) -> Result<Option<()>> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            bail!("it ended with {status}\n{log}");
        }
        let Ok(mut stream) = TcpStream::connect_timeout(&self.address, Duration::from_secs(1))
        else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
        let mut head = [0_u8; 12];
        Ok(stream
            .read_exact(&mut head)
            .is_ok_and(|()| head.ends_with(b" 200"))
            .then_some(()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        shell::kill_group(&self.child, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
