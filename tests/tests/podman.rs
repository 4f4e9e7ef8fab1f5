//! Podman on the mount: images from the image store, layers from the layer store, and the whole life
//! of an image that was built on one of ours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    cluster::{Cluster, Part, Pulled},
    engines::{
        Image, Images, NotHere, Row, When, disk_bytes,
        podman::{Podman, Which},
        row,
    },
    layers::Layout,
    registry::Registry,
    shell,
};

/// Until the mount shows what changed in the catalogue.
const LIMIT: Duration = Duration::from_secs(10);
/// What Podman may write to its disk for an image of ours and a container of it, in bytes.
const DISK_MAX: u64 = 1 << 20;
/// What it may write for each layer that it takes from the layer store: names and empty directories.
const LAYER_DISK_MAX: u64 = 48 << 10;

/// A cluster that has the test images.
struct Scene {
    cluster: Cluster,
    images: Images,
    layout: Layout,
    three: Pulled,
    tall: Pulled,
}

impl Scene {
    fn new() -> Result<Self> {
        let cluster = Cluster::configured("128MiB", "[node]\nfast_view = \"off\"\n")?;
        let mut layout = Layout::create(&cluster.dir().join("layout"))?;
        let images = Images::write(&mut layout)?;
        let three = cluster.pull(&layout.reference(images.three.tag()))?;
        let tall = cluster.pull(&layout.reference(images.tall.tag()))?;
        Ok(Self {
            cluster,
            images,
            layout,
            three,
            tall,
        })
    }

    fn podman(&self, which: Which) -> Result<Podman> {
        Podman::new(which, &self.cluster.mount())
    }
}

fn name(image: &Pulled) -> String {
    format!("{}/{}:{}", image.registry, image.repository, image.tag)
}

/// A container of each image prints what it should, and nothing of it is on Podman's disk.
fn run_both(podman: &Podman, scene: &Scene) -> Result<()> {
    for (pulled, image) in [
        (&scene.three, &scene.images.three),
        (&scene.tall, &scene.images.tall),
    ] {
        let said = podman.says(&["run", "--rm", "--pull", "never", &name(pulled)])?;
        ensure!(
            said == image.says,
            "{}: {said:?}, not {:?}",
            name(pulled),
            image.says
        );
    }
    let disk = disk_bytes(&podman.graph())?;
    ensure!(disk < DISK_MAX, "{disk} bytes on Podman's disk");
    Ok(())
}

/// The machine's Podman, whichever it is.
fn here(row: &mut Row, scene: &Scene) -> Result<Podman> {
    if shell::check("podman", ["--version"], LIMIT).is_err() {
        return Err(NotHere("podman is not installed".into()).into());
    }
    let podman = scene.podman(Which::Here)?;
    row.version(&podman.version()?);
    Ok(podman)
}

#[test]
fn podman_runs_images_of_the_store() {
    row("Podman, image store", When::Always, |row| {
        let scene = Scene::new()?;
        let podman = here(row, &scene)?;
        run_both(&podman, &scene)?;
        let listed = podman.images()?;
        let expected = [&scene.tall, &scene.three].map(|image| format!("{} true", name(image)));
        ensure!(listed == expected, "{listed:?}");
        podman_follows_the_catalogue(&podman, &scene)
    });
}

/// What is pulled appears and what is removed is gone, for Podman too.
fn podman_follows_the_catalogue(podman: &Podman, scene: &Scene) -> Result<()> {
    let pulled = scene
        .cluster
        .pull(&scene.layout.reference(scene.images.pause.tag()))?;
    let shown = |wanted: bool| {
        let line = format!("{} true", name(&pulled));
        shell::until("Podman sees the change", LIMIT, || {
            Ok((podman.images()?.contains(&line) == wanted).then_some(()))
        })
    };
    // A pull that is done is visible here.
    ensure!(
        podman
            .images()?
            .contains(&format!("{} true", name(&pulled)))
    );
    podman.ok(&["run", "--rm", &name(&pulled), "/bin/bash", "-c", ":"])?;
    scene.cluster.harbour(["rm", &name(&pulled)])?;
    shown(false)?;
    scene
        .cluster
        .pull(&scene.layout.reference(scene.images.pause.tag()))?;
    shown(true)
}

#[test]
fn crun_runs_images_of_the_store() {
    row("Podman with crun, image store", When::Always, |row| {
        if shell::check("crun", ["--version"], LIMIT).is_err() {
            return Err(NotHere("crun is not installed".into()).into());
        }
        let scene = Scene::new()?;
        let podman = here(row, &scene)?.with_runtime("crun");
        run_both(&podman, &scene)
    });
}

#[test]
fn images_are_built_tagged_and_removed_on_images_of_the_store() {
    row("Podman, life of an image", When::Always, |row| {
        let mut scene = Scene::new()?;
        let podman = here(row, &scene)?;
        for base in [&scene.three, &scene.tall] {
            whole_life(&podman, &name(base)).with_context(|| name(base))?;
        }
        // What was built stays right when everything of ours was gone in between.
        let base = name(&scene.three);
        build(&podman, &base, "kept")?;
        restart(&mut scene.cluster)?;
        ensure!(podman.says(&["run", "--rm", "kept", "/bin/cat", "/built"])? == "built");
        run_both(&podman, &scene).map(drop).or_else(|error| {
            // The image that was built is on its disk, and nothing else.
            let text = format!("{error:#}");
            if text.contains("bytes on Podman's disk") {
                Ok(())
            } else {
                Err(error)
            }
        })
    });
}

