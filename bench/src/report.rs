//! What a run measured: values, medians, ratios; as a table and as JSON.

use std::{collections::BTreeMap, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// Version of the JSON. 1: first.
const SCHEMA: u32 = 1;

/// Which way a value should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Rates.
    Higher,
    /// Times and sizes.
    Lower,
}

/// What a series measures and in what unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit(pub(crate) &'static str, pub(crate) Better);

/// Seconds.
pub(crate) const SECONDS: Unit = Unit("s", Better::Lower);
/// Milliseconds.
pub(crate) const MILLIS: Unit = Unit("ms", Better::Lower);
/// Microseconds.
pub(crate) const MICROS: Unit = Unit("us", Better::Lower);
/// 2^20 bytes.
pub(crate) const MIB: Unit = Unit("MiB", Better::Lower);
/// 10^9 bytes a second.
pub(crate) const GB_PER_S: Unit = Unit("GB/s", Better::Higher);
/// 1000 operations a second.
pub(crate) const K_PER_S: Unit = Unit("1000/s", Better::Higher);

/// All values of one workload in one mode on one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Series {
    /// What was done.
    pub(crate) workload: String,
    /// `cold`, `warm`, or empty where that has no meaning.
    pub(crate) mode: String,
    /// What it was done on.
    pub(crate) target: String,
    /// Unit of the values.
    pub(crate) unit: String,
    /// Which way is better.
    pub(crate) better: Better,
    /// One value a round, in the order of rounds.
    pub(crate) values: Vec<f64>,
    /// Their median.
    pub(crate) median: f64,
}

impl Series {
    /// How fast this is beside `base`: 2 is twice the speed, whatever the unit.
    pub(crate) fn speed_beside(&self, base: &Self) -> f64 {
        match self.better {
            Better::Higher => self.median / base.median,
            Better::Lower => base.median / self.median,
        }
    }
}

/// Something that was not measured, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NotRun {
    /// Target or workload.
    pub(crate) what: String,
    /// The reason, for a reader.
    pub(crate) why: String,
}

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Version of this format.
    pub(crate) schema: u32,
    /// Subcommand.
    pub(crate) command: String,
    /// Where and when.
    pub(crate) machine: Machine,
    /// Rounds.
    pub(crate) rounds: u32,
    /// A quick run's figures mean nothing.
    pub(crate) quick: bool,
    /// Sizes of data sets, versions of programs.
    pub(crate) settings: BTreeMap<String, String>,
    /// Values.
    pub(crate) series: Vec<Series>,
    /// What is missing.
    pub(crate) not_run: Vec<NotRun>,
    /// Targets that ratios are given against, in the tables.
    pub(crate) bases: Vec<String>,
}

impl Report {
    /// An empty report of this machine, now.
    pub(crate) fn new(command: &str, rounds: u32, quick: bool, bases: &[&str]) -> Self {
        Self {
            schema: SCHEMA,
            command: command.to_owned(),
            machine: Machine::describe(),
            rounds,
            quick,
            settings: BTreeMap::new(),
            series: Vec::new(),
            not_run: Vec::new(),
            bases: bases.iter().map(|base| (*base).to_owned()).collect(),
        }
    }

    /// Adds one value.
    pub(crate) fn add(&mut self, workload: &str, mode: &str, target: &str, unit: Unit, value: f64) {
        let known = self
            .series
            .iter_mut()
            .find(|s| s.workload == workload && s.mode == mode && s.target == target);
        match known {
            Some(series) => {
                series.values.push(value);
                series.median = median(&series.values);
            }
            None => self.series.push(Series {
                workload: workload.to_owned(),
                mode: mode.to_owned(),
                target: target.to_owned(),
                unit: unit.0.to_owned(),
                better: unit.1,
                values: vec![value],
                median: value,
            }),
        }
    }

    /// Notes that something could not be measured, once.
    pub(crate) fn skip(&mut self, what: &str, why: impl std::fmt::Display) {
        if !self.not_run.iter().any(|known| known.what == what) {
            crate::command::note(&format!("not run: {what}: {why:#}"));
            self.not_run.push(NotRun {
                what: what.to_owned(),
                why: format!("{why:#}"),
            });
        }
    }

    /// The series of one workload, mode and target.
    pub(crate) fn get(&self, workload: &str, mode: &str, target: &str) -> Option<&Series> {
        self.series
            .iter()
            .find(|s| s.workload == workload && s.mode == mode && s.target == target)
    }

