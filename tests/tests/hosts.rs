//! Several hosts: what is lent on some is read on others.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use harbour_tests::{
    cluster::{Part, Pulled},
    hosts::{Family, Hosts},
    layers::{Entry, Layout, digest, noise, programs},
    shell,
};

/// Memory lent by each donor.
const LEND: &str = "96MiB";
/// The files of the image, each of this many bytes.
const FILE_BYTES: usize = 3 << 20;
/// How many there are.
const FILES: usize = 12;
/// No read may stand still for longer.
const STALL_LIMIT: Duration = Duration::from_secs(3);

struct Image {
    layout: Layout,
    sums: String,
}

/// An image of programs, files, and the list of their sums, which is checked inside of it.
fn image(dir: &Path) -> Image {
    let mut layout = Layout::create(&dir.join("layout")).unwrap();
    let (mut files, mut sums) = (vec![Entry::dir("data")], String::new());
    for n in 0..FILES {
        let data = noise(n as u64, FILE_BYTES);
        let sum = digest(&data).replace("sha256:", "");
        sums += &format!("{sum}  /data/{n}\n");
        files.push(Entry::file(format!("data/{n}"), data));
    }
    files.push(Entry::file("sums", sums.clone()));
    for name in ["proc", "dev"] {
        files.push(Entry::dir(name));
    }
    let programs = programs(&["/bin/sh", "/usr/bin/sha256sum"]).unwrap();
    layout.image("i", &[programs, files]).unwrap();
    Image { layout, sums }
}

/// metad on host 0, donors on the others, and the image pulled on host 1, which has no mount.
fn cluster(hosts: &Hosts) -> (Image, Pulled) {
    hosts.start(0, Part::Metad, &[]).unwrap();
    for host in 1..hosts.count() {
        let flags = ["--lend", LEND, "--huge-pages", "never"];
        hosts.start(host, Part::Donor, &flags).unwrap();
    }
    hosts.wait_donors(hosts.count() - 1).unwrap();
    let image = image(hosts.dir());
    let pulled = hosts.pull(1, &image.layout.reference("i")).unwrap();
    (image, pulled)
}

/// Starts the mount of host 0, which lends nothing and has nothing; gives the image's root there.
fn mount(hosts: &Hosts, pulled: &Pulled) -> String {
    hosts.start(0, Part::Node, &[]).unwrap();
    hosts.wait_node(0).unwrap();
    hosts.rootfs(0, pulled).unwrap().display().to_string()
}

/// Reads every file with nothing cached by the kernel, compares with the sums, and gives the time
/// of the slowest file.
fn read_all(hosts: &Hosts, root: &str, image: &Image) -> Duration {
    let mut slowest = Duration::ZERO;
    hosts.shell(0, "echo 3 > /proc/sys/vm/drop_caches").unwrap();
    for line in image.sums.lines() {
        let (sum, path) = line.split_once("  ").unwrap();
        let began = Instant::now();
        let read = hosts.shell(0, &format!("sha256sum {root}{path}")).unwrap();
        slowest = slowest.max(began.elapsed());
        assert!(
            read.text().starts_with(sum),
            "{path}: {}\n{}",
            read.text(),
            hosts.logs()
        );
    }
    slowest
}

/// Runs the image's own programs in a container of runc, over an overlay on the mount.
fn container(hosts: &Hosts, root: &str) {
    let bundle = hosts.dir().join("bundle");
    for name in ["up", "work", "rootfs"] {
        fs::create_dir_all(bundle.join(name)).unwrap();
    }
    let at = bundle.display();
    let script = format!(
        "cd {at} && mount -t tmpfs up up && mkdir up/u up/w && \
         mount -t overlay overlay -o lowerdir={root},upperdir=up/u,workdir=up/w rootfs && \
         runc spec && \
         sed -i 's/\"terminal\": true/\"terminal\": false/; s/\"readonly\": true/\"readonly\": false/' config.json && \
         sed -i 's|^\\t\\t\\t\"sh\"|\\t\\t\\t\"/bin/sh\", \"-c\", \"/usr/bin/sha256sum -c --quiet /sums \\&\\& echo all is as it was\"|' config.json && \
         mkdir -p /run/runc && runc --root /run/runc run --no-pivot c1"
    );
    let run = hosts.shell(0, &script).unwrap();
    assert!(
        run.text().contains("all is as it was"),
        "{}{}",
        run.text(),
        run.stderr
    );
}

