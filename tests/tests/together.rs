//! Hosts that pull one image at the same time: each layer leaves the registry once, whoever fetches it,
//! and a host that dies, hangs or is stopped is succeeded by one that waited.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use harbour_tests::{
    cluster::Part,
    hosts::{Family, Hosts},
    layers::{Entry, Layout, noise},
    shell,
};
use serde_json::Value;

/// Hosts that pull; the first has metad too. Behind them comes the registry's.
const PULLERS: usize = 4;
const REGISTRY: usize = PULLERS;
/// Layers of the image and the bytes of each.
const LAYERS: usize = 8;
const LAYER_BYTES: usize = 3 << 20;
/// The registry's cable: the image takes three seconds.
const RATE_MBIT: u32 = 64;
/// What frames, headers and manifests may add to the bytes of layers on the registry's cable.
const OVERHEAD: f64 = 1.08;
/// A pull that succeeds one that died.
const LIMIT: Duration = Duration::from_secs(60);
/// Lease of a pull in seconds.
const LEASE_S: &str = "4";

struct Pulling {
    host: usize,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

struct Done {
    good: bool,
    report: Value,
    text: String,
    at: Instant,
}

struct Scene {
    hosts: Hosts,
    reference: String,
}

impl Scene {
    fn new() -> Self {
        let hosts = Hosts::new(PULLERS + 1, Family::V4).unwrap();
        hosts
            .start(0, Part::Metad, &["--lease-s", LEASE_S])
            .unwrap();
        for host in 1..=2 {
            let flags = ["--lend", "64MiB", "--huge-pages", "never"];
            hosts.start(host, Part::Donor, &flags).unwrap();
        }
        hosts.wait_donors(2).unwrap();
        let mut layout = Layout::create(&hosts.dir().join("layout")).unwrap();
        let layer = |n: usize| {
            vec![Entry::file(
                format!("file-{n}"),
                noise(n as u64, LAYER_BYTES),
            )]
        };
        let layers: Vec<_> = (0..LAYERS).map(layer).collect();
        layout.image("i", &layers).unwrap();
        hosts
            .serve_image(REGISTRY, &layout.reference("i"), "many/layers:1")
            .unwrap();
        hosts.slow_down(REGISTRY, RATE_MBIT).unwrap();
        let reference = format!("{}/many/layers:1", hosts.registry(REGISTRY));
        Self { hosts, reference }
    }

    fn pull(&self, host: usize) -> Pulling {
        let dir = self.hosts.host_dir(host);
        let (out, err) = (dir.join("pull.json"), dir.join("pull.log"));
        let mut command = self.hosts.command(host, ["pull", "--insecure", "--json"]);
        command.args(["--jobs", "2", "--progress", "plain", &self.reference]);
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Pulling {
            host,
            child,
            out,
            err,
        }
    }

    /// Bytes that have left the registry's host.
    fn sent(&self) -> u64 {
        // Of a line of this file the ninth figure is the bytes that were sent.
        let script = "sed -n 's/^ *eth0: *//p' /proc/net/dev | awk '{print $9}'";
        let text = self.hosts.shell(REGISTRY, script).unwrap();
        text.text().trim().parse().unwrap()
    }

    fn locks(&self) -> Vec<Value> {
        let locks = self.hosts.json(0, "locks").unwrap();
        locks.as_array().cloned().unwrap()
    }

    /// Waits until some pull has a layer of which bytes have come and others wait for it; gives its
    /// process.
    fn holder(&self) -> u64 {
        shell::until("a layer is held and waited for", LIMIT, || {
            let locks = self.locks();
            let waited = |key: &Value| {
                locks
                    .iter()
                    .any(|l| l["state"] == "waits" && l["key"] == *key)
            };
            let held = locks.iter().find(|lock| {
                lock["state"] == "held"
                    && lock["done_bytes"].as_u64() > Some(0)
                    && waited(&lock["key"])
            });
            Ok(held.and_then(|lock| lock["pid"].as_u64()))
        })
        .unwrap()
    }

    fn kill(&self, signal: &str, pid: u64) {
        self.hosts
            .shell(0, &format!("kill -{signal} {pid}"))
            .unwrap();
    }

    fn wait(&self, mut pulling: Pulling) -> Done {
        // `nsenter` stops with the program that it waits for, and nobody else lets it go on.
        let nsenter = nix::unistd::Pid::from_raw(pulling.child.id().cast_signed());
        nix::sys::signal::kill(nsenter, nix::sys::signal::Signal::SIGCONT).unwrap();
        let status = shell::wait(&mut pulling.child, Instant::now() + LIMIT).unwrap();
        let text = std::fs::read_to_string(&pulling.err).unwrap();
        let status = status.unwrap_or_else(|| {
            panic!(
                "host {} still pulls:\n{text}{}",
                pulling.host,
                self.hosts.logs()
            )
        });
        let json = std::fs::read(&pulling.out).unwrap();
        let reports: Value = serde_json::from_slice(&json).unwrap_or_default();
        Done {
            good: status.success(),
            report: reports[0].clone(),
            text,
            at: Instant::now(),
        }
    }

