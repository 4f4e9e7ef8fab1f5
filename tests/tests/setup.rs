//! `harbour setup` on files as people have them: what is written, that it is written whole or not at all,
//! and that `--undo` puts back every byte.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use harbour_tests::{
    cluster,
    shell::{self, Output},
};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

#[path = "setup/check.rs"]
mod check;
#[path = "setup/engines.rs"]
mod engines;
#[path = "setup/files.rs"]
mod files;

/// A host's worth of configuration, and a state directory.
struct Host {
    dir: TempDir,
}

/// A file in all that undoing has to bring back.
#[derive(Debug, PartialEq, Eq)]
struct Whole {
    bytes: Option<Vec<u8>>,
    mode: u32,
    owner: (u32, u32),
}

impl Host {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a subcommand of setup that knows nothing of this machine's engines.
    fn setup(&self, words: &[&str]) -> Output {
        self.armed(words, None)
    }

    fn armed(&self, words: &[&str], failpoint: Option<&str>) -> Output {
        let mut command = Command::new(cluster::binary());
        command.arg("--state-dir").arg(self.path("state"));
        command.args([
            "--run-dir",
            "/nonexistent/run",
            "--mount",
            "/nonexistent/mount",
        ]);
        command.arg("setup").args(words);
        command.env("PATH", "/nonexistent");
        if let Some(failpoint) = failpoint {
            command.env("HARBOUR_FAILPOINT", format!("{failpoint}=abort"));
        }
        shell::run(&mut command, LIMIT).unwrap()
    }

    /// Sets an engine up with files of this host, saying yes.
    fn engine(&self, engine: &str, more: &[&str], failpoint: Option<&str>) -> Output {
        let words = self.words(engine, more);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.armed(&words, failpoint)
    }

    fn words(&self, engine: &str, more: &[&str]) -> Vec<String> {
        let at = |name: &str| self.path(name).display().to_string();
        let own = match engine {
            "containerd" => vec!["--config-file".into(), at("etc/containerd/config.toml")],
            "docker" => vec![
                "--config-file".into(),
                at("etc/docker/daemon.json"),
                "--containerd-config-file".into(),
                at("etc/containerd/config.toml"),
                "--docker-version".into(),
                "26.1".into(),
            ],
            _ => vec!["--config-file".into(), at("etc/containers/storage.conf")],
        };
        let more = more.iter().map(|word| (*word).to_owned());
        [vec![engine.to_owned()], own, more.collect()].concat()
    }

    fn whole(&self, name: &str) -> Whole {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(meta) => Whole {
                bytes: Some(fs::read(&path).unwrap()),
                mode: meta.mode() & 0o7777,
                owner: (meta.uid(), meta.gid()),
            },
            Err(_) => Whole {
                bytes: None,
                mode: 0,
                owner: (0, 0),
            },
        }
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Everything below `etc`, links as links.
    fn listing(&self) -> Vec<PathBuf> {
        fn below(dir: &Path, list: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                list.push(entry.path());
                if entry.file_type().unwrap().is_dir() {
                    below(&entry.path(), list);
                }
            }
        }
        let mut list = Vec::new();
        below(&self.path("etc"), &mut list);
        list.sort();
        list
    }
}

/// The file that an engine's setup is about.
fn main_file(engine: &str) -> &'static str {
    match engine {
        "containerd" => "etc/containerd/config.toml",
        "docker" => "etc/docker/daemon.json",
        _ => "etc/containers/storage.conf",
    }
}

#[test]
fn undoing_brings_every_byte_back() {
    for case in files::cases() {
        let host = Host::new();
        let file = main_file(case.engine);
        if let Some(text) = &case.text {
            host.write(file, text, 0o640);
            if nix::unistd::geteuid().is_root() {
                chown(host.path(file), Some(7), Some(8)).unwrap();
            }
        }
        let (before, listed) = (host.whole(file), host.listing());
        let flags = [&["--yes"], case.flags].concat();
        let name = format!("{} {}", case.engine, case.name);
        host.engine(case.engine, &flags, None).ok().expect(&name);
        let after = host.whole(file);
        assert_ne!(before.bytes, after.bytes, "{name}");
        if before.bytes.is_some() {
            assert_eq!(
                (before.mode, before.owner),
                (after.mode, after.owner),
                "{name}"
            );
        }
        let text = String::from_utf8(after.bytes.clone().unwrap()).unwrap();
        for needle in case.needles {
            assert!(text.contains(needle), "{name}: {needle} in\n{text}");
        }
        // What was there is there still, line by line, unless it is what had to change.
        for line in case.text.iter().flat_map(|text| text.lines()) {
            let gone = case.gone.iter().any(|gone| line.contains(gone));
            assert!(
                gone || text.contains(line),
                "{name}: {line} is gone from\n{text}"
            );
        }
        // A second time there is nothing to do, and nobody has to be asked.
        let again = host
            .engine(case.engine, case.flags, None)
            .ok()
            .expect(&name);
        assert!(again.text().contains("nothing to do"), "{}", again.text());
        assert_eq!(host.whole(file), after, "{name}");
        let undo = host.engine(case.engine, &["--undo", "--yes"], None);
        undo.ok().expect(&name);
        assert_eq!(host.whole(file), before, "{name}");
        assert_eq!(host.listing(), listed, "{name}");
        let undo = host.engine(case.engine, &["--undo", "--yes"], None);
        assert!(
            undo.ok().unwrap().text().contains("nothing to undo"),
            "{name}"
        );
    }
}