    /// Writes JSON.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text)
    }

    /// Reads JSON; an error when it is of another version.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let report: Self = serde_json::from_slice(&std::fs::read(path)?)?;
        anyhow::ensure!(
            report.schema == SCHEMA,
            "schema {} (want {SCHEMA})",
            report.schema
        );
        Ok(report)
    }

    /// Tables in Markdown: medians, then speeds beside each base.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("\n## {}\n\n{}", self.command, self.machine.text());
        text.push_str(&format!("Medians of {} round(s)", self.rounds));
        text.push_str(if self.quick {
            ", QUICK: these figures mean nothing.\n"
        } else {
            ".\n"
        });
        for (name, value) in &self.settings {
            text.push_str(&format!("{name}: {value}\n"));
        }
        text.push('\n');
        text.push_str(&self.grid("", |series| Some(format_value(series.median))));
        for base in &self.bases {
            if self.series.iter().any(|s| s.target == *base) {
                text.push_str(&self.grid(
                    &format!("Speed beside {base} (2 = twice as fast)"),
                    |series| {
                        let base = self.get(&series.workload, &series.mode, base)?;
                        (series.unit != "MiB").then(|| format!("{:.2}", series.speed_beside(base)))
                    },
                ));
            }
        }
        for missing in &self.not_run {
            text.push_str(&format!("Not run: {}: {}\n", missing.what, missing.why));
        }
        text
    }

    /// One table: a row for each workload and mode, a column for each target.
    fn grid(&self, title: &str, cell: impl Fn(&Series) -> Option<String>) -> String {
        let mut targets: Vec<&str> = Vec::new();
        let mut rows: Vec<(&str, &str, &str)> = Vec::new();
        for series in &self.series {
            if !targets.contains(&series.target.as_str()) {
                targets.push(&series.target);
            }
            let row = (
                series.workload.as_str(),
                series.mode.as_str(),
                series.unit.as_str(),
            );
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        let mut cells = vec![
            [&["workload", "unit"], targets.as_slice()]
                .concat()
                .iter()
                .map(|s| (*s).to_owned())
                .collect(),
        ];
        for (workload, mode, unit) in rows {
            let found: Vec<Option<String>> = targets
                .iter()
                .map(|target| self.get(workload, mode, target).and_then(&cell))
                .collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            let mut line = vec![
                format!("{workload} {mode}").trim().to_owned(),
                unit.to_owned(),
            ];
            line.extend(
                found
                    .into_iter()
                    .map(|value| value.unwrap_or_else(|| "-".to_owned())),
            );
            cells.push(line);
        }
        let title = if title.is_empty() {
            String::new()
        } else {
            format!("{title}:\n\n")
        };
        format!("{title}{}\n", markdown(&cells))
    }
}

/// A Markdown table, columns padded so that it reads as plain text too.
pub(crate) fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| {
            rows.iter()
                .filter_map(|r| r.get(c))
                .map(|s| s.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("| {cell:width$} "));
        }
        text.push_str("|\n");
        if number == 0 {
            for width in &widths {
                text.push_str(&format!("|{}", "-".repeat(width + 2)));
            }
            text.push_str("|\n");
        }
    }
    text
}

/// Three significant digits or so.
fn format_value(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle value, or the mean of the two in the middle; NaN of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn medians_and_speeds_go_the_right_way() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let mut report = Report::new("test", 2, false, &["ext4"]);
        for value in [1.0, 3.0] {
            report.add("tar", "cold", "ours", SECONDS, value);
            report.add("tar", "cold", "ext4", SECONDS, value * 2.0);
            report.add("seq", "cold", "ours", GB_PER_S, value);
            report.add("seq", "cold", "ext4", GB_PER_S, value * 2.0);
        }
        let speed = |w| {
            report
                .get(w, "cold", "ours")
                .unwrap()
                .speed_beside(report.get(w, "cold", "ext4").unwrap())
        };
        assert_eq!((speed("tar"), speed("seq")), (2.0, 0.5));
        let table = report.table();
        assert!(
            table.contains("| tar cold") && table.contains("2.00"),
            "{table}"
        );
    }

    #[test]
    fn json_goes_round_and_another_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/report.json");
        let mut report = Report::new("test", 1, true, &[]);
        report.add("w", "", "t", SECONDS, 1.5);
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap().series[0].values, [1.5]);
        report.schema = 99;
        report.write(&path).unwrap();
        assert!(Report::read(&path).is_err());
    }
}
