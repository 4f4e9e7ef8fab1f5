//! The directories above the views, and what happens to them and to views when the catalogue
//! changes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/support.rs"]
mod support;

use std::time::Duration;

use harbour_fs::{Config, Error, Fs, Node};
use harbour_image::{
    digest::Digest,
    index::{FileType, ViewKind},
    tree::Tree,
};
use support::{
    model::{Model, meta},
    walk::{find, list},
    world::World,
};

fn tiny(text: &str) -> Model {
    let mut model = Model::new(1 << 20);
    model.file(
        Tree::ROOT,
        b"who",
        meta(0o644),
        text.as_bytes().to_vec(),
        false,
    );
    model
}

fn text(fs: &Fs, path: &str) -> String {
    let attr = find(fs, path).unwrap();
    let data = fs.patiently(|fs| fs.read(attr.node, 0, 1 << 20)).unwrap();
    assert_eq!(data.len() as u64, attr.size, "{path}");
    String::from_utf8(data.to_vec()).unwrap()
}

fn names(fs: &Fs, path: &str) -> Vec<String> {
    let listed = list(fs, find(fs, path).unwrap().node, false, 2).unwrap();
    let mut names: Vec<String> = listed[2..]
        .iter()
        .map(|(name, _)| String::from_utf8(name.clone()).unwrap())
        .collect();
    names.sort();
    names
}

/// Follows a relative link as the kernel would.
fn follow(fs: &Fs, path: &str) -> String {
    let link = find(fs, path).unwrap();
    assert_eq!(link.kind, FileType::Symlink);
    let target = String::from_utf8(fs.patiently(|fs| fs.readlink(link.node)).unwrap()).unwrap();
    let mut at: Vec<&str> = path.split('/').collect();
    at.pop();
    for part in target.split('/') {
        match part {
            ".." => drop(at.pop().expect("inside the mount")),
            part => at.push(part),
        }
    }
    at.join("/")
}

#[test]
fn images_layers_and_files_stand_where_they_should() {
    let world = World::new();
    let layers = vec![
        world.layer(&mut tiny("bottom"), 1, &[1]),
        world.layer(&mut tiny("top"), 2, &[1]),
    ];
    let mut image = world.image(
        ("docker.io", "library/app", "12"),
        &mut tiny("image"),
        3,
        &[1],
    );
    image.diff_ids = layers.iter().map(|layer| layer.diff_id).collect();
    let mut other_name = image.clone();
    other_name.tag = "latest".into();
    let manifest = image.manifest;
    let mut erofs: Vec<String> = layers
        .iter()
        .map(|layer| layer.diff_id)
        .chain([manifest])
        .map(|digest| format!("{}.erofs", digest.short()))
        .collect();
    erofs.sort();
    world.show(vec![other_name, image], layers);
    let fs = world.fs(Config::default());

    assert_eq!(
        names(&fs, ""),
        [
            ".devices",
            ".status",
            "erofs",
            "images",
            "layers",
            "layerstore",
            "store"
        ]
    );
    assert_eq!(names(&fs, "images/docker.io/library/app"), ["12", "latest"]);
    assert_eq!(
        names(&fs, "images/docker.io/library/app/12"),
        ["config.json", "layers", "manifest.json", "rootfs"]
    );
    assert_eq!(
        names(&fs, "images/docker.io/library/app/12/layers"),
        ["0", "1"]
    );
    assert_eq!(names(&fs, "erofs"), erofs);
    let dir = "images/docker.io/library/app";
    assert_eq!(text(&fs, &format!("{dir}/12/rootfs/who")), "image");
    assert_eq!(
        text(
            &fs,
            &format!("{}/who", follow(&fs, &format!("{dir}/12/layers/0")))
        ),
        "bottom"
    );
    assert_eq!(
        text(
            &fs,
            &format!("{}/who", follow(&fs, &format!("{dir}/latest/layers/1")))
        ),
        "top"
    );
    assert_eq!(
        follow(&fs, &format!("{dir}/latest/rootfs")),
        format!("{dir}/12/rootfs")
    );
    assert_eq!(
        text(&fs, &format!("{dir}/12/manifest.json")),
        "{\"manifest\":3}"
    );
    assert_eq!(
        text(&fs, &format!("{dir}/latest/config.json")),
        "{\"config\":3}"
    );
    assert_eq!(fs.view_name(3), Some(manifest.short()));

    let status: serde_json::Value =
        serde_json::from_str(&text(&fs, ".status/status.json")).unwrap();
    assert_eq!(status["generation"], 1);
    let views: serde_json::Value = serde_json::from_str(&text(&fs, ".status/views.json")).unwrap();
    assert_eq!(views.as_array().unwrap().len(), 3);

    let root = fs.getattr(Node::ROOT).unwrap().0;
    assert_eq!((root.node.raw(), root.nlink, root.perm), (1, 9, 0o555));
    // From a view's root, `..` leads back to the directory that shows it.
    let rootfs = find(&fs, &format!("{dir}/12/rootfs")).unwrap();
    let up = fs
        .patiently(|fs| fs.lookup(rootfs.node, b".."))
        .unwrap()
        .attr
        .unwrap();
    assert_eq!(up.node, find(&fs, &format!("{dir}/12")).unwrap().node);
    let ttl = fs
        .patiently(|fs| fs.lookup(rootfs.node, b"who"))
        .unwrap()
        .entry_ttl;
    assert!(ttl >= Duration::from_secs(3600));
}

