//! fio, the judge of reads from one large file.

use std::{path::Path, process::Command};

use anyhow::Context as _;

use crate::command;

/// One fio run over a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// From start to end in blocks of this many bytes, with the buffer that fio takes by itself.
    Sequential(u64),
    /// The same into a buffer that begins at a page.
    Aligned(u64),
    /// 4 KiB blocks in random order by this many processes.
    Random4K(u32),
}

/// Bytes and operations a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Bytes a second.
    pub(crate) bytes: f64,
    /// Operations a second.
    pub(crate) operations: f64,
}

/// Runs a job over the first `len` bytes of `file`.
///
/// Cold: no block is read twice, so the run ends at the time limit or at the end of the file. Warm:
/// the random jobs last `seconds`, the sequential one goes over the file four times, because one
/// pass is too short to time. `seed` chooses the random order.
pub(crate) fn run(
    job: Job,
    file: &Path,
    len: u64,
    seconds: u32,
    cold: bool,
    seed: u64,
) -> anyhow::Result<Rate> {
    let mut fio = Command::new("fio");
    fio.args([
        "--name=read",
        "--ioengine=psync",
        "--readonly",
        "--allow_file_create=0",
        "--output-format=json",
    ]);
    // By itself fio drops the file's pages before it starts.
    fio.args(["--invalidate=0", "--group_reporting"]);
    // By itself its buffer lies 16 bytes beside a page, as large allocations do. On some processors
    // copies to there take several times longer, which hides what file systems differ in.
    if !matches!(job, Job::Sequential(_)) {
        fio.arg("--iomem_align=4096");
    }
    fio.arg(format!("--filename={}", file.display()));
    match job {
        Job::Sequential(block) | Job::Aligned(block) => {
            fio.args(["--rw=read"])
                .arg(format!("--bs={block}"))
                .arg(format!("--size={len}"));
            fio.arg(if cold { "--loops=1" } else { "--loops=4" });
        }
        Job::Random4K(jobs) => {
            // Each process has its own part, so that together they read no block twice.
            let part = (len / u64::from(jobs)) & !4095;
            fio.args(["--rw=randread", "--bs=4096", "--randrepeat=1"]);
            fio.arg(format!("--randseed={}", seed + 1))
                .arg(format!("--runtime={seconds}"));
            fio.arg(format!("--numjobs={jobs}"))
                .arg(format!("--size={part}"));
            fio.arg(format!("--offset_increment={part}"));
            if !cold {
                fio.arg("--time_based");
            }
        }
    }
    let output = command::run(&mut fio)?;
    parse(&output).with_context(|| format!("cannot read fio's output for {}", file.display()))
}

fn parse(output: &[u8]) -> anyhow::Result<Rate> {
    // Warnings come before the JSON on the same stream.
    let start = output.iter().position(|b| *b == b'{').context("no JSON")?;
    let json: serde_json::Value = serde_json::from_slice(&output[start..])?;
    let read = &json["jobs"][0]["read"];
    let number = |key: &str| {
        read[key]
            .as_f64()
            .filter(|v| *v > 0.0)
            .with_context(|| format!("no {key}"))
    };
    anyhow::ensure!(
        json["jobs"][0]["error"].as_i64() == Some(0),
        "a read failed"
    );
    Ok(Rate {
        bytes: number("bw_bytes")?,
        operations: number("iops")?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn parses_fio_and_refuses_errors() {
        let good = br#"fio: note
            {"jobs":[{"error":0,"read":{"bw_bytes":4096000,"iops":1000.5}}]}"#;
        let rate = parse(good).unwrap();
        assert_eq!((rate.bytes, rate.operations), (4_096_000.0, 1000.5));
        assert!(parse(br#"{"jobs":[{"error":5,"read":{"bw_bytes":1,"iops":1}}]}"#).is_err());
        assert!(parse(br#"{"jobs":[]}"#).is_err());
        assert!(parse(b"nothing").is_err());
    }
}
