//! File workloads on every target, interleaved.
//!
//! In each round every workload runs on every target before the next workload starts, and the
//! order of targets moves on by one each round: what the machine does meanwhile hits all alike.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::Context as _;
use clap::Args;
use harbour_bench::content::Rng;
use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{Mode, SFlag, fstatat},
};

use crate::{
    Common, command,
    data::Data,
    fio::{self, Job},
    harbour::Harbour,
    mounts,
    report::{GB_PER_S, K_PER_S, Report, SECONDS, Unit},
    sandbox::Place,
    targets::{self, DIRS, EXT4, SQUASHFUSE, Target, UNREAD, VIEW},
    unread::{self, Unread},
};

/// `harbour-bench workloads`
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Only these targets, like ext4,harbour-view,overlay-ext4
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    targets: Vec<String>,
    /// Only these workloads, like tar,stat,seq-1m
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
}

/// Modules that a small program pulls in: some of Python and some of C.
const PYTHON: &str = "import json, sqlite3, ssl, http.client, email.message, decimal, hashlib";

/// How small files are opened.
const READ_ONLY: OFlag = OFlag::O_RDONLY.union(OFlag::O_CLOEXEC);

/// One workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// fio on the large file.
    Fio(&'static str, Job),
    /// GNU tar of the small files into a pipe.
    Tar,
    /// `find -ls` of the metadata set into a pipe.
    Find,
    /// lstat of every name of the metadata set, in random order.
    Stat,
    /// open, read to the end and close of every small file, in random order.
    OpenRead,
    /// A Python interpreter that imports some modules and ends.
    Python,
}

const WORKS: [Work; 10] = [
    Work::Fio("seq-1m", Job::Sequential(1 << 20)),
    Work::Fio("seq-128k", Job::Sequential(128 << 10)),
    Work::Fio("seq-1m-aligned", Job::Aligned(1 << 20)),
    Work::Fio("rand-4k-1", Job::Random4K(1)),
    Work::Fio("rand-4k-4", Job::Random4K(4)),
    Work::Tar,
    Work::Find,
    Work::Stat,
    Work::OpenRead,
    Work::Python,
];

/// What workloads read besides the target.
struct Inputs {
    big_bytes: u64,
    fio_seconds: u32,
    small: Vec<String>,
    meta: Vec<String>,
}

/// A value and how much was seen for it: all targets must show the same.
struct Measured {
    value: f64,
    amount: u64,
}

/// Runs them.
pub(crate) fn run(options: &Options, place: &Place) -> anyhow::Result<Report> {
    let common = &options.common;
    let data = Data::load(&common.data)?;
    let rounds = common.rounds(5);
    let mut report = Report::new("workloads", rounds, common.quick, &[EXT4, SQUASHFUSE]);
    report.settings.insert("data".to_owned(), data.text());
    let inputs = Inputs {
        big_bytes: data.big_bytes,
        fio_seconds: if common.quick { 1 } else { 3 },
        small: shuffled(&common.data.join("small.list"), 1)?,
        meta: shuffled(&common.data.join("meta.list"), 2)?,
    };
    let harbour = pooled(options, &data, place).context("harbour does not serve the data")?;
    let ours = doors(harbour.as_ref(), &data, &mut report)?;
    let targets = targets::build(&common.data, place, ours, &options.targets, &mut report);
    let measured: Vec<&Target> = targets.iter().filter(|target| target.measured).collect();
    let mut works: Vec<Work> = WORKS
        .into_iter()
        .filter(|w| chosen(&options.only, w.name()))
        .collect();
    if works.contains(&Work::Python) && !data.python {
        works.retain(|work| *work != Work::Python);
        report.skip(
            Work::Python.name(),
            "the data was made without --python-root",
        );
    }
    let mut unread = unread_files(options, &mut report);
    let mut amounts = HashMap::new();
    for round in 0..rounds {
        for work in &works {
            command::note(&format!("round {} of {rounds}: {}", round + 1, work.name()));
            for place in 0..measured.len() {
                let target = measured[(place + round as usize) % measured.len()];
                if let Err(why) = both(*work, target, &inputs, round, &mut amounts, &mut report) {
                    report.skip(&format!("{} on {}", work.name(), target.name), why);
                }
            }
            if let Err(why) = disk(*work, &mut unread, &mut report) {
                report.skip(&format!("{} on {UNREAD}", work.name()), why);
            }
        }
    }
    report.series.sort_by_key(|s| {
        let work = WORKS.iter().position(|w| w.name() == s.workload);
        let target = targets.iter().position(|t| t.name == s.target);
        let target = target.unwrap_or(targets.len());
        (work, s.mode.clone(), target)
    });
    Ok(report)
}

