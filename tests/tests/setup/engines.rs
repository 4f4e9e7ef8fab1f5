//! The same with engines that are there: they take what was written, and doctor sees what they make of it.

use std::{
    ffi::OsString,
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    cluster,
    engines::{Containerd, NotHere, Packages, Site, Suite, When, containerd, row},
    shell,
};
use serde_json::Value;

use super::{Host, LIMIT};

/// Which suites run in every run of the tests.
pub(crate) fn suites() -> [(Suite, When); 3] {
    [
        (Suite::Bookworm, When::Always),
        (Suite::Trixie, When::Matrix),
        (Suite::Sid, When::Matrix),
    ]
}

/// A run of setup that finds the programs of a suite.
fn setup(host: &Host, packages: &Packages, words: &[&str]) -> Result<String> {
    let mut command = Command::new(cluster::binary());
    command.arg("--state-dir").arg(host.path("state"));
    command.arg("--run-dir").arg(host.path("run"));
    command
        .arg("setup")
        .args(words)
        .env("PATH", packages.path());
    Ok(shell::run(&mut command, LIMIT)?.ok()?.text())
}

fn dump(packages: &Packages, file: &Path) -> Result<toml::Table> {
    let mut command = packages.command("containerd");
    command.arg("--config").arg(file).args(["config", "dump"]);
    Ok(shell::run(&mut command, LIMIT)?.ok()?.text().parse()?)
}

/// What CRI of this dump uses.
fn used(dump: &toml::Table) -> Option<&str> {
    let plugins = dump.get("plugins")?;
    let old = plugins
        .get("io.containerd.grpc.v1.cri")
        .and_then(|cri| cri.get("containerd"));
    let images = old.or_else(|| plugins.get("io.containerd.cri.v1.images"))?;
    images.get("snapshotter")?.as_str()
}

/// Where a suite is unpacked.
fn tree(packages: &Packages) -> Result<PathBuf> {
    let path = packages.path();
    let first = std::env::split_paths(&path).next().context("no PATH")?;
    Ok(first.join("../..").canonicalize()?)
}

#[test]
fn containerd_loads_the_plugin() {
    for (suite, when) in suites() {
        let name = format!("setup containerd, {}", suite.name());
        row(&name, when, |row| {
            let packages = suite.packages()?;
            row.version(packages.version("containerd"));
            let site = Site::start()?;
            let mut engine = Containerd::start(&containerd::Settings {
                packages: &packages,
                net: &site.net,
                dir: &site.dir().join("c"),
                registry: &site.registry.host(),
                pause: &site.reference(&site.images.pause),
                snapshotter: None,
            })?;
            let file = site.dir().join("c/containerd.toml");
            let before = fs::read(&file)?;
            let host = Host::new();
            let name = file.display().to_string();
            setup(
                &host,
                &packages,
                &["containerd", "--yes", "--config-file", &name],
            )?;
            ensure!(used(&dump(&packages, &file)?) == Some("harbour"));
            engine.stop()?;
            engine.resume()?;
            let plugins = engine.ctr("default", &["plugins", "ls"])?;
            let ours = plugins
                .lines()
                .find(|line| line.split_whitespace().nth(1) == Some("harbour"));
            let ours = ours.context(plugins.clone())?;
            ensure!(ours.trim_end().ends_with("ok"), "{ours}");
            // What it did before it still does.
            let image = site.reference(&site.images.three);
            engine.ctr("default", &["images", "pull", "--plain-http", &image])?;
            setup(&host, &packages, &["containerd", "--undo", "--yes"])?;
            ensure!(fs::read(&file)? == before);
            engine.stop()?;
            engine.resume()?;
            Ok(())
        });
    }
}

