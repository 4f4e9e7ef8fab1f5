//! The TCP transport beside the same link used plainly: iperf3, and a bare socket's round trip; and
//! a file read through the mount of a cluster over it.
//!
//! Two network namespaces joined by a pair of virtual interfaces. A child in the far one lends
//! memory, answers bare round trips and runs iperf3's server; everything is measured from the near
//! one, turn about.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_pool::{
    tcp::TcpTransport,
    token::{RegionKey, Token},
    transport::{Access, Read, RegionId, Transport, Write},
};
use serde::{Deserialize, Serialize};

use crate::{
    command,
    fio::{self, Job},
    mounts,
    report::{GB_PER_S, MICROS, Report},
    sandbox::Place,
};

mod cluster;
pub(crate) mod far;

use cluster::Cluster;

/// The transport.
pub(crate) const TCP: &str = "harbour-tcp";
/// The same link's throughput.
pub(crate) const IPERF: &str = "iperf3";
/// A file read from its start to its end through the mount, nothing cached, digests checked.
pub(crate) const FILE: &str = "file-1m";
/// The same link's round trip, of the same sizes.
pub(crate) const SOCKET: &str = "socket";

const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// Bytes that are lent, and read through in turn.
const LENT_BYTES: u64 = 256 << 20;
/// Operations of one batch: what a reader that reads ahead has under way.
const BATCH: usize = 8;
const MIB: usize = 1 << 20;
/// Bytes of a short read.
const SHORT: usize = 4096;
/// Length of a request on the wire, which bare round trips send too.
const ASKED: usize = 32;
/// Longest time of one operation.
const LIMIT: Duration = Duration::from_secs(20);

/// What the far side says once it stands.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    donor: SocketAddr,
    echo: SocketAddr,
    /// Tokens of the region, read and write.
    tokens: [[u8; 32]; 2],
}

/// The far side. Dropped, it ends.
struct Far {
    child: Child,
    _stdin: ChildStdin,
    ready: Ready,
}

/// Runs it.
pub(crate) fn run(common: &crate::Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(5);
    let time = Duration::from_millis(if common.quick { 300 } else { 2000 });
    let mut report = Report::new("link", rounds, common.quick, &[IPERF, SOCKET]);
    let far = Far::start()?;
    let transport = far.connect()?;
    fill(&transport)?;
    let mut echo = TcpStream::connect(far.ready.echo)?;
    echo.set_nodelay(true)?;
    let iperf = command::find("iperf3");
    if iperf.is_none() {
        report.skip(IPERF, "it is not installed");
    }
    let cluster = Cluster::start(common, place, far.child.id())?;
    for round in 0..rounds {
        command::note(&format!("round {} of {rounds}: link", round + 1));
        for (work, reverse) in [("read-1m", true), ("write-1m", false)] {
            if iperf.is_some() {
                let found = iperf3(reverse, time, place);
                match found {
                    Ok(rate) => report.add(work, "", IPERF, GB_PER_S, rate),
                    Err(why) => report.skip(IPERF, why),
                }
            }
            let rate = if reverse {
                reads(&transport, BATCH, time)?
            } else {
                writes(&transport, time)?
            };
            report.add(work, "", TCP, GB_PER_S, rate);
        }
        report.add(
            "read-1m one by one",
            "",
            TCP,
            GB_PER_S,
            reads(&transport, 1, time)?,
        );
        let plain = iperf.is_some().then(|| iperf3(true, time, place));
        match plain {
            Some(Ok(rate)) => report.add(FILE, "", IPERF, GB_PER_S, rate),
            Some(Err(why)) => report.skip(IPERF, why),
            None => {}
        }
        mounts::drop_caches(2 * cluster.len)?;
        let job = Job::Aligned(MIB as u64);
        let rate = fio::run(job, &cluster.file, cluster.len, 0, true, u64::from(round))?;
        report.add(FILE, "", TCP, GB_PER_S, rate.bytes / 1e9);
        report.add("read-4k", "", SOCKET, MICROS, round_trips(&mut echo, time)?);
        report.add("read-4k", "", TCP, MICROS, short_reads(&transport, time)?);
    }
    Ok(report)
}

