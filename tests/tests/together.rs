//! Hosts that pull one image at the same time: each layer leaves the registry once, whoever fetches it,
//! and a host that dies, hangs or is stopped is succeeded by one that waited.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use harbour_tests::{
    pulling::{Done, LIMIT, OVERHEAD, Pulling, Scene},
    shell,
};

/// Hosts that pull where one can fail.
const PULLERS: usize = 4;
/// Hosts that pull images with layers in common.
const MANY: usize = 12;
/// Images that have 6 of 10 layers in common.
const IMAGES: u64 = 3;
const COMMON: u64 = 6;
const OF_IMAGE: u64 = 10;
const SMALL_BYTES: usize = 400_000;
/// Layers of the image and the bytes of each.
const LAYERS: u64 = 8;
const LAYER_BYTES: usize = 3 << 20;
/// The registry's cable: the image takes three seconds.
const RATE_MBIT: u32 = 64;

/// One image and some hosts.
fn scene() -> (Scene, Vec<String>) {
    let mut scene = Scene::new(PULLERS, RATE_MBIT).unwrap();
    let layers: Vec<u64> = (0..LAYERS).collect();
    let reference = scene.serve("i", &layers, LAYER_BYTES).unwrap();
    (scene, vec![reference])
}

/// Begins to pull on so many hosts at once, on each what `images` says.
fn begin(scene: &Scene, hosts: usize, images: impl Fn(usize) -> Vec<String>) -> Vec<Pulling> {
    let begun = (0..hosts).map(|host| scene.pull(host, &images(host)).unwrap());
    begun.collect()
}

fn wait(scene: &Scene, pulls: Vec<Pulling>) -> Vec<Done> {
    let waited = pulls.into_iter().map(|pull| scene.wait(pull).unwrap());
    waited.collect()
}

fn sum(done: &[Done], key: &str) -> u64 {
    done.iter().map(|done| done.sum(key)).sum()
}

/// How often the bytes of the image went over the registry's cable since `before`.
fn times_sent(scene: &Scene, before: u64) -> f64 {
    (scene.sent().unwrap() - before) as f64 / (LAYERS as usize * LAYER_BYTES) as f64
}

#[test]
fn four_hosts_take_each_layer_from_the_registry_once() {
    let (scene, image) = scene();
    let before = scene.sent().unwrap();
    let done = wait(&scene, begin(&scene, PULLERS, |_| image.clone()));
    for done in &done {
        let host = done.host;
        assert!(
            done.good,
            "host {host}: {}{}",
            done.text,
            scene.hosts.logs()
        );
        // Those that came before it asked were there already.
        let layers = done.sum("fetched") + done.sum("fetched_by_others");
        assert!(layers <= LAYERS, "host {host}: {}", done.reports);
    }
    assert_eq!(sum(&done, "fetched"), LAYERS);
    let sharing = done.iter().filter(|done| done.sum("fetched") > 0);
    assert!(sharing.count() >= 2, "one host did all of it");
    let sent = times_sent(&scene, before);
    eprintln!("the image went over the registry's cable {sent:.3} times");
    assert!((1.0..OVERHEAD).contains(&sent), "{sent}");
    // Who waits says for whom, and how far that one is.
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let told = |line: &str| line.contains(&format!("fetched by {host}, ")) && line.contains(" of ");
    let shown = done.iter().filter(|done| done.text.lines().any(told));
    assert!(shown.count() > 0, "{}", done[PULLERS - 1].text);
    scene.at_rest().unwrap();
}

/// Has one host fail with a layer in its hands; gives what became of it and of the others, the time
/// from `fail` to the last one's end, and how often the image was sent.
fn succeeded(
    scene: &Scene,
    image: &[String],
    fail: impl FnOnce(u64),
) -> (Vec<Done>, Duration, f64) {
    let before = scene.sent().unwrap();
    let pulls = begin(scene, PULLERS, |_| image.to_vec());
    let pid = scene.holder().unwrap();
    let failed = Instant::now();
    fail(pid);
    let done = wait(scene, pulls);
    let good = done.iter().filter(|done| done.good);
    let last = good.map(|done| done.at).max().unwrap();
    (done, last - failed, times_sent(scene, before))
}

