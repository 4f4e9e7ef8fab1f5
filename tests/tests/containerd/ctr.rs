//! `ctr` of containerd 2, which leaves the work to the daemon's transfer service.

use anyhow::{Result, ensure};
use harbour_tests::engines::{Containerd, Image, Row, Suite};

use crate::{Cost, Scene, pods};

const NAMESPACE: &str = "default";

/// Pulls what the pool has, what only the registry has, and runs all.
pub(crate) fn life(row: &mut Row, suite: Suite) -> Result<()> {
    let scene = Scene::new(row, suite, "containerd")?;
    let containerd = pods::start(&scene, true)?;
    let images = &scene.site.images;
    let mut costs = Vec::new();
    for image in [&images.three, &images.tall] {
        let cost = pull(&scene, &containerd, image)?;
        cost.is_small(image)?;
        costs.push(cost);
        runs(&scene, &containerd, image)?;
    }
    // Comes into the pool first, and from there.
    pull(&scene, &containerd, &images.spare)?.is_small(&images.spare)?;
    runs(&scene, &containerd, &images.spare)?;
    drop(containerd);
    let plain = pods::start(&scene, false)?;
    for (image, cost) in [&images.three, &images.tall].into_iter().zip(costs) {
        let other = pull(&scene, &plain, image)?;
        cost.beside(other, &format!("ctr {} {}", suite.name(), image.tag()));
    }
    Ok(())
}

fn pull(scene: &Scene, containerd: &Containerd, image: &Image) -> Result<Cost> {
    let name = scene.site.reference(image);
    let snapshotter = containerd.snapshotter();
    let words = [
        "images",
        "pull",
        "--plain-http",
        "--snapshotter",
        snapshotter,
        &name,
    ];
    scene.cost(&containerd.root(), || {
        containerd.ctr(NAMESPACE, &words)?;
        Ok(())
    })
}

fn runs(scene: &Scene, containerd: &Containerd, image: &Image) -> Result<()> {
    let said = containerd.run(NAMESPACE, &scene.site.reference(image), image.tag())?;
    ensure!(said == image.says, "{said}");
    Ok(())
}