/// Files of the system that are left to be read once. A quick run leaves them to one that counts.
fn unread_files(options: &Options, report: &mut Report) -> Vec<Unread> {
    let wanted = options.targets.is_empty() || options.targets.iter().any(|name| name == UNREAD);
    if !wanted || options.common.quick {
        return Vec::new();
    }
    unread::find(Path::new("/")).unwrap_or_else(|why| {
        report.skip(UNREAD, why);
        Vec::new()
    })
}

/// One cold value of a sequential workload from a file that nobody has read.
fn disk(work: Work, unread: &mut Vec<Unread>, report: &mut Report) -> anyhow::Result<()> {
    let Work::Fio(name, job @ (Job::Sequential(_) | Job::Aligned(_))) = work else {
        return Ok(());
    };
    if unread.is_empty() {
        return Ok(());
    }
    let file = unread.remove(0);
    work.load_program()?;
    let rate = fio::run(job, &file.path, file.len, 0, true, 0)?;
    report.add(name, "cold", UNREAD, work.unit(), rate.bytes / 1e9);
    Ok(())
}

fn chosen(only: &[String], name: &str) -> bool {
    only.is_empty() || only.iter().any(|o| o == name)
}

/// A pool with the data in it, if one of its doors is asked for.
fn pooled(options: &Options, data: &Data, place: &Place) -> anyhow::Result<Option<Harbour>> {
    let wanted = |name: &str| options.targets.iter().any(|target| target.ends_with(name));
    if !options.targets.is_empty() && !wanted(DIRS) && !wanted(VIEW) {
        return Ok(None);
    }
    let common = &options.common;
    let image = data.image("bench")?;
    let harbour = Harbour::up(&common.harbour, place, "w", image.unpacked_bytes, &[])?;
    let seconds = harbour.pull(&format!("oci:{}:bench", common.data.join("oci").display()))?;
    let megabytes = image.unpacked_bytes / 1_000_000;
    command::note(&format!("pooled {megabytes} MB in {seconds:.1} s"));
    Ok(Some(harbour))
}

/// Where our doors to the data are.
fn doors(
    harbour: Option<&Harbour>,
    data: &Data,
    report: &mut Report,
) -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    let Some(harbour) = harbour else {
        return Ok(Vec::new());
    };
    let manifest = &data.image("bench")?.manifest;
    let mut ours = vec![(DIRS, harbour.root(manifest)?)];
    match harbour.view(manifest) {
        Ok(view) => ours.push((VIEW, view)),
        Err(why) => report.skip(VIEW, why),
    }
    Ok(ours)
}

/// Names of a set, in an order that no directory has.
fn shuffled(list: &Path, seed: u64) -> anyhow::Result<Vec<String>> {
    let text =
        fs::read_to_string(list).with_context(|| format!("cannot read {}", list.display()))?;
    let mut names: Vec<String> = text.lines().map(str::to_owned).collect();
    Rng::new(seed).shuffle(&mut names);
    Ok(names)
}

