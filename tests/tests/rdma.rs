//! A cluster whose bytes travel by RDMA.
//!
//! Needs two RDMA devices that reach each other, named by
//! `HARBOUR_TEST_SEATS=<address of the donor's>=<its name>,<address of the reader's>=<its name>`, and in
//! `HARBOUR_TEST_LAYOUT` a directory in which [`an_image_is_laid_out`] was run before; fails without.
//! `tests/run rdma` makes a guest that has both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use harbour_tests::{
    cluster::{Part, Pulled},
    hosts::{Hosts, Seat},
    layers::{Blob, Entry, Layout, digest, media, noise, tar},
    shell,
};
use serde_json::Value;

/// metad and the donor.
const DONOR: usize = 0;
/// Pulls, and has no mount.
const PULLER: usize = 1;
/// Lends nothing, and has never seen the image.
const READER: usize = 2;
/// The same with RDMA turned off.
const PLAIN: usize = 3;

/// What the donor lends.
const LEND: &str = "128MiB";
/// The file that is read through the mount.
const BIG: &str = "data/big";
const BIG_BYTES: usize = 64 << 20;
/// Small files beside it.
const FILES: u64 = 40;
/// The largest payload of a packet, whatever the device agreed to.
const MTU: u64 = 4096;
/// Ticks (10 ms) of processor time of the donor's process by which a read may differ from as long a
/// time without one: room for a heartbeat to metad that fell into the one and not into the other.
const HEARTBEAT_TICKS: u64 = 4;
/// How much more the donor's serving threads do for a read by TCP than for the same one by RDMA, where
/// they may wake for something else.
const SERVED_RATIO_MIN: u64 = 4;
/// The donor's threads that wait for readers and serve them have names that begin with this; the
/// others talk to metad.
const SERVING: &str = "harbour-";

fn layout_dir() -> PathBuf {
    let dir = std::env::var_os("HARBOUR_TEST_LAYOUT");
    dir.expect("this test needs a guest (HARBOUR_TEST_LAYOUT): tests/run rdma")
        .into()
}

fn seats() -> [Seat; 2] {
    let named = std::env::var("HARBOUR_TEST_SEATS").expect(
        "this test needs RDMA devices (HARBOUR_TEST_SEATS=address=device,…): tests/run rdma",
    );
    let seats: Vec<_> = named
        .split(',')
        .map(|seat| seat.split_once('=').unwrap())
        .map(|(address, device)| Seat {
            address: address.parse().unwrap(),
            rdma_device: device.to_owned(),
        })
        .collect();
    seats.try_into().unwrap()
}

/// Not a test: makes the image of the one below, outside of the guest, where making it takes a
/// second and not a minute. A static busybox, files, and the list of their sums.
#[test]
fn an_image_is_laid_out() {
    let busybox = Entry {
        mode: 0o755,
        ..Entry::file("bin/busybox", fs::read("/bin/busybox").unwrap())
    };
    let programs = [
        Entry::dir("bin"),
        busybox,
        Entry::symlink("bin/sh", "busybox"),
        Entry::dir("proc"),
        Entry::dir("dev"),
        Entry::dir("sys"),
    ];
    let (mut files, mut sums) = (vec![Entry::dir("data")], String::new());
    let small = (1..=FILES).map(|n| (format!("data/{n}"), noise(n, 997 * n as usize)));
    for (name, data) in [(BIG.to_owned(), noise(0, BIG_BYTES))]
        .into_iter()
        .chain(small)
    {
        sums += &format!("{}  /{name}\n", digest(&data).replace("sha256:", ""));
        files.push(Entry::file(name, data));
    }
    files.push(Entry::file("sums", sums.clone()));
    let dir = layout_dir();
    let mut layout = Layout::create(&dir).unwrap();
    // Plain: what cannot be made shorter need not be inflated in the guest.
    let layers = [programs.to_vec(), files].map(|entries| {
        let tar = tar(&entries);
        let diff_id = digest(&tar);
        Blob::new(tar, media::TAR, diff_id)
    });
    layout.blobs("i", &layers).unwrap();
    fs::write(dir.join("sums"), sums).unwrap();
}

