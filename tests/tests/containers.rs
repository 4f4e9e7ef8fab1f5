//! Containers without an engine: `harbour run`, `bundle`, `mount` and `umount` with a real runtime.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Result, ensure};
use harbour_tests::{
    cluster::Cluster,
    engines::{Images, NotHere, Row, When, row},
    layers::{Blob, Entry, Layout, architecture, programs, tar},
    shell::{self, Output},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
/// Layers of the tall image: more than one page of mount options has room for.
const TALL: usize = 120;

struct Scene {
    cluster: Cluster,
    image: String,
}

/// Two layers: programs and users below, and on top what hides some of it.
fn scene(fast_view: &str) -> Scene {
    let cluster = Cluster::configured("128MiB", &format!("[node]\nfast_view = \"{fast_view}\"\n"));
    let cluster = cluster.unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    let mut below = programs(&["/bin/bash", "/bin/cat", "/bin/sleep", "/bin/ls"]).unwrap();
    for dir in ["etc", "proc", "dev", "sys", "dir", "srv"] {
        below.push(Entry::dir(dir));
    }
    below.push(Entry {
        mode: 0o1777,
        ..Entry::dir("tmp")
    });
    below.push(Entry::file(
        "etc/passwd",
        "root:x:0:0::/root:\nweb:x:33:44::/srv:\n",
    ));
    below.push(Entry::file("gone", "gone"));
    below.push(Entry::file("dir/old", "old"));
    let above = vec![
        Entry::file(".wh.gone", ""),
        Entry::dir("dir"),
        Entry::file("dir/.wh..wh..opq", ""),
        Entry::file("dir/new", "new\n"),
    ];
    let blobs = [below, above].map(|layer| Blob::gzip(&tar(&layer)).unwrap());
    let diff_ids: Vec<_> = blobs.iter().map(|blob| blob.diff_id.as_str()).collect();
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": {
            "Env": ["GREETING=hello", "PATH=/bin:/usr/bin"],
            "Entrypoint": ["/bin/bash", "-c"], "Cmd": ["echo $GREETING from $PWD as $UID"],
            "WorkingDir": "/srv", "User": "web",
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string().into_bytes();
    layout.documents("i", &config, &blobs).unwrap();
    let image = layout.reference("i");
    let pulled = cluster.pull(&image).unwrap();
    if fast_view == "auto" {
        cluster.view(&pulled.manifest).unwrap();
    }
    Scene { cluster, image }
}

impl Scene {
    /// A container of the image.
    fn run(&self, flags: &[&str], command: &[&str]) -> Output {
        let words = [&["run"], flags, &[&self.image], command].concat();
        self.cluster.run(words).unwrap()
    }

    fn state(&self) -> PathBuf {
        self.cluster.dir().join("state")
    }

    fn home(&self, name: &str) -> PathBuf {
        self.state().join("containers").join(name)
    }

    /// What containers and mounts have left.
    fn left(&self) -> usize {
        let entries = |dir| fs::read_dir(self.state().join(dir)).map_or(0, Iterator::count);
        entries("containers") + entries("mounts")
    }

    /// Waits until a container's script has made a file.
    fn wait_for(&self, name: &str, file: &str) {
        let path = self.home(name).join("upper").join(file);
        let there = || Ok(path.exists().then_some(()));
        shell::until("the container runs", LIMIT, there).unwrap();
    }
}

fn mounted(dir: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = dir.display().to_string();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(&dir))
}