#[test]
fn files_of_each_release_are_taken() {
    for (suite, when) in suites() {
        let name = format!("setup of containerd's own files, {}", suite.name());
        row(&name, when, |row| {
            let packages = suite.packages()?;
            row.version(packages.version("containerd"));
            let mut command = packages.command("containerd");
            let defaults = shell::run(command.args(["config", "default"]), LIMIT)?.ok()?;
            let shipped = tree(&packages)?.join("etc/containerd/config.toml");
            let imported = "version = 2\nimports = [\"more/*.toml\"]\n";
            for text in [
                defaults.text(),
                fs::read_to_string(shipped)?,
                imported.to_owned(),
            ] {
                let host = Host::new();
                host.write("etc/c.toml", &text, 0o600);
                let file = host.path("etc/c.toml");
                let name = file.display().to_string();
                setup(
                    &host,
                    &packages,
                    &["containerd", "--yes", "--config-file", &name],
                )?;
                ensure!(used(&dump(&packages, &file)?) == Some("harbour"), "{text}");
                let again = setup(&host, &packages, &["containerd", "--config-file", &name])?;
                ensure!(again.contains("nothing to do"), "{again}");
                setup(&host, &packages, &["containerd", "--undo", "--yes"])?;
                ensure!(fs::read_to_string(&file)? == text);
            }
            // What would be overruled by a file that is imported is not written.
            let host = Host::new();
            host.write("etc/c.toml", &imported.replace('*', "other"), 0o600);
            let other = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n\
                [plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"native\"\n";
            host.write("etc/more/other.toml", other, 0o600);
            let listed = host.listing();
            let name = host.path("etc/c.toml").display().to_string();
            let refused = setup(
                &host,
                &packages,
                &["containerd", "--yes", "--config-file", &name],
            );
            let why = format!("{:#}", refused.err().context("it was overruled")?);
            ensure!(why.contains("CRI use native"), "{why}");
            ensure!(host.listing() == listed && !host.path("state/setup/containerd").exists());
            Ok(())
        });
    }
}

#[test]
fn doctor_sees_a_silent_fallback() {
    row("doctor, containerd 1.6", When::Always, |row| {
        let packages = Suite::Bookworm.packages()?;
        row.version(packages.version("containerd"));
        let host = Host::new();
        let socket = host.path("run/snapshotter.sock");
        let plugin = format!(
            "[proxy_plugins.harbour]\ntype = \"snapshot\"\naddress = \"{}\"\n",
            socket.display()
        );
        let new = format!(
            "version = 2\n{plugin}[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"harbour\"\n"
        );
        let old = format!(
            "version = 2\n{plugin}[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
             snapshotter = \"harbour\"\ndisable_snapshot_annotations = false\n"
        );
        let path = packages.path();
        let said =
            |text: Option<&str>| doctor(&host, &path, "containerd/config.toml", text, "containerd");
        let good = said(None)?;
        ensure!(
            good.iter()
                .any(|(grade, detail)| grade == "ok" && detail.contains("not set up")),
            "{good:?}"
        );
        let silent = said(Some(&new))?;
        let fell = |(grade, detail): &(String, String)| {
            grade == "bad" && detail.contains("falls back to overlayfs without a word")
        };
        ensure!(silent.iter().any(fell), "{silent:?}");
        let missing = said(Some(&old))?;
        ensure!(
            missing
                .iter()
                .any(|(grade, detail)| grade == "bad" && detail.contains("there is no")),
            "{missing:?}"
        );
        fs::create_dir_all(host.path("run"))?;
        let listener = UnixListener::bind(&socket)?;
        let good = said(Some(&old))?;
        let listens = |(grade, detail): &(String, String)| {
            grade == "ok" && detail.contains("CRI and who asks")
        };
        ensure!(good.iter().any(listens), "{good:?}");
        drop(listener);
        let stale = said(Some(&old))?;
        ensure!(
            stale
                .iter()
                .any(|(grade, detail)| grade == "bad" && detail.contains("has gone")),
            "{stale:?}"
        );
        let broken = said(Some("version = 2\n["))?;
        ensure!(broken.iter().any(|(grade, _)| grade == "bad"), "{broken:?}");
        Ok(())
    });
    row("doctor, containerd 2.1", When::Matrix, |row| {
        let packages = Suite::Sid.packages()?;
        row.version(packages.version("containerd"));
        let host = Host::new();
        // What is right for 1.x is dropped by 2.x.
        let old = format!(
            "version = 2\n[proxy_plugins.harbour]\ntype = \"snapshot\"\naddress = \"{}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"harbour\"\n",
            host.path("run/snapshotter.sock").display()
        );
        let path = packages.path();
        let silent = doctor(
            &host,
            &path,
            "containerd/config.toml",
            Some(&old),
            "containerd",
        )?;
        let fell = |(grade, detail): &(String, String)| {
            grade == "bad" && detail.contains("falls back to overlayfs without a word")
        };
        ensure!(silent.iter().any(fell), "{silent:?}");
        Ok(())
    });
}

#[test]
fn doctor_looks_at_docker_and_podman() {
    row("doctor, docker 20.10", When::Always, |row| {
        let packages = Suite::Bookworm.packages()?;
        row.version(packages.version("docker.io"));
        let host = Host::new();
        let path = packages.path();
        let said = |text: Option<&str>| doctor(&host, &path, "docker/daemon.json", text, "docker");
        let all =
            "{\"features\": {\"containerd-snapshotter\": true}, \"storage-driver\": \"harbour\"}";
        for (text, grade, word) in [
            (None, "ok", "not set up"),
            (Some("{"), "bad", "EOF"),
            (
                Some("{\"storage-driver\": \"harbour\"}"),
                "bad",
                "no longer has all",
            ),
            (Some(all), "bad", "Docker 20.10 does not have"),
        ] {
            let findings = said(text)?;
            let as_expected = |(g, d): &(String, String)| g == grade && d.contains(word);
            ensure!(findings.iter().any(as_expected), "{text:?}: {findings:?}");
        }
        Ok(())
    });
    row("doctor, podman", When::Always, |_| {
        if !Path::new("/usr/bin/podman").exists() {
            return Err(NotHere("there is no podman here".into()).into());
        }
        let host = Host::new();
        let path = std::env::var_os("PATH").context("no PATH")?;
        let store = host.path("mount/store");
        let named = format!(
            "[storage.options]\nadditionalimagestores = [\"{}\"]\n",
            store.display()
        );
        let expect = |text: Option<&str>, grade: &str, word: &str| {
            let findings = doctor(&host, &path, "containers/storage.conf", text, "podman")?;
            let as_expected = |(g, d): &(String, String)| g == grade && d.contains(word);
            ensure!(findings.iter().any(as_expected), "{findings:?}");
            Ok(())
        };
        expect(None, "ok", "not set up")?;
        expect(Some(&named), "bad", "which is not there")?;
        expect(Some("[storage"), "bad", "line 1")?;
        fs::create_dir_all(&store)?;
        expect(Some(&named), "ok", "names the store")
    });
}

/// What doctor says of an engine on a host whose /etc has nothing but this file.
fn doctor(
    host: &Host,
    path: &OsString,
    file: &str,
    text: Option<&str>,
    engine: &str,
) -> Result<Vec<(String, String)>> {
    let given = host.path("given");
    let _ = fs::remove_file(&given);
    if let Some(text) = text {
        fs::write(&given, text)?;
    }
    let script = "mount -t tmpfs none /etc && if [ -e \"$1\" ]; then mkdir -p \"${2%/*}\"; cat \"$1\" > \"$2\"; fi; \
        shift 2; PATH=$WANTED; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    command.arg(&given).arg(Path::new("/etc").join(file));
    command.arg(cluster::binary());
    command.arg("--state-dir").arg(host.path("state"));
    command.arg("--run-dir").arg(host.path("run"));
    command.arg("--mount").arg(host.path("mount"));
    command.args(["doctor", "--json"]).env("WANTED", path);
    let output = shell::run(&mut command, LIMIT)?;
    let findings: Value =
        serde_json::from_slice(&output.stdout).with_context(|| output.stderr.clone())?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let findings = findings.as_array().into_iter().flatten();
    let ours = findings.filter(|finding| finding["check"] == engine);
    Ok(ours
        .map(|f| (text(&f["grade"]), text(&f["detail"])))
        .collect())
}
