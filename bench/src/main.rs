//! `harbour-bench`: measures ImageHarbour beside what a user would pick instead, in one run.
//!
//! Every measuring subcommand runs in namespaces of its own ([`sandbox`]), so that mounts,
//! daemons and firewall rules of the engines under test cannot outlive it. Each writes a
//! [`report::Report`]; `check` compares reports with the thresholds in [`check`]. How to read the
//! figures stands in `bench/README.md`.

mod check;
mod command;
mod data;
mod engines;
mod fio;
mod fleet;
mod giveback;
mod harbour;
mod ingest;
mod link;
mod locks;
mod machine;
mod memory;
mod mounts;
mod open;
mod rdma;
mod report;
mod sandbox;
mod targets;
mod tasks;
mod together;
mod unread;
mod verify;
mod workloads;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

/// Measures ImageHarbour beside what a user would pick instead.
#[derive(Debug, Parser)]
#[command(name = "harbour-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the data sets, as OCI images and as what the references read
    Data(data::Options),
    /// File workloads on the mount, the fast view and the references
    Workloads(workloads::Options),
    /// Random reads with and without verification
    Verify(Common),
    /// Pulls from a local registry beside podman, docker and umoci
    Ingest(ingest::Options),
    /// First listing of a pooled image beside pulls of the same image
    Open(Common),
    /// The TCP transport between two network namespaces beside iperf3 and a bare socket
    Link(Common),
    /// Time until a donor under pressure has given memory back, while it is read
    Giveback(Common),
    /// Hosts that pull one image at the same moment, beside as many independent copies
    Together(Common),
    /// A thousand short container tasks on five hosts, beside the same on local copies
    Tasks(Common),
    /// Docker on the mount, beside the same Docker that pulls and unpacks for itself
    Engines(Common),
    /// A thousand clients of metad's locks, and what readers of its catalogue notice
    Locks(Common),
    /// The verbs transport beside perftest, from what tests/rdma/run measured in its guest
    Rdma(rdma::Options),
    /// The other end of `link`
    #[command(hide = true)]
    FarSide,
    /// Write to this many bytes of memory and end; for the harness itself
    #[command(hide = true)]
    Touch {
        /// How many
        bytes: usize,
        /// Say so and hold it until standard input ends
        #[arg(long)]
        hold: bool,
    },
    /// Compare reports with the thresholds; exits with 1 when one is missed
    Check {
        /// Reports that the other subcommands wrote
        #[arg(required = true, value_name = "REPORT")]
        reports: Vec<PathBuf>,
    },
}

/// Flags of every measuring subcommand.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// Directory that `data` filled; on ext4, with room for storage of engines
    #[arg(long, value_name = "DIR", env = "HARBOUR_BENCH_DATA")]
    pub(crate) data: PathBuf,
    /// The command under test
    #[arg(
        long,
        value_name = "FILE",
        env = "HARBOUR_BIN",
        default_value = "harbour"
    )]
    pub(crate) harbour: PathBuf,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Rounds; the median of them counts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
    /// One short round, to see that everything works; its figures mean nothing
    #[arg(long)]
    pub(crate) quick: bool,
}

impl Common {
    /// Rounds to run: what was asked, else one when quick, else `default`.
    pub(crate) fn rounds(&self, default: u32) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { default })
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            command::note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Data(options) => data::make(&options).map(|()| ExitCode::SUCCESS),
        Command::Touch { bytes, hold } => {
            mounts::touch(bytes, hold)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { reports } => check::run(&reports),
        Command::Workloads(o) => inside(&o.common.clone(), |place| workloads::run(&o, place)),
        Command::Verify(o) => inside(&o, |place| verify::run(&o, place)),
        Command::Ingest(o) => inside(&o.common.clone(), |place| ingest::run(&o, place)),
        Command::Rdma(o) => rdma::run(&o),
        Command::FarSide => link::far::run().map(|()| ExitCode::SUCCESS),
        Command::Link(o) => inside(&o, |place| link::run(&o, place)),
        Command::Giveback(o) => inside(&o, |place| giveback::run(&o, place)),
        Command::Together(o) => inside(&o, |place| together::run(&o, place)),
        Command::Tasks(o) => inside(&o, |place| tasks::run(&o, place)),
        Command::Engines(o) => inside(&o, |place| engines::run(&o, place)),
        Command::Locks(o) => inside(&o, |place| locks::run(&o, place)),
        Command::Open(o) => inside(&o, |place| open::run(&o, place)),
    }
}

/// Runs `measure` in the sandbox, prints its report and writes it where `--json` says.
fn inside(
    common: &Common,
    measure: impl FnOnce(&sandbox::Place) -> anyhow::Result<report::Report>,
) -> anyhow::Result<ExitCode> {
    let place = match sandbox::enter(&common.data)? {
        sandbox::Entered::Inside(place) => place,
        sandbox::Entered::Finished(code) => return Ok(code),
    };
    let report = measure(&place)?;
    command::say(&report.table())?;
    if let Some(path) = &common.json {
        report
            .write(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
