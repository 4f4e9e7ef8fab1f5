//! Several hosts on one machine: network namespaces joined by a bridge, each with directories of
//! its own, and `harbour` running in them.
//!
//! Everything lives below one process, the *keel*: process 1 of a PID namespace, with a mount and a
//! network namespace of its own. It dies with the test that made it, however that ends, and the
//! kernel takes every process, mount, interface and namespace with it. The machine's own network
//! is never touched: the bridge is in the keel's namespace, and nothing leads out of it.
//!
//! A host is only a network namespace: all of them see one file system, so that shared memory would
//! reach from host to host. Parts are therefore told to use TCP. Hosts on RDMA devices ([`Seat`]) are
//! the other way round: soft RoCE does not work from one network namespace to another, so they share
//! the one of the test, and have mount namespaces in which each has a boot ID of its own. Hosts with
//! rooms ([`Hosts::in_rooms`]) have both, and a root directory each: what a page says can be typed there.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    cluster::{Part, Pulled, Turn, binary},
    shell::{self, Output},
};

mod net;
mod registry;
mod rooms;
mod seats;

pub use seats::Seat;

/// Until the keel stands.
const KEEL_LIMIT: Duration = Duration::from_secs(10);
/// One command on a host.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// One pull, on a slow machine that does other things too.
const PULL_LIMIT: Duration = Duration::from_secs(300);
/// Until parts answer, or are gone.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Port of metad.
const METAD_PORT: u16 = 7480;
/// Port of a donor.
const DONOR_PORT: u16 = 7481;
/// Lines of each log shown when something fails.
const LOG_LINES: usize = 15;

/// Which addresses are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// 10.77.0.N
    V4,
    /// fd77::N
    V6,
}

/// How hosts reach each other.
#[derive(Clone, Debug)]
enum Wires {
    /// Cables to a bridge.
    Cables(Family),
    /// The network of the test.
    Seats(Vec<Seat>),
    /// Cables to a bridge and a root directory each, by these names.
    Rooms(Vec<String>),
}

/// A set of hosts, numbered from 0; metad is on host 0.
#[derive(Debug)]
pub struct Hosts {
    dir: TempDir,
    wires: Wires,
    count: usize,
    keel: Child,
    /// Process 1 of the namespaces, as this process sees it.
    init: u32,
    _turn: Turn,
}

impl Hosts {
    /// Makes `count` hosts, at most 16, with nothing running on them.
    pub fn new(count: usize, family: Family) -> Result<Self> {
        Self::make(count, Wires::Cables(family))
    }

    fn make(count: usize, wires: Wires) -> Result<Self> {
        ensure!((1..=16).contains(&count), "{count} hosts");
        ensure!(
            nix::unistd::geteuid().is_root(),
            "hosts are made of namespaces: run this as root"
        );
        let turn = Turn::take()?;
        let dir = tempfile::Builder::new()
            .prefix("harbour.")
            .rand_bytes(8)
            .tempdir_in("/tmp")?;
        let ready = dir.path().join("ready");
        // Names of namespaces live under /run: in a file system of the keel's own they end with it.
        let script =
            "mount -t tmpfs run /run && mkdir /run/netns && touch \"$0\" && exec sleep infinity";
        let own = match wires {
            Wires::Cables(_) | Wires::Rooms(_) => ["--mount", "--pid", "--net"].as_slice(),
            Wires::Seats(_) => &["--mount", "--pid"],
        };
        let keel = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare"])
            .args(own)
            .args(["--fork", "--mount-proc", "--kill-child=KILL"])
            .args(["sh", "-c", script])
            .arg(&ready)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run setpriv and unshare (package util-linux)")?;
        let mut hosts = Self {
            dir,
            wires,
            count,
            keel,
            init: 0,
            _turn: turn,
        };
        let children = format!("/proc/{0}/task/{0}/children", hosts.keel.id());
        hosts.init = shell::until("the namespaces stand", KEEL_LIMIT, || {
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            let child = text
                .split_whitespace()
                .next()
                .and_then(|id| id.parse().ok());
            Ok(child.filter(|_| ready.exists()))
        })?;
        for host in 0..count {
            for name in ["state", "run", "mnt"] {
                std::fs::create_dir_all(hosts.host_dir(host).join(name))?;
            }
        }
        match &hosts.wires {
            Wires::Cables(_) => hosts.lay_cables()?,
            Wires::Seats(_) => hosts.part_ways()?,
            Wires::Rooms(names) => {
                hosts.lay_cables()?;
                hosts.furnish(names)?;
                return Ok(hosts);
            }
        }
        hosts.certify()?;
        Ok(hosts)
    }

