//! Programs that read while donors fail: fio, and a container.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    image::{FIO_BLOCK, FIO_FILE_MIB, FIO_FILES, FIO_VERIFY},
    stage::{NODE, Stage},
};
use crate::shell;

/// Reads a second of each of fio's jobs.
const FIO_RATE: u32 = 150;
/// Until a program that was told to end has ended: no read lasts so long.
const END_LIMIT: Duration = Duration::from_secs(40);
/// Until the container reads.
const START_LIMIT: Duration = Duration::from_secs(30);
/// The container's name.
const NAME: &str = "faults";
/// What the container does: reads its files past the kernel's cache, checks them, and says when.
const SCRIPT: &str = r#"trap 'echo ended; exit 0' TERM
while :; do
  while read -r sum file; do
    dd if="$file" iflag=nocache count=0 status=none || exit 3
    echo "$sum  $file" | sha256sum -c --quiet - || exit 4
    echo "beat $EPOCHREALTIME"
    sleep 0.02
  done < /sums
done
"#;

/// What fio found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fio {
    /// Reads, every one checked.
    pub(super) reads: u64,
    /// The longest.
    pub(super) longest: Duration,
}

/// fio at work.
#[derive(Debug)]
pub(super) struct FioRun {
    child: Child,
    output: PathBuf,
    log: PathBuf,
}

impl FioRun {
    /// Starts it for `lasts`, on the image's root.
    pub(super) fn start(stage: &Stage, lasts: Duration) -> Result<Self> {
        let dir = stage.hosts.dir();
        let (output, log) = (dir.join("fio.json"), dir.join("fio.log"));
        let mut command = stage.hosts.on(NODE, "fio");
        command.args(["--readonly", "--rw=randread", "--direct=1", FIO_VERIFY]);
        command.args(["--verify_fatal=1", "--verify_state_save=0"]);
        command.args(["--time_based", "--output-format=json"]);
        command.arg(format!("--bs={FIO_BLOCK}"));
        command.arg(format!("--size={FIO_FILE_MIB}m"));
        command.arg(format!("--rate_iops={FIO_RATE}"));
        command.arg(format!("--runtime={}ms", lasts.as_millis()));
        command.arg(format!("--output={}", output.display()));
        for name in FIO_FILES {
            command.arg(format!("--name={}", name.replace('/', "-")));
            // A colon parts names of files, and a registry's name has one.
            let path = stage.root.join(name).display().to_string();
            command.arg(format!("--filename={}", path.replace(':', "\\:")));
        }
        let child = spawn(&mut command, &log)?;
        Ok(Self { child, output, log })
    }

    /// Waits for its end, and says what it found.
    pub(super) fn end(mut self) -> Result<Fio> {
        let status = shell::wait(&mut self.child, Instant::now() + END_LIMIT)?;
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let status = status.with_context(|| format!("fio does not end\n{said}"))?;
        ensure!(status.success(), "fio ended with {status}\n{said}");
        let text = fs::read_to_string(&self.output)?;
        let text = text.get(text.find('{').unwrap_or(0)..).unwrap_or_default();
        let found: Value = serde_json::from_str(text).context("what fio found")?;
        let mut all = Fio::default();
        for job in found["jobs"].as_array().context("fio's jobs")? {
            ensure!(job["error"] == 0, "fio: {job}\n{said}");
            let number = |value: &Value| value.as_u64().context("fio gave no number");
            let longest = number(&job["read"]["clat_ns"]["max"])?;
            all.reads += number(&job["read"]["total_ios"])?;
            all.longest = all.longest.max(Duration::from_nanos(longest));
        }
        ensure!(all.reads > 0, "fio read nothing\n{said}");
        Ok(all)
    }
}

/// What the container said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Beats {
    /// Files that it read and checked.
    pub(super) count: usize,
    /// The longest time between two of them.
    pub(super) longest_gap: Duration,
}

