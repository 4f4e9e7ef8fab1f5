//! Several donors on one host, each a process with a run directory of its own: an image with two
//! replicas loses a donor to kill -9 while it is read, is whole again without its source, and is
//! spread evenly when another donor joins.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use harbour_tests::{
    beside::{Donor, Often},
    cluster::{Cluster, Part, Pulled},
    layers::{Blob, Entry, Layout, noise, tar},
    shell,
};
use serde_json::Value;

/// Memory of each donor.
const LEND: &str = "384MiB";
/// Layers of the image, each with one large file and some small ones.
const LAYERS: u64 = 8;
/// Length of the large file.
const LARGE: usize = 30_000_000;
/// Until a donor that fell silent is made up for: its lease, and some copies.
const COPY_LIMIT: Duration = Duration::from_secs(60);
/// Until a donor that joined has its share.
const EVEN_LIMIT: Duration = Duration::from_secs(60);

/// Files of the image by path.
type Files = Arc<Vec<(String, Vec<u8>)>>;

fn files() -> Files {
    let mut files = Vec::new();
    for n in 0..LAYERS {
        files.push((format!("dir-{n}/large"), noise(n, LARGE)));
        for file in 0..8 {
            let bytes = noise(1_000 + n * 100 + file, 20_000 + file as usize);
            files.push((format!("dir-{n}/small-{file}"), bytes));
        }
    }
    Arc::new(files)
}

fn layout(dir: &Path, files: &Files) -> Layout {
    let mut layout = Layout::create(&dir.join("layout")).unwrap();
    let layer = |n: u64| {
        let name = format!("dir-{n}");
        let of_layer = files.iter().filter(|(path, _)| path.starts_with(&name));
        let files = of_layer.map(|(path, bytes)| Entry::file(path.as_str(), bytes.as_slice()));
        let entries: Vec<_> = [Entry::dir(name.as_str())]
            .into_iter()
            .chain(files)
            .collect();
        Blob::plain(&tar(&entries))
    };
    let layers: Vec<_> = (0..LAYERS).map(layer).collect();
    layout.blobs("i", &layers).unwrap();
    layout
}

/// Reads everything past the page cache and compares it.
fn check(rootfs: &Path, files: &Files) {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    for (path, bytes) in files.iter() {
        let path = rootfs.join(path);
        let read = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(read == *bytes, "{}: other bytes", path.display());
    }
}

fn live(cluster: &Cluster) -> Vec<Value> {
    let donors = cluster.json("donors").unwrap();
    let donors = donors.as_array().unwrap().iter();
    donors.filter(|d| d["live"] == true).cloned().collect()
}

