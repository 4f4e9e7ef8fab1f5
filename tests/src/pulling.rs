//! Hosts that pull at the same time from a registry behind a slow cable.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    cluster::Part,
    hosts::{Family, Hosts},
    layers::{Entry, Layout, noise},
    shell,
};

/// Longest time of one pull, also of one that succeeds another that died.
pub const LIMIT: Duration = Duration::from_secs(60);
/// What frames, headers and manifests may add to the bytes of layers on the registry's cable.
pub const OVERHEAD: f64 = 1.08;
/// Lease of a pull.
pub const LEASE: Duration = Duration::from_secs(4);

/// metad is on the first host, donors on the next two, and the registry behind all that pull.
#[derive(Debug)]
pub struct Scene {
    /// The hosts.
    pub hosts: Hosts,
    registry: usize,
    rate_mbit: u32,
    layout: Layout,
    served: bool,
}

/// A pull under way.
#[derive(Debug)]
pub struct Pulling {
    /// Where.
    pub host: usize,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// What became of it.
#[derive(Debug)]
pub struct Done {
    /// Where.
    pub host: usize,
    /// It exited with 0.
    pub good: bool,
    /// One for each image.
    pub reports: Value,
    /// What it said on the way.
    pub text: String,
    /// When it ended.
    pub at: Instant,
}

impl Done {
    /// A number of all its reports together.
    pub fn sum(&self, key: &str) -> u64 {
        let reports = self.reports.as_array().into_iter().flatten();
        reports.filter_map(|report| report[key].as_u64()).sum()
    }
}

impl Scene {
    /// So many hosts that pull, at least three, and a registry that sends so many Mbit a second.
    pub fn new(pullers: usize, rate_mbit: u32) -> Result<Self> {
        let hosts = Hosts::new(pullers + 1, Family::V4)?;
        let lease = LEASE.as_secs().to_string();
        hosts.start(0, Part::Metad, &["--lease-s", &lease])?;
        for host in 1..=2 {
            let flags = ["--lend", "96MiB", "--huge-pages", "never"];
            hosts.start(host, Part::Donor, &flags)?;
        }
        hosts.wait_donors(2)?;
        let layout = Layout::create(&hosts.dir().join("layout"))?;
        Ok(Self {
            hosts,
            registry: pullers,
            rate_mbit,
            layout,
            served: false,
        })
    }

    /// Starts metad again, with the lease that it had.
    pub fn start_metad(&self) -> Result<()> {
        let lease = LEASE.as_secs().to_string();
        self.hosts.start(0, Part::Metad, &["--lease-s", &lease])
    }

    /// Puts an image into the registry whose layers have one file of noise each, named `file-SEED` after
    /// what it follows from; gives its reference.
    pub fn serve(&mut self, tag: &str, seeds: &[u64], bytes: usize) -> Result<String> {
        let layer = |seed: &u64| vec![Entry::file(format!("file-{seed}"), noise(*seed, bytes))];
        let layers: Vec<_> = seeds.iter().map(layer).collect();
        self.layout.image(tag, &layers)?;
        let (reference, name) = (self.layout.reference(tag), format!("many/parts:{tag}"));
        if self.served {
            self.hosts.push_image(self.registry, &reference, &name)?;
        } else {
            self.hosts.serve_image(self.registry, &reference, &name)?;
            self.hosts.slow_down(self.registry, self.rate_mbit)?;
            self.served = true;
        }
        Ok(format!("{}/{name}", self.hosts.registry(self.registry)))
    }

    /// Begins to pull on a host.
    pub fn pull(&self, host: usize, references: &[String]) -> Result<Pulling> {
        let dir = self.hosts.host_dir(host);
        let (out, err) = (dir.join("pull.json"), dir.join("pull.log"));
        let mut command = self.hosts.command(host, ["pull", "--insecure", "--json"]);
        command.args(["--jobs", "2", "--progress", "plain"]);
        command.args(references);
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()?;
        Ok(Pulling {
            host,
            child,
            out,
            err,
        })
    }

    /// Sends a signal to whatever pulls on a host.
    pub fn signal_pull(&self, host: usize, signal: &str) -> Result<()> {
        // The brackets keep the pattern from finding the shell that asks.
        let pattern = format!("[/]h{host}/run --mount .* pull ");
        let script = format!("pkill -{signal} -f -- '{pattern}' || true");
        self.hosts.shell(0, &script).map(drop)
    }

    /// Bytes that have left the registry's host.
    pub fn sent(&self) -> Result<u64> {
        // Of a line of this file the ninth figure is the bytes that were sent.
        let script = "sed -n 's/^ *eth0: *//p' /proc/net/dev | awk '{print $9}'";
        let text = self.hosts.shell(self.registry, script)?;
        Ok(text.text().trim().parse()?)
    }

    /// Who holds what and who waits.
    pub fn locks(&self) -> Result<Vec<Value>> {
        let locks = self.hosts.json(0, "locks")?;
        locks.as_array().cloned().context("not a list")
    }

    /// Waits until some pull has a layer of which bytes have come and others wait for it; gives its
    /// process.
    pub fn holder(&self) -> Result<u64> {
        shell::until("a layer is held and waited for", LIMIT, || {
            let locks = self.locks()?;
            let waits = |key: &Value| {
                let mut locks = locks.iter();
                locks.any(|lock| lock["state"] == "waits" && lock["key"] == *key)
            };
            let mut held = locks.iter().filter(|lock| lock["state"] == "held");
            let found =
                held.find(|lock| lock["done_bytes"].as_u64() > Some(0) && waits(&lock["key"]));
            Ok(found.and_then(|lock| lock["pid"].as_u64()))
        })
    }

    /// Waits for a pull to end.
    pub fn wait(&self, mut pulling: Pulling) -> Result<Done> {
        // `nsenter` stops with the program that it waits for, and nobody else lets it go on.
        let nsenter = Pid::from_raw(pulling.child.id().cast_signed());
        if pulling.child.try_wait()?.is_none() {
            kill(nsenter, Signal::SIGCONT)?;
        }
        let status = shell::wait(&mut pulling.child, Instant::now() + LIMIT)?;
        let at = Instant::now();
        let text = std::fs::read_to_string(&pulling.err)?;
        let host = pulling.host;
        let still = || format!("host {host} still pulls:\n{text}{}", self.hosts.logs());
        let status = status.with_context(still)?;
        let json = std::fs::read(&pulling.out)?;
        Ok(Done {
            host,
            good: status.success(),
            reports: serde_json::from_slice(&json).unwrap_or_default(),
            text,
            at,
        })
    }

    /// What metad has counts up, and nobody holds or waits for anything.
    pub fn at_rest(&self) -> Result<()> {
        shell::run(&mut self.hosts.command(0, ["audit"]), LIMIT)?.ok()?;
        let locks = self.locks()?;
        ensure!(locks.is_empty(), "claims of the dead: {locks:?}");
        Ok(())
    }
}