/// Packets that a device has counted: sent, received.
fn packets(seat: &Seat) -> (u64, u64) {
    let dir = format!(
        "/sys/class/infiniband/{}/ports/1/hw_counters",
        seat.rdma_device
    );
    let count = |name: &str| -> u64 {
        let text = fs::read_to_string(Path::new(&dir).join(name)).unwrap();
        text.trim().parse().unwrap()
    };
    (count("sent_pkts"), count("rcvd_pkts"))
}

/// Processor time of a process, in ticks, in user mode and in the kernel together.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<_> = fields.split_whitespace().collect();
    [fields[11], fields[12]]
        .iter()
        .map(|field| field.parse::<u64>().unwrap())
        .sum()
}

/// Processor time of those threads of a process whose names begin with `prefix`, in nanoseconds.
fn time_of_threads(pid: u32, prefix: &str) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut names = Vec::new();
    let mut all = 0;
    for thread in threads.map(|thread| thread.unwrap().path()) {
        let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
        if name.starts_with(prefix) {
            let times = fs::read_to_string(thread.join("schedstat")).unwrap();
            let on_processor = times.split_whitespace().next().unwrap();
            all += on_processor.parse::<u64>().unwrap();
        }
        names.push(name);
    }
    assert!(
        names.iter().any(|name| name.starts_with(prefix)),
        "{names:?}"
    );
    all
}

/// What happened around something that was done.
struct Moved {
    took: Duration,
    /// Packets that left the donor's device, and that the readers' took in.
    sent: u64,
    received: u64,
    /// Processor time of the donor's process, and of its threads that serve.
    donor_ticks: u64,
    serving_ns: u64,
}

/// The guest's cluster.
struct Scene {
    hosts: Hosts,
    donor: Seat,
    reader: Seat,
    image: Pulled,
    sums: String,
}

impl Scene {
    fn watch(&self, done: impl FnOnce()) -> Moved {
        let pid = self.hosts.pid(DONOR, Part::Donor).unwrap();
        let before = (packets(&self.donor).0, packets(&self.reader).1);
        let (ticks_before, ns_before) = (ticks(pid), time_of_threads(pid, SERVING));
        let start = Instant::now();
        done();
        let took = start.elapsed();
        let (ticks_after, ns_after) = (ticks(pid), time_of_threads(pid, SERVING));
        Moved {
            took,
            sent: packets(&self.donor).0 - before.0,
            received: packets(&self.reader).1 - before.1,
            donor_ticks: ticks_after - ticks_before,
            serving_ns: ns_after - ns_before,
        }
    }

    fn sum(&self, file: &str) -> &str {
        let line = self
            .sums
            .lines()
            .find(|line| line.ends_with(&format!("  /{file}")));
        line.and_then(|line| line.split_whitespace().next())
            .unwrap()
    }

    /// Starts the mount of a host; gives the image's directory there.
    fn mount(&self, host: usize) -> PathBuf {
        self.hosts.start(host, Part::Node, &[]).unwrap();
        self.hosts.wait_node(host).unwrap();
        let root = self.hosts.rootfs(host, &self.image).unwrap();
        root.parent().unwrap().to_owned()
    }

    /// Reads the large file with nothing of it cached by the kernel, and compares.
    fn read(&self, host: usize, image: &Path) -> Moved {
        self.hosts
            .shell(host, "echo 3 > /proc/sys/vm/drop_caches")
            .unwrap();
        let file = image.join("rootfs").join(BIG);
        let read = format!("sha256sum {}", file.display());
        self.watch(|| {
            let said = self.hosts.shell(host, &read).unwrap().text();
            assert!(said.starts_with(self.sum(BIG)), "{said}");
        })
    }

    /// Reads a little until it comes by `transport`: on a busy machine the first queue pair may not have
    /// been there in time, and RDMA is tried again.
    fn comes_to(&self, host: usize, transport: &str, image: &Path) {
        let limit = Duration::from_secs(30);
        shell::until("bytes come by it", limit, || {
            let file = image.join("rootfs/sums");
            let read = format!(
                "echo 3 > /proc/sys/vm/drop_caches; cat {} > /dev/null; sleep 0.6",
                file.display()
            );
            self.hosts.shell(host, &read)?;
            let donor = self.hosts.json(host, "status")?["donors"][0].clone();
            Ok((donor["transport"] == transport).then_some(()))
        })
        .unwrap_or_else(|e| panic!("{transport}: {e:#}\n{}", self.hosts.logs()));
    }