fn containers_run(fast_view: &str) {
    let scene = scene(fast_view);
    let said = |flags: &[&str], command: &[&str]| {
        let output = scene.run(flags, command).ok().unwrap();
        output.text().trim().to_owned()
    };
    // As the image says, and then otherwise.
    assert_eq!(said(&[], &[]), "hello from /srv as 33");
    let flags = [
        "--env",
        "GREETING=bye",
        "--user",
        "5:6",
        "--workdir",
        "/dir",
    ];
    assert_eq!(
        said(&flags, &["echo $GREETING from $PWD as $UID"]),
        "bye from /dir as 5"
    );
    let flags = ["--entrypoint", "/bin/cat"];
    assert_eq!(said(&flags, &["/dir/new"]), "new");
    // What a layer hides is hidden.
    assert_eq!(
        said(&["--user", "0"], &["ls /dir; [ -e /gone ] || echo hidden"]),
        "new\nhidden"
    );
    // What one container writes the next one does not see.
    assert_eq!(
        said(&["-u", "0"], &["echo x > /written; cat /written"]),
        "x"
    );
    assert_eq!(
        said(&["-u", "0"], &["[ -e /written ] || echo fresh"]),
        "fresh"
    );
    let refused = scene.run(&["-u", "0", "--read-only"], &["echo x > /written"]);
    assert!(!refused.status.success(), "{}", refused.text());
    // Exit codes are the command's; what is wrong before is ours.
    assert_eq!(scene.run(&[], &["exit 7"]).status.code(), Some(7));
    let unknown = scene.cluster.run(["run", "no/such:image"]).unwrap();
    assert_eq!(unknown.status.code(), Some(3), "{}", unknown.stderr);
    assert!(
        unknown.stderr.contains("harbour pull"),
        "{}",
        unknown.stderr
    );
    let nobody = scene.run(&["--user", "nobody"], &[]);
    assert!(nobody.stderr.contains("no user"), "{}", nobody.stderr);
    // A directory of this host.
    let dir = scene.cluster.dir().join("shared");
    fs::create_dir(&dir).unwrap();
    let volume = format!("{}:/shared", dir.display());
    said(
        &["-u", "0", "--volume", &volume],
        &["echo out > /shared/file"],
    );
    assert_eq!(fs::read_to_string(dir.join("file")).unwrap(), "out\n");
    assert_eq!(scene.left(), 0);
}

#[test]
fn containers_run_on_the_fast_view() {
    containers_run("auto");
}

#[test]
fn containers_run_on_layers() {
    containers_run("off");
}

#[test]
fn signals_reach_a_container_and_what_killed_ones_leave_is_taken_away() {
    let scene = scene("off");
    let script = "trap 'exit 5' TERM; echo > /srv/on; while :; do sleep 0.1; done";
    let flags = ["--user", "0"];
    let words = [&["run", "--name", "t"], &flags[..], &[&scene.image, script]].concat();
    let mut child = scene.cluster.command(words).spawn().unwrap();
    scene.wait_for("t", "srv/on");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(scene.left(), 0);

    // Killed, it leaves a container that goes on, whose directory nobody touches.
    let script = "echo > /tmp-on; while :; do sleep 0.1; done";
    let words = [&["run", "--name", "k"], &flags[..], &[&scene.image, script]].concat();
    let mut child = scene.cluster.command(words).spawn().unwrap();
    scene.wait_for("k", "tmp-on");
    child.kill().unwrap();
    child.wait().unwrap();
    scene.run(&[], &[]).ok().unwrap();
    assert!(mounted(&scene.home("k").join("rootfs")));
    // When its runtime is dead too, the next one ends it and takes it away.
    let bundle = scene.home("k").display().to_string();
    let runtime = format!("run --bundle {bundle} k");
    shell::check("pkill", ["-KILL", "-f", &runtime], LIMIT).unwrap();
    shell::until("the runtime is dead", LIMIT, || {
        scene.run(&[], &[]).ok()?;
        Ok((!scene.home("k").exists()).then_some(()))
    })
    .unwrap();
    assert_eq!(scene.left(), 0);
}

#[test]
fn images_are_mounted_written_to_and_taken_away() {
    let scene = scene("off");
    let dir = scene.cluster.dir().join("at");
    fs::create_dir(&dir).unwrap();
    let at = dir.display().to_string();
    let harbour = |words: &[&str]| scene.cluster.harbour(words.iter().copied()).unwrap();
    harbour(&["mount", &scene.image, &at]);
    assert_eq!(fs::read_to_string(dir.join("dir/new")).unwrap(), "new\n");
    fs::write(dir.join("written"), "x").unwrap();
    harbour(&["umount", &at]);
    assert!(!mounted(&dir) && scene.left() == 0);
    harbour(&["mount", "--read-only", &scene.image, &at]);
    assert!(fs::write(dir.join("written"), "x").is_err());
    harbour(&["umount", &at]);
    // What is kept by name stays.
    let upper = scene.cluster.dir().join("kept").display().to_string();
    for expected in [false, true] {
        harbour(&["mount", "--upper", &upper, &scene.image, &at]);
        assert_eq!(dir.join("written").exists(), expected);
        fs::write(dir.join("written"), "x").unwrap();
        harbour(&["umount", &at]);
    }
    let twice = scene.cluster.run(["umount", &at]).unwrap();
    assert!(!twice.status.success());

    let bundle = scene.cluster.dir().join("bundle");
    let place = bundle.display().to_string();
    harbour(&["bundle", &scene.image, &place, "echo $GREETING"]);
    let root = scene.cluster.dir().join("runc").display().to_string();
    let run = ["--root", &root, "run", "--bundle", &place, "b"];
    let said = shell::check("runc", run, LIMIT).unwrap();
    assert_eq!(said.text().trim(), "hello");
    let full = scene.cluster.run(["bundle", &scene.image, &place]).unwrap();
    assert!(full.stderr.contains("not empty"), "{}", full.stderr);
    harbour(&["umount", &bundle.join("rootfs").display().to_string()]);
}