#[test]
fn names_that_clash_or_cannot_be_paths_are_resolved() {
    let world = World::new();
    let mut number = 0;
    let mut image = |registry: &str, repository: &str, tag: &str| {
        number += 1;
        world.image(
            (registry, repository, tag),
            &mut tiny(&format!("{repository}:{tag}")),
            number,
            &[1],
        )
    };
    let images = vec![
        image("r", "app", "web"),
        image("r", "app/web", "1"),
        image("r", "app/web", "rootfs"),
        image("r", "layers/config.json", "manifest.json"),
        image("r", "../up", "1"),
        image("r", "a//b", "1"),
        image("", "a", "1"),
        image("r", "a", "."),
        image("r", "a\0b", "1"),
        image("r", "x/../../..", "1"),
        image("r", &"deep/".repeat(100), "1"),
        image("r", "a", &"t".repeat(300)),
        image("r", "by-digest", "sha256:0123"),
    ];
    world.show(images, vec![]);
    let fs = world.fs(Config::default());
    assert_eq!(names(&fs, "images"), ["r"]);
    assert_eq!(names(&fs, "images/r"), ["app", "by-digest", "layers:"]);
    let both = [
        "1",
        "config.json",
        "layers",
        "manifest.json",
        "rootfs",
        "rootfs:",
    ];
    assert_eq!(names(&fs, "images/r/app/web"), both);
    assert_eq!(text(&fs, "images/r/app/web/rootfs/who"), "app:web");
    assert_eq!(text(&fs, "images/r/app/web/1/rootfs/who"), "app/web:1");
    assert_eq!(
        text(&fs, "images/r/app/web/rootfs:/rootfs/who"),
        "app/web:rootfs"
    );
    assert_eq!(
        text(
            &fs,
            "images/r/layers:/config.json:/manifest.json:/rootfs/who"
        ),
        "layers/config.json:manifest.json"
    );
    assert_eq!(
        text(&fs, "images/r/by-digest/sha256:0123/rootfs/who"),
        "by-digest:sha256:0123"
    );
}

