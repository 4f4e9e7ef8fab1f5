//! Hosts that pull one image while pulls and metad are killed, frozen and cut off at random moments:
//! whoever lives has the image in the end, byte for byte, the books balance, and the registry sends again
//! only what was lost.
//!
//! `HARBOUR_CHURN_RUNS=300 tests/run churn` is the long version; `HARBOUR_CHURN_SEED` is the seed of the
//! first run, and the others have those that follow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    collections::BTreeSet,
    fmt, thread,
    time::{Duration, Instant},
};

use harbour_tests::{
    cluster::Part,
    faults::plan::Dice,
    hosts::Hosts,
    layers::noise,
    pulling::{Done, LEASE, LIMIT, OVERHEAD, Scene},
    setting, shell,
};

/// Runs when nothing is said.
const RUNS: u64 = 6;
const SEED: u64 = 1;
const PULLERS: usize = 4;
/// A host that has neither metad nor a donor: its cable can be pulled out.
const ALONE: usize = 3;
const LAYERS: u64 = 8;
const LAYER_BYTES: usize = 1 << 20;
/// The image takes two seconds.
const RATE_MBIT: u32 = 36;
/// When things go wrong.
const FIRST_MS: u64 = 100;
const LAST_MS: u64 = 2000;
/// Pulls begin within this time.
const STAGGER_MS: u64 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    KillPull(usize),
    FreezePull(usize),
    CutPull,
    KillMetad,
    FreezeMetad,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    kind: Kind,
    at: Duration,
    lasts: Duration,
}

struct Plan {
    seed: u64,
    faults: Vec<Fault>,
    starts: Vec<Duration>,
}

impl Plan {
    fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let ms = Duration::from_millis;
        let count = 1 + dice.below(3);
        let mut faults = Vec::new();
        for _ in 0..count {
            let kind = match dice.below(5) {
                0 => Kind::KillPull(dice.below(PULLERS as u64) as usize),
                1 => Kind::FreezePull(dice.below(PULLERS as u64) as usize),
                2 => Kind::CutPull,
                3 => Kind::KillMetad,
                _ => Kind::FreezeMetad,
            };
            // Shorter than the lease, or longer; metad always comes back before others lose theirs.
            let long = dice.below(2) == 1 && !matches!(kind, Kind::KillMetad | Kind::FreezeMetad);
            let lasts = match long {
                true => LEASE + ms(500 + dice.below(1500)),
                false => ms(100 + dice.below(1400)),
            };
            let at = ms(dice.of(&(FIRST_MS..=LAST_MS)));
            let same = |other: &&Fault| {
                let metad = |kind| matches!(kind, Kind::KillMetad | Kind::FreezeMetad);
                metad(other.kind) && metad(kind)
            };
            // One thing at a time happens to metad.
            if !faults.iter().any(|fault| same(&fault)) {
                faults.push(Fault { kind, at, lasts });
            }
        }
        faults.sort_by_key(|fault| fault.at);
        let starts = (0..PULLERS).map(|_| ms(dice.below(STAGGER_MS))).collect();
        Self {
            seed,
            faults,
            starts,
        }
    }

    /// Hosts whose pulls may fail.
    fn hit(&self) -> BTreeSet<usize> {
        let hit = self.faults.iter().filter_map(|fault| match fault.kind {
            Kind::KillPull(host) | Kind::FreezePull(host) => Some(host),
            Kind::CutPull => Some(ALONE),
            Kind::KillMetad | Kind::FreezeMetad => None,
        });
        hit.collect()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}:", self.seed)?;
        for Fault { kind, at, lasts } in &self.faults {
            write!(
                f,
                " {kind:?} at {} ms for {} ms,",
                at.as_millis(),
                lasts.as_millis()
            )?;
        }
        Ok(())
    }
}

/// Does one thing and puts it right again.
fn inflict(scene: &Scene, fault: Fault, began: Instant) {
    let hosts: &Hosts = &scene.hosts;
    thread::sleep(fault.at.saturating_sub(began.elapsed()));
    match fault.kind {
        Kind::KillPull(host) => scene.signal_pull(host, "KILL").unwrap(),
        Kind::FreezePull(host) => {
            scene.signal_pull(host, "STOP").unwrap();
            thread::sleep(fault.lasts);
            scene.signal_pull(host, "CONT").unwrap();
        }
        Kind::CutPull => {
            hosts.plug(ALONE, false).unwrap();
            thread::sleep(fault.lasts);
            hosts.plug(ALONE, true).unwrap();
        }
        Kind::KillMetad => {
            hosts.signal(0, Part::Metad, "KILL").unwrap();
            thread::sleep(fault.lasts);
            scene.start_metad().unwrap();
        }
        Kind::FreezeMetad => {
            hosts.signal(0, Part::Metad, "STOP").unwrap();
            thread::sleep(fault.lasts);
            hosts.signal(0, Part::Metad, "CONT").unwrap();
        }
    }
}

