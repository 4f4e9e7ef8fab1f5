//! `rdma`: the verbs transport beside perftest on the same two devices, as measured in the guest that
//! `tests/rdma/run --figures` boots.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;
use serde::Deserialize;

use crate::{
    command,
    report::{GB_PER_S, MICROS, Report},
};

/// The transport.
pub(crate) const VERBS: &str = "harbour-verbs";
/// Its measure for many bytes.
pub(crate) const BANDWIDTH: &str = "ib_read_bw";
/// Its measure for few.
pub(crate) const LATENCY: &str = "ib_read_lat";

/// What the guest measured.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// What `tests/rdma/run --figures` wrote
    #[arg(value_name = "FILE")]
    figures: PathBuf,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The guest's values, one a round each.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Figures {
    read_1m_batch_mib_s: Vec<f64>,
    read_1m_one_mib_s: Vec<f64>,
    ib_read_bw_mib_s: Vec<f64>,
    read_4k_us: Vec<f64>,
    ib_read_lat_us: Vec<f64>,
}

/// Makes a report of them.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let text = fs::read(&options.figures)
        .with_context(|| format!("cannot read {}", options.figures.display()))?;
    let report = report(serde_json::from_slice(&text)?)?;
    command::say(&report.table())?;
    if let Some(path) = &options.json {
        report
            .write(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn report(figures: Figures) -> anyhow::Result<Report> {
    const GB_IN_MIB: f64 = (1 << 20) as f64 / 1e9;
    let rounds = figures.ib_read_bw_mib_s.len();
    let mut report = Report::new("rdma", u32::try_from(rounds)?, false, &[BANDWIDTH, LATENCY]);
    report.settings.insert(
        "where".to_owned(),
        "a QEMU guest with two processors, all emulated (TCG) and never idle (idle=poll); soft RoCE on both ends of a veth pair"
            .to_owned(),
    );
    let work = [
        ("read-1m", VERBS, GB_PER_S, figures.read_1m_batch_mib_s),
        ("read-1m", BANDWIDTH, GB_PER_S, figures.ib_read_bw_mib_s),
        (
            "read-1m one by one",
            VERBS,
            GB_PER_S,
            figures.read_1m_one_mib_s,
        ),
        ("read-4k", VERBS, MICROS, figures.read_4k_us),
        ("read-4k", LATENCY, MICROS, figures.ib_read_lat_us),
    ];
    for (workload, target, unit, values) in work {
        anyhow::ensure!(
            !values.is_empty() && values.len() == rounds,
            "{} values of {workload} on {target}, {rounds} rounds",
            values.len()
        );
        for value in values {
            let value = if unit.0 == GB_PER_S.0 {
                value * GB_IN_MIB
            } else {
                value
            };
            report.add(workload, "", target, unit, value);
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_report_is_made_of_whole_rounds() {
        let figures = |latency: &str| {
            let text = format!(
                r#"{{"read_1m_batch_mib_s": [90.0, 100.0, 80.0], "read_1m_one_mib_s": [50.0, 51.0, 52.0],
                    "ib_read_bw_mib_s": [100.0, 100.0, 100.0], "read_4k_us": [{latency}],
                    "ib_read_lat_us": [100.0, 110.0, 90.0]}}"#
            );
            report(serde_json::from_str(&text).unwrap())
        };
        let whole = figures("120.0, 130.0, 125.0").unwrap();
        assert_eq!(whole.rounds, 3);
        let of = |workload, target| whole.get(workload, "", target).unwrap();
        let speed = of("read-1m", VERBS).speed_beside(of("read-1m", BANDWIDTH));
        assert!((speed - 0.9).abs() < 1e-9, "{speed}");
        let time = 1.0 / of("read-4k", VERBS).speed_beside(of("read-4k", LATENCY));
        assert!((time - 1.25).abs() < 1e-9, "{time}");
        assert!(figures("120.0, 130.0").is_err());
        assert!(figures("").is_err());
    }
}
