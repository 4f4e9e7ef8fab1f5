//! The read-only part of a POSIX file system, on every door to an image: each call that would
//! change something gives EROFS, everything else behaves as on a disk.
//!
//! The same checks run on a disk mounted read-only, so that a wrong expectation is seen as one.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "readonly/directories.rs"]
mod directories;
#[path = "readonly/mutations.rs"]
mod mutations;
#[path = "readonly/plant.rs"]
mod plant;
#[path = "readonly/semantics.rs"]
mod semantics;

use std::{path::PathBuf, time::Duration};

use harbour_tests::{
    cluster::Cluster,
    layers::Layout,
    overlay::{Overlay, Sweep},
    shell,
};

/// Runs both tables on one door and gives the complaints.
fn complaints(door: &str, top: &std::path::Path) -> Vec<String> {
    let found = [mutations::check(top), semantics::check(top)].concat();
    found.into_iter().map(|c| format!("{door}: {c}")).collect()
}

#[test]
fn every_door_is_a_proper_read_only_file_system() {
    let cluster = Cluster::start("128MiB").unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    layout.image("posix", &[plant::layer()]).unwrap();
    let image = cluster.pull(&layout.reference("posix")).unwrap();
    let layers = cluster.json("layers").unwrap();
    let diff_id = layers[0]["diff_id"].as_str().unwrap();
    let mut doors = vec![
        ("rootfs", cluster.rootfs(&image).unwrap()),
        ("layer", cluster.layer(diff_id)),
    ];
    if cluster.json("status").unwrap()["node"]["fast_view"]
        .as_str()
        .unwrap()
        .starts_with("on")
    {
        doors.push(("fast view", cluster.view(&image.manifest).unwrap()));
    }
    let overlay = Overlay::read_only(&[cluster.layer(diff_id)]).unwrap();
    doors.push(("overlay on the layer", overlay.path()));
    let found: Vec<_> = doors
        .iter()
        .flat_map(|(door, top)| complaints(door, top))
        .collect();
    assert!(
        found.is_empty(),
        "{} complaints:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn directories_above_the_images_are_read_only_too() {
    let cluster = Cluster::start("64MiB").unwrap();
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    layout.image("posix", &[plant::layer()]).unwrap();
    let image = cluster.pull(&layout.reference("posix")).unwrap();
    cluster.rootfs(&image).unwrap();
    let mount = cluster.mount();
    let all: Vec<PathBuf> = ["", "images", "layers", "erofs", ".status"]
        .iter()
        .map(|d| mount.join(d))
        .chain([cluster.image_dir(&image)])
        .collect();
    let found: Vec<_> = all
        .iter()
        .flat_map(|dir| mutations::check_directory(dir))
        .collect();
    assert!(
        found.is_empty(),
        "{} complaints:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_disk_mounted_read_only_passes_the_same_checks() {
    let dir = tempfile::tempdir().unwrap();
    let [layer, tree, top] = ["layer.tar", "tree", "top"].map(|n| dir.path().join(n));
    std::fs::write(&layer, harbour_tests::layers::tar(&plant::layer())).unwrap();
    std::fs::create_dir(&tree).unwrap();
    std::fs::create_dir(&top).unwrap();
    let _sweep = Sweep(dir.path());
    let text = |p: &PathBuf| p.to_str().unwrap().to_owned();
    let run = |program: &str, args: &[&str]| {
        shell::check(program, args, Duration::from_secs(60)).unwrap()
    };
    run(
        "tar",
        &[
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-xpf",
            &text(&layer),
            "-C",
            &text(&tree),
        ],
    );
    run("mount", &["--bind", &text(&tree), &text(&top)]);
    run("mount", &["-o", "remount,bind,ro", &text(&top)]);
    let found = complaints("disk", &top);
    assert!(
        found.is_empty(),
        "{} complaints:\n{}",
        found.len(),
        found.join("\n")
    );
}