#[test]
fn what_cannot_be_read_is_named_and_left_alone() {
    for (engine, text, says, code) in [
        ("containerd", "version = 2\n[grpc\n", "line 2", 2),
        ("containerd", "version = 3\n", "version 3", 2),
        (
            "containerd",
            "[plugins.cri]\nx = 1\n",
            "containerd config migrate",
            2,
        ),
        ("docker", "{\n  \"debug\": true,\n}\n", "line 3", 2),
        ("docker", "{\n  // mine\n}\n", "line 2", 2),
        ("docker", "[]\n", "object", 2),
        ("podman", "[storage]\ndriver = overlay\n", "line 2", 2),
        ("podman", "[storage]\ndriver = \"vfs\"\n", "vfs", 2),
    ] {
        let host = Host::new();
        let file = main_file(engine);
        host.write(file, text, 0o600);
        let (before, listed) = (host.whole(file), host.listing());
        let flags: &[&str] = match engine {
            "podman" => &["--yes"],
            _ => &["--yes", "--containerd-version", "1.7"],
        };
        let output = host.engine(engine, flags, None);
        assert_eq!(output.status.code(), Some(code), "{}", output.stderr);
        let path = host.path(file).display().to_string();
        assert!(output.stderr.contains(&path), "{}", output.stderr);
        assert!(output.stderr.contains(says), "{says}: {}", output.stderr);
        assert!(
            output.stderr.contains("nothing was written"),
            "{}",
            output.stderr
        );
        assert_eq!((host.whole(file), host.listing()), (before, listed));
    }
    let host = Host::new();
    fs::create_dir_all(host.path("etc/docker")).unwrap();
    fs::write(host.path(main_file("docker")), b"{\n\"a\": \"\xff\"}").unwrap();
    let output = host.engine("docker", &["--yes", "--containerd-version", "1.7"], None);
    assert!(
        output.stderr.contains("line 2: not UTF-8"),
        "{}",
        output.stderr
    );
}

#[test]
fn nothing_is_written_unasked() {
    let host = Host::new();
    let flags = ["--containerd-version", "1.7"];
    let output = host.engine("containerd", &flags, None);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stderr.contains("--yes"), "{}", output.stderr);
    // It was shown all the same.
    assert!(
        output.text().contains("+[proxy_plugins.harbour]"),
        "{}",
        output.text()
    );
    let dry = host.engine(
        "containerd",
        &["--dry-run", "--containerd-version", "1.7"],
        None,
    );
    assert!(dry.ok().unwrap().text().contains("+version = 2"));
    assert!(host.listing().is_empty() && !host.path("state").exists());
    // Without an engine on the host nobody can tell what it reads.
    let output = host.engine("containerd", &["--yes"], None);
    assert_eq!(output.status.code(), Some(3));
    assert!(
        output.stderr.contains("--containerd-version"),
        "{}",
        output.stderr
    );
    let words = ["docker", "--docker-version", "20.10", "--yes"];
    let output = host.setup(&words);
    assert_eq!(output.status.code(), Some(5));
    assert!(
        output.stderr.contains("harbour docker attach"),
        "{}",
        output.stderr
    );
}

#[test]
fn a_link_stays_a_link() {
    let host = Host::new();
    let text = "version = 2\n";
    host.write("etc/kept/real.toml", text, 0o600);
    fs::create_dir_all(host.path("etc/containerd")).unwrap();
    let link = host.path(main_file("containerd"));
    symlink("../kept/real.toml", &link).unwrap();
    let flags = ["--yes", "--containerd-version", "1.6"];
    host.engine("containerd", &flags, None).ok().unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let real = fs::read_to_string(host.path("etc/kept/real.toml")).unwrap();
    assert!(real.contains("harbour"));
    host.engine("containerd", &["--undo", "--yes"], None)
        .ok()
        .unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&link).unwrap(), text);
    fs::remove_file(host.path("etc/kept/real.toml")).unwrap();
    let output = host.engine("containerd", &flags, None);
    assert!(
        output.stderr.contains("link to nothing"),
        "{}",
        output.stderr
    );
}