    /// An authority of this cluster's own, and each host's certificate from it.
    fn certify(&self) -> Result<()> {
        let certs = |args: &[&str]| -> Result<()> {
            let mut command = Command::new(binary());
            command.arg("certs").args(args);
            command.arg("--dir").arg(self.authority());
            shell::run(&mut command, COMMAND_LIMIT)?.ok().map(drop)
        };
        certs(&["init"])?;
        (0..self.count).try_for_each(|host| {
            let address = self.address(host).to_string();
            certs(&["issue", &format!("h{host}"), "--san", &address])
        })
    }

    fn authority(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Top of all directories, visible to all hosts and to the test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Directory of one host, with `state`, `run`, `mnt` and logs.
    pub fn host_dir(&self, host: usize) -> PathBuf {
        self.dir.path().join(format!("h{host}"))
    }

    /// The address of a host.
    pub fn address(&self, host: usize) -> IpAddr {
        let number = u8::try_from(host + 1).unwrap_or(u8::MAX);
        match &self.wires {
            Wires::Cables(Family::V4) => Ipv4Addr::new(10, 77, 0, number).into(),
            Wires::Cables(Family::V6) => {
                Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()).into()
            }
            Wires::Seats(seats) => seats[host].address,
            Wires::Rooms(_) => Ipv4Addr::new(192, 0, 2, number).into(),
        }
    }

    /// A program in the namespaces, on no host: where the bridge is.
    fn in_keel(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args(["--mount", "--net", "--pid", "--", program]);
        command
    }

    /// A program on a host.
    pub fn on(&self, host: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.in_keel("nsenter");
        if !matches!(self.wires, Wires::Seats(_)) {
            command.arg(format!("--net=/run/netns/h{host}"));
        }
        if !matches!(self.wires, Wires::Cables(_)) {
            command.arg(format!("--mount={}", seats::namespace(host)));
        }
        command.arg("--");
        if let Wires::Rooms(names) = &self.wires {
            command.arg("chroot").arg(rooms::root(&names[host]));
            command.env("PATH", rooms::PATH);
        }
        command.arg(program);
        command.env_remove("HARBOUR_FAILPOINT");
        command.env_remove("HARBOUR_CONFIG");
        command
    }

    /// A shell script on a host, to its end, which has to be a good one.
    pub fn shell(&self, host: usize, script: &str) -> Result<Output> {
        shell::run(self.on(host, "sh").args(["-ec", script]), COMMAND_LIMIT)?
            .ok()
            .with_context(|| format!("on host {host}\n{}", self.logs()))
    }

    /// `harbour` on a host, with the flags that mean it.
    pub fn command<S: AsRef<std::ffi::OsStr>>(
        &self,
        host: usize,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let dir = self.host_dir(host);
        let mut command = self.on(host, binary());
        command.env("RUST_BACKTRACE", "1");
        for name in ["state", "run"] {
            command.arg(format!("--{name}-dir")).arg(dir.join(name));
        }
        command.arg("--mount").arg(dir.join("mnt"));
        if self.config_file().exists() {
            command.arg("--config").arg(self.config_file());
        }
        command
            .arg("--tls-dir")
            .arg(self.authority().join(format!("hosts/h{host}")));
        command.args(["--metad", &format!("https://{}", self.metad())]);
        match &self.wires {
            Wires::Cables(_) | Wires::Rooms(_) => command.args(["--transport", "tcp"]),
            Wires::Seats(seats) => command.args(["--rdma-device", &seats[host].rdma_device]),
        };
        command.args(args);
        command
    }

