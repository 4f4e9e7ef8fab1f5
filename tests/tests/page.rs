//! The page of README.md on a cluster of three hosts, typed line by line on hosts that have nothing
//! but a network and this machine's programs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File},
    process::{Child, Stdio},
    time::Duration,
};

use harbour_tests::{fixtures, hosts::Hosts, shell};

/// The heading of the page, and the end of its lines.
const HEADING: &str = "## A cluster of three hosts";
/// Hosts of the page, by the last number of their addresses, and one that stands for the registries
/// of the world.
const NAMES: [&str; 4] = ["alpha", "beta", "gamma", "world"];
const WORLD: usize = 3;
/// What the page pulls.
const IMAGE: &str = "library/debian:12";
const ROOTFS: &str = "/harbour/images/docker.io/library/debian/12/rootfs";
/// One line of the page, on a machine that does other things too.
const LINE_LIMIT: Duration = Duration::from_secs(120);
/// Until what a line started does its work.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// A line: the number of the host, and what is typed there.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    host: usize,
    text: String,
}

/// The lines of the first block below the heading.
fn lines(readme: &str) -> Vec<Line> {
    let (_, page) = readme.split_once(HEADING).expect("README.md has the page");
    let block = page.split("```").nth(1).expect("the page has a block");
    let line = |line: &str| {
        let (name, text) = line
            .split_once('$')
            .unwrap_or_else(|| panic!("who types {line:?}?"));
        let host = NAMES.iter().position(|known| *known == name);
        let host = host.unwrap_or_else(|| panic!("no host {name:?}"));
        Line {
            host,
            text: text.trim().to_owned(),
        }
    };
    block.trim().lines().map(line).collect()
}

/// The part that a line starts and that stays, if it does.
fn part(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("sudo harbour ")?;
    let word = rest.split_whitespace().next()?;
    ["metad", "donor", "node"].contains(&word).then_some(word)
}

struct Stage {
    hosts: Hosts,
    started: Vec<Started>,
}

/// What a line started, until the page is over.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // What it entered the namespaces with; they have ended, and with them what ran there.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

impl Stage {
    fn logs(&self) -> String {
        let mut shown = String::new();
        for name in NAMES {
            for part in ["metad", "donor", "node"] {
                let log = self.hosts.dir().join(format!("{name}-{part}.log"));
                let text = fs::read(log).unwrap_or_default();
                shown += &String::from_utf8_lossy(&text);
            }
        }
        shown
    }

    /// Types a line and waits for its end.
    fn typed(&self, host: usize, line: &str) -> anyhow::Result<shell::Output> {
        shell::run(self.hosts.on(host, "sh").args(["-ec", line]), LINE_LIMIT)
    }

    /// Types a line that has to end well.
    fn good(&self, host: usize, line: &str) -> String {
        let output = self.typed(host, line).and_then(shell::Output::ok);
        let output =
            output.unwrap_or_else(|e| panic!("{}$ {line}: {e:#}\n{}", NAMES[host], self.logs()));
        output.text()
    }

    /// Starts what stays, and waits until it is at work.
    fn start(&mut self, line: &Line, part: &str) {
        let name = format!("{}-{part}.log", NAMES[line.host]);
        let log = File::create(self.hosts.dir().join(name)).unwrap();
        let child = self
            .hosts
            .on(line.host, "sh")
            .args(["-ec", &line.text])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.started.push(Started(child));
        let probe = match part {
            "metad" => "harbour donors --json",
            "donor" => "harbour donors --json | grep '\"live\": *true'",
            _ => "test -d /harbour/images",
        };
        let asked = if part == "node" { line.host } else { 0 };
        let ready = shell::until(part, READY_LIMIT, || {
            Ok(self.typed(asked, probe)?.status.success().then_some(()))
        });
        ready.unwrap_or_else(|e| panic!("{e:#}\n{}", self.logs()));
    }
}

#[test]
fn the_page_does_what_it_says() {
    let readme = fs::read_to_string(fixtures::checkout().join("README.md")).unwrap();
    let lines = lines(&readme);
    let base = fixtures::judged("base").unwrap();
    let hosts = Hosts::in_rooms(&NAMES).unwrap();
    let layout = format!("oci:{}:base", fixtures::cache().join("oci").display());
    hosts.serve_image(WORLD, &layout, IMAGE).unwrap();
    let mirror = format!(
        "[registry.\"docker.io\"]\nmirrors = [\"http://{}\"]\n",
        hosts.registry(WORLD)
    );
    let mut stage = Stage {
        hosts,
        started: Vec::new(),
    };
    let mut said = String::new();
    for line in &lines {
        if let Some(part) = part(&line.text) {
            stage.start(line, part);
            continue;
        }
        if line.text.contains("harbour pull") {
            // The world's registries are not to be had here.
            stage.good(
                line.host,
                &format!("cat > /etc/harbour/harbour.toml <<'END'\n{mirror}END"),
            );
        }
        if line.text.starts_with("ls ") {
            stage.good(
                line.host,
                &format!(
                    "for i in $(seq 100); do {} && exit; sleep 0.1; done; exit 1",
                    line.text
                ),
            );
        }
        said = stage.good(line.host, &line.text);
    }
    let listed: Vec<&str> = said.split_whitespace().collect();
    for name in ["bin", "etc", "usr", "var"] {
        assert!(listed.contains(&name), "the last line said {said}");
    }
    let reader = lines.last().unwrap().host;
    let tree = base.umoci.display();
    // Of devices diff says no more than that they are some; `equality.rs` looks at their numbers.
    let differ = format!(
        "diff -r --no-dereference {tree} {ROOTFS} > /run/diff 2>&1 || true\n\
         sed -i '/ is a character special file while file .* is a character special file$/d' /run/diff\n\
         cat /run/diff"
    );
    assert_eq!(stage.good(reader, &differ), "");
    // It lends nothing: all came over the network from who does.
    let donors = stage.good(0, "harbour donors --json");
    let donors: serde_json::Value = serde_json::from_str(&donors).unwrap();
    let lending: Vec<_> = donors
        .as_array()
        .unwrap()
        .iter()
        .filter(|d| d["used_bytes"].as_u64() > Some(0))
        .collect();
    assert_eq!(lending.len(), 1, "{donors}");
    let why = stage.good(
        reader,
        &format!("harbour why {ROOTFS}/etc/passwd --metad https://192.0.2.1:7480"),
    );
    assert!(why.contains("tcp"), "{why}");
}

#[test]
fn lines_of_a_page_are_taken_apart() {
    let page =
        format!("x\n{HEADING}\n\ntext\n\n```\nalpha$ a b\ngamma$  c\n```\n```\nbeta$ d\n```\n");
    let line = |host, text: &str| Line {
        host,
        text: text.into(),
    };
    assert_eq!(lines(&page), [line(0, "a b"), line(2, "c")]);
    assert_eq!(part("sudo harbour node --metad x"), Some("node"));
    assert_eq!(part("sudo harbour pull x"), None);
}
