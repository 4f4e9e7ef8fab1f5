//! Runs in which donors fail while programs read: what fails and when follows from a seed.
//!
//! One cluster is kept for all runs ([`stage`]). In a run fio checks the files that it wrote into
//! the image, a container checks others, and probers time every read and compare every byte
//! ([`load`], [`probe`]), while donors are killed, frozen, cut off, slowed, corrupted and squeezed
//! ([`plan`], [`inflict`]). After each run the cluster is put right, and the next one begins when
//! every pack has its replicas again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

mod group;
mod image;
mod inflict;
mod load;
pub mod plan;
mod probe;
mod stage;

use self::{
    load::{Beats, Container, Fio, FioRun},
    plan::{Kind, Plan},
    probe::{Past, Probed, Prober},
    stage::{Numbers, Stage},
};

/// No read may take longer.
pub const STALL_LIMIT: Duration = Duration::from_secs(3);
/// fio is at work for so long before faults begin and after they end.
const MARGIN: Duration = Duration::from_millis(300);

/// What one run showed.
#[derive(Clone, Debug)]
pub struct Shown {
    fio: Fio,
    beats: Beats,
    probed: Probed,
    numbers: Numbers,
}

/// All runs together.
#[derive(Clone, Debug, Default)]
pub struct Sum {
    /// Runs that ended well.
    pub runs: usize,
    faults: [usize; Kind::NAMES.len()],
    reads: u64,
    beats: usize,
    longest: Duration,
    longest_seed: u64,
    longest_gap: Duration,
    donors: u64,
    registry: u64,
    wrong: u64,
    hedges: u64,
    refills: u64,
}

/// Makes the runs of `count` seeds from `first` on, and tells of each. The error names the seed that failed.
pub fn runs(first: u64, count: u64, mut say: impl FnMut(&str)) -> Result<Sum> {
    let stage = Stage::set()?;
    let mut sum = Sum::default();
    for number in 0..count {
        let plan = Plan::of(first.wrapping_add(number));
        let began = Instant::now();
        let shown = one(&stage, &plan).map_err(|error| {
            // What counts comes last: who shows the end of a log shows it.
            anyhow!(
                "{}\n{error:#}\nrun {} of {count} failed: {plan}\nreplay it with HARBOUR_FAULT_SEED={} HARBOUR_FAULT_RUNS=1 tests/run faults",
                stage.hosts.logs(),
                number + 1,
                plan.seed,
            )
        })?;
        let mending = Instant::now();
        stage
            .mend(&plan)
            .and_then(|()| {
                let used = shown.numbers.registry + shown.numbers.refills > 0;
                if used { stage.renew_mount() } else { Ok(()) }
            })
            .with_context(|| format!("after run {}: {plan}", number + 1))?;
        sum.add(&plan, &shown);
        say(&format!(
            "run {}/{count} {plan}: {shown}; {:.1} s and {:.1} s of mending",
            number + 1,
            (mending - began).as_secs_f64(),
            mending.elapsed().as_secs_f64(),
        ));
    }
    Ok(sum)
}

fn one(stage: &Stage, plan: &Plan) -> Result<Shown> {
    let before = stage.numbers()?;
    let container = Container::start(stage)?;
    let seen = |path: &std::path::Path| stage.hosts.seen(path);
    let mut doors = vec![(seen(&stage.root), Past::Direct)];
    let lower = stage.lower.first().context("no layers")?;
    doors.push((seen(lower), Past::Dropped));
    doors.extend(stage.view.as_ref().map(|view| (seen(view), Past::Dropped)));
    let probers = doors
        .into_iter()
        .zip(plan.seed..)
        .map(|((root, past), seed)| Prober::start(root, past, &stage.content, seed))
        .collect::<Result<Vec<_>>>()?;
    let fio = FioRun::start(stage, plan.lasts() + 2 * MARGIN)?;
    std::thread::sleep(MARGIN);
    let carried_out = inflict::carry_out(stage, plan);
    // All of them are ended, whatever is wrong with one.
    let probed: Vec<Result<Probed>> = probers.into_iter().map(Prober::end).collect();
    let (fio, beats) = (fio.end(), container.end());
    carried_out?;
    let probed = probed
        .into_iter()
        .reduce(|all, one| Ok(all?.and(one?)))
        .context("no prober")??;
    let shown = Shown {
        fio: fio?,
        beats: beats?,
        probed,
        numbers: stage.numbers()?.since(before),
    };
    ensure!(shown.numbers.failed == 0, "reads failed: {shown}");
    ensure!(
        shown.longest() <= STALL_LIMIT && shown.beats.longest_gap <= STALL_LIMIT,
        "a read stood still: {shown}"
    );
    Ok(shown)
}

impl Shown {
    fn longest(&self) -> Duration {
        self.fio.longest.max(self.probed.longest)
    }

    fn reads(&self) -> u64 {
        self.fio.reads + self.probed.reads
    }
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Numbers {
            donors,
            registry,
            wrong,
            hedges,
            refills,
            failed,
        } = self.numbers;
        write!(
            f,
            "longest read {} ms by fio, {} ms by probes ({}), longest gap {} ms; {} reads, {} files; \
             {} MiB from donors, {} MiB from the registry, {wrong} wrong, {hedges} hedges, {refills} refills, {failed} failed",
            self.fio.longest.as_millis(),
            self.probed.longest.as_millis(),
            self.probed.at,
            self.beats.longest_gap.as_millis(),
            self.reads(),
            self.beats.count,
            donors >> 20,
            registry >> 20,
        )
    }
}

impl Sum {
    fn add(&mut self, plan: &Plan, shown: &Shown) {
        self.runs += 1;
        for fault in &plan.faults {
            self.faults[fault.kind.number()] += 1;
        }
        self.reads += shown.reads();
        self.beats += shown.beats.count;
        if shown.longest() > self.longest {
            (self.longest, self.longest_seed) = (shown.longest(), plan.seed);
        }
        self.longest_gap = self.longest_gap.max(shown.beats.longest_gap);
        let Numbers {
            donors,
            registry,
            wrong,
            hedges,
            refills,
            failed: _,
        } = shown.numbers;
        self.donors += donors;
        self.registry += registry;
        self.wrong += wrong;
        self.hedges += hedges;
        self.refills += refills;
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} runs;", self.runs)?;
        for (name, count) in Kind::NAMES.iter().zip(self.faults) {
            write!(f, " {name} {count},")?;
        }
        write!(
            f,
            " {} reads checked and {} files in containers; longest read {} ms (seed {}), longest gap {} ms; \
             {} MiB from donors, {} MiB from the registry, {} wrong stretches refused, {} hedges, {} refills waited for",
            self.reads,
            self.beats,
            self.longest.as_millis(),
            self.longest_seed,
            self.longest_gap.as_millis(),
            self.donors >> 20,
            self.registry >> 20,
            self.wrong,
            self.hedges,
            self.refills
        )
    }
}
