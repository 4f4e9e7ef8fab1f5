//! Thresholds, and whether reports meet them. `bench/README.md` has the same table.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;

use crate::{
    command, engines, giveback,
    ingest::HARBOUR,
    link, locks, open, rdma,
    report::{Report, markdown},
    targets::{DIRS, EXT4, SQUASHFUSE, TMPFS, UNREAD, VIEW},
    tasks, together,
    verify::{UNVERIFIED, VERIFIED},
};

/// What a median must be.
#[derive(Clone, Copy, Debug)]
enum Bound {
    /// At least this many times the speed of another target at the same work.
    Speed(&'static str, f64),
    /// At most this part of the time that another target takes for the same work.
    Time(&'static str, f64),
    /// At most this, in the series' unit.
    AtMost(f64),
    /// At least this, in the series' unit.
    AtLeast(f64),
    /// At most this many times the same target's median at another work.
    Growth(&'static str, f64),
}

/// One promise.
#[derive(Clone, Copy, Debug)]
struct Threshold {
    command: &'static str,
    workload: &'static str,
    mode: &'static str,
    target: &'static str,
    bound: Bound,
}

const fn on(
    workload: &'static str,
    mode: &'static str,
    target: &'static str,
    bound: Bound,
) -> Threshold {
    Threshold {
        command: "workloads",
        workload,
        mode,
        target,
        bound,
    }
}

const fn of(
    command: &'static str,
    workload: &'static str,
    target: &'static str,
    bound: Bound,
) -> Threshold {
    Threshold {
        command,
        workload,
        mode: "",
        target,
        bound,
    }
}

const fn unverified(workload: &'static str) -> Threshold {
    Threshold {
        command: "verify",
        workload,
        mode: "cold",
        target: VERIFIED,
        bound: Bound::Speed(UNVERIFIED, 0.8),
    }
}

const fn engine(workload: &'static str, bound: Bound) -> Threshold {
    of("engines", workload, engines::OURS, bound)
}

/// All of them.
const THRESHOLDS: &[Threshold] = &[
    on("seq-1m", "warm", DIRS, Bound::Speed(EXT4, 0.85)),
    on("seq-128k", "warm", DIRS, Bound::Speed(EXT4, 0.85)),
    on("tar", "warm", DIRS, Bound::Speed(EXT4, 0.85)),
    on("find", "warm", DIRS, Bound::Speed(EXT4, 0.85)),
    on("stat", "warm", DIRS, Bound::Speed(EXT4, 0.85)),
    on("tar", "cold", DIRS, Bound::Time(EXT4, 0.7)),
    on("tar", "cold", DIRS, Bound::Time(SQUASHFUSE, 0.4)),
    on("seq-1m", "cold", DIRS, Bound::Speed(UNREAD, 4.0)),
    on("seq-128k", "cold", DIRS, Bound::Speed(UNREAD, 4.0)),
    on("seq-1m", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("seq-128k", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("rand-4k-1", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("rand-4k-4", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("tar", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("find", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("stat", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("open-read-close", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("python3", "warm", VIEW, Bound::Speed(EXT4, 0.95)),
    on("tar", "cold", VIEW, Bound::Time(EXT4, 0.4)),
    on("stat", "cold", VIEW, Bound::Speed(EXT4, 1.2)),
    on("open-read-close", "cold", VIEW, Bound::Speed(EXT4, 3.0)),
    on("seq-1m", "cold", VIEW, Bound::Speed(UNREAD, 4.0)),
    on("seq-128k", "cold", VIEW, Bound::Speed(UNREAD, 4.0)),
    unverified("rand-4k-1 dirs"),
    unverified("rand-4k-4 dirs"),
    unverified("rand-4k-1 view"),
    unverified("rand-4k-4 view"),
    of(
        "ingest",
        "pull size-1200m",
        HARBOUR,
        Bound::Time("podman", 0.5),
    ),
    of(
        "ingest",
        "pull size-1200m",
        HARBOUR,
        Bound::Time("docker", 0.5),
    ),
    of(
        "ingest",
        "peak beyond the pool, size-1200m",
        HARBOUR,
        Bound::AtMost(256.0),
    ),
    of(
        "link",
        "read-1m",
        link::TCP,
        Bound::Speed(link::IPERF, 0.85),
    ),
    of(
        "link",
        link::FILE,
        link::TCP,
        Bound::Speed(link::IPERF, 0.6),
    ),
    of("link", "read-4k", link::TCP, Bound::Time(link::SOCKET, 1.5)),
    of(
        "rdma",
        "read-1m",
        rdma::VERBS,
        Bound::Speed(rdma::BANDWIDTH, 0.8),
    ),
    of(
        "rdma",
        "read-4k",
        rdma::VERBS,
        Bound::Time(rdma::LATENCY, 1.5),
    ),
    of(
        "giveback",
        giveback::GIVE_BACK,
        giveback::DONOR,
        Bound::AtMost(200.0),
    ),
    of("locks", locks::PAIRS, locks::METAD, Bound::AtLeast(10.0)),
    of("locks", locks::GRANT, locks::METAD, Bound::AtMost(20.0)),
    of(
        "locks",
        locks::READ,
        locks::BUSY,
        Bound::Time(locks::IDLE, 1.2),
    ),
    of(
        "locks",
        locks::READ,
        locks::BUSY,
        Bound::Time(locks::APART, 1.2),
    ),
    of(
        "together",
        "time, 20 hosts",
        together::OURS,
        Bound::Growth("time, 1 host", 1.25),
    ),
    of(
        "together",
        "bytes, 20 hosts",
        together::OURS,
        Bound::Growth("bytes, 1 host", 1.02),
    ),
    engine("pull 100m", Bound::AtMost(0.3)),
    engine("pull 1000m", Bound::AtMost(0.3)),
    engine("received 100m", Bound::AtMost(100.0)),
    engine("received 1000m", Bound::AtMost(100.0)),
    engine("disk 100m", Bound::AtMost(1000.0)),
    engine("disk 1000m", Bound::AtMost(1000.0)),
    engine("first start 100m", Bound::Time(engines::PLAIN, 0.1)),
    engine("first start 1000m", Bound::Time(engines::PLAIN, 0.1)),
    engine(engines::START, Bound::Time(engines::PLAIN, 1.15)),
    of("tasks", tasks::TIME, VIEW, Bound::Time(tasks::COPIES, 1.03)),
    of("open", "open size-1m", open::LS, Bound::AtMost(10.0)),
    of("open", "open size-5m", open::LS, Bound::AtMost(10.0)),
    of("open", "open size-130m", open::LS, Bound::AtMost(10.0)),
    of("open", "open size-1200m", open::LS, Bound::AtMost(10.0)),
    of(
        "open",
        "open size-1200m",
        open::LS,
        Bound::Growth("open size-1m", 2.0),
    ),
    of("open", "open size-1m", open::VIEW, Bound::AtMost(10.0)),
    of("open", "open size-5m", open::VIEW, Bound::AtMost(10.0)),
    of("open", "open size-130m", open::VIEW, Bound::AtMost(10.0)),
    of("open", "open size-1200m", open::VIEW, Bound::AtMost(10.0)),
    of(
        "open",
        "open size-1200m",
        open::VIEW,
        Bound::Growth("open size-1m", 2.0),
    ),
];

/// What the same run says of others that meet the same limits of this machine as a missed promise does:
/// for the directories a FUSE file system with nothing to check, and files in memory, which are kept in
/// single pages as FUSE's are; for readers beside locks those of a metad that nobody locks.
const PEERS: [(&str, &[&str]); 2] = [(DIRS, &[SQUASHFUSE, TMPFS]), (locks::BUSY, &[locks::APART])];

/// A line on [`PEERS`], where they were measured.
fn limits(threshold: &Threshold, reports: &[Report]) -> Option<String> {
    let (_, peers) = PEERS.iter().find(|(of, _)| *of == threshold.target)?;
    let (Bound::Speed(base, _) | Bound::Time(base, _)) = threshold.bound else {
        return None;
    };
    let of_command = |report: &&Report| report.command == threshold.command;
    let report = reports.iter().find(of_command)?;
    let speeds: Vec<String> = peers
        .iter()
        .filter_map(|peer| {
            let peer_threshold = Threshold {
                target: peer,
                ..*threshold
            };
            let speed = found(&peer_threshold, report)?;
            Some(format!("{peer} {speed:.2}"))
        })
        .collect();
    let (work, mode) = (threshold.workload, threshold.mode);
    (!speeds.is_empty()).then(|| {
        format!(
            "{work} {mode}, in the same run beside {base}: {}\n",
            speeds.join(", ")
        )
    })
}

/// Compares; fails when a threshold is missed or was not measured at all.
pub(crate) fn run(paths: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let mut reports = Vec::new();
    for path in paths {
        let report =
            Report::read(path).with_context(|| format!("cannot use {}", path.display()))?;
        if report.quick {
            command::note(&format!(
                "{}: a quick run's figures mean nothing",
                path.display()
            ));
        }
        reports.push(report);
    }
    let verdicts: Vec<Verdict> = THRESHOLDS
        .iter()
        .filter(|threshold| {
            reports
                .iter()
                .any(|report| report.command == threshold.command)
        })
        .map(|threshold| judge(threshold, &reports))
        .collect();
    let missed = verdicts.iter().filter(|verdict| !verdict.met).count();
    command::say(&table(&verdicts))?;
    for verdict in verdicts.iter().filter(|verdict| !verdict.met) {
        if let Some(text) = limits(&verdict.threshold, &reports) {
            command::say(&text)?;
        }
    }
    command::say(&format!(
        "{} of {} thresholds met\n",
        verdicts.len() - missed,
        verdicts.len()
    ))?;
    Ok(if missed == 0 && !verdicts.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Verdict {
    threshold: Threshold,
    /// The ratio or value found; none when it was not measured.
    found: Option<f64>,
    met: bool,
}

fn judge(threshold: &Threshold, reports: &[Report]) -> Verdict {
    let found = reports
        .iter()
        .filter(|report| report.command == threshold.command)
        .find_map(|report| found(threshold, report))
        .filter(|value| value.is_finite());
    let met = found.is_some_and(|value| match threshold.bound {
        Bound::Speed(_, least) | Bound::AtLeast(least) => value >= least,
        Bound::Time(_, most) | Bound::AtMost(most) | Bound::Growth(_, most) => value <= most,
    });
    Verdict {
        threshold: *threshold,
        found,
        met,
    }
}

fn found(threshold: &Threshold, report: &Report) -> Option<f64> {
    let series = report.get(threshold.workload, threshold.mode, threshold.target)?;
    let beside = |target| report.get(threshold.workload, threshold.mode, target);
    match threshold.bound {
        Bound::Speed(base, _) => Some(series.speed_beside(beside(base)?)),
        Bound::Time(base, _) => Some(1.0 / series.speed_beside(beside(base)?)),
        Bound::AtMost(_) | Bound::AtLeast(_) => Some(series.median),
        Bound::Growth(workload, _) => Some(
            series.median
                / report
                    .get(workload, threshold.mode, threshold.target)?
                    .median,
        ),
    }
}

impl Threshold {
    /// Cells that the README shows: where, what, on what, the promise.
    fn cells(&self) -> Vec<String> {
        let promise = match self.bound {
            Bound::Speed(base, least) => format!("at least {least} times the speed of {base}"),
            Bound::Time(base, most) => format!("at most {most} of the time of {base}"),
            Bound::AtMost(most) => {
                let unit = match (self.command, self.workload) {
                    ("ingest", _) => "MiB",
                    ("engines", work) if work.starts_with("pull") => "s",
                    ("engines", _) => "KiB",
                    _ => "ms",
                };
                format!("at most {most} {unit}")
            }
            Bound::AtLeast(least) => format!("at least {least} thousand a second"),
            Bound::Growth(workload, most) => format!("at most {most} times its own {workload:?}"),
        };
        let work = format!("{} {}", self.workload, self.mode).trim().to_owned();
        [self.command, &work, self.target, &promise]
            .map(str::to_owned)
            .to_vec()
    }
}

fn table(verdicts: &[Verdict]) -> String {
    let mut rows = vec![
        ["report", "work", "target", "promise", "found", ""]
            .map(str::to_owned)
            .to_vec(),
    ];
    for verdict in verdicts {
        let mut cells = verdict.threshold.cells();
        cells.push(
            verdict
                .found
                .map_or("not measured".to_owned(), |value| format!("{value:.2}")),
        );
        cells.push(if verdict.met { "met" } else { "MISSED" }.to_owned());
        rows.push(cells);
    }
    markdown(&rows)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::report::{GB_PER_S, MIB, SECONDS};

    #[test]
    fn the_readme_has_the_same_table() {
        let mut rows = vec![
            ["report", "work", "target", "promise"]
                .map(str::to_owned)
                .to_vec(),
        ];
        rows.extend(THRESHOLDS.iter().map(Threshold::cells));
        let table = markdown(&rows);
        assert!(
            include_str!("../README.md").contains(&table),
            "bench/README.md should have:\n{table}"
        );
    }

    #[test]
    fn verdicts_follow_the_direction_of_the_unit() {
        let mut report = Report::new("workloads", 1, false, &[]);
        for (target, gb_per_s, seconds) in
            [(EXT4, 1.0, 2.0), (DIRS, 4.0, 1.0), (SQUASHFUSE, 1.0, 5.0)]
        {
            report.add("seq-1m", "cold", target, GB_PER_S, gb_per_s);
            report.add("tar", "cold", target, SECONDS, seconds);
        }
        let reports = [report];
        let met = |workload, bound| judge(&on(workload, "cold", DIRS, bound), &reports).met;
        assert!(met("seq-1m", Bound::Speed(EXT4, 4.0)) && !met("seq-1m", Bound::Speed(EXT4, 4.1)));
        assert!(met("tar", Bound::Time(EXT4, 0.5)) && !met("tar", Bound::Time(EXT4, 0.49)));
        assert!(met("tar", Bound::Time(SQUASHFUSE, 0.2)) && !met("tar", Bound::AtMost(0.9)));
        assert!(
            met("tar", Bound::Growth("seq-1m", 0.25)) && !met("tar", Bound::Growth("seq-1m", 0.2))
        );
        // What was not measured is not met.
        assert!(!met("stat", Bound::Speed(EXT4, 0.0)) && !met("tar", Bound::Time("nothing", 9.0)));
    }

    #[test]
    fn a_miss_is_shown_beside_its_peers() {
        let mut report = Report::new("workloads", 1, false, &[]);
        for (target, speed) in [(EXT4, 4.0), (DIRS, 2.0), (SQUASHFUSE, 1.0)] {
            report.add("seq-1m", "warm", target, GB_PER_S, speed);
        }
        let reports = [report];
        let said = limits(&THRESHOLDS[0], &reports).unwrap();
        assert_eq!(
            said,
            "seq-1m warm, in the same run beside ext4: squashfuse_ll 0.25\n"
        );
        assert_eq!(
            limits(&on("tar", "warm", DIRS, Bound::Speed(EXT4, 1.0)), &reports),
            None
        );
        assert_eq!(
            limits(
                &on("seq-1m", "warm", VIEW, Bound::Speed(EXT4, 1.0)),
                &reports
            ),
            None
        );
    }

    #[test]
    fn a_missed_threshold_fails_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ingest.json");
        let mut report = Report::new("ingest", 1, false, &[]);
        for (target, seconds) in [(HARBOUR, 1.0), ("podman", 2.0), ("docker", 2.5)] {
            report.add("pull size-1200m", "", target, SECONDS, seconds);
        }
        report.add("peak beyond the pool, size-1200m", "", HARBOUR, MIB, 100.0);
        report.write(&path).unwrap();
        let code = |code| format!("{code:?}");
        assert_eq!(
            code(run(std::slice::from_ref(&path)).unwrap()),
            code(ExitCode::SUCCESS)
        );
        report.add("pull size-1200m", "", HARBOUR, SECONDS, 5.0);
        report.write(&path).unwrap();
        assert_eq!(code(run(&[path]).unwrap()), code(ExitCode::FAILURE));
    }
}