impl Far {
    /// Starts it in a network namespace of its own and joins that to this one.
    fn start() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("cannot find the path of this program")?;
        let mut child = Command::new("unshare")
            .args(["--net", "--"])
            .arg(own)
            .arg("far-side")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run unshare (package util-linux)")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (mut stdin, stdout) = (stdin.context("no stdin")?, stdout.context("no stdout")?);
        let mut lines = BufReader::new(stdout).lines();
        let mut line =
            || -> anyhow::Result<String> { Ok(lines.next().context("the far side ended early")??) };
        // It is in its namespace once it has spoken.
        anyhow::ensure!(line()? == "here", "the far side said something else");
        let pid = child.id().to_string();
        ip(&[
            "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &pid,
        ])?;
        ip(&["addr", "add", &format!("{NEAR}/24"), "dev", "near"])?;
        ip(&["link", "set", "near", "up"])?;
        writeln!(stdin, "go")?;
        let ready = serde_json::from_str(&line()?).context("the far side is not ready")?;
        Ok(Self {
            child,
            _stdin: stdin,
            ready,
        })
    }

    fn connect(&self) -> anyhow::Result<TcpTransport> {
        let [read, write] = self.ready.tokens.map(|token| Some(Token(token)));
        let key = RegionKey {
            region: RegionId(0),
            read,
            write,
        };
        let deadline = Instant::now() + LIMIT;
        TcpTransport::connect(
            self.ready.donor,
            None,
            0,
            Access::ReadWrite,
            &[key],
            deadline,
        )
        .context("cannot reach the donor of the far side")
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // The end of its standard input is its end; this is for one that hangs.
        if self.child.kill().is_ok() {
            let _status = self.child.wait();
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    command::run(Command::new("ip").args(arguments)).map(drop)
}

/// GB/s of iperf3 with one connection; from the far side when `reverse`.
fn iperf3(reverse: bool, time: Duration, place: &Place) -> anyhow::Result<f64> {
    let mut command = Command::new("iperf3");
    command
        .args(["--client", &FAR.to_string(), "--json", "--length", "1M"])
        .args(["--time", &time.as_secs().max(1).to_string()])
        .current_dir(&place.short);
    if reverse {
        command.arg("--reverse");
    }
    let answer: serde_json::Value = serde_json::from_slice(&command::run(&mut command)?)?;
    let bits = answer["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3 gives no rate")? / 8e9)
}

/// Bytes at `offset` of what is lent: a read that goes astray shows.
fn byte_at(offset: u64) -> u8 {
    (offset / SHORT as u64).wrapping_mul(0x9E37_79B9) as u8
}

fn fill(transport: &TcpTransport) -> anyhow::Result<()> {
    for start in (0..LENT_BYTES).step_by(MIB) {
        let pages = (start..start + MIB as u64).step_by(SHORT);
        let bytes: Vec<u8> = pages.flat_map(|page| [byte_at(page); SHORT]).collect();
        let write = Write {
            region: RegionId(0),
            offset: start,
            from: &bytes,
        };
        transport.write(&[write], Instant::now() + LIMIT)?;
    }
    Ok(())
}

/// GB/s of reads of 1 MiB, `batch` at a time, through all that is lent and again.
fn reads(transport: &TcpTransport, batch: usize, time: Duration) -> anyhow::Result<f64> {
    let mut memory = vec![0; batch * MIB];
    let (mut at, mut bytes) = (0_u64, 0_u64);
    let start = Instant::now();
    while start.elapsed() < time {
        let first = at;
        let mut reads: Vec<_> = memory
            .chunks_mut(MIB)
            .map(|into| {
                let offset = at;
                at = (at + MIB as u64) % LENT_BYTES;
                Read {
                    region: RegionId(0),
                    offset,
                    into,
                }
            })
            .collect();
        transport.read(&mut reads, Instant::now() + LIMIT)?;
        bytes += (batch * MIB) as u64;
        let last = memory.len() - 1;
        let wanted = (first + last as u64) % LENT_BYTES;
        anyhow::ensure!(
            memory[0] == byte_at(first) && memory[last] == byte_at(wanted),
            "wrong bytes"
        );
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e9)
}

/// GB/s of writes of 1 MiB in batches, of what is there already.
fn writes(transport: &TcpTransport, time: Duration) -> anyhow::Result<f64> {
    let pages = (0..MIB as u64).step_by(SHORT);
    let memory: Vec<u8> = pages.flat_map(|page| [byte_at(page); SHORT]).collect();
    let batch: Vec<_> = (0..BATCH)
        .map(|_| Write {
            region: RegionId(0),
            offset: 0,
            from: &memory,
        })
        .collect();
    let mut bytes = 0_u64;
    let start = Instant::now();
    while start.elapsed() < time {
        transport.write(&batch, Instant::now() + LIMIT)?;
        bytes += (BATCH * MIB) as u64;
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e9)
}

/// Microseconds of one 4 KiB read, one after the other.
fn short_reads(transport: &TcpTransport, time: Duration) -> anyhow::Result<f64> {
    let mut into = [0; SHORT];
    let (mut at, mut count) = (0_u64, 0_u32);
    let start = Instant::now();
    while start.elapsed() < time {
        at = (at + 7919 * SHORT as u64) % LENT_BYTES;
        let read = Read {
            region: RegionId(0),
            offset: at,
            into: &mut into,
        };
        transport.read(&mut [read], Instant::now() + LIMIT)?;
        anyhow::ensure!(into[0] == byte_at(at), "wrong bytes");
        count += 1;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}

/// Microseconds of one bare round trip: as many bytes there and back as a read of 4 KiB takes.
fn round_trips(echo: &mut TcpStream, time: Duration) -> anyhow::Result<f64> {
    let mut into = [0; far::ANSWERED];
    let mut count = 0_u32;
    let start = Instant::now();
    while start.elapsed() < time {
        echo.write_all(&[1; ASKED])?;
        echo.read_exact(&mut into)?;
        count += 1;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}