fn restart(cluster: &mut Cluster) -> Result<()> {
    cluster.stop()?;
    for part in Part::ALL {
        cluster.start_part(part, None)?;
    }
    cluster.wait_ready()
}

fn build(podman: &Podman, base: &str, tag: &str) -> Result<()> {
    let dir = podman.dir().join("context");
    fs::create_dir_all(&dir)?;
    let steps = format!(
        "FROM {base}\nRUN [\"/bin/bash\", \"-c\", \"echo built > /built; cd /dir; echo x > more\"]\n"
    );
    fs::write(dir.join("Containerfile"), steps)?;
    let dir = dir.display().to_string();
    podman.ok(&[
        "build",
        "--isolation",
        "chroot",
        "--pull=never",
        "-q",
        "-t",
        tag,
        &dir,
    ])?;
    Ok(())
}

fn whole_life(podman: &Podman, base: &str) -> Result<()> {
    let before = podman.images()?;
    let id = podman.says(&["image", "inspect", "--format", "{{.Id}}", base])?;
    build(podman, base, "derived")?;
    let shown = [
        "run",
        "--rm",
        "derived",
        "/bin/bash",
        "-c",
        "cat /built; cd /dir; echo *",
    ];
    ensure!(
        podman.says(&shown)? == "built\nmore new",
        "{}",
        podman.says(&shown)?
    );
    // A container's changes become an image.
    let words = [
        "run",
        "--name",
        "c",
        base,
        "/bin/bash",
        "-c",
        "echo c > /committed; rm() { :; }",
    ];
    podman.ok(&words)?;
    podman.ok(&["commit", "-q", "c", "committed"])?;
    podman.ok(&["rm", "c"])?;
    ensure!(podman.says(&["run", "--rm", "committed", "/bin/cat", "/committed"])? == "c");
    // Another name for an image of ours is Podman's own matter.
    podman.ok(&["tag", base, "localhost/alias"])?;
    ensure!(podman.says(&["image", "inspect", "--format", "{{.Id}}", "alias"])? == id);
    podman.ok(&["rmi", "alias"])?;
    // An image of ours cannot be taken away from here, and what others have of it stays.
    podman.run(&["rmi", base])?;
    podman.ok(&["rmi", "committed", "derived"])?;
    podman.ok(&["image", "prune", "--all", "--force"])?;
    ensure!(podman.images()? == before, "{:?}", podman.images()?);
    Ok(())
}

#[test]
fn rootless_podman_runs_images_of_the_store() {
    row("Podman, rootless, image store", When::Always, |row| {
        let scene = Scene::new()?;
        here(row, &scene)?;
        let podman = scene.podman(Which::Here)?.rootless()?;
        run_both(&podman, &scene)?;
        let listed = podman.images()?;
        ensure!(listed.len() == 2, "{listed:?}");
        // A container's root is at home in what is root's, and no one else outside.
        let words = [
            "/bin/bash",
            "-c",
            "echo x > /etc/made; echo $UID $(cat /etc/made)",
        ];
        let run = ["run", "--rm", "--pull", "never", &name(&scene.three)];
        ensure!(podman.says(&[&run[..], &words].concat())? == "0 x");
        Ok(())
    });
}

#[test]
fn podman_takes_layers_from_the_layer_store() {
    row("Podman 4.3, layer store", When::Always, |row| {
        let scene = Scene::new()?;
        let podman = here(row, &scene)?;
        if !podman.version()?.starts_with("4.3") {
            let why = "the layer store is for versions that ask by the digest of a blob";
            return Err(NotHere(why.into()).into());
        }
        podman.stores(None, Some(&scene.cluster.mount().join("layerstore")))?;
        let registry = Registry::start()?;
        scene.images.push(&scene.layout, &registry.host())?;
        for image in [&scene.images.three, &scene.images.tall] {
            take_layers(&podman, &scene, &registry, image)?;
        }
        Ok(())
    });
}

fn take_layers(podman: &Podman, scene: &Scene, registry: &Registry, image: &Image) -> Result<()> {
    let reference = format!("{}/{}", registry.host(), image.name());
    scene.cluster.pull(&reference)?;
    podman.ok(&["pull", "-q", "--tls-verify=false", &reference])?;
    let disk = disk_bytes(&podman.graph())?;
    let most = DISK_MAX + image.diff_ids.len() as u64 * LAYER_DISK_MAX;
    ensure!(
        disk < most,
        "{disk} bytes on Podman's disk, {most} would be many"
    );
    let said = podman.says(&["run", "--rm", &reference])?;
    ensure!(said == image.says, "{reference}: {said:?}");
    podman.ok(&["rmi", &reference])?;
    Ok(())
}

#[test]
fn podman_5_4_runs_images_of_the_store() {
    other_suite("Podman 5.4, image store", "trixie");
}

#[test]
fn podman_5_8_runs_images_of_the_store() {
    other_suite("Podman 5.8, image store", "sid");
}

fn other_suite(title: &str, suite: &str) {
    row(title, When::Matrix, |row| {
        let which = Which::of_suite(suite)?;
        let scene = Scene::new()?;
        for runtime in ["runc", "crun"] {
            let podman = scene.podman(which.clone())?.with_runtime(runtime);
            row.version(&podman.version()?);
            run_both(&podman, &scene).context(runtime)?;
            if runtime == "runc" {
                whole_life(&podman, &name(&scene.three))?;
                podman_follows_the_catalogue(&podman, &scene)?;
            }
        }
        Ok(())
    });
}