/// A container at work, over an overlay of the image's layers.
#[derive(Debug)]
pub(super) struct Container<'a> {
    stage: &'a Stage,
    child: Child,
    log: PathBuf,
}

impl<'a> Container<'a> {
    /// Starts it and waits until it reads.
    pub(super) fn start(stage: &'a Stage) -> Result<Self> {
        let dir = stage.hosts.dir();
        let (bundle, log) = (dir.join("bundle"), dir.join("container.log"));
        for name in ["up", "rootfs"] {
            fs::create_dir_all(bundle.join(name))?;
        }
        write_spec(stage, &bundle)?;
        let lower: Vec<_> = stage
            .lower
            .iter()
            .map(|l| l.display().to_string())
            .collect();
        let script = format!(
            "cd {} && mount -t tmpfs up up && mkdir up/u up/w && \
             mount -t overlay overlay -o lowerdir={},upperdir=up/u,workdir=up/w rootfs && \
             mkdir -p /run/runc && exec runc --root /run/runc run --no-pivot {NAME}",
            bundle.display(),
            lower.join(":")
        );
        let mut command = stage.hosts.on(NODE, "sh");
        let child = spawn(command.args(["-ec", &script]), &log)?;
        let mut container = Self { stage, child, log };
        shell::until("the container reads", START_LIMIT, || {
            let ended = container.child.try_wait()?;
            let said = fs::read_to_string(&container.log).unwrap_or_default();
            ensure!(ended.is_none(), "the container ended: {said}");
            Ok(said.contains("beat ").then_some(()))
        })?;
        Ok(container)
    }

    /// Tells it to end, and gives what it said.
    pub(super) fn end(mut self) -> Result<Beats> {
        let script = format!("runc --root /run/runc kill {NAME} TERM");
        let told = self.stage.hosts.shell(NODE, &script);
        let status = shell::wait(&mut self.child, Instant::now() + END_LIMIT)?;
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = said.lines().filter(|line| !line.starts_with("beat "));
        let other = lines.collect::<Vec<_>>().join("\n");
        let status = status.with_context(|| format!("the container does not end\n{other}"))?;
        told.with_context(|| format!("the container had ended with {status}:\n{other}"))?;
        let good = status.success() && other.lines().any(|line| line == "ended");
        ensure!(good, "the container ended with {status}:\n{other}");
        let bundle = self.stage.hosts.dir().join("bundle");
        let script = format!("cd {} && umount rootfs && umount up", bundle.display());
        self.stage.hosts.shell(NODE, &script)?;
        beats(&said)
    }
}

fn write_spec(stage: &Stage, bundle: &Path) -> Result<()> {
    let path = bundle.join("config.json");
    if !path.exists() {
        let script = format!("cd {} && runc spec", bundle.display());
        stage.hosts.shell(NODE, &script)?;
        let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = vec!["/bin/bash", "-c", SCRIPT].into();
        spec["linux"]["cgroupsPath"] = stage.pen.path.as_str().into();
        spec["root"]["readonly"] = false.into();
        fs::write(&path, spec.to_string())?;
    }
    Ok(())
}

fn beats(said: &str) -> Result<Beats> {
    let mut beats = Beats::default();
    let mut before: Option<f64> = None;
    for line in said.lines() {
        let Some(time) = line.strip_prefix("beat ") else {
            continue;
        };
        let time: f64 = time.trim().replace(',', ".").parse()?;
        let gap = before.map_or(0.0, |before| (time - before).max(0.0));
        beats.longest_gap = beats.longest_gap.max(Duration::from_secs_f64(gap));
        beats.count += 1;
        before = Some(time);
    }
    Ok(beats)
}

fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let file = File::create(log)?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {:?}", command.get_program()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_found() {
        let said = "beat 10.000001\nbeat 10.500001\nnoise\nbeat 12.000001\nended\n";
        let beats = beats(said).unwrap();
        assert_eq!(beats.count, 3);
        assert!(beats.longest_gap.as_secs_f64() > 1.49 && beats.longest_gap.as_secs_f64() < 1.51);
    }
}