#[test]
fn a_change_shows_at_once_and_tells_the_kernel_what_to_drop() {
    let world = World::new();
    let one = world.image(("r", "app", "1"), &mut tiny("one"), 1, &[1]);
    let layer = world.layer(&mut tiny("layer"), 9, &[1]);
    let layer_name = layer.diff_id.short();
    world.show(vec![one.clone()], vec![layer.clone()]);
    let fs = world.fs(Config::default());
    let node = |path: &str| find(&fs, path).unwrap().node;
    let (app, tag, layers, images) = (
        node("images/r/app"),
        node("images/r/app/1"),
        node("layers"),
        node("images"),
    );
    let config = node("images/r/app/1/config.json");
    let layers_time = find(&fs, "layers").unwrap().mtime;
    assert!(fs.snapshot_changed().is_empty(), "nothing changed yet");

    // The tag moves, another comes, the layer stays.
    let mut moved = world.image(("r", "app", "1"), &mut tiny("two"), 2, &[1]);
    moved.diff_ids = vec![layer.diff_id];
    let other = world.image(("r", "app", "2"), &mut tiny("three"), 3, &[1]);
    world.show(vec![moved.clone(), other], vec![layer]);
    let changes = fs.snapshot_changed();
    assert!(
        changes.entries.contains(&(tag, "rootfs".into())),
        "{changes:?}"
    );
    assert!(
        changes.nodes.contains(&app) && changes.nodes.contains(&config),
        "{changes:?}"
    );
    assert!(
        !changes.nodes.contains(&layers) && !changes.nodes.contains(&images),
        "{changes:?}"
    );
    assert!(
        !changes
            .entries
            .iter()
            .any(|(dir, _)| *dir == layers || *dir == app),
        "{changes:?}"
    );
    assert_eq!(text(&fs, "images/r/app/1/rootfs/who"), "two");
    assert_eq!(node("images/r/app/1"), tag, "numbers come from paths");
    assert_eq!(find(&fs, "layers").unwrap().mtime, layers_time);
    assert_eq!(text(&fs, "images/r/app/1/config.json"), "{\"config\":2}");

    // All of it goes.
    world.show(vec![], vec![]);
    let changes = fs.snapshot_changed();
    assert!(
        changes.entries.contains(&(layers, layer_name)),
        "{changes:?}"
    );
    assert!(
        changes.entries.contains(&(images, "r".into())),
        "{changes:?}"
    );
    assert!(matches!(find(&fs, "images/r"), Err(Error::NotFound)));
    assert!(matches!(fs.getattr(app), Err(Error::Stale(_))));
    assert!(fs.snapshot_changed().is_empty());
}

#[test]
fn changes_made_while_nobody_asked_are_not_lost() {
    let world = World::new();
    let fs = world.fs(Config::default());
    for number in 1..4 {
        let image = world.image(
            ("r", &format!("app{number}"), "1"),
            &mut tiny("x"),
            number,
            &[1],
        );
        world.show(vec![image], vec![]);
        // An operation takes the snapshot over before anybody calls.
        let name = format!("images/r/app{number}/1/rootfs/who");
        assert_eq!(text(&fs, &name), "x");
    }
    let changes = fs.snapshot_changed();
    let r = find(&fs, "images/r").unwrap().node;
    for gone in ["app1", "app2"] {
        assert!(changes.entries.contains(&(r, gone.into())), "{changes:?}");
    }
}

