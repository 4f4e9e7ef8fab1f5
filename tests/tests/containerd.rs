//! containerd and Docker as they are: the test images are right, and so is what drives engines.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use anyhow::Result;
use harbour_tests::engines::{Containerd, Dockerd, Site, Suite, When, containerd, docker, row};

fn containerd(site: &Site, suite: Suite) -> Result<Containerd> {
    Containerd::start(&containerd::Settings {
        packages: &suite.packages()?,
        net: &site.net,
        dir: &site.dir().join(suite.name()),
        registry: &site.registry.host(),
        pause: &site.reference(&site.images.pause),
        snapshotter: None,
    })
}

fn docker(site: &Site, suite: Suite, store: docker::Store) -> Result<Dockerd> {
    Dockerd::start(&docker::Settings {
        packages: &suite.packages()?,
        net: &site.net,
        dir: &site.dir().join(suite.name()),
        registry: &site.registry.host(),
        store,
    })
}

#[test]
fn containerd_pulls_and_runs() {
    row("containerd 1.6, plain pull", When::Always, |row| {
        row.version(Suite::Bookworm.packages()?.version("containerd"));
        let site = Site::start()?;
        let containerd = containerd(&site, Suite::Bookworm)?;
        let cri = containerd.cri()?;
        for image in [&site.images.three, &site.images.tall] {
            let name = site.reference(image);
            let bytes = site.gate.bytes();
            cri.pull(&name)?;
            assert!(site.gate.bytes() > bytes, "nothing came");
            assert_eq!(containerd.run("k8s.io", &name, image.tag())?, image.says);
            let pod = cri.start(&name, image.tag(), &[], &site.dir().join("logs"))?;
            assert_eq!(pod.said()?, image.says);
        }
        Ok(())
    });
}

#[test]
fn docker_pulls_and_runs() {
    row("docker 26.1, plain pull", When::Always, |row| {
        row.version(Suite::Trixie.packages()?.version("docker.io"));
        let site = Site::start()?;
        let mut docker = docker(&site, Suite::Trixie, docker::Store::Overlay2)?;
        let image = &site.images.three;
        let name = site.reference(image);
        docker.docker(&["pull", &name])?;
        assert_eq!(docker.run(&name)?, image.says);
        let pause = site.reference(&site.images.pause);
        let words = ["run", "--detach", "--name", "pause", &pause];
        docker.docker(&words)?;
        docker.restart()?;
        assert_eq!(
            docker.docker(&["exec", "pause", "bash", "-c", "echo on"])?,
            "on"
        );
        Ok(())
    });
}
