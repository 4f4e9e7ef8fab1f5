//! Kill -9 at every step of a pull, of whoever is at work: after a restart no half image is
//! visible, no space is lost, the next pull succeeds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use harbour_tests::{
    cluster::{Cluster, Part, Pulled},
    layers::{Entry, Layout, noise},
    shell,
};
use serde_json::Value;

/// Memory lent: room for many images, also for those of dead pulls whose leases have not run out.
const LEND: &str = "256MiB";
/// Memory lent where images have to push each other out.
const LEND_LITTLE: &str = "64MiB";
/// Until leases of the dead have run out and readers have acknowledged.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// One pull beside a dead or dying daemon.
const PULL_LIMIT: Duration = Duration::from_secs(60);

/// A cluster in which the dead are found out soon: most of the time of these tests would be leases of
/// 15 s that run out.
fn start(lend: &str) -> Cluster {
    Cluster::configured(lend, "[metad]\nlease_s = 4\n").unwrap()
}

/// A made-up image of two layers whose bytes no other image has.
struct Image {
    layout: Layout,
    seed: u64,
}

impl Image {
    const SIZE: usize = 6_000_000;

    fn new(cluster: &Cluster, seed: u64) -> Self {
        let mut layout = Layout::create(&cluster.dir().join(format!("layout-{seed}"))).unwrap();
        let layer = |n: u64| {
            vec![
                Entry::dir(format!("dir-{n}")),
                Entry::file(
                    format!("dir-{n}/large"),
                    noise(seed * 10 + n, Self::SIZE / 2),
                ),
                Entry::file(format!("dir-{n}/small"), format!("{seed}")),
            ]
        };
        layout.image("i", &[layer(0), layer(1)]).unwrap();
        Self { layout, seed }
    }

    fn reference(&self) -> String {
        self.layout.reference("i")
    }

    /// Everything in it, through the mount.
    fn check(&self, cluster: &Cluster, image: &Pulled) {
        let rootfs = cluster.rootfs(image).unwrap();
        for n in 0..2 {
            let large = fs::read(rootfs.join(format!("dir-{n}/large"))).unwrap();
            assert!(
                large == noise(self.seed * 10 + n, Self::SIZE / 2),
                "image {}: other bytes",
                self.seed
            );
            assert_eq!(
                fs::read_to_string(rootfs.join(format!("dir-{n}/small"))).unwrap(),
                self.seed.to_string()
            );
        }
    }
}

fn images(cluster: &Cluster) -> Vec<Value> {
    cluster.json("images").unwrap().as_array().unwrap().clone()
}

fn name_of(image: &Value) -> String {
    let field = |key: &str| image[key].as_str().unwrap().to_owned();
    format!(
        "{}/{}:{}",
        field("registry"),
        field("repository"),
        field("tag")
    )
}

/// What is listed stands whole under the mount, and nothing else stands there.
fn nothing_is_half(cluster: &Cluster, after: &str) {
    for image in images(cluster) {
        let rootfs = image["rootfs"].as_str().unwrap().to_owned();
        let whole = shell::until("the image is there", Duration::from_secs(20), || {
            Ok(fs::read_dir(format!("{rootfs}/dir-1"))
                .is_ok()
                .then_some(()))
        });
        whole.unwrap_or_else(|e| panic!("after {after}: {rootfs}: {e:#}\n{}", cluster.logs()));
        for n in 0..2 {
            let got = fs::read(format!("{rootfs}/dir-{n}/large"));
            let got =
                got.unwrap_or_else(|e| panic!("after {after}: {rootfs}: {e}\n{}", cluster.logs()));
            assert_eq!(got.len(), Image::SIZE / 2, "after {after}: {rootfs}");
        }
    }
    // The node hears of what was removed a moment later than metad knows it.
    let same = shell::until(
        "the mount shows what is listed",
        Duration::from_secs(20),
        || {
            let shown = count_rootfs(&cluster.mount().join("images"));
            Ok((shown == images(cluster).len()).then_some(()))
        },
    );
    same.unwrap_or_else(|e| panic!("after {after}: {e:#}"));
}