/// Reads the whole image through a mount that the kernel has nothing of.
fn read_all(scene: &Scene, root: &std::path::Path, layers: &[u64]) {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    for seed in layers {
        let file = scene.hosts.seen(&root.join(format!("file-{seed}")));
        let read = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert!(
            read == noise(*seed, LAYER_BYTES),
            "{} has other bytes",
            file.display()
        );
    }
}

/// One run; gives how often the image left the registry, and the time until all had it.
fn run(scene: &mut Scene, plan: &Plan) -> (f64, Duration) {
    let layers: Vec<u64> = (0..LAYERS).map(|n| plan.seed * 1000 + n).collect();
    let tag = format!("s{}", plan.seed);
    let image = vec![scene.serve(&tag, &layers, LAYER_BYTES).unwrap()];
    let before = scene.sent().unwrap();
    let began = Instant::now();
    let scene = &*scene;
    let done: Vec<Done> = thread::scope(|scope| {
        let image = &image;
        let pulls = plan.starts.iter().enumerate().map(|(host, start)| {
            scope.spawn(move || {
                thread::sleep(*start);
                let pull = scene.pull(host, image).unwrap();
                // Told to go on only when what happens to it is over.
                let end = plan.faults.iter().map(|fault| fault.at + fault.lasts).max();
                thread::sleep(end.unwrap_or_default().saturating_sub(began.elapsed()));
                scene.wait(pull).unwrap()
            })
        });
        let pulls: Vec<_> = pulls.collect();
        for fault in &plan.faults {
            scope.spawn(move || inflict(scene, *fault, began));
        }
        pulls.into_iter().map(|pull| pull.join().unwrap()).collect()
    });
    let hit = plan.hit();
    for done in &done {
        let host = done.host;
        let fine = done.good || hit.contains(&host);
        assert!(
            fine,
            "{plan} host {host}:\n{}{}",
            done.text,
            scene.hosts.logs()
        );
    }
    // Who failed comes back, and finds what the others have, or what it left.
    for host in &hit {
        let again = scene.wait(scene.pull(*host, &image).unwrap()).unwrap();
        assert!(
            again.good,
            "{plan} host {host}, again:\n{}{}",
            again.text,
            scene.hosts.logs()
        );
    }
    let took = began.elapsed();
    let bytes = (LAYERS as usize * LAYER_BYTES) as f64;
    let sent = (scene.sent().unwrap() - before) as f64 / bytes;
    // Each that failed had at most two layers in its hands.
    let lost = hit.len() as f64 * 2.0 / LAYERS as f64;
    assert!(
        sent < OVERHEAD + 0.05 + lost,
        "{plan} {sent:.2} images left the registry"
    );
    let pulled = scene.hosts.pull(0, &image[0]).unwrap();
    assert_eq!(pulled.fetched, 0, "{plan} not all was there");
    let root = scene.hosts.rootfs(0, &pulled).unwrap();
    read_all(scene, &root, &layers);
    let mut remove = scene.hosts.command(0, ["rm", &image[0]]);
    shell::run(&mut remove, LIMIT).unwrap().ok().unwrap();
    // Claims of those that were killed last until their leases are over.
    shell::until("all is at rest", LIMIT, || Ok(scene.at_rest().ok())).unwrap_or_else(|e| {
        panic!("{plan} {e:#}: {:?}{}", scene.at_rest(), scene.hosts.logs());
    });
    (sent, took)
}

#[test]
fn pulls_that_die_are_succeeded_whatever_happens() {
    let first = setting("HARBOUR_CHURN_SEED", SEED);
    let count = setting("HARBOUR_CHURN_RUNS", RUNS);
    let mut scene = Scene::new(PULLERS, RATE_MBIT).unwrap();
    scene.hosts.start(0, Part::Node, &[]).unwrap();
    scene.hosts.wait_node(0).unwrap();
    let (mut most, mut longest) = (0.0_f64, Duration::ZERO);
    for seed in first..first + count {
        let plan = Plan::of(seed);
        let (sent, took) = run(&mut scene, &plan);
        println!("{plan} {sent:.2} images sent, {:.1} s", took.as_secs_f64());
        (most, longest) = (most.max(sent), longest.max(took));
    }
    println!(
        "figures: churn, seeds {first} to {}: at most {most:.2} images sent, {:.1} s",
        first + count - 1,
        longest.as_secs_f64()
    );
}
