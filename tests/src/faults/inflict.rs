//! Doing to donors what a plan says, at the time it says.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::SeekFrom;

use super::{
    plan::{Dice, Fault, Kind, Plan},
    stage::{KEEP_FREE_MIB, REGISTRY, Stage},
};
use crate::cluster::Part;

/// Stretches that are made bad at a time: what readers check as one.
const STRETCH: u64 = 16 << 10;

/// Something that begins or ends.
#[derive(Clone, Copy)]
struct Event {
    at: Duration,
    begins: bool,
    fault: Fault,
}

/// Goes through a plan in its time; what it began it ends. What was lost for good is put right by
/// [`Stage::mend`].
pub(super) fn carry_out(stage: &Stage, plan: &Plan) -> Result<()> {
    let mut events: Vec<Event> = Vec::new();
    for fault in &plan.faults {
        events.push(Event {
            at: fault.at,
            begins: true,
            fault: *fault,
        });
        events.push(Event {
            at: fault.at + fault.lasts,
            begins: false,
            fault: *fault,
        });
    }
    events.sort_by_key(|event| event.at);
    let started = Instant::now();
    if !plan.registry {
        stage.hosts.plug(REGISTRY, false)?;
    }
    for event in events {
        thread::sleep(event.at.saturating_sub(started.elapsed()));
        let done = if event.begins {
            begin(stage, plan, &event.fault)
        } else {
            end(stage, &event.fault)
        };
        done.with_context(|| format!("{:?}", event.fault))?;
    }
    thread::sleep(plan.lasts().saturating_sub(started.elapsed()));
    Ok(())
}

fn begin(stage: &Stage, plan: &Plan, fault: &Fault) -> Result<()> {
    let (hosts, host) = (&stage.hosts, fault.host);
    match fault.kind {
        Kind::Kill => hosts.signal(host, Part::Donor, "KILL"),
        Kind::Freeze => hosts.signal(host, Part::Donor, "STOP"),
        Kind::Cut => hosts.plug(host, false),
        Kind::Slow(mbit) => hosts.slow_down(host, mbit),
        Kind::Corrupt(percent) => corrupt(stage, host, percent, plan.seed),
        Kind::Squeeze(percent) => squeeze(stage, host, percent),
    }
}

fn end(stage: &Stage, fault: &Fault) -> Result<()> {
    let (hosts, host) = (&stage.hosts, fault.host);
    match fault.kind {
        Kind::Kill => stage.start_donor(host),
        Kind::Freeze => hosts.signal(host, Part::Donor, "CONT"),
        Kind::Cut => hosts.plug(host, true),
        Kind::Slow(_) => hosts.speed_up(host),
        Kind::Corrupt(_) => Ok(()),
        Kind::Squeeze(_) => stage.group(host)?.lift(),
    }
}

/// The memory that a donor lends, as files, each once.
fn lent(stage: &Stage, host: usize) -> Result<Vec<PathBuf>> {
    let pid = stage.hosts.pid(host, Part::Donor)?;
    let (mut found, mut seen) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let path = entry.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if !target.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if !seen.contains(&meta.ino()) {
            seen.push(meta.ino());
            found.push(path);
        }
    }
    ensure!(!found.is_empty(), "the donor on host {host} lends nothing");
    Ok(found)
}

/// Changes a byte in so many of a hundred stretches that hold something.
fn corrupt(stage: &Stage, host: usize, percent: u32, seed: u64) -> Result<()> {
    let mut dice = Dice::new(seed);
    for path in lent(stage, host)? {
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        let len = file.metadata()?.len();
        let mut at = 0;
        // Holes hold nothing, and stay holes.
        while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap_or(len);
            for stretch in (data..end).step_by(STRETCH as usize) {
                if dice.below(100) >= u64::from(percent) {
                    continue;
                }
                let place = stretch + dice.below(STRETCH.min(end - stretch));
                let mut byte = [0];
                file.read_exact_at(&mut byte, place)?;
                file.write_all_at(&[!byte[0]], place)?;
            }
            at = end;
        }
    }
    Ok(())
}

/// Leaves the donor's host so little that it has to give back so much of what it holds.
fn squeeze(stage: &Stage, host: usize, percent: u32) -> Result<()> {
    let held: u64 = lent(stage, host)?
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|meta| meta.blocks() * 512)
        .sum();
    let wanted = held * u64::from(percent) / 100;
    stage
        .group(host)?
        .leave((KEEP_FREE_MIB << 20).saturating_sub(wanted))
}