    /// What metad has counts up, and nobody holds or waits for anything.
    fn at_rest(&self) {
        let mut audit = self.hosts.command(0, ["audit"]);
        shell::run(&mut audit, LIMIT).unwrap().ok().unwrap();
        assert_eq!(self.locks(), Vec::<Value>::new());
    }

    /// How often the bytes of the image went over the registry's cable since `before`.
    fn times_sent(&self, before: u64) -> f64 {
        (self.sent() - before) as f64 / (LAYERS * LAYER_BYTES) as f64
    }
}

fn sum(done: &[Done], key: &str) -> u64 {
    done.iter()
        .filter_map(|done| done.report[key].as_u64())
        .sum()
}

#[test]
fn four_hosts_take_each_layer_from_the_registry_once() {
    let scene = Scene::new();
    let before = scene.sent();
    let pulls: Vec<_> = (0..PULLERS).map(|host| scene.pull(host)).collect();
    let done: Vec<Done> = pulls.into_iter().map(|pull| scene.wait(pull)).collect();
    for (host, done) in done.iter().enumerate() {
        assert!(
            done.good,
            "host {host}: {}{}",
            done.text,
            scene.hosts.logs()
        );
        let of = |key: &str| done.report[key].as_u64().unwrap();
        let layers = of("fetched") + of("fetched_by_others");
        // Those that came before it asked were there already.
        assert!(layers <= LAYERS as u64, "host {host}: {}", done.report);
    }
    assert_eq!(sum(&done, "fetched"), LAYERS as u64);
    let sharing = done
        .iter()
        .filter(|d| d.report["fetched"].as_u64() > Some(0));
    assert!(sharing.count() >= 2, "one host did all of it");
    let sent = scene.times_sent(before);
    eprintln!("the image went over the registry's cable {sent:.3} times");
    assert!((1.0..OVERHEAD).contains(&sent), "{sent}");
    // Who waits says for whom, and how far that one is.
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let told = |line: &str| line.contains(&format!("fetched by {host}, ")) && line.contains(" of ");
    let shown = done.iter().filter(|done| done.text.lines().any(told));
    assert!(shown.count() > 0, "{}", done[PULLERS - 1].text);
    scene.at_rest();
}

/// Has one host fail with a layer in its hands; gives what became of it and of the others, and the time
/// from `fail` to the last one's end.
fn succeeded(scene: &Scene, fail: impl FnOnce(u64)) -> (Vec<Done>, Duration, f64) {
    let before = scene.sent();
    let pulls: Vec<_> = (0..PULLERS).map(|host| scene.pull(host)).collect();
    let pid = scene.holder();
    let failed = Instant::now();
    fail(pid);
    let done: Vec<Done> = pulls.into_iter().map(|pull| scene.wait(pull)).collect();
    let good = done.iter().filter(|done| done.good);
    let last = good.map(|done| done.at).max().unwrap();
    (done, last - failed, scene.times_sent(before))
}

/// The failed one's layers are fetched again, at most the two it had in hand and what it had staged.
fn check(scene: &Scene, (done, took, sent): (Vec<Done>, Duration, f64), limit: Duration) {
    let texts: Vec<_> = done.iter().map(|done| done.text.as_str()).collect();
    let good = done.iter().filter(|done| done.good).count();
    assert_eq!(good, PULLERS - 1, "{texts:#?}{}", scene.hosts.logs());
    eprintln!("the others were done after {took:.1?}; {sent:.2} images left the registry");
    assert!(took < limit, "{took:?}\n{texts:#?}");
    assert!(sent < OVERHEAD + 2.0 / LAYERS as f64, "{sent}");
    scene.at_rest();
}

#[test]
fn a_host_that_is_killed_is_succeeded() {
    let scene = Scene::new();
    let outcome = succeeded(&scene, |pid| scene.kill("KILL", pid));
    check(&scene, outcome, Duration::from_secs(10));
}

#[test]
fn a_host_that_is_stopped_hands_over_at_once() {
    let scene = Scene::new();
    let outcome = succeeded(&scene, |pid| scene.kill("INT", pid));
    check(&scene, outcome, Duration::from_secs(8));
}

#[test]
fn a_host_that_hangs_is_succeeded_and_fenced_off() {
    let scene = Scene::new();
    let outcome = succeeded(&scene, |pid| {
        scene.kill("STOP", pid);
        let gone = || {
            let locks = scene.locks();
            Ok((!locks.iter().any(|lock| lock["pid"] == pid)).then_some(()))
        };
        shell::until("its lease is over", LIMIT, gone).unwrap();
        scene.kill("CONT", pid);
    });
    let late = outcome.0.iter().find(|done| !done.good);
    let text = late.map(|done| done.text.clone()).unwrap_or_default();
    assert!(text.contains("lease"), "{text}");
    check(&scene, outcome, Duration::from_secs(15));
}
