//! Images of the pool in a Docker's own store, the overlay2 data-root, with real daemons of three ages.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "docker/scene.rs"]
mod scene;

use std::{fs, path::Path, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use harbour_tests::{
    cluster::{Cluster, Part},
    engines::{Dockerd, Row, Suite, When, docker::Store, row},
    layers::{Entry, Layout, digest, tar},
    shell,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use scene::{HARBOUR_LIMIT, Scene};
use serde_json::Value;

/// Until something that was begun is seen.
const SEEN_LIMIT: Duration = Duration::from_secs(30);
/// The whole life of an image in a Docker.
fn life(suite: Suite, row: &mut Row) -> Result<()> {
    let mut scene = Scene::start(suite, row)?;
    let images = scene.site.images.clone();
    let [three, tall, pause] =
        [&images.three, &images.tall, &images.pause].map(|image| scene.site.reference(image));
    for image in [&three, &tall, &pause] {
        scene.cluster.pull(image)?;
    }
    scene.docker.stop()?;
    let before = scene.store()?;
    scene.docker.resume()?;

    // While a daemon runs nothing is written that it could overlook, and it is said how to go on.
    let said = scene.harbour(&["attach", &three, "--tar-split"])?;
    ensure!(
        said.contains("is pending") && said.contains("apply --restart"),
        "{said}"
    );
    ensure!(scene.state(&three)?.as_deref() == Some("pending"));
    scene.docker.stop()?;
    let said = scene.harbour(&["apply"])?;
    ensure!(said.contains(&format!("{three} is attached")), "{said}");
    scene.harbour(&["attach", &tall])?;
    let full = scene.store()?;
    for image in [&three, &tall] {
        let said = scene.harbour(&["attach", image])?;
        ensure!(said.contains("attached already"), "{said}");
    }
    ensure!(scene.harbour(&["apply"])? == "nothing was to be done");
    ensure!(scene.store()? == full, "attaching again changed something");
    scene.docker.resume()?;
    ensure!(scene.docker.run(&three)? == images.three.says);
    ensure!(scene.docker.run(&tall)? == images.tall.says);

    restarts(&mut scene, &three, &pause)?;
    children(&scene, &three, &images.three.says)?;
    saved(&scene, &three, &images.three.diff_ids)?;
    pushed(&mut scene)?;
    removed_in_docker(&mut scene, &pause)?;

    // An image that a container has stays; then all goes, and the store is as it was.
    let refused = scene.try_harbour(&["detach", &three])?;
    ensure!(!refused.status.success(), "{}", refused.text());
    ensure!(
        refused.stderr.contains("does not remove"),
        "{}",
        refused.stderr
    );
    ensure!(scene.docker.run(&three)? == images.three.says);
    let size = scene.size(&three)?;
    scene.docker.docker(&["rm", "--force", "web"])?;
    scene.harbour(&["detach", &three])?;
    ensure!(scene.state(&three)?.is_none());
    ensure!(
        !scene
            .docker
            .try_docker(&["run", "--pull", "never", &three])?
            .status
            .success()
    );
    scene.docker.stop()?;
    scene.harbour(&["detach", "--all"])?;
    ensure!(scene.harbour(&["list"])?.lines().count() == 1);
    let after = scene.store()?;
    ensure!(
        after == before,
        "left: {:?}",
        after.keys().collect::<Vec<_>>()
    );
    scene.docker.resume()?;
    ensure!(scene.docker.docker(&["images", "--quiet"])?.is_empty());
    // As large as when Docker unpacks it itself.
    scene.docker.docker(&["pull", &three])?;
    let own = scene.size(&three)?;
    ensure!(own == size, "{size} bytes are {own} of Docker's own");
    Ok(())
}

/// The daemon is started again around what is new, while a container runs.
fn restarts(scene: &mut Scene, three: &str, pause: &str) -> Result<()> {
    let script = "n=0; while :; do n=$((n + 1)); echo $n > /tmp/n; sleep 0.02; done";
    let words = [
        "run",
        "--detach",
        "--name",
        "web",
        three,
        "/bin/bash",
        "-c",
        script,
    ];
    scene.docker.docker(&words)?;
    let started = ["inspect", "--format", "{{.State.StartedAt}}", "web"];
    // The file is empty for a moment whenever it is written.
    let count = |docker: &Dockerd| -> Option<u64> {
        let text = docker.docker(&["exec", "web", "/bin/cat", "/tmp/n"]);
        text.ok()?.parse().ok()
    };
    let since = scene.docker.docker(&started)?;
    let before = shell::until("the container counts", SEEN_LIMIT, || {
        Ok(count(&scene.docker))
    })?;

    let pid = scene.docker.pid().context("no daemon")?;
    let wanted = scene.site.dir().join("start");
    let (stop, start) = (format!("kill {pid}"), format!("touch {}", wanted.display()));
    let words = [
        "attach",
        pause,
        "--restart",
        "--stop-command",
        &stop,
        "--start-command",
        &start,
    ];
    let mut command = scene.command(&words);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn()?;
    shell::until("the daemon is to be started", SEEN_LIMIT, || {
        Ok(wanted.exists().then_some(()))
    })?;
    // It has ended: this takes notice.
    scene.docker.stop()?;
    scene.docker.resume()?;
    let ended = shell::wait(&mut child, std::time::Instant::now() + HARBOUR_LIMIT)?;
    ensure!(ended.is_some_and(|status| status.success()), "{ended:?}");
    ensure!(scene.state(pause)?.as_deref() == Some("attached"));
    ensure!(
        scene
            .docker
            .docker(&["images", "--quiet", pause])?
            .lines()
            .count()
            == 1
    );
    ensure!(
        scene.docker.docker(&started)? == since,
        "the container was started anew"
    );
    shell::until("the container counts on", SEEN_LIMIT, || {
        Ok(count(&scene.docker).filter(|now| *now > before).map(drop))
    })
}

/// Images on top of ours: built, committed, tagged, pushed, pulled, removed.
fn children(scene: &Scene, three: &str, says: &str) -> Result<()> {
    let (docker, host) = (&scene.docker, scene.site.registry.host());
    let context = scene.site.dir().join("context");
    fs::create_dir(&context)?;
    let steps = format!(
        "FROM {three}\nCOPY file /file\nRUN [\"/bin/bash\", \"-c\", \"echo $(cat /file) > /built\"]\n"
    );
    fs::write(context.join("Dockerfile"), steps)?;
    fs::write(context.join("file"), "by docker\n")?;
    let child = format!("{host}/harbour/child:1");
    docker.docker(&["build", "--tag", &child, &context.display().to_string()])?;
    let cat = [
        "run", "--rm", "--pull", "never", &child, "/bin/cat", "/built",
    ];
    ensure!(docker.docker(&cat)? == "by docker");
    ensure!(docker.run(&child)? == says);
    docker.docker(&["commit", "web", "committed:1"])?;
    let cat = ["run", "--rm", "committed:1", "/bin/cat", "/replaced"];
    ensure!(docker.docker(&cat)? == "above");
    docker.docker(&["tag", three, "other:1"])?;
    ensure!(docker.run("other:1")? == says);
    docker.docker(&["rmi", "committed:1", "other:1"])?;
    ensure!(docker.run(three)? == says);

    // The registry has the lower layers, and Docker knows that.
    docker.docker(&["push", &child])?;
    docker.docker(&["rmi", &child])?;
    docker.docker(&["image", "prune", "--force"])?;
    let bytes = scene.site.gate.bytes();
    let said = docker.docker(&["pull", &child])?;
    ensure!(said.matches("Already exists").count() == 3, "{said}");
    let bytes = scene.site.gate.bytes() - bytes;
    ensure!(bytes < 100_000, "{bytes} bytes were pulled");
    ensure!(docker.run(&child)? == says);
    docker.docker(&["rmi", &child])?;
    Ok(())
}

/// What `docker save` writes is, layer by layer, what was pulled.
fn saved(scene: &Scene, image: &str, diff_ids: &[String]) -> Result<()> {
    let dir = scene.site.dir().join("saved");
    fs::create_dir(&dir)?;
    let file = scene.site.dir().join("saved.tar").display().to_string();
    scene.docker.docker(&["save", "--output", &file, image])?;
    let to = dir.display().to_string();
    shell::check("tar", ["-xf", &file, "-C", &to], SEEN_LIMIT)?;
    let manifest: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
    let layers = manifest[0]["Layers"].as_array().context("no layers")?;
    let mut found = Vec::new();
    for layer in layers {
        let path = dir.join(layer.as_str().context("no path")?);
        found.push(digest(&fs::read(path)?));
    }
    ensure!(found == diff_ids, "{found:?} are not {diff_ids:?}");
    Ok(())
}

/// An image that no registry has is pushed to one, layer by layer as it was. Its first layer has a path
/// twice, of which only the last content is in the mount.
fn pushed(scene: &mut Scene) -> Result<()> {
    let mut layout = Layout::create(&scene.cluster.dir().join("layout"))?;
    let long = "n".repeat(150);
    let layers = [
        vec![
            Entry::dir("d"),
            Entry::file("d/twice", "the first content"),
            Entry::file("d/twice", "and the second"),
            Entry::file(b"d/\xff\xfe".to_vec(), "no text"),
            Entry::file(format!("d/{long}"), "a long name"),
            Entry::symlink("d/link", "twice"),
            Entry::file("d/empty", ""),
        ],
        vec![Entry::file(".wh.d", ""), Entry::file("e", vec![7; 700_000])],
    ];
    layout.image("i", &layers)?;
    let image = layout.reference("i");
    scene.cluster.pull(&image)?;
    scene.docker.stop()?;
    scene.harbour(&["attach", &image, "--tar-split"])?;
    scene.docker.resume()?;
    let to = format!("{}/harbour/pushed:1", scene.site.registry.host());
    scene.docker.docker(&["tag", "localhost/layout:i", &to])?;
    scene.docker.docker(&["push", &to])?;
    scene.docker.docker(&["rmi", &to])?;
    let dir = scene.site.dir().join("pushed").display().to_string();
    let from = format!("docker://{to}");
    let copy = [
        "copy",
        "-q",
        "--src-tls-verify=false",
        &from,
        &format!("dir:{dir}"),
    ];
    shell::check("skopeo", copy, SEEN_LIMIT)?;
    let manifest: Value =
        serde_json::from_slice(&fs::read(Path::new(&dir).join("manifest.json"))?)?;
    for (blob, layer) in manifest["layers"]
        .as_array()
        .context("no layers")?
        .iter()
        .zip(&layers)
    {
        let name = blob["digest"].as_str().context("no digest")?;
        let file = Path::new(&dir).join(name.trim_start_matches("sha256:"));
        let file = file.display().to_string();
        let stream = shell::check("gzip", ["-dc", &file], SEEN_LIMIT)?.stdout;
        ensure!(stream == tar(layer), "a layer was pushed that is another");
    }
    Ok(())
}

/// What somebody removes by Docker's own means stays away.
fn removed_in_docker(scene: &mut Scene, image: &str) -> Result<()> {
    scene.docker.docker(&["rmi", image])?;
    scene.docker.stop()?;
    scene.harbour(&["apply"])?;
    ensure!(scene.state(image)?.as_deref() == Some("removed"));
    scene.docker.resume()?;
    ensure!(
        scene
            .docker
            .docker(&["images", "--quiet", image])?
            .is_empty()
    );
    Ok(())
}

#[test]
fn docker_20_has_images_of_the_pool_in_its_data_root() {
    row("Docker 20.10, data-root", When::Always, |row| {
        life(Suite::Bookworm, row)
    });
}

#[test]
fn docker_26_has_images_of_the_pool_in_its_data_root() {
    row("Docker 26.1, data-root", When::Matrix, |row| {
        life(Suite::Trixie, row)
    });
}

#[test]
fn docker_28_has_images_of_the_pool_in_its_data_root() {
    row("Docker 28, data-root", When::Matrix, |row| {
        life(Suite::Sid, row)
    });
}

#[test]
fn docker_28_with_its_images_in_containerd_is_refused() {
    row(
        "Docker 28, containerd store, no data-root",
        When::Matrix,
        |row| {
            let scene = Scene::start_with(Suite::Sid, Store::Containerd, row)?;
            let image = scene.site.reference(&scene.site.images.three);
            scene.cluster.pull(&image)?;
            let output = scene.try_harbour(&["attach", &image])?;
            ensure!(
                output.stderr.contains("harbour snapshotter"),
                "{}",
                output.stderr
            );
            // So it is where its configuration is not to be seen.
            let root = scene.docker.data_root().display().to_string();
            let host = format!("unix://{}", scene.docker.socket().display());
            let words = [
                "docker",
                "attach",
                &image,
                "--data-root",
                &root,
                "--docker-host",
                &host,
            ];
            let output = scene.cluster.run(words)?;
            ensure!(
                output.stderr.contains("containerd's store"),
                "{}",
                output.stderr
            );
            Ok(())
        },
    );
}

/// A data-root follows the catalogue, daemon or no daemon.
fn follows(row: &mut Row) -> Result<()> {
    let mut scene = Scene::start(Suite::Bookworm, row)?;
    let images = scene.site.images.clone();
    let [three, pause] = [&images.three, &images.pause].map(|image| scene.site.reference(image));
    scene.docker.stop()?;
    let mut command = scene.command(&["attach", "--watch", "*/harbour/*"]);
    let log = fs::File::create(scene.site.dir().join("watch.log"))?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut watch = command.spawn()?;
    let outcome = (|| {
        let becomes = |scene: &Scene, image: &str, state: Option<&str>| {
            shell::until("the data-root follows", SEEN_LIMIT, || {
                Ok((scene.state(image)?.as_deref() == state).then_some(()))
            })
        };
        scene.cluster.pull(&three)?;
        // What does not match is not attached.
        let mut layout = Layout::create(&scene.cluster.dir().join("layout"))?;
        layout.image("i", &[vec![Entry::file("f", "f")]])?;
        let other = scene.cluster.pull(&layout.reference("i"))?;
        becomes(&scene, &three, Some("attached"))?;
        scene.docker.resume()?;
        ensure!(scene.docker.run(&three)? == images.three.says);
        let other = format!("{}/{}:{}", other.registry, other.repository, other.tag);
        ensure!(scene.state(&other)?.is_none());
        // While the daemon runs, images that come wait, and images that go are removed by it.
        scene.cluster.pull(&pause)?;
        becomes(&scene, &pause, Some("pending"))?;
        scene.cluster.harbour(["rm", &three])?;
        becomes(&scene, &three, None)?;
        ensure!(scene.docker.docker(&["images", "--quiet"])?.is_empty());
        scene.docker.stop()?;
        becomes(&scene, &pause, Some("attached"))?;
        scene.docker.resume()?;
        ensure!(
            scene
                .docker
                .docker(&["images", "--quiet", &pause])?
                .lines()
                .count()
                == 1
        );
        Ok(())
    })();
    kill(Pid::from_raw(i32::try_from(watch.id())?), Signal::SIGTERM)?;
    let ended = shell::wait(&mut watch, std::time::Instant::now() + SEEN_LIMIT)?;
    let log = fs::read_to_string(scene.site.dir().join("watch.log"))?;
    outcome.context(log)?;
    ensure!(ended.is_some_and(|status| status.success()), "{ended:?}");
    Ok(())
}

#[test]
fn a_data_root_follows_the_catalogue() {
    row("Docker 20.10, data-root, watch", When::Always, follows);
}

#[test]
fn what_cannot_be_attached_is_refused() {
    let mut cluster = Cluster::configured("64MiB", "[node]\nfast_view = \"off\"\n").unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    layout.image("i", &[vec![Entry::file("f", "f")]]).unwrap();
    let image = layout.reference("i");
    cluster.pull(&image).unwrap();
    let root = cluster.dir().join("root");
    let at = root.display().to_string();
    let attach = |cluster: &Cluster, image: &str| {
        let words = ["docker", "attach", image, "--data-root", &at];
        let output = cluster.run(words).unwrap();
        (output.status.code(), output.stderr)
    };
    let (code, said) = attach(&cluster, &image);
    assert!(code == Some(3) && said.contains("no data-root"), "{said}");
    fs::create_dir_all(root.join("image/vfs")).unwrap();
    let (code, said) = attach(&cluster, &image);
    assert!(
        code == Some(1) && said.contains("storage driver vfs"),
        "{said}"
    );
    fs::remove_dir_all(root.join("image")).unwrap();
    let (code, said) = attach(&cluster, "no/such:image");
    assert!(code == Some(3) && said.contains("harbour pull"), "{said}");
    let (code, said) = attach(&cluster, &image);
    assert_eq!(code, Some(0), "{said}");
    let words = ["docker", "detach", "other:1", "--data-root", &at];
    let output = cluster.run(words).unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", output.stderr);
    cluster.kill(Part::Node).unwrap();
    let (code, said) = attach(&cluster, &image);
    assert!(
        code == Some(4) && said.contains("nothing is mounted"),
        "{said}"
    );
}