/// One cold and one warm value of a workload on a target.
fn both(
    work: Work,
    target: &Target,
    inputs: &Inputs,
    round: u32,
    amounts: &mut HashMap<&'static str, u64>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut check = |measured: Measured| {
        let expected = *amounts.entry(work.name()).or_insert(measured.amount);
        anyhow::ensure!(
            expected == measured.amount,
            "saw {} where others saw {expected}",
            measured.amount
        );
        Ok(measured.value)
    };
    mounts::drop_caches(work.reads(inputs))?;
    work.load_program()?;
    let cold = check(work.measure(&target.root, inputs, true, round)?)?;
    report.add(work.name(), "cold", &target.name, work.unit(), cold);
    work.warm_up(&target.root, inputs, round)?;
    let warm = check(work.measure(&target.root, inputs, false, round)?)?;
    report.add(work.name(), "warm", &target.name, work.unit(), warm);
    Ok(())
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Fio(name, _) => name,
            Self::Tar => "tar",
            Self::Find => "find",
            Self::Stat => "stat",
            Self::OpenRead => "open-read-close",
            Self::Python => "python3",
        }
    }

    fn unit(self) -> Unit {
        match self {
            Self::Fio(_, Job::Sequential(_) | Job::Aligned(_)) => GB_PER_S,
            Self::Fio(_, Job::Random4K(_)) | Self::Stat | Self::OpenRead => K_PER_S,
            Self::Tar | Self::Find | Self::Python => SECONDS,
        }
    }

    /// Memory that caches may take for it, in bytes.
    fn reads(self, inputs: &Inputs) -> u64 {
        match self {
            Self::Fio(..) => 2 * inputs.big_bytes,
            _ => 512 << 20,
        }
    }

    /// The caches that were dropped held the program too, which is not what is measured.
    fn load_program(self) -> anyhow::Result<()> {
        let program = match self {
            Self::Fio(..) => "fio",
            Self::Tar => "tar",
            Self::Find => "find",
            Self::Python => "chroot",
            Self::Stat | Self::OpenRead => return Ok(()),
        };
        command::run(Command::new(program).arg("--version")).map(drop)
    }

    /// One run that does not count; for random reads one that reaches every block.
    fn warm_up(self, root: &Path, inputs: &Inputs, round: u32) -> anyhow::Result<()> {
        let work = match self {
            Self::Fio(name, _) => Self::Fio(name, Job::Sequential(1 << 20)),
            other => other,
        };
        work.measure(root, inputs, true, round).map(drop)
    }

    fn measure(
        self,
        root: &Path,
        inputs: &Inputs,
        cold: bool,
        round: u32,
    ) -> anyhow::Result<Measured> {
        match self {
            Self::Fio(_, job) => {
                let file = root.join("big.bin");
                let rate = fio::run(
                    job,
                    &file,
                    inputs.big_bytes,
                    inputs.fio_seconds,
                    cold,
                    u64::from(round),
                )?;
                let value = match job {
                    Job::Sequential(_) | Job::Aligned(_) => rate.bytes / 1e9,
                    Job::Random4K(_) => rate.operations / 1e3,
                };
                Ok(Measured { value, amount: 0 })
            }
            Self::Tar => {
                // To a pipe: GNU tar reads nothing when it sees that its output is /dev/null.
                let mut amount = 0;
                let mut tar = Command::new("tar");
                tar.arg("-C").arg(root).args(["-cf", "-", "small"]);
                let value = command::timed(&mut tar, &mut |bytes| amount += bytes.len() as u64)?;
                Ok(Measured { value, amount })
            }
            Self::Find => {
                let mut amount = 0;
                let mut find = Command::new("find");
                find.arg(root.join("meta")).arg("-ls");
                let count = |bytes: &[u8]| bytes.iter().filter(|b| **b == b'\n').count() as u64;
                let value = command::timed(&mut find, &mut |bytes| amount += count(bytes))?;
                Ok(Measured { value, amount })
            }
            Self::Stat => stat_all(root, &inputs.meta, passes(cold, 10)),
            Self::OpenRead => read_all(root, &inputs.small, passes(cold, 4)),
            Self::Python => {
                // With no environment there is no PATH to find it in.
                let chroot = command::find("chroot").context("chroot is not installed")?;
                let mut python = Command::new(chroot);
                python
                    .arg(root)
                    .args(["/usr/bin/python3", "-I", "-B", "-c", PYTHON])
                    .env_clear();
                let value = command::timed(&mut python, &mut |_| {})?;
                Ok(Measured { value, amount: 0 })
            }
        }
    }
}

/// An open directory for names relative to it: how deep the target lies in this host's tree is not
/// what is measured.
fn below(root: &Path) -> anyhow::Result<File> {
    File::open(root).with_context(|| format!("cannot open {}", root.display()))
}

/// How often a workload goes over its names: with everything in caches one pass takes a tenth of a
/// second, in which whatever else the machine does weighs more than what file systems differ in.
fn passes(cold: bool, warm: usize) -> usize {
    if cold { 1 } else { warm }
}

fn stat_all(root: &Path, names: &[String], passes: usize) -> anyhow::Result<Measured> {
    let dir = below(root)?;
    let mut amount = 0;
    let started = Instant::now();
    for name in (0..passes).flat_map(|_| names) {
        let stat = fstatat(&dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .with_context(|| format!("cannot stat {name} below {}", root.display()))?;
        // Directories have a size of their own on every file system.
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR {
            amount += stat.st_size.unsigned_abs();
        }
    }
    Ok(Measured {
        value: (names.len() * passes) as f64 / started.elapsed().as_secs_f64() / 1e3,
        amount: amount / passes as u64,
    })
}

fn read_all(root: &Path, names: &[String], passes: usize) -> anyhow::Result<Measured> {
    let dir = below(root)?;
    let mut buffer = vec![0; 128 << 10];
    let mut amount = 0;
    let started = Instant::now();
    for name in (0..passes).flat_map(|_| names) {
        let mut read = || -> std::io::Result<u64> {
            let mut file = File::from(openat(&dir, name.as_str(), READ_ONLY, Mode::empty())?);
            let mut total = 0;
            loop {
                match file.read(&mut buffer)? {
                    0 => return Ok(total),
                    n => total += n as u64,
                }
            }
        };
        amount += read().with_context(|| format!("cannot read {name} below {}", root.display()))?;
    }
    Ok(Measured {
        value: (names.len() * passes) as f64 / started.elapsed().as_secs_f64() / 1e3,
        amount: amount / passes as u64,
    })
}