fn count_rootfs(dir: &std::path::Path) -> usize {
    if dir.join("rootfs").exists() {
        return 1;
    }
    let Ok(list) = fs::read_dir(dir) else {
        return 0;
    };
    list.flatten().map(|e| count_rootfs(&e.path())).sum()
}

/// Takes every image away and waits until the books say that nothing is used.
fn no_space_is_lost(cluster: &Cluster, after: &str) {
    remove_all(cluster);
    let mut last = Value::Null;
    let settled = shell::until("the books are empty", SETTLE_LIMIT, || {
        last = cluster.json("status")?["metad"].clone();
        let keys = [
            "used_bytes",
            "reserved_bytes",
            "quarantined_bytes",
            "images",
            "layers",
            "objects",
            "packs",
        ];
        Ok(keys.iter().all(|key| last[*key] == 0).then_some(()))
    });
    settled.unwrap_or_else(|e| panic!("after {after}: {e:#}: {last}\n{}", cluster.logs()));
    assert_eq!(last["free_bytes"], last["lent_bytes"], "after {after}");
}

/// A pull that may fail but has to end.
fn pull_with(cluster: &Cluster, reference: &str, failpoint: Option<&str>) -> shell::Output {
    let mut command: Command = cluster.command(["pull", reference]);
    if let Some(failpoint) = failpoint {
        command.env("HARBOUR_FAILPOINT", failpoint);
    }
    shell::run(&mut command, PULL_LIMIT).unwrap_or_else(|e| panic!("{e:#}\n{}", cluster.logs()))
}

#[test]
fn the_puller_dies_at_each_step() {
    let cluster = start(LEND);
    for (n, point) in harbour::failpoint::NAMES.iter().enumerate() {
        let image = Image::new(&cluster, n as u64);
        let output = pull_with(
            &cluster,
            &image.reference(),
            Some(&format!("{point}=abort")),
        );
        assert!(
            !output.status.success(),
            "{point} was never reached: {}",
            output.stderr
        );
        let visible = images(&cluster).len();
        let wanted = usize::from(*point == "pull.committed");
        assert_eq!(visible, wanted, "{point}: images visible");
        nothing_is_half(&cluster, point);
        let pulled = cluster.pull(&image.reference()).unwrap();
        image.check(&cluster, &pulled);
        cluster
            .harbour(["rm", &name_of(&images(&cluster)[0])])
            .unwrap();
    }
    no_space_is_lost(&cluster, "all steps of the puller");
}

#[test]
fn the_puller_dies_at_any_moment() {
    let cluster = start(LEND);
    let image = Image::new(&cluster, 100);
    let whole = pull_with(&cluster, &image.reference(), None)
        .ok()
        .unwrap()
        .elapsed;
    cluster
        .harbour(["rm", &name_of(&images(&cluster)[0])])
        .unwrap();
    for n in 1..8_u64 {
        let image = Image::new(&cluster, 100 + n);
        let mut child = cluster
            .command(["pull", &image.reference()])
            .spawn()
            .unwrap();
        std::thread::sleep(whole.mul_f64(n as f64 / 8.0));
        child.kill().unwrap();
        child.wait().unwrap();
        nothing_is_half(&cluster, &format!("{n}/8 of a pull"));
    }
    let pulled = cluster.pull(&image.reference()).unwrap();
    image.check(&cluster, &pulled);
    no_space_is_lost(&cluster, "pulls that were killed");
}

