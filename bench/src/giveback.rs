//! How long a donor takes to give back memory that its host needs, while it is read.
//!
//! A `harbour donor` that lends so much, all of it written, and keeps a floor free that leaves it
//! alone. It is frozen while another process takes memory from the host, so that all that is missing
//! is missing at once when it goes on: the clock runs from there until the host has got back what was
//! asked for, whoever held it. A reader on the same host has the pages mapped, reads all the time and
//! looks at what it gets.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_pool::{
    shm::ShmTransport,
    token::Token,
    transport::{Access, Read, Transport, Write},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    Common, command,
    command::Daemon,
    mounts,
    report::{MILLIS, Report},
    sandbox::Place,
};

/// Until the host has its memory back.
pub(crate) const GIVE_BACK: &str = "give back";
/// The longest time that one read of 64 KiB took meanwhile.
const READ: &str = "longest read meanwhile";
/// The donor under test.
pub(crate) const DONOR: &str = "donor";

/// What the donor has to spare before something takes memory from it.
const SPARE_BYTES: u64 = 256 << 20;
/// Beyond what is asked for, for what else goes on in the host while it is given back.
const NOISE_BYTES: u64 = 512 << 20;
/// How exact the kernel's sum of shared memory is: each processor keeps some pages to itself.
const SLACK_BYTES: u64 = 8 << 20;
/// Bytes of one write.
const WRITTEN: usize = 1 << 20;
/// Bytes of one read.
const READ_BYTES: usize = 64 << 10;
/// Longest wait for anything here.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(5);
    let (lent, asked) = if common.quick {
        (768 << 20, 512 << 20)
    } else {
        (6 << 30, 4 << 30)
    };
    let mut report = Report::new("giveback", rounds, common.quick, &[]);
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    report.settings.insert("lent".to_owned(), mib(lent));
    report.settings.insert("asked for".to_owned(), mib(asked));
    let needed = lent + asked + SPARE_BYTES + NOISE_BYTES;
    let available = meminfo("MemAvailable")?;
    if available < needed + (1 << 30) {
        report.skip(GIVE_BACK, format!("needs {} of memory", mib(needed)));
        return Ok(report);
    }
    for round in 0..rounds {
        command::note(&format!("round {} of {rounds}: {GIVE_BACK}", round + 1));
        let (took, longest) = once(common, place, lent, asked)?;
        report.add(GIVE_BACK, "", DONOR, MILLIS, took.as_secs_f64() * 1e3);
        report.add(READ, "", DONOR, MILLIS, longest.as_secs_f64() * 1e3);
    }
    Ok(report)
}

/// Time until `asked` bytes of `lent` were back, and the longest that a reader waited meanwhile.
fn once(
    common: &Common,
    place: &Place,
    lent: u64,
    asked: u64,
) -> anyhow::Result<(Duration, Duration)> {
    mounts::drop_caches(lent)?;
    let run = place.short.join("g");
    let work = place.work.join("state-giveback");
    fs::create_dir_all(&run)?;
    let available = meminfo("MemAvailable")?;
    let floor = available.saturating_sub(lent + SPARE_BYTES);
    let daemon = |part: &str| {
        let mut command = Command::new(&common.harbour);
        command.env_remove("HARBOUR_CONFIG").arg(part);
        command.arg("--run-dir").arg(&run);
        command.arg("--state-dir").arg(&work);
        command
    };
    let metad_socket = run.join("metad.sock");
    let mut metad = Daemon::start(&mut daemon("metad"), &place.work.join("giveback-metad.log"))?;
    metad.wait_ready(LIMIT, || metad_socket.exists())?;
    let mut donor = daemon("donor");
    donor.args(["--lend", &lent.to_string(), "--huge-pages", "never"]);
    donor.args(["--keep-free", &floor.to_string(), "--on-stop", "drop"]);
    donor.args(["--metad", &format!("unix:{}", metad_socket.display())]);
    let mut donor = Daemon::start(&mut donor, &place.work.join("giveback-donor.log"))?;
    let socket = run.join("donor.sock");
    let mut transport = None;
    donor.wait_ready(LIMIT, || {
        let limit = Instant::now() + LIMIT;
        transport = ShmTransport::connect(&socket, 0, Access::ReadWrite, Token::NONE, limit).ok();
        transport.is_some()
    })?;
    let transport = transport.context("the donor does not answer")?;
    fill(&transport, lent)?;
    squeeze(&donor, transport, asked, floor)
}