#[test]
fn what_somebody_changed_since_is_not_lost() {
    let host = Host::new();
    let file = main_file("podman");
    let before = "[storage]\ndriver = \"overlay\"\n";
    host.write(file, before, 0o644);
    host.engine("podman", &["--yes", "--no-check"], None)
        .ok()
        .unwrap();
    let ours = String::from_utf8(host.whole(file).bytes.unwrap()).unwrap();
    let theirs = format!("{ours}# mine\n");
    fs::write(host.path(file), &theirs).unwrap();
    let output = host.engine("podman", &["--undo", "--yes"], None);
    assert_eq!(output.status.code(), Some(5));
    assert!(
        output.stderr.contains("changed by somebody else"),
        "{}",
        output.stderr
    );
    assert_eq!(fs::read_to_string(host.path(file)).unwrap(), theirs);
    let output = host.engine("podman", &["--undo", "--yes", "--force"], None);
    let said = output.ok().unwrap().text();
    assert_eq!(fs::read_to_string(host.path(file)).unwrap(), before);
    let kept = said
        .lines()
        .find_map(|line| line.strip_prefix("what it held now is kept in "));
    assert_eq!(fs::read_to_string(kept.unwrap()).unwrap(), theirs);
    // Put back by hand is as good as undone.
    host.engine("podman", &["--yes", "--no-check"], None)
        .ok()
        .unwrap();
    fs::write(host.path(file), before).unwrap();
    host.engine("podman", &["--undo", "--yes"], None)
        .ok()
        .unwrap();
    assert_eq!(fs::read_to_string(host.path(file)).unwrap(), before);
}

/// containerd's file belongs to two engines: the second stands on what the first wrote.
#[test]
fn engines_that_share_a_file_are_undone_in_turn() {
    let host = Host::new();
    let file = main_file("containerd");
    host.write(file, "version = 2\n", 0o644);
    let before = host.whole(file);
    let flags = ["--yes", "--containerd-version", "1.7"];
    for (first, second) in [("containerd", "docker"), ("docker", "containerd")] {
        host.engine(first, &flags, None).ok().unwrap();
        host.engine(second, &flags, None).ok().unwrap();
        let output = host.engine(first, &["--undo", "--yes"], None);
        assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
        let next = format!("harbour setup {second} --undo");
        assert!(output.stderr.contains(&next), "{}", output.stderr);
        host.engine(second, &["--undo", "--yes"], None)
            .ok()
            .unwrap();
        host.engine(first, &["--undo", "--yes"], None).ok().unwrap();
        assert_eq!(host.whole(file), before, "{first}, then {second}");
        assert!(!host.path(main_file("docker")).exists());
    }
}

/// Killed at any step, each file is the old one or the new one, and both ways go on from there.
#[test]
fn a_setup_that_is_killed_leaves_old_or_new() {
    let flags = ["--yes", "--containerd-version", "1.7"];
    let old = "version = 2\n# mine\n";
    let new = {
        let host = Host::new();
        host.write(main_file("containerd"), old, 0o604);
        host.engine("docker", &flags, None).ok().unwrap();
        [main_file("containerd"), main_file("docker")].map(|file| host.whole(file))
    };
    for point in harbour::failpoint::SETUP_NAMES {
        for onward in [true, false] {
            let host = Host::new();
            host.write(main_file("containerd"), old, 0o604);
            let both =
                || [main_file("containerd"), main_file("docker")].map(|file| host.whole(file));
            let (before, listed) = (both(), host.listing());
            let undoing = *point == "setup.undone";
            if undoing {
                host.engine("docker", &flags, None).ok().unwrap();
                let output = host.engine("docker", &["--undo", "--yes"], Some(point));
                assert!(!output.status.success(), "{point} was not passed");
            } else {
                let output = host.engine("docker", &flags, Some(point));
                assert!(!output.status.success(), "{point} was not passed");
            }
            for ((now, old), new) in both().iter().zip(&before).zip(&new) {
                let whole = now == old || (now.bytes == new.bytes && now.mode == new.mode);
                assert!(whole, "{point}: {now:?}");
            }
            if onward {
                host.engine("docker", &flags, None).ok().unwrap();
                assert_eq!(
                    both().map(|file| file.bytes),
                    [&new[0], &new[1]].map(|f| f.bytes.clone())
                );
            }
            host.engine("docker", &["--undo", "--yes"], None)
                .ok()
                .unwrap();
            assert_eq!(both(), before, "{point}, onward {onward}");
            assert_eq!(host.listing(), listed, "{point}, onward {onward}");
        }
    }
}

#[test]
fn a_report_is_one_json_value() {
    let host = Host::new();
    let flags = ["--yes", "--json", "--containerd-version", "2.1"];
    let output = host.engine("containerd", &flags, None).ok().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["outcome"], "changed");
    assert_eq!(report["files"][0]["changed"], true);
    let output = host.engine("containerd", &["--undo", "--yes", "--json"], None);
    let report: serde_json::Value = serde_json::from_slice(&output.ok().unwrap().stdout).unwrap();
    assert_eq!(report["outcome"], "undone");
}