/// Pulls, and starts metad again as soon as it dies meanwhile; tells whether it did.
fn pull_past_a_death(cluster: &mut Cluster, reference: &str) -> (shell::Output, bool) {
    let command = cluster.command(["pull", reference]);
    let pull = std::thread::spawn(move || {
        let mut command = command;
        shell::run(&mut command, PULL_LIMIT)
    });
    let mut died = false;
    while !pull.is_finished() {
        if !died && cluster.ended(Part::Metad).unwrap() {
            died = true;
            cluster.start_part(Part::Metad, None).unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = pull.join().unwrap();
    (
        output.unwrap_or_else(|e| panic!("{e:#}\n{}", cluster.logs())),
        died,
    )
}

/// What a client does so that metad comes past a failpoint; tells whether metad died and stands again.
fn provoke(cluster: &mut Cluster, point: &str, image: &Image) -> bool {
    let pull =
        |cluster: &Cluster, image: &Image| drop(pull_with(cluster, &image.reference(), None));
    match point.split('.').next().unwrap() {
        "begin" => pull(cluster, image),
        // A pull does not end with the metad that it began at.
        "reserve" | "put_index" | "stage_layer" | "commit" => {
            let (output, died) = pull_past_a_death(cluster, &image.reference());
            assert!(
                output.status.success(),
                "{point}: {}\n{}",
                output.stderr,
                cluster.logs()
            );
            return died;
        }
        "evict" => {
            for n in 0..14 {
                let image = Image::new(cluster, image.seed + 1000 + n);
                if pull_past_a_death(cluster, &image.reference()).1 {
                    return true;
                }
            }
        }
        "abort" => {
            let mut layout = Layout::create(&cluster.dir().join("bad")).unwrap();
            layout
                .image(
                    "x",
                    &[vec![
                        Entry::file("f", noise(image.seed, 5_000_000)),
                        Entry::hard("l", "none"),
                    ]],
                )
                .unwrap();
            pull_with(cluster, &layout.reference("x"), None);
        }
        "expire" => {
            pull_with(cluster, &image.reference(), Some("pull.stored=abort"));
        }
        "remove_name" | "collect" | "release" => {
            pull(cluster, image);
            if let Some(first) = images(cluster).first() {
                let _ = cluster.run(["rm", &name_of(first)]).unwrap();
            }
        }
        "commit_refill" => {
            pull(cluster, image);
            cluster.replace_donor().unwrap();
            return pull_past_a_death(cluster, &image.reference()).1;
        }
        other => panic!("no way is known to bring metad past {other:?}: write one here"),
    }
    false
}

/// Walks through the failpoints of these names: metad dies at each, and comes back without.
fn metad_dies(lend: &str, points: impl Fn(&str) -> bool) {
    let points: Vec<_> = harbour_metad::failpoint::NAMES
        .iter()
        .filter(|p| points(p))
        .collect();
    assert!(!points.is_empty(), "no failpoint of these names");
    let mut cluster = start(lend);
    let mut complaints = Vec::new();
    for (n, point) in points.iter().enumerate() {
        cluster.kill(Part::Metad).unwrap();
        cluster
            .start_part(Part::Metad, Some(&format!("{point}=abort")))
            .unwrap();
        cluster.wait_ready().unwrap();
        let image = Image::new(&cluster, 200 + 20 * n as u64);
        let died = provoke(&mut cluster, point, &image);
        let died = shell::until("metad dies", Duration::from_secs(40), || {
            Ok((died || cluster.ended(Part::Metad)?).then_some(()))
        });
        if died.is_err() {
            complaints.push(format!("{point} was never reached"));
        }
        cluster.kill(Part::Metad).unwrap();
        cluster.start_part(Part::Metad, None).unwrap();
        cluster
            .wait_ready()
            .unwrap_or_else(|e| panic!("{point}: {e:#}"));
        nothing_is_half(&cluster, point);
        let pulled =
            pull_when_there_is_room(&cluster, &image).unwrap_or_else(|e| panic!("{point}: {e:#}"));
        image.check(&cluster, &pulled);
        remove_all(&cluster);
    }
    no_space_is_lost(&cluster, &format!("{points:?}"));
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Pulls. A pool that was full when metad died may be so until its readers have been heard again.
fn pull_when_there_is_room(cluster: &Cluster, image: &Image) -> anyhow::Result<Pulled> {
    shell::until("there is room", SETTLE_LIMIT, || {
        match cluster.pull(&image.reference()) {
            Ok(pulled) => Ok(Some(pulled)),
            Err(e) if format!("{e:#}").contains("no room") => Ok(None),
            Err(e) => Err(e),
        }
    })
}

fn remove_all(cluster: &Cluster) {
    for image in images(cluster) {
        cluster.harbour(["rm", &name_of(&image)]).unwrap();
    }
}

#[test]
fn metad_dies_while_a_pull_begins_and_writes() {
    metad_dies(LEND, |p| {
        p.starts_with("begin.") || p.starts_with("reserve.")
    });
}

#[test]
fn metad_dies_while_a_layer_is_staged() {
    metad_dies(LEND, |p| {
        p.starts_with("put_index.") || p.starts_with("stage_layer.")
    });
}

#[test]
fn metad_dies_around_a_commit() {
    metad_dies(LEND, |p| {
        p.starts_with("commit.") || p.starts_with("commit_refill.")
    });
}

#[test]
fn metad_dies_while_it_evicts() {
    metad_dies(LEND_LITTLE, |p| p.starts_with("evict."));
}

#[test]
fn metad_dies_while_space_is_freed() {
    metad_dies(LEND, |p| {
        let group = p.split('.').next().unwrap_or(p);
        !matches!(
            group,
            "begin"
                | "reserve"
                | "put_index"
                | "stage_layer"
                | "commit"
                | "commit_refill"
                | "evict"
        )
    });
}

#[test]
fn the_donor_dies_during_a_pull() {
    let mut cluster = start(LEND);
    for (n, point) in ["reserve.after", "put_index.middle", "commit.before"]
        .iter()
        .enumerate()
    {
        cluster.kill(Part::Metad).unwrap();
        cluster
            .start_part(Part::Metad, Some(&format!("{point}=sleep:1500")))
            .unwrap();
        cluster.wait_ready().unwrap();
        let before = cluster.live_donor().unwrap();
        let image = Image::new(&cluster, 300 + n as u64);
        let started = Instant::now();
        let mut child = cluster
            .command(["pull", "--progress=none", &image.reference()])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        cluster.kill(Part::Donor).unwrap();
        let ended = shell::wait(&mut child, started + PULL_LIMIT).unwrap();
        assert!(
            ended.is_some(),
            "{point}: the pull hangs on a dead donor\n{}",
            cluster.logs()
        );
        cluster.start_part(Part::Donor, None).unwrap();
        cluster.wait_donor(before).unwrap();
        // Whether it was committed or not: what is visible is whole, if need be from the source.
        nothing_is_half(&cluster, point);
        let pulled = cluster
            .pull(&image.reference())
            .unwrap_or_else(|e| panic!("{point}: {e:#}"));
        image.check(&cluster, &pulled);
        remove_all(&cluster);
    }
    no_space_is_lost(&cluster, "donors that died during pulls");
}

#[test]
fn the_donor_dies_under_readers() {
    let mut cluster = start(LEND);
    let image = Image::new(&cluster, 400);
    let pulled = cluster.pull(&image.reference()).unwrap();
    cluster.rootfs(&pulled).unwrap();
    cluster.replace_donor().unwrap();
    // Everything it held is lost: reads bring it back from where the image came from.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    image.check(&cluster, &pulled);
    no_space_is_lost(&cluster, "a donor that died under readers");
}

#[test]
fn the_node_dies_and_comes_back() {
    let mut cluster = start(LEND);
    let image = Image::new(&cluster, 500);
    let pulled = cluster.pull(&image.reference()).unwrap();
    image.check(&cluster, &pulled);
    cluster.kill(Part::Node).unwrap();
    cluster.start_part(Part::Node, None).unwrap();
    cluster.wait_ready().unwrap();
    image.check(&cluster, &pulled);
    no_space_is_lost(&cluster, "a node that died");
}
