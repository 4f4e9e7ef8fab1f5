//! Memory that is reached over the network: a donor, an ingest and a mount that may use TCP alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use harbour_tests::{
    cluster::Cluster,
    layers::{Entry, Layout},
    shell,
};

/// Bytes that differ from place to place and file to file.
fn content(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Small files, a long one, and one of many objects.
fn files() -> Vec<(String, Vec<u8>)> {
    let small = (0..200).map(|n| (format!("usr/small/{n}"), content(n, (n * 331) as usize)));
    let long = [(1000, 1 << 20), (1001, 9 << 20), (1002, (3 << 20) + 17)];
    let long = long.map(|(seed, len)| (format!("usr/long-{seed}"), content(seed, len)));
    small.chain(long).collect()
}

fn layer() -> Vec<Entry> {
    let dirs = ["usr", "usr/small"].map(Entry::dir);
    let files = files()
        .into_iter()
        .map(|(name, data)| Entry::file(name, data));
    dirs.into_iter().chain(files).collect()
}

fn equals(top: &Path) {
    for (name, data) in files() {
        let got = std::fs::read(top.join(&name)).unwrap();
        assert!(got == data, "{name} differs below {}", top.display());
    }
}

/// Pulls and reads through every door with a donor that listens on `listen`.
fn over_tcp(listen: &str) {
    let toml = format!("transport = 'tcp'\n[donor]\nlisten = ['{listen}']\n");
    let mut cluster = Cluster::configured("128MiB", &toml).unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    layout.image("far", &[layer()]).unwrap();
    let image = cluster.pull(&layout.reference("far")).unwrap();
    let rootfs = cluster.rootfs(&image).unwrap();
    equals(&rootfs);
    let status = cluster.json("status").unwrap();
    if status["node"]["fast_view"]
        .as_str()
        .unwrap()
        .starts_with("on")
    {
        equals(&cluster.view(&image.manifest).unwrap());
    }
    let donors = shell::until(
        "the node says how it reads",
        std::time::Duration::from_secs(5),
        || {
            let donors = cluster.json("donors")?;
            Ok(donors[0]["transport"].is_string().then_some(donors))
        },
    )
    .unwrap();
    assert_eq!(donors[0]["transport"], "tcp");
    assert!(!donors.to_string().contains("token"), "{donors}");
    // The node's page may be half a second old.
    let limit = std::time::Duration::from_secs(5);
    let moved = shell::until("the node counts what it read", limit, || {
        let status = cluster.json("status")?;
        let moved = status["node"]["counters"]["pool_bytes"].clone();
        let enough = moved["tcp"].as_u64() >= Some(13 << 20);
        Ok(enough.then_some(moved))
    })
    .unwrap();
    assert!(moved["shm"].is_null(), "{moved}");
    let file = rootfs.join("usr/long-1001");
    let why = cluster
        .harbour(["why", "--json", file.to_str().unwrap()])
        .unwrap();
    assert!(
        why.text().contains("\"transport\": \"tcp\""),
        "{}",
        why.text()
    );
    // A donor that comes back lends new memory under new tokens, and what is lost is refilled.
    cluster.replace_donor().unwrap();
    equals(&rootfs);
    let logs = cluster.logs();
    assert!(!logs.contains("token: ["), "{logs}");
}

#[test]
fn a_tree_that_lies_on_another_host_is_read_byte_for_byte() {
    over_tcp("127.0.0.1:0");
}

#[test]
fn the_same_over_ipv6() {
    over_tcp("[::1]:0");
}

#[test]
fn a_transport_that_there_is_not_is_said_to_be_missing() {
    let cluster = Cluster::start("64MiB").unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    layout.image("near", &[layer()]).unwrap();
    let reference = layout.reference("near");
    let refused = cluster
        .run(["--transport", "tcp", "pull", reference.as_str()])
        .unwrap();
    let text = &refused.stderr;
    assert!(text.contains("no address of tcp"), "{text}");
    cluster.pull(&reference).unwrap();
    assert_eq!(
        cluster.json("donors").unwrap()[0]["addresses"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn a_donor_that_cannot_be_found_does_not_start() {
    let cluster = Cluster::empty("64MiB").unwrap();
    let refused = cluster
        .run([
            "donor",
            "--lend",
            "64MiB",
            "--huge-pages",
            "never",
            "--listen",
            "0.0.0.0:0",
        ])
        .unwrap();
    let text = &refused.stderr;
    assert!(text.contains("--advertise"), "{text}");
}
