//! containerd as Kubernetes drives it.

use std::time::Duration;

use anyhow::{Result, ensure};
use harbour_tests::{
    cluster::Part,
    engines::{
        Containerd, Image, Row, Suite,
        containerd::{self, CRI_NAMESPACE, SNAPSHOTTER},
    },
    shell,
};

use crate::{Cost, Scene};

/// Until an engine has connected again to a snapshotter that was away.
const RECONNECT_LIMIT: Duration = Duration::from_secs(15);

/// The whole life of images and containers.
pub(crate) fn life(row: &mut Row, suite: Suite) -> Result<()> {
    let mut scene = Scene::new(row, suite, "containerd")?;
    let mut containerd = start(&scene, true)?;
    let costs = pulls(&scene, &containerd)?;
    two_namespaces(&scene, &containerd)?;
    restarts(&mut scene, &mut containerd)?;
    gone(&scene, &containerd)?;
    away(&mut scene, &containerd)?;
    drop(containerd);
    let plain = start(&scene, false)?;
    let images = [&scene.site.images.three, &scene.site.images.tall];
    for (image, cost) in images.into_iter().zip(costs) {
        let other = pull(&scene, &plain, image)?;
        cost.beside(
            other,
            &format!("containerd {} {}", suite.name(), image.tag()),
        );
    }
    Ok(())
}

pub(crate) fn start(scene: &Scene, ours: bool) -> Result<Containerd> {
    let socket = scene.socket();
    let dir = scene.site.dir().join(if ours { "c" } else { "plain" });
    Containerd::start(&containerd::Settings {
        packages: &scene.packages,
        net: &scene.site.net,
        dir: &dir,
        registry: &scene.site.registry.host(),
        pause: &scene.site.reference(&scene.site.images.pause),
        snapshotter: ours.then_some(&socket),
    })
}

pub(crate) fn pull(scene: &Scene, containerd: &Containerd, image: &Image) -> Result<Cost> {
    let cri = containerd.cri()?;
    scene.cost(&containerd.root(), || {
        cri.pull(&scene.site.reference(image))?;
        Ok(())
    })
}

/// A container by `ctr` and one in a pod print the right line.
pub(crate) fn runs(scene: &Scene, containerd: &Containerd, image: &Image) -> Result<()> {
    let name = scene.site.reference(image);
    let said = containerd.run(CRI_NAMESPACE, &name, "ctr")?;
    ensure!(said == image.says, "{said}");
    let cri = containerd.cri()?;
    let pod = cri.start(&name, "pod", &[], &scene.site.dir().join("logs"))?;
    let said = pod.said()?;
    ensure!(said.ends_with(&image.says), "in a pod: {said}");
    Ok(())
}

fn pulls(scene: &Scene, containerd: &Containerd) -> Result<[Cost; 2]> {
    let images = &scene.site.images;
    let mut costs = Vec::new();
    for image in [&images.three, &images.tall] {
        let cost = pull(scene, containerd, image)?;
        cost.is_small(image)?;
        runs(scene, containerd, image)?;
        costs.push(cost);
    }
    let listed = containerd.cri()?.images()?;
    ensure!(listed.len() >= costs.len(), "{listed:?}");
    Ok([costs[0], costs[1]])
}

/// What one namespace removes stays for the other.
fn two_namespaces(scene: &Scene, containerd: &Containerd) -> Result<()> {
    let image = &scene.site.images.three;
    let name = scene.site.reference(image);
    let pull = [
        "images",
        "pull",
        "--plain-http",
        "--snapshotter",
        SNAPSHOTTER,
        &name,
    ];
    containerd.ctr("other", &pull)?;
    let said = containerd.run("other", &name, "other")?;
    ensure!(said == image.says, "in another namespace: {said}");
    containerd.ctr("other", &["images", "remove", "--sync", &name])?;
    ensure!(
        snapshots(containerd, "other")? == 0,
        "snapshots without an image"
    );
    runs(scene, containerd, image)
}

/// Restarts of the engine, and of ours without a warning. Who was running is running still.
fn restarts(scene: &mut Scene, containerd: &mut Containerd) -> Result<()> {
    let image = scene.site.images.three.clone();
    let name = scene.site.reference(&image);
    let bytes = scene.site.gate.bytes();
    let wait = ["/bin/sleep", "infinity"];
    let cri = containerd.cri()?;
    let pod = cri.start(&name, "long", &wait, &scene.site.dir().join("logs"))?;
    let report = || pod.exec(&["/report"]);
    ensure!(report()? == image.says);
    containerd.stop()?;
    containerd.resume()?;
    cri.wait()?;
    ensure!(report()? == image.says, "after a restart of containerd");
    drop(pod);
    runs(scene, containerd, &image)?;
    containerd.kill()?;
    scene.node_dies()?;
    containerd.resume()?;
    runs(scene, containerd, &image)?;
    scene.node_dies()?;
    reconnected(containerd)?;
    runs(scene, containerd, &image)?;
    runs(scene, containerd, &scene.site.images.tall)?;
    let moved = scene.site.gate.bytes() - bytes;
    ensure!(moved < crate::MOVED_MAX, "{moved} bytes moved by restarts");
    Ok(())
}

/// An engine that found nobody at the socket tries again a little later, by itself.
fn reconnected(containerd: &Containerd) -> Result<()> {
    let list = ["snapshots", "--snapshotter", SNAPSHOTTER, "list"];
    shell::until("containerd tries again", RECONNECT_LIMIT, || {
        let listed = containerd.try_ctr(CRI_NAMESPACE, &list)?;
        Ok(listed.status.success().then_some(()))
    })
}

/// Removed images take their snapshots along, but what another image stands on.
fn gone(scene: &Scene, containerd: &Containerd) -> Result<()> {
    let images = &scene.site.images;
    let before = snapshots(containerd, CRI_NAMESPACE)?;
    let three = scene.site.reference(&images.three);
    for name in names(scene, containerd, &three)? {
        containerd.ctr(CRI_NAMESPACE, &["images", "remove", "--sync", &name])?;
    }
    let after = snapshots(containerd, CRI_NAMESPACE)?;
    ensure!(
        after + 2 == before,
        "{before} snapshots with both images, {after} without the one of three"
    );
    runs(scene, containerd, &images.tall)
}

/// Every name of one image; the runtime interface gives it three.
pub(crate) fn names(scene: &Scene, containerd: &Containerd, name: &str) -> Result<Vec<String>> {
    let cri = containerd.cri()?;
    let image = cri.image(name)?;
    let image =
        image.ok_or_else(|| anyhow::anyhow!("{name} is not there: {}", scene.cluster.logs()))?;
    Ok([image.repo_tags, image.repo_digests, vec![image.id]].concat())
}

fn snapshots(containerd: &Containerd, namespace: &str) -> Result<usize> {
    let list = ["snapshots", "--snapshotter", SNAPSHOTTER, "list"];
    Ok(containerd.ctr(namespace, &list)?.lines().skip(1).count())
}

/// What the pool lacks comes into it; with nobody who could bring it, containerd fetches as ever.
fn away(scene: &mut Scene, containerd: &Containerd) -> Result<()> {
    scene.cluster.kill(Part::Metad)?;
    let spare = scene.site.images.spare.clone();
    let cost = pull(scene, containerd, &spare)?;
    cost.is_plain(&spare)?;
    runs(scene, containerd, &spare)?;
    scene.cluster.start_part(Part::Metad, None)?;
    scene.cluster.wait_ready()
}