    /// Fails unless `status` and `why` of a host say that bytes come from the donor by `transport`;
    /// gives what they say of its donor.
    fn comes_by(&self, host: usize, transport: &str, image: &Path) -> Value {
        let logs = || self.hosts.logs();
        let limit = Duration::from_secs(10);
        // The node's page may be half a second old.
        let donor = shell::until("status says how bytes come", limit, || {
            let donor = self.hosts.json(host, "status")?["donors"][0].clone();
            Ok(donor["transport"].is_string().then_some(donor))
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}", logs()));
        assert_eq!(donor["transport"], transport, "{donor}\n{}", logs());
        let file = image.join("rootfs").join(BIG);
        let mut why = self
            .hosts
            .command(host, ["why", "--json", file.to_str().unwrap()]);
        let why = shell::run(&mut why, limit).unwrap().ok().unwrap();
        let why: Value = serde_json::from_slice(&why.stdout).unwrap();
        let shares = why[0]["why"]["donors"].as_array().unwrap();
        assert!(!shares.is_empty(), "{why}");
        for share in shares {
            assert_eq!(share["transport"], transport, "{why}");
        }
        let by = shell::until("the node counts what it read", limit, || {
            let status = self.hosts.json(host, "status")?;
            let by = status["node"]["counters"]["pool_bytes"].clone();
            Ok((by[transport].as_u64() >= Some(BIG_BYTES as u64)).then_some(by))
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}", logs()));
        let others = by.as_object().unwrap().iter();
        let strays: Vec<_> = others
            .filter(|(name, bytes)| *name != transport && bytes.as_u64() > Some(1 << 20))
            .collect();
        assert!(strays.is_empty(), "{strays:?}");
        donor
    }

    /// Runs the image's own program in a container of runc, over an overlay of the layers in the
    /// mount; it reads every byte there is.
    fn container(&self, host: usize, image: &Path) -> Moved {
        let bundle = self.hosts.dir().join("bundle");
        for name in ["up", "rootfs"] {
            fs::create_dir_all(bundle.join(name)).unwrap();
        }
        let (at, image) = (bundle.display(), image.display());
        let script = format!(
            "cd {at}\n\
             lower=$(ls -d {image}/layers/* | sort -rV | xargs readlink -f | paste -sd:)\n\
             mount -t tmpfs up up && mkdir up/u up/w\n\
             mount -t overlay overlay -o lowerdir=$lower,upperdir=up/u,workdir=up/w rootfs\n\
             runc spec\n\
             jq '.process.terminal = false | .root.readonly = false | .process.args = [\"/bin/sh\", \"-c\", \
               \"/bin/busybox sha256sum -c -s /sums && echo all is as it was > /said && /bin/busybox cat /said\"]' \
               config.json > new && mv new config.json\n\
             mkdir -p /run/runc\n\
             echo 3 > /proc/sys/vm/drop_caches\n\
             runc --root /run/runc run --no-pivot c1\n\
             echo lower: $lower\n"
        );
        self.watch(|| {
            let said = self.hosts.shell(host, &script).unwrap();
            let (text, stderr) = (said.text(), said.stderr);
            assert!(text.contains("all is as it was"), "{text}{stderr}");
            assert_eq!(text.matches("/layers/").count(), 2, "{text}");
        })
    }
}

/// metad and the donor on the one device, and the image pulled over the other.
fn scene() -> Scene {
    let [donor, reader] = seats();
    let plain = Seat {
        rdma_device: "none".to_owned(),
        ..reader.clone()
    };
    let seats = vec![donor.clone(), reader.clone(), reader.clone(), plain];
    let hosts = Hosts::in_seats(seats).unwrap();
    hosts.start(DONOR, Part::Metad, &[]).unwrap();
    // Fixed: a donor that may have to give back looks at its host twenty times a second, whether anybody
    // reads or not, which an emulated processor takes a thirtieth of its time for.
    let flags = ["--lend", LEND, "--huge-pages", "never", "--lend-fixed"];
    hosts.start(DONOR, Part::Donor, &flags).unwrap();
    hosts.wait_donors(1).unwrap();
    let before = packets(&reader).0;
    let reference = format!("oci:{}:i", layout_dir().display());
    let start = Instant::now();
    let image = hosts.pull(PULLER, &reference).unwrap();
    let sent = packets(&reader).0 - before;
    println!(
        "pulled in {:?}, {sent} packets from the puller's device",
        start.elapsed()
    );
    assert!(
        sent >= BIG_BYTES as u64 / MTU,
        "{sent} packets: {}\n{}",
        hosts.json(PULLER, "donors").unwrap(),
        hosts.logs()
    );
    Scene {
        hosts,
        donor,
        reader,
        image,
        sums: fs::read_to_string(layout_dir().join("sums")).unwrap(),
    }
}

/// The guest has two NUMA nodes, and every region is on the one that had the most room.
fn regions_have_a_node(scene: &Scene) {
    let nodes = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap();
    assert_eq!(nodes.trim(), "0-1", "the guest was to have two nodes");
    let pid = scene.hosts.pid(DONOR, Part::Donor).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let lent: Vec<_> = maps
        .lines()
        .filter(|line| line.contains("memfd:harbour"))
        .collect();
    println!("lent on NUMA nodes: {lent:?}");
    assert!(!lent.is_empty(), "{maps}");
    let chosen = |line: &&str| {
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .starts_with("prefer:")
    };
    assert!(lent.iter().all(chosen), "{lent:?}");
}

/// Reads by RDMA: the devices carry all of it, and the donor's process has no part in it.
/// What its serving threads took, for comparison: one may wake for the end of an earlier connection,
/// and is charged for packets that its processor handles just then.
fn one_sided(scene: &Scene, image: &Path) -> u64 {
    let all = BIG_BYTES as u64 / MTU;
    let read = scene.read(READER, image);
    let idle = scene.watch(|| thread::sleep(read.took));
    println!(
        "64 MiB read by RDMA in {:?}: {} packets sent by the donor's device, {} received; the donor's process: \
         {} ticks, and {} in as long a time without; its serving threads: {} ns",
        read.took, read.sent, read.received, read.donor_ticks, idle.donor_ticks, read.serving_ns
    );
    assert!(
        read.sent >= all && read.received >= all,
        "the devices carried the bytes"
    );
    assert!(idle.sent < all / 10, "{} packets while idle", idle.sent);
    assert!(
        read.donor_ticks <= idle.donor_ticks + HEARTBEAT_TICKS,
        "{} ticks of the donor's process",
        read.donor_ticks
    );
    // Nothing of it can run, and all is read as before.
    scene.hosts.signal(DONOR, Part::Donor, "STOP").unwrap();
    let frozen = scene.read(READER, image);
    scene.hosts.signal(DONOR, Part::Donor, "CONT").unwrap();
    println!(
        "the same while the donor's process is frozen in {:?}: {} packets, {} ticks",
        frozen.took, frozen.sent, frozen.donor_ticks
    );
    assert!(frozen.sent >= all, "{} packets", frozen.sent);
    assert_eq!((frozen.donor_ticks, frozen.serving_ns), (0, 0));
    read.serving_ns
}

#[test]
fn a_cluster_over_two_devices() {
    let scene = scene();
    let all = BIG_BYTES as u64 / MTU;
    regions_have_a_node(&scene);

    let image = scene.mount(READER);
    scene.comes_to(READER, "verbs", &image);
    let ran = scene.container(READER, &image);
    println!(
        "a container checked every byte in {:?}, {} packets",
        ran.took, ran.sent
    );
    assert!(
        ran.sent >= all,
        "{} packets for the container's bytes\n{}",
        ran.sent,
        scene.hosts.logs()
    );
    let unserved_ns = one_sided(&scene, &image);
    let donor = scene.comes_by(READER, "verbs", &image);
    assert!(donor["transport_remark"].is_null(), "{donor}");

    let image = scene.mount(PLAIN);
    let read = scene.read(PLAIN, &image);
    println!(
        "64 MiB read by TCP in {:?}: {} packets of the devices, {} ticks of the donor's process, its serving \
         threads: {} ns",
        read.took, read.sent, read.donor_ticks, read.serving_ns
    );
    assert!(read.sent < all / 10, "{} packets by RDMA", read.sent);
    assert!(
        read.serving_ns > SERVED_RATIO_MIN * unserved_ns,
        "{} ns to serve it, {unserved_ns} ns where nothing was to be served",
        read.serving_ns
    );
    let donor = scene.comes_by(PLAIN, "tcp", &image);
    let remark = donor["transport_remark"].as_str().unwrap_or_default();
    assert!(remark.contains("--rdma-device none"), "{donor}");
}
