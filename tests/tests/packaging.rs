//! What the Debian package is made of: units that systemd takes, an example of the configuration whose keys
//! exist, and files that are there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use harbour_tests::{
    engines::{NotHere, When, row},
    fixtures::checkout,
    shell,
};

const LIMIT: Duration = Duration::from_secs(60);

fn dist() -> PathBuf {
    checkout().join("tools/dist")
}

fn units() -> Vec<PathBuf> {
    let entries = fs::read_dir(dist().join("systemd")).unwrap();
    let mut units: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    units.sort();
    assert_eq!(units.len(), 4, "{units:?}");
    units
}

#[test]
fn systemd_takes_the_units() {
    row("systemd-analyze verify", When::Always, |_| {
        if !Path::new("/usr/bin/systemd-analyze").exists() {
            return Err(NotHere("there is no systemd-analyze here".into()).into());
        }
        // Units that name a program which is here: the package's is not installed.
        let dir = tempfile::tempdir()?;
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no"]);
        for unit in units() {
            let text = fs::read_to_string(&unit)?;
            let copy = dir.path().join(unit.file_name().unwrap());
            fs::write(&copy, text.replace("/usr/bin/harbour", "/bin/true"))?;
            command.arg(copy);
        }
        let output = shell::run(&mut command, LIMIT)?.ok()?;
        // What it does not know it only speaks of.
        assert_eq!(output.stderr, "");
        Ok(())
    });
}

/// The mount has to be seen by the host: a mount namespace of the service's own would hide it.
#[test]
fn services_that_mount_have_no_namespace_of_their_own() {
    for unit in units() {
        let name = unit.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&unit).unwrap();
        let mounts = name == "harbour.service" || name == "harbour-node.service";
        let keys: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, _)| key)
            .collect();
        let hides = |key: &&str| {
            let paths = key.ends_with("Paths") || key.ends_with("Directories");
            let kinds = [
                "Protect",
                "Private",
                "BindPaths",
                "RootDirectory",
                "MountFlags",
                "DynamicUser",
            ];
            paths || kinds.iter().any(|kind| key.starts_with(kind))
        };
        let hiding: Vec<_> = keys.iter().copied().filter(hides).collect();
        assert_eq!(hiding.is_empty(), mounts, "{name}: {hiding:?}");
        for (key, value) in [
            ("KillMode", "mixed"),
            ("Type", "notify"),
            ("Restart", "always"),
        ] {
            assert!(
                text.contains(&format!("\n{key}={value}\n")),
                "{name}: {key}"
            );
        }
    }
}

#[test]
fn keys_of_the_example_exist() {
    let text = fs::read_to_string(dist().join("harbour.toml")).unwrap();
    let written: toml::Table = text.parse().unwrap();
    let empty = |value: &toml::Value| value.as_table().is_some_and(toml::Table::is_empty);
    assert!(written.values().all(empty), "nothing is set by the package");
    // A # right before a key or a heading is one to take away.
    let is_example = |line: &str| !line.starts_with(' ');
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(example) if is_example(example) => example,
        _ => line,
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("harbour.toml");
    let lines: Vec<_> = lines.collect();
    fs::write(&file, lines.join("\n")).unwrap();
    let loaded = harbour::config::File::load(Some(&file)).unwrap();
    assert_eq!(loaded.pull.jobs, Some(2));
    assert!(loaded.registry.contains_key("registry.example.org"));
}

#[test]
fn what_the_package_takes_from_the_checkout_is_there() {
    let manifest = fs::read_to_string(checkout().join("tools/Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    let tools = checkout().join("tools");
    let sources = deb["assets"].as_array().unwrap().iter();
    let sources = sources.map(|asset| asset[0].as_str().unwrap());
    for source in sources.filter(|source| !source.starts_with("target/")) {
        assert!(tools.join(source).is_file(), "{source}");
    }
    for unit in deb["systemd-units"].as_array().unwrap() {
        let (dir, name) = (
            unit["unit-scripts"].as_str().unwrap(),
            unit["unit-name"].as_str().unwrap(),
        );
        assert!(
            tools.join(dir).join(format!("{name}.service")).is_file(),
            "{name}"
        );
        // A host may have containers on the mount: an upgrade is not the time to take it away.
        for key in [
            "enable",
            "start",
            "restart-after-upgrade",
            "stop-on-upgrade",
        ] {
            assert_eq!(unit[key].as_bool(), Some(false), "{name}: {key}");
        }
    }
}

/// Starts a part as systemd would and waits for what it says.
#[test]
fn a_service_says_when_it_is_ready() {
    use std::os::unix::net::UnixDatagram;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let socket = UnixDatagram::bind(at("notify")).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = Command::new(harbour_tests::cluster::binary());
    for (flag, name) in [
        ("--state-dir", "state"),
        ("--run-dir", "run"),
        ("--mount", "mount"),
    ] {
        command.arg(flag).arg(at(name));
    }
    command.arg("metad").env("NOTIFY_SOCKET", at("notify"));
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    let mut said = [0; 64];
    let told = socket.recv(&mut said);
    let serves = std::os::unix::net::UnixStream::connect(at("run/metad.sock")).is_ok();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(&said[..told.unwrap()], b"READY=1");
    assert!(serves);
}