#[test]
fn an_image_of_many_layers_is_mounted() {
    let scene = scene("off");
    let mut layout = Layout::create(&scene.cluster.dir().join("tall")).unwrap();
    let layers: Vec<_> = (0..TALL)
        .map(|n| vec![Entry::file(format!("layer-{n}"), n.to_string())])
        .collect();
    layout.image("tall", &layers).unwrap();
    let image = layout.reference("tall");
    scene.cluster.pull(&image).unwrap();
    let dir = scene.cluster.dir().join("at");
    fs::create_dir(&dir).unwrap();
    let at = dir.display().to_string();
    scene.cluster.harbour(["mount", &image, &at]).unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), TALL);
    assert_eq!(fs::read_to_string(dir.join("layer-7")).unwrap(), "7");
    scene.cluster.harbour(["umount", &at]).unwrap();
}

/// Somebody who is nobody on this host.
const SOMEBODY: u32 = 4321;

fn without_root(fast_view: &str) {
    let scene = scene(fast_view);
    let dir = scene.cluster.dir().to_owned();
    // So that somebody else finds the mount.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let home = dir.join("home");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        let id = SOMEBODY.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        command.arg(harbour_tests::cluster::binary());
        command.arg("--mount").arg(scene.cluster.mount());
        command.arg("--run-dir").arg(scene.cluster.run_dir());
        command.arg("run").args(words).env("XDG_DATA_HOME", &home);
        shell::run(&mut command, LIMIT).unwrap()
    };
    let script = "echo $UID; ls /dir; [ -e /gone ] || echo hidden; echo w > /tmp/w && cat /tmp/w";
    let said = run(&["--user", "0", &scene.image, script]).ok().unwrap();
    assert_eq!(said.text(), "0\nnew\nhidden\nw\n");
    assert_eq!(
        run(&["--user", "0", &scene.image, "exit 7"]).status.code(),
        Some(7)
    );
    // Who it would be does not exist there.
    let other = run(&[&scene.image]);
    assert!(other.stderr.contains("does not exist"), "{}", other.stderr);
    let left = home.join("harbour/containers");
    assert_eq!(fs::read_dir(left).unwrap().count(), 0);
}

#[test]
fn containers_run_without_root_on_layers() {
    without_root("off");
}

#[test]
fn containers_run_without_root_on_the_fast_view() {
    without_root("auto");
}

#[test]
fn runc_runs_the_images_of_the_matrix() {
    row("runc, harbour run", When::Always, |row| runs(row, "runc"));
}

#[test]
fn crun_runs_the_images_of_the_matrix() {
    row("crun, harbour run", When::Always, |row| runs(row, "crun"));
}

fn runs(row: &mut Row, runtime: &str) -> Result<()> {
    let Ok(said) = shell::check(runtime, ["--version"], LIMIT) else {
        return Err(NotHere(format!("{runtime} is not installed")).into());
    };
    let said = said.text();
    let version = said
        .lines()
        .next()
        .and_then(|line| line.split(' ').next_back());
    row.version(version.unwrap_or_default());
    let cluster = Cluster::start("128MiB")?;
    let mut layout = Layout::create(&cluster.dir().join("layout"))?;
    let images = Images::write(&mut layout)?;
    for image in [&images.three, &images.tall] {
        let reference = layout.reference(image.tag());
        cluster.pull(&reference)?;
        let command = cluster.command(["run", "--runtime", runtime, &reference]);
        let said = shell::run(&mut one_kind_of_cgroups(&command), LIMIT)?.ok()?;
        ensure!(said.text().trim() == image.says, "{}", said.text());
    }
    Ok(())
}

/// A command that sees cgroups of version 1 alone where the machine has both, which crun does not take.
fn one_kind_of_cgroups(command: &Command) -> Command {
    let script = "umount -l /sys/fs/cgroup/unified 2>/dev/null; exec \"$@\"";
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "sh", "-c", script, "sh"]);
    apart.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => apart.env(key, value),
            None => apart.env_remove(key),
        };
    }
    apart
}