fn wait_live(cluster: &Cluster, count: usize) {
    shell::until("metad knows the donors", COPY_LIMIT, || {
        Ok((live(cluster).len() == count).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", cluster.logs()));
}

/// How far the live donor that is farthest from the mean is from it, in percent.
fn farthest(cluster: &Cluster) -> u64 {
    let used: Vec<u64> = live(cluster)
        .iter()
        .map(|donor| donor["used_bytes"].as_u64().unwrap())
        .collect();
    let mean = used.iter().sum::<u64>() / used.len() as u64;
    assert!(mean > 0);
    used.iter()
        .map(|used| used.abs_diff(mean) * 100 / mean)
        .max()
        .unwrap()
}

fn replicas(cluster: &Cluster) -> Value {
    cluster.json("status").unwrap()["metad"]["replicas"].clone()
}

/// Every lent byte is in one book, and the donors' books are metad's, however much moves meanwhile.
fn books_balance(status: &mut Command) {
    let output = shell::run(status, Duration::from_secs(60)).and_then(shell::Output::ok);
    let status: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let book = |key: &str| status["metad"][key].as_u64().unwrap();
    let taken = book("used_bytes") + book("reserved_bytes") + book("quarantined_bytes");
    let donors = status["donors"].as_array().unwrap();
    let sum = |key: &str| donors.iter().map(|d| d[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("lent_bytes"), book("lent_bytes"), "{status}");
    assert_eq!(sum("used_bytes"), taken, "{status}");
    assert_eq!(sum("free_bytes"), book("free_bytes"), "{status}");
    assert_eq!(taken + book("free_bytes"), book("lent_bytes"), "{status}");
}

fn pull(cluster: &Cluster, layout: &Layout) -> Pulled {
    let reference = layout.reference("i");
    let args = [
        "pull",
        "--insecure",
        "--json",
        "--replicas",
        "2",
        &reference,
    ];
    let output = shell::run(&mut cluster.command(args), Duration::from_secs(300));
    let output = output.and_then(shell::Output::ok).unwrap();
    let reports: Vec<Pulled> = serde_json::from_slice(&output.stdout).unwrap();
    reports.into_iter().next().unwrap()
}

/// Waits until nothing is missing and nothing is on its way.
fn wait_whole(cluster: &Cluster) {
    shell::until("every pack has its replicas", COPY_LIMIT, || {
        let now = replicas(cluster);
        let whole = now["missing"] == 0 && now["copies_running"] == 0;
        Ok((whole && now["wanted"].as_u64() > Some(0)).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", replicas(cluster), cluster.logs()));
}

#[test]
fn a_donor_dies_and_another_joins_and_all_is_whole_and_even() {
    let mut cluster = Cluster::start(LEND).unwrap();
    let one = Donor::start(&cluster, "one", LEND).unwrap();
    let two = Donor::start(&cluster, "two", LEND).unwrap();
    wait_live(&cluster, 3);
    let files = files();
    let layout = layout(cluster.dir(), &files);
    let pulled = pull(&cluster, &layout);
    let rootfs = cluster.rootfs(&pulled).unwrap();
    wait_whole(&cluster);
    assert!(farthest(&cluster) <= 20, "{:?}", live(&cluster));
    let mut status = cluster.command(["status", "--json"]);
    let books = Often::start(move || books_balance(&mut status));
    // From now on there is no source to fall back to.
    fs::rename(cluster.dir().join("layout"), cluster.dir().join("away")).unwrap();

    let (read, compared) = (rootfs.clone(), Arc::clone(&files));
    let reader = Often::start(move || check(&read, &compared));
    let dead = two.name().to_owned();
    drop(two);
    check(&rootfs, &files);
    shell::until("the dead donor's lease is over", COPY_LIMIT, || {
        let gone = live(&cluster)
            .iter()
            .all(|donor| donor["name"] != dead.as_str());
        Ok(gone.then_some(()))
    })
    .unwrap();
    wait_whole(&cluster);
    let after_loss = replicas(&cluster);
    assert!(after_loss["copies_done"].as_u64() > Some(0), "{after_loss}");
    assert_eq!(after_loss["packs_lost"], 0, "{after_loss}");

    let _three = Donor::start(&cluster, "three", LEND).unwrap();
    let joined = Instant::now();
    wait_live(&cluster, 3);
    shell::until("the load is even", EVEN_LIMIT, || {
        let now = replicas(&cluster);
        let done = now["copies_running"] == 0 && now["rebalancing"] == false;
        Ok((done && farthest(&cluster) <= 20).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}\n{}", live(&cluster), cluster.logs()));
    eprintln!("even {:?} after a donor joined", joined.elapsed());
    wait_whole(&cluster);
    assert!(reader.end("every read gives the right bytes") > 0);
    let looks = books.end("the books balance at every moment");
    assert!(looks > 10, "{looks}");

    // Any one of the donors may go now: the others have everything.
    drop(one);
    check(&rootfs, &files);
    assert!(!cluster.ended(Part::Node).unwrap());
    let layers = cluster.json("layers").unwrap();
    assert_eq!(layers.as_array().unwrap().len() as u64, LAYERS);
}