/// The failed one's layers are fetched again, at most the two it had in hand.
fn check(scene: &Scene, (done, took, sent): (Vec<Done>, Duration, f64), limit: Duration) {
    let texts: Vec<_> = done.iter().map(|done| done.text.as_str()).collect();
    let good = done.iter().filter(|done| done.good).count();
    assert_eq!(good, PULLERS - 1, "{texts:#?}{}", scene.hosts.logs());
    eprintln!("the others were done after {took:.1?}; {sent:.2} images left the registry");
    assert!(took < limit, "{took:?}\n{texts:#?}");
    assert!(sent < OVERHEAD + 2.0 / LAYERS as f64, "{sent}");
    scene.at_rest().unwrap();
}

fn kill(scene: &Scene, signal: &str, pid: u64) {
    let script = format!("kill -{signal} {pid}");
    scene.hosts.shell(0, &script).unwrap();
}

#[test]
fn a_host_that_is_killed_is_succeeded() {
    let (scene, image) = scene();
    let outcome = succeeded(&scene, &image, |pid| kill(&scene, "KILL", pid));
    check(&scene, outcome, Duration::from_secs(10));
}

#[test]
fn a_host_that_is_stopped_hands_over_at_once() {
    let (scene, image) = scene();
    let outcome = succeeded(&scene, &image, |pid| kill(&scene, "INT", pid));
    check(&scene, outcome, Duration::from_secs(8));
}

#[test]
fn a_host_that_hangs_is_succeeded_and_fenced_off() {
    let (scene, image) = scene();
    let outcome = succeeded(&scene, &image, |pid| {
        kill(&scene, "STOP", pid);
        let gone = || {
            let locks = scene.locks()?;
            Ok((!locks.iter().any(|lock| lock["pid"] == pid)).then_some(()))
        };
        shell::until("its lease is over", LIMIT, gone).unwrap();
        kill(&scene, "CONT", pid);
    });
    let late = outcome.0.iter().find(|done| !done.good);
    let text = late.map(|done| done.text.clone()).unwrap_or_default();
    assert!(text.contains("lease"), "{text}");
    check(&scene, outcome, Duration::from_secs(15));
}

/// Twelve hosts, three images that have most of their layers in common, each host in an order of its own.
#[test]
fn layers_that_images_share_come_once_whoever_wants_them_in_whatever_order() {
    let mut scene = Scene::new(MANY, RATE_MBIT).unwrap();
    let images: Vec<String> = (0..IMAGES)
        .map(|number| {
            let own = COMMON + number * (OF_IMAGE - COMMON);
            let layers: Vec<u64> = (0..COMMON).chain(own..own + OF_IMAGE - COMMON).collect();
            let tag = number.to_string();
            scene.serve(&tag, &layers, SMALL_BYTES).unwrap()
        })
        .collect();
    let distinct = COMMON + IMAGES * (OF_IMAGE - COMMON);
    let before = scene.sent().unwrap();
    let done = wait(
        &scene,
        begin(&scene, MANY, |host| {
            // All six orders, twice.
            let mut images = images.clone();
            images.rotate_left(host % IMAGES as usize);
            if host % 2 == 1 {
                images.swap(0, 1);
            }
            images
        }),
    );
    for done in &done {
        let host = done.host;
        assert!(
            done.good,
            "host {host}: {}{}",
            done.text,
            scene.hosts.logs()
        );
        assert_eq!(done.reports.as_array().map(Vec::len), Some(images.len()));
    }
    assert_eq!(sum(&done, "fetched"), distinct);
    let bytes = distinct as usize * SMALL_BYTES;
    let sent = (scene.sent().unwrap() - before) as f64 / bytes as f64;
    eprintln!("the layers went over the registry's cable {sent:.3} times");
    // Manifests and configs are asked for by each host.
    assert!((1.0..OVERHEAD + 0.1).contains(&sent), "{sent}");
    scene.at_rest().unwrap();
}