fn four_hosts(family: Family, tls: bool) {
    let hosts = Hosts::new(4, family).unwrap();
    hosts.configure(&format!("tls_data = {tls}\n")).unwrap();
    let (image, pulled) = cluster(&hosts);
    let root = mount(&hosts, &pulled);
    read_all(&hosts, &root, &image);
    let donors = hosts.wait_donors(3).unwrap();
    let used: Vec<_> = donors
        .iter()
        .map(|d| d["used_bytes"].as_u64().unwrap())
        .collect();
    assert!(
        used.iter().sum::<u64>() > (FILES * FILE_BYTES) as u64 / 2,
        "{used:?}"
    );
    for donor in &donors {
        let over = &donor["transport"];
        assert!(over == "tcp" || donor["used_bytes"] == 0, "{donor}");
        let network = if tls { "tls:" } else { "tcp:" };
        let addresses = donor["addresses"].as_array().unwrap().iter();
        let mut others = addresses.filter_map(|at| at.as_str()?.get(..4));
        assert!(others.any(|at| at == network), "{donor}");
    }
    container(&hosts, &root);
}

#[test]
fn a_container_on_a_host_that_lends_nothing_and_had_nothing() {
    four_hosts(Family::V4, false);
}

#[test]
fn the_same_with_ipv6_alone() {
    four_hosts(Family::V6, false);
}

#[test]
fn the_same_with_all_bytes_under_tls() {
    four_hosts(Family::V4, true);
}

#[test]
fn a_donor_that_is_slow_slows_reads_down_and_no_more() {
    let hosts = Hosts::new(2, Family::V4).unwrap();
    let (image, pulled) = cluster(&hosts);
    let root = mount(&hosts, &pulled);
    hosts.slow_down(1, 100).unwrap();
    let slow = read_all(&hosts, &root, &image);
    assert!(
        slow > Duration::from_millis(100),
        "{slow:?}: is the cable slow?"
    );
    hosts.speed_up(1).unwrap();
    read_all(&hosts, &root, &image);
}

/// A donor that is cut off, frozen or killed: what it had comes back from the source.
#[test]
fn donors_that_vanish() {
    let hosts = Hosts::new(3, Family::V4).unwrap();
    let (image, pulled) = cluster(&hosts);
    let root = mount(&hosts, &pulled);
    read_all(&hosts, &root, &image);
    let mut slowest = Vec::new();
    hosts.signal(1, Part::Donor, "STOP").unwrap();
    slowest.push(("frozen", read_all(&hosts, &root, &image)));
    hosts.signal(1, Part::Donor, "CONT").unwrap();
    hosts.wait_donors(2).unwrap();
    hosts.plug(2, false).unwrap();
    slowest.push(("cut off", read_all(&hosts, &root, &image)));
    hosts.plug(2, true).unwrap();
    hosts.wait_donors(2).unwrap();
    hosts.signal(1, Part::Donor, "KILL").unwrap();
    slowest.push(("killed", read_all(&hosts, &root, &image)));
    eprintln!("slowest files: {slowest:?}");
    for (what, time) in slowest {
        assert!(time < 2 * STALL_LIMIT, "{what}: {time:?}\n{}", hosts.logs());
    }
}

/// A donor whose host is short of memory gives it back, and what lay there is read all the same.
#[test]
fn a_donor_that_is_squeezed() {
    let hosts = Hosts::new(2, Family::V4).unwrap();
    let (image, pulled) = cluster(&hosts);
    let root = mount(&hosts, &pulled);
    read_all(&hosts, &root, &image);
    let before = hosts.wait_donors(1).unwrap().remove(0);
    hosts.signal(1, Part::Donor, "TERM").unwrap();
    hosts.wait_donors(0).unwrap();
    // More than any host has to spare: from the first look on everything has to go back.
    let flags = [
        "--lend",
        LEND,
        "--huge-pages",
        "never",
        "--keep-free",
        "1000TiB",
    ];
    hosts.start(1, Part::Donor, &flags).unwrap();
    let squeezed = shell::until("all is given back", Duration::from_secs(30), || {
        let donors = hosts.wait_donors(1)?;
        Ok((donors[0]["lent_bytes"] == 0).then(|| donors[0].clone()))
    });
    let squeezed = squeezed.unwrap_or_else(|e| panic!("{e:#}\n{}", hosts.logs()));
    assert_ne!(squeezed["epoch"], before["epoch"]);
    let log = hosts.logs();
    assert!(log.contains("gave memory back"), "{log}");
}

#[test]
fn nothing_is_left_behind() {
    let hosts = Hosts::new(2, Family::V4).unwrap();
    hosts.start(0, Part::Metad, &[]).unwrap();
    hosts.start(1, Part::Donor, &["--lend", LEND]).unwrap();
    hosts.wait_donors(1).unwrap();
    let dir = hosts.dir().to_owned();
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let ours = || {
        let found = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&name)
        });
        found.count()
    };
    assert!(ours() >= 2, "metad and a donor");
    drop(hosts);
    shell::until("all processes are gone", Duration::from_secs(10), || {
        Ok((ours() == 0).then_some(()))
    })
    .unwrap();
    assert!(!dir.exists());
    assert!(!Path::new("/run/netns/h0").exists());
}