    /// Gives every command on every host this configuration file.
    pub fn configure(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(self.config_file(), text)?)
    }

    fn config_file(&self) -> PathBuf {
        self.dir.path().join("harbour.toml")
    }

    fn metad(&self) -> std::net::SocketAddr {
        (self.address(0), METAD_PORT).into()
    }

    /// Starts a part of `harbour` on a host, with more flags.
    pub fn start(&self, host: usize, part: Part, flags: &[&str]) -> Result<()> {
        self.start_in(host, part, flags, None)
    }

    /// The same in a cgroup, given by its file of processes.
    pub fn start_in(
        &self,
        host: usize,
        part: Part,
        flags: &[&str],
        group: Option<&Path>,
    ) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(host, part))?;
        let mut command = self.command(host, [part.name()]);
        match part {
            Part::Metad => command.args(["--listen", &self.metad().to_string()]),
            Part::Donor => {
                let at = std::net::SocketAddr::from((self.address(host), DONOR_PORT));
                command.args(["--listen", &at.to_string()]);
                command.args(["--donor-name", &format!("h{host}")])
            }
            Part::Node => command.args(["--node-name", &format!("h{host}")]),
        };
        command.args(flags);
        let mut command = match group {
            Some(processes) => within(processes, &command),
            None => command,
        };
        // Ends with the namespaces, not with this handle.
        let _child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(())
    }

    /// Sends a signal to a part, by the name that `kill` has for it: `KILL`, `STOP`, `TERM`.
    pub fn signal(&self, host: usize, part: Part, signal: &str) -> Result<()> {
        let pid = self.host_dir(host).join(format!("run/{}.pid", part.name()));
        self.shell(
            host,
            &format!("kill -{signal} \"$(cat {})\"", pid.display()),
        )?;
        Ok(())
    }

    /// A part's process ID as this process sees it.
    pub fn pid(&self, host: usize, part: Part) -> Result<u32> {
        let file = self.host_dir(host).join(format!("run/{}.pid", part.name()));
        let inside = std::fs::read_to_string(&file)
            .with_context(|| format!("reading {}", file.display()))?;
        let space = |id: &str| std::fs::read_link(format!("/proc/{id}/ns/pid")).ok();
        let ours = space(&self.init.to_string()).context("the namespaces are gone")?;
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("NSpid:"));
            let last = line.and_then(|line| line.split_whitespace().next_back());
            // One that has ended may lie there for ever: a stopped `nsenter` fetches no child.
            if status.contains("\nState:\tZ") {
                continue;
            }
            if last == Some(inside.trim()) && space(&id).as_ref() == Some(&ours) {
                return Ok(id.parse()?);
            }
        }
        anyhow::bail!("{} on host {host} does not run", part.name())
    }

    /// A path on the hosts, as this process reaches it through their mounts.
    pub fn seen(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix("/").unwrap_or(path);
        Path::new(&format!("/proc/{}/root", self.init)).join(below)
    }

    /// Waits until metad knows so many live donors.
    pub fn wait_donors(&self, count: usize) -> Result<Vec<Value>> {
        shell::until("the donors are known", READY_LIMIT, || {
            let donors = self.json(0, "donors").unwrap_or_default();
            let live = donors.as_array().into_iter().flatten();
            let live: Vec<_> = live
                .filter(|donor| donor["live"] == true)
                .cloned()
                .collect();
            Ok((live.len() == count).then_some(live))
        })
        .with_context(|| self.logs())
    }

    /// Waits until the mount of a host serves.
    pub fn wait_node(&self, host: usize) -> Result<()> {
        shell::until("the mount serves", READY_LIMIT, || {
            let status = self.json(host, "status").unwrap_or_default();
            Ok((status["node"]["ready"] == true).then_some(()))
        })
        .with_context(|| self.logs())
    }

    /// A listing as JSON.
    pub fn json(&self, host: usize, listing: &str) -> Result<Value> {
        let output = shell::run(&mut self.command(host, [listing, "--json"]), COMMAND_LIMIT)?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`{}` printed no JSON: {}", output.command, output.stderr))
    }

    /// Pulls on a host.
    pub fn pull(&self, host: usize, reference: &str) -> Result<Pulled> {
        let mut command = self.command(host, ["pull", "--insecure", "--json", reference]);
        let output = shell::run(&mut command, PULL_LIMIT)
            .and_then(Output::ok)
            .with_context(|| self.logs())?;
        let reports: Vec<Pulled> = serde_json::from_slice(&output.stdout)?;
        reports.into_iter().next().context("no report")
    }

    /// The merged view of a pulled image on a host, as a path there, once it is there.
    pub fn rootfs(&self, host: usize, image: &Pulled) -> Result<PathBuf> {
        let path = self.host_dir(host).join("mnt/images");
        let path = path.join(&image.registry).join(&image.repository);
        let path = path.join(&image.tag).join("rootfs");
        shell::until("the mount shows the image", READY_LIMIT, || {
            let there = self.on(host, "test").arg("-d").arg(&path).status()?;
            Ok(there.success().then_some(()))
        })
        .with_context(|| self.logs())?;
        Ok(path)
    }

    /// Ends of all logs, for messages.
    pub fn logs(&self) -> String {
        let mut shown = String::from("logs of the hosts:");
        for host in 0..self.count {
            for part in Part::ALL {
                let text = std::fs::read(self.log(host, part)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                let lines: Vec<_> = text.lines().collect();
                for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                    shown.push_str(&format!("\n  h{host} {}: {line}", part.name()));
                }
            }
        }
        shown
    }

    fn log(&self, host: usize, part: Part) -> PathBuf {
        self.host_dir(host).join(format!("{}.log", part.name()))
    }
}

/// `command`, which joins a cgroup first.
fn within(processes: &Path, command: &Command) -> Command {
    let mut joined = Command::new("sh");
    joined.args(["-ec", "echo $$ > \"$0\" && exec \"$@\""]);
    joined.arg(processes).arg(command.get_program());
    joined.args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => joined.env(key, value),
            None => joined.env_remove(key),
        };
    }
    joined
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // The kernel ends everything in the namespaces with their process 1.
        let _ = self.keel.kill();
        let _ = self.keel.wait();
        if std::thread::panicking() && std::env::var_os("HARBOUR_TEST_KEEP").is_some() {
            eprintln!("kept: {}", self.dir.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}
