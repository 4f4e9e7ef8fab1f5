//! Docker on the containerd image store with our snapshotter.

use anyhow::{Result, ensure};
use harbour_tests::engines::{Dockerd, Image, Row, Suite, docker, docker::Store};

use crate::{Cost, Scene};

/// The whole life of images and containers.
pub(crate) fn life(row: &mut Row, suite: Suite) -> Result<()> {
    let mut scene = Scene::new(row, suite, "docker.io")?;
    let mut docker = start(&scene, "d", Store::Snapshotter(scene.socket()))?;
    let images = scene.site.images.clone();
    let mut costs = Vec::new();
    for image in [&images.three, &images.tall] {
        let cost = pull(&scene, &docker, image)?;
        cost.is_small(image)?;
        costs.push(cost);
        runs(&scene, &docker, image)?;
    }
    // Comes into the pool first, and from there.
    pull(&scene, &docker, &images.spare)?.is_small(&images.spare)?;
    runs(&scene, &docker, &images.spare)?;
    commits(&scene, &docker)?;
    restarts(&mut scene, &mut docker)?;
    removes(&scene, &docker)?;
    drop(docker);
    let plain = start(&scene, "plain", Store::Containerd)?;
    for (image, cost) in [&images.three, &images.tall].into_iter().zip(costs) {
        let other = pull(&scene, &plain, image)?;
        cost.beside(other, &format!("docker {} {}", suite.name(), image.tag()));
    }
    Ok(())
}

pub(crate) fn start(scene: &Scene, dir: &str, store: Store) -> Result<Dockerd> {
    Dockerd::start(&docker::Settings {
        packages: &scene.packages,
        net: &scene.site.net,
        dir: &scene.site.dir().join(dir),
        registry: &scene.site.registry.host(),
        store,
    })
}

pub(crate) fn pull(scene: &Scene, docker: &Dockerd, image: &Image) -> Result<Cost> {
    scene.cost(&docker.root(), || {
        docker.docker(&["pull", "--quiet", &scene.site.reference(image)])?;
        Ok(())
    })
}

pub(crate) fn runs(scene: &Scene, docker: &Dockerd, image: &Image) -> Result<()> {
    let said = docker.run(&scene.site.reference(image))?;
    ensure!(said == image.says, "{said}");
    Ok(())
}

/// A container becomes an image of its own on top of ours.
fn commits(scene: &Scene, docker: &Dockerd) -> Result<()> {
    let three = &scene.site.images.three;
    let name = scene.site.reference(three);
    let write = [
        "run",
        "--name",
        "made",
        &name,
        "bash",
        "-c",
        "echo mine > /kept",
    ];
    docker.docker(&write)?;
    docker.docker(&["commit", "made", "mine:1"])?;
    docker.docker(&["rm", "made"])?;
    let said = docker.docker(&["run", "--rm", "mine:1", "/report"])?;
    let said = said.replace("kept: mine; link: below", "kept: below; link: below");
    ensure!(said == three.says, "after a commit: {said}");
    docker.docker(&["tag", &name, "named:1"])?;
    ensure!(docker.run("named:1")? == three.says, "under another name");
    Ok(())
}

/// Restarts of the engine, and of ours without a warning.
fn restarts(scene: &mut Scene, docker: &mut Dockerd) -> Result<()> {
    let three = scene.site.images.three.clone();
    let name = scene.site.reference(&three);
    let bytes = scene.site.gate.bytes();
    docker.docker(&[
        "run", "--detach", "--name", "long", &name, "sleep", "infinity",
    ])?;
    docker.restart()?;
    let said = docker.docker(&["exec", "long", "/report"])?;
    ensure!(said == three.says, "after a restart of dockerd: {said}");
    docker.docker(&["rm", "--force", "long"])?;
    runs(scene, docker, &three)?;
    scene.node_dies()?;
    for image in [&three, &scene.site.images.tall] {
        runs(scene, docker, image)?;
    }
    let moved = scene.site.gate.bytes() - bytes;
    ensure!(moved < crate::MOVED_MAX, "{moved} bytes moved by restarts");
    Ok(())
}

/// Removed and pruned images go, and the rest stays.
fn removes(scene: &Scene, docker: &Dockerd) -> Result<()> {
    let images = &scene.site.images;
    let name = scene.site.reference(&images.three);
    docker.docker(&["rmi", &name, "named:1", "mine:1"])?;
    docker.docker(&["image", "prune", "--force"])?;
    let listed = docker.docker(&["images", "--quiet", &name])?;
    ensure!(listed.is_empty(), "{name} is still there");
    runs(scene, docker, &images.tall)?;
    pull(scene, docker, &images.three)?.is_small(&images.three)?;
    runs(scene, docker, &images.three)
}
