//! Two engines of one host on one mount, each with a snapshotter of its own: a containerd collects
//! every snapshot behind its socket that it does not know.

use std::{
    os::unix::net::UnixStream,
    process::{Child, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    engines::{Row, Suite, containerd::CRI_NAMESPACE, docker::Store},
    shell,
};
use nix::sys::signal::Signal;

use crate::{SOCKET_LIMIT, Scene, docker, pods};

/// Ends with the row.
struct Second(Child);

impl Drop for Second {
    fn drop(&mut self) {
        shell::kill_group(&self.0, Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// What one removes, the other keeps.
pub(crate) fn beside(row: &mut Row, suite: Suite) -> Result<()> {
    let scene = Scene::new(row, suite, "containerd")?;
    let socket = scene.site.dir().join("second.sock");
    let _second = second(&scene, &socket)?;
    let containerd = pods::start(&scene, true)?;
    let engine = docker::start(&scene, "d", Store::Snapshotter(socket))?;
    let images = scene.site.images.clone();
    for image in [&images.three, &images.tall] {
        docker::pull(&scene, &engine, image)?.is_small(image)?;
        pods::pull(&scene, &containerd, image)?.is_small(image)?;
        docker::runs(&scene, &engine, image)?;
        pods::runs(&scene, &containerd, image)?;
    }
    let three = scene.site.reference(&images.three);
    for name in pods::names(&scene, &containerd, &three)? {
        containerd.ctr(CRI_NAMESPACE, &["images", "remove", "--sync", &name])?;
    }
    docker::runs(&scene, &engine, &images.three)?;
    // Gone from the catalogue too: what an engine has snapshots of stays.
    scene.cluster.harbour(["rm", &three])?;
    docker::runs(&scene, &engine, &images.three)?;
    let moved = scene.site.gate.bytes();
    let said = engine.docker(&["run", "--rm", &three, "/report"])?;
    ensure!(said == images.three.says, "{said}");
    ensure!(
        scene.site.gate.bytes() == moved,
        "bytes moved for what is there"
    );
    pods::runs(&scene, &containerd, &images.tall)
}

fn second(scene: &Scene, socket: &std::path::Path) -> Result<Second> {
    let log = std::fs::File::create(scene.cluster.dir().join("second.log"))?;
    let mut command = scene.cluster.command(["snapshotter", "--socket"]);
    command.arg(socket).arg("--state-dir");
    command.arg(scene.site.dir().join("second"));
    let mut child = Second({
        use std::os::unix::process::CommandExt as _;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?
    });
    let there = shell::until("the second snapshotter listens", SOCKET_LIMIT, || {
        ensure!(child.0.try_wait()?.is_none(), "it ended by itself");
        Ok(UnixStream::connect(socket).is_ok().then_some(()))
    });
    let log = scene.cluster.dir().join("second.log");
    there.with_context(|| std::fs::read_to_string(log).unwrap_or_default())?;
    Ok(child)
}