#[test]
fn a_view_that_is_held_outlives_its_entry() {
    let world = World::new();
    let layer = world.layer(&mut tiny("still here"), 4, &[1]);
    let path = format!("layers/{}", layer.diff_id.short());
    let erofs = format!("erofs/{}.erofs", layer.diff_id.short());
    let unheld = world.layer(&mut tiny("gone"), 5, &[1]);
    world.show(vec![], vec![layer, unheld]);
    let fs = world.fs(Config::default());
    let root = find(&fs, &path).unwrap().node;
    let who = fs
        .patiently(|fs| fs.lookup(root, b"who"))
        .unwrap()
        .attr
        .unwrap()
        .node;
    assert_eq!(fs.held(), [4]);
    world.show(vec![], vec![]);
    fs.snapshot_changed();
    assert_eq!(fs.held(), [4]);
    assert_eq!(
        &*fs.patiently(|fs| fs.read(who, 0, 100)).unwrap(),
        b"still here"
    );
    assert!(
        fs.patiently(|fs| fs.lookup(root, b"none"))
            .unwrap()
            .attr
            .is_none()
    );
    assert!(matches!(find(&fs, &path), Err(Error::NotFound)));
    fs.forget(who, 1);
    fs.forget(root, 1);
    assert_eq!(fs.held(), [] as [u32; 0]);
    assert!(matches!(
        fs.patiently(|fs| fs.getattr(who)),
        Err(Error::Stale(_))
    ));

    // Listing with attributes gives nodes too, without `.` and `..`; the EROFS file is its view's.
    let again = world.layer(&mut tiny("again"), 6, &[1]);
    let path = format!("layers/{}", again.diff_id.short());
    let erofs_again = format!("erofs/{}.erofs", again.diff_id.short());
    world.show(vec![], vec![again]);
    let root = find(&fs, &path).unwrap().node;
    fs.forget(root, 1);
    list(&fs, root, false, 10).unwrap();
    assert_eq!(fs.held(), [] as [u32; 0]);
    let listed = list(&fs, root, true, 10).unwrap();
    assert_eq!((listed.len(), fs.held()), (3, vec![6]));
    fs.forget(listed[2].1.node, 1);
    assert_eq!(fs.held(), [] as [u32; 0]);
    let file = find(&fs, &erofs_again).unwrap().node;
    assert_eq!(fs.held(), [6]);
    fs.forget(file, 1);
    assert_eq!(fs.held(), [] as [u32; 0]);
    assert!(find(&fs, &erofs).is_err());
}

#[test]
fn a_document_that_is_not_what_its_digest_says_is_not_shown() {
    let world = World::new();
    let image = world.image(("r", "app", "1"), &mut tiny("x"), 1, &[1]);
    let (manifest, mut missing) = (image.manifest, image.clone());
    (missing.tag, missing.config) = ("2".into(), Digest::of(b"nobody has it"));
    world.corrupt_document(&manifest);
    world.show(vec![image, missing], vec![]);
    let fs = world.fs(Config::default());
    assert!(
        matches!(find(&fs, "images/r/app/1/manifest.json"), Err(Error::WrongDocument(d)) if d == manifest)
    );
    assert!(matches!(
        find(&fs, "images/r/app/2/config.json"),
        Err(Error::Document { .. })
    ));
    assert_eq!(text(&fs, "images/r/app/1/config.json"), "{\"config\":1}");
    // The listing around it stands.
    let dir = find(&fs, "images/r/app/1").unwrap().node;
    assert_eq!(list(&fs, dir, true, 10).unwrap().len(), 6);
}

#[test]
fn indexes_of_idle_views_are_given_up_and_opened_again() {
    let world = World::new();
    let mut models: Vec<Model> = (0..8)
        .map(|_| support::model::sample(ViewKind::Layer, 400))
        .collect();
    let layers: Vec<_> = models
        .iter_mut()
        .zip(1..)
        .map(|(model, number)| world.layer(model, number, &[1]))
        .collect();
    let paths: Vec<String> = layers
        .iter()
        .map(|layer| format!("layers/{}/large", layer.diff_id.short()))
        .collect();
    world.show(vec![], layers);
    let fs = world.fs(Config {
        index_cache_bytes: 200_000,
        prefetch_indexes: false,
        ..Config::default()
    });
    for _ in 0..2 {
        for path in &paths {
            let dir = find(&fs, path).unwrap().node;
            assert_eq!(list(&fs, dir, true, 1000).unwrap().len(), 402);
        }
    }
    let stats = fs.stats();
    assert!(stats.open_views < 8, "{stats:?}");
    assert!(stats.index_bytes < 500_000, "{stats:?}");
}
