//! Hostile images through the command line, and garbage on every socket: each gets an error that
//! names the thing, nothing half-made remains, nothing else is disturbed.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "badinput/images.rs"]
mod images;
#[path = "badinput/sockets.rs"]
mod sockets;

use std::{fs, time::Duration};

use harbour_tests::{
    cluster::{Cluster, Part, Pulled},
    layers::{Entry, Layout},
    shell,
};

/// Longest that any refusal may take.
const LIMIT: Duration = Duration::from_secs(120);

/// An honest image, and what it takes to see that it still is one.
struct Witness {
    image: Pulled,
    bytes: Vec<u8>,
}

impl Witness {
    fn pull(cluster: &Cluster) -> Self {
        let bytes: Vec<u8> = (0..3_000_000_u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let mut layout = Layout::create(&cluster.dir().join("witness")).unwrap();
        let file = Entry::file("witness", bytes.clone());
        layout
            .image("w", &[vec![file, Entry::symlink("link", "witness")]])
            .unwrap();
        Self {
            image: cluster.pull(&layout.reference("w")).unwrap(),
            bytes,
        }
    }

    fn check(&self, cluster: &Cluster, after: &str) {
        let path = cluster.rootfs(&self.image).unwrap().join("link");
        let now =
            fs::read(&path).unwrap_or_else(|e| panic!("after {after}: {e}\n{}", cluster.logs()));
        assert!(
            now == self.bytes,
            "after {after}: the other image gives other bytes"
        );
    }
}

#[test]
fn hostile_images_are_refused_by_name() {
    let mut cluster = Cluster::start("64MiB").unwrap();
    let witness = Witness::pull(&cluster);
    let used = cluster.book("used_bytes").unwrap();
    let mut complaints = Vec::new();
    for case in images::cases() {
        let dir = cluster.dir().join("hostile");
        let mut layout = Layout::create(&dir).unwrap();
        (case.build)(&mut layout).unwrap();
        let mut command = cluster.command(["pull"]);
        command.args(case.flags).arg(layout.reference("x"));
        let output = shell::run(&mut command, LIMIT)
            .unwrap_or_else(|e| panic!("{}: {e:#}\n{}", case.name, cluster.logs()));
        complaints.extend(complain(&case, &output));
        fs::remove_dir_all(&dir).unwrap();
        for image in cluster.json("images").unwrap().as_array().unwrap() {
            if image["repository"] != witness.image.repository.as_str() {
                complaints.push(format!("{}: it is listed", case.name));
                let part = |key: &str| image[key].as_str().unwrap().to_owned();
                let name = format!(
                    "{}/{}:{}",
                    part("registry"),
                    part("repository"),
                    part("tag")
                );
                cluster.harbour(["rm", &name]).unwrap();
            }
        }
        for part in Part::ALL {
            assert!(
                !cluster.ended(part).unwrap(),
                "{}: {} ended\n{}",
                case.name,
                part.name(),
                cluster.logs()
            );
        }
        witness.check(&cluster, case.name);
    }
    assert!(
        complaints.is_empty(),
        "{} complaints:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
    // A pull that failed gives everything back at once; what it had committed to layers nobody
    // names goes with the next collection.
    shell::until("space came back", Duration::from_secs(60), || {
        let books = (
            cluster.book("used_bytes")?,
            cluster.book("reserved_bytes")?,
            cluster.book("quarantined_bytes")?,
        );
        Ok((books == (used, 0, 0)).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {}", cluster.json("status").unwrap()));
}

fn complain(case: &images::Case, output: &shell::Output) -> Option<String> {
    let said = output.stderr.trim();
    let wrong = match output.status.code() {
        Some(0) => "it was accepted".to_owned(),
        Some(code @ (1 | 2 | 3 | 5 | 6)) => {
            let missing: Vec<_> = case.says.iter().filter(|s| !said.contains(**s)).collect();
            if !missing.is_empty() {
                format!("the message lacks {missing:?}")
            } else if said.contains("panicked") {
                "a panic".to_owned()
            } else if case.code.is_some_and(|wanted| wanted != code) {
                format!("exit code {code} instead of {:?}", case.code)
            } else {
                return None;
            }
        }
        other => format!("exit code {other:?} ({})", output.status),
    };
    Some(format!(
        "{}: {wrong}\n    {}",
        case.name,
        said.chars()
            .take(600)
            .collect::<String>()
            .replace('\n', "\n    ")
    ))
}

#[test]
fn an_image_larger_than_the_pool_is_refused_and_another_fits_after() {
    let cluster = Cluster::start("32MiB").unwrap();
    let witness = Witness::pull(&cluster);
    let mut layout = Layout::create(&cluster.dir().join("large")).unwrap();
    let noise = images::noise(60_000_000);
    layout
        .image("large", &[vec![Entry::file("large", noise.clone())]])
        .unwrap();
    layout
        .image(
            "fits",
            &[vec![Entry::file("fits", noise[..9_000_000].to_vec())]],
        )
        .unwrap();
    let output = cluster.try_pull(&layout.reference("large")).unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", output.stderr);
    assert_eq!(cluster.json("images").unwrap().as_array().unwrap().len(), 1);
    let image = cluster.pull(&layout.reference("fits")).unwrap();
    let got = fs::read(cluster.rootfs(&image).unwrap().join("fits")).unwrap();
    assert!(got == noise[..9_000_000], "other bytes");
    witness.check(&cluster, "an image larger than the pool");
}

#[test]
fn a_full_disk_is_an_error_and_nothing_half_made() {
    let mut cluster = Cluster::empty("64MiB").unwrap();
    let state = cluster.dir().join("state");
    let args = [
        "-t",
        "tmpfs",
        "-o",
        "size=3m",
        "tmpfs",
        state.to_str().unwrap(),
    ];
    shell::check("mount", args, Duration::from_secs(20)).unwrap();
    Part::ALL
        .into_iter()
        .for_each(|part| cluster.start_part(part, None).unwrap());
    cluster.wait_ready().unwrap();
    let witness = Witness::pull(&cluster);
    // 100,000 names make an index of several MiB, which goes to that disk.
    let names: Vec<_> = (0..100_000)
        .map(|n| Entry::file(format!("name-{n:06}"), ""))
        .collect();
    let mut layout = Layout::create(&cluster.dir().join("many")).unwrap();
    layout.image("many", &[names]).unwrap();
    let output = cluster.try_pull(&layout.reference("many")).unwrap();
    assert!(
        matches!(output.status.code(), Some(1 | 6)),
        "{} {}",
        output.status,
        output.stderr
    );
    assert_eq!(cluster.json("images").unwrap().as_array().unwrap().len(), 1);
    witness.check(&cluster, "a full disk");
    let mut layout = Layout::create(&cluster.dir().join("small")).unwrap();
    layout
        .image("small", &[vec![Entry::file("small", "small")]])
        .unwrap();
    let image = cluster.pull(&layout.reference("small")).unwrap();
    assert_eq!(
        fs::read(cluster.rootfs(&image).unwrap().join("small")).unwrap(),
        b"small"
    );
}

#[test]
fn garbage_on_every_socket_disturbs_nobody() {
    let mut cluster = Cluster::start("64MiB").unwrap();
    let witness = Witness::pull(&cluster);
    let attacked = sockets::attack(&cluster).unwrap();
    assert!(attacked.len() >= 2, "only {attacked:?} were found");
    for part in Part::ALL {
        assert!(
            !cluster.ended(part).unwrap(),
            "{} ended\n{}",
            part.name(),
            cluster.logs()
        );
    }
    witness.check(&cluster, "garbage");
    let mut layout = Layout::create(&cluster.dir().join("next")).unwrap();
    layout
        .image(
            "next",
            &[vec![Entry::file("next", images::noise(2_000_000))]],
        )
        .unwrap();
    let image = cluster.pull(&layout.reference("next")).unwrap();
    assert_eq!(
        fs::read(cluster.rootfs(&image).unwrap().join("next")).unwrap(),
        images::noise(2_000_000)
    );
    for part in Part::ALL {
        let open = fs::read_dir(format!("/proc/{}/fd", cluster.pid(part).unwrap()))
            .unwrap()
            .count();
        assert!(
            open < 400,
            "{} holds {open} descriptors after the attack",
            part.name()
        );
    }
}
