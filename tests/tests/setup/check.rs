//! `harbour setup check` against engines that were set up: a real pull through our snapshotter.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    cluster::Cluster,
    engines::{Containerd, Packages, Site, containerd, row},
    shell,
};

use super::{LIMIT, engines::suites};

fn setup(cluster: &Cluster, packages: &Packages, words: &[&str]) -> Result<shell::Output> {
    let mut command: Command = cluster.command([&["setup"], words].concat());
    shell::run(command.env("PATH", packages.path()), LIMIT * 2)
}

#[test]
fn a_real_pull_is_seen() {
    for (suite, when) in suites() {
        let name = format!("setup check containerd, {}", suite.name());
        row(&name, when, |row| {
            let packages = suite.packages()?;
            row.version(packages.version("containerd"));
            let cluster = Cluster::start("128MiB")?;
            let site = Site::start()?;
            let image = site.reference(&site.images.three);
            cluster.pull(&image)?;
            let mut engine = Containerd::start(&containerd::Settings {
                packages: &packages,
                net: &site.net,
                dir: &site.dir().join("c"),
                registry: &site.registry.host(),
                pause: &site.reference(&site.images.pause),
                snapshotter: None,
            })?;
            let (file, socket) = (site.dir().join("c/containerd.toml"), engine.socket());
            let (file, socket) = (file.display().to_string(), socket.display().to_string());
            let check = ["check", "containerd", "--address", &socket];
            let not_yet = setup(&cluster, &packages, &check)?;
            ensure!(not_yet.status.code() == Some(1), "{}", not_yet.stderr);
            ensure!(
                not_yet.stderr.contains("has not loaded the plugin"),
                "{}",
                not_yet.stderr
            );
            setup(
                &cluster,
                &packages,
                &["containerd", "--yes", "--config-file", &file],
            )?
            .ok()?;
            engine.stop()?;
            engine.resume()?;
            let said = setup(&cluster, &packages, &check)?.ok()?.text();
            ensure!(
                said.contains(&format!("ctr pulled {image} with it")),
                "{said}"
            );
            // Nothing of it is left.
            for namespace in ["harbour-check", "k8s.io"] {
                let images = engine.ctr(namespace, &["images", "ls", "-q"])?;
                ensure!(!images.contains(&image), "{namespace}: {images}");
            }
            let json = setup(&cluster, &packages, &[&check[..], &["--json"]].concat())?.ok()?;
            let report: serde_json::Value = serde_json::from_slice(&json.stdout)?;
            ensure!(report["image"] == image.as_str(), "{report}");
            setup(&cluster, &packages, &["containerd", "--undo", "--yes"])?
                .ok()
                .context("undoing")?;
            Ok(())
        });
    }
}