/// Takes memory from the host until `asked` bytes are missing of the `floor` that the donor keeps
/// free, and has the donor notice.
fn squeeze(
    donor: &Daemon,
    transport: ShmTransport,
    asked: u64,
    floor: u64,
) -> anyhow::Result<(Duration, Duration)> {
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || read_on(&transport, &stop))
    };
    let pid = Pid::from_raw(i32::try_from(donor.pid())?);
    kill(pid, Signal::SIGSTOP)?;
    // From what is there now: what the host had to spare at the start it may have no longer, or more.
    let spare = meminfo("MemAvailable")?.saturating_sub(floor);
    let hog = Hog::start(spare + asked + NOISE_BYTES)?;
    let before = meminfo("Shmem")?;
    let start = Instant::now();
    kill(pid, Signal::SIGCONT)?;
    let back = loop {
        if before.saturating_sub(meminfo("Shmem")?) + SLACK_BYTES >= asked {
            break start.elapsed();
        }
        let came = before.saturating_sub(meminfo("Shmem")?) >> 20;
        anyhow::ensure!(
            start.elapsed() < LIMIT,
            "the donor gives back {came} MiB and no more"
        );
        thread::sleep(Duration::from_millis(1));
    };
    stop.store(true, Ordering::Release);
    let reader = reader.join();
    drop(hog);
    let Ok(longest) = reader else {
        anyhow::bail!("the reader panicked");
    };
    Ok((back, longest?))
}

/// Byte that a page of a region holds: one that comes from elsewhere shows.
fn byte_at(region: u32, offset: u64) -> u8 {
    let page = offset / 4096 + u64::from(region).wrapping_mul(0x51_7C_C1);
    (page.wrapping_mul(0x9E37_79B9) >> 8) as u8 | 1
}

/// Writes to all that is lent.
fn fill(transport: &ShmTransport, lent: u64) -> anyhow::Result<()> {
    let regions = transport.regions();
    let total: u64 = regions.iter().map(|region| region.len).sum();
    anyhow::ensure!(total == lent, "{total} bytes are lent in place of {lent}");
    let mut bytes = vec![0; WRITTEN];
    for region in regions {
        for offset in (0..region.len).step_by(WRITTEN) {
            for (at, page) in (offset..).step_by(4096).zip(bytes.chunks_mut(4096)) {
                page.fill(byte_at(region.id.0, at));
            }
            let write = Write {
                region: region.id,
                offset,
                from: &bytes,
            };
            transport.write(&[write], Instant::now() + LIMIT)?;
        }
    }
    Ok(())
}

/// Reads here and there in what is lent at that moment, until told to stop. The longest time that a
/// read took. What a region that goes meanwhile gives is zero, or an error; anything else that was
/// not written is an error of ours.
fn read_on(transport: &ShmTransport, stop: &AtomicBool) -> anyhow::Result<Duration> {
    let mut into = vec![0; READ_BYTES];
    let (mut longest, mut turn, mut read) = (Duration::ZERO, 0_u64, 0_u64);
    while !stop.load(Ordering::Acquire) {
        let regions = transport.regions();
        turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let count = regions.len().max(1) as u64;
        let index = usize::try_from((turn >> 33) % count)?;
        let region = regions.get(index).context("the donor lends nothing")?;
        let offset = (turn >> 13) % (region.len / READ_BYTES as u64) * READ_BYTES as u64;
        let start = Instant::now();
        let one = Read {
            region: region.id,
            offset,
            into: &mut into,
        };
        let found = transport.read(&mut [one], start + LIMIT);
        longest = longest.max(start.elapsed());
        let lent = |transport: &ShmTransport| {
            let now = transport.regions();
            now.iter().any(|other| other.id == region.id)
        };
        let right = into
            .iter()
            .enumerate()
            .step_by(4096)
            .all(|(at, byte)| *byte == byte_at(region.id.0, offset + at as u64));
        if found.is_ok() && right {
            read += 1;
        } else {
            anyhow::ensure!(
                !lent(transport),
                "region {} at {offset} is lent and read wrong: {found:?}",
                region.id.0
            );
        }
    }
    anyhow::ensure!(read > 0, "nothing was read meanwhile");
    Ok(longest)
}

/// Bytes of a line of `/proc/meminfo`.
fn meminfo(name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(Path::new("/proc/meminfo"))?;
    let line = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?.strip_prefix(':')?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    Ok(line.with_context(|| format!("/proc/meminfo has no {name}"))? * 1024)
}

/// A process that holds memory until it is dropped.
struct Hog(Child);

impl Hog {
    fn start(bytes: u64) -> anyhow::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .args(["touch", "--hold", &bytes.to_string()])
            .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut hog = Self(child);
        let stdout = hog.0.stdout.take().context("no stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        anyhow::ensure!(
            line == "held\n",
            "{bytes} bytes of memory are not to be had"
        );
        Ok(hog)
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
