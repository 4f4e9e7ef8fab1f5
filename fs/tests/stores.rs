//! What engines read below `store` and `layerstore`, without an engine.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/support.rs"]
mod support;

use std::sync::Arc;

use harbour_fs::{
    Config, Error, Fs, Node,
    source::{BlobEntry, ImageEntry, LayerEntry},
};
use harbour_image::{
    digest::Digest,
    index::{FileType, ViewKind},
    manifest::Compression,
};
use serde_json::Value;
use support::{
    model::{Model, sample},
    walk::{find, list},
    world::World,
};

const LAYERS: &str = "store/overlay-layers/layers.json";
const IMAGES: &str = "store/overlay-images/images.json";

fn read(fs: &Fs, node: Node) -> Vec<u8> {
    let data = fs.patiently(|fs| fs.read(node, 0, 1 << 20)).unwrap();
    data.to_vec()
}

fn text(fs: &Fs, path: &str) -> String {
    let attr = find(fs, path).unwrap();
    let bytes = read(fs, attr.node);
    assert_eq!(bytes.len() as u64, attr.size, "{path}");
    String::from_utf8(bytes).unwrap()
}

fn json(fs: &Fs, path: &str) -> Value {
    serde_json::from_str(&text(fs, path)).unwrap()
}

fn link(fs: &Fs, path: &str) -> String {
    let node = find(fs, path).unwrap().node;
    String::from_utf8(fs.patiently(|fs| fs.readlink(node)).unwrap()).unwrap()
}

fn names(fs: &Fs, path: &str) -> Vec<String> {
    let listed = list(fs, find(fs, path).unwrap().node, true, 3).unwrap();
    let mut names: Vec<String> = (listed[2..].iter())
        .map(|(name, _)| String::from_utf8(name.clone()).unwrap())
        .collect();
    names.sort();
    names
}

fn model() -> Model {
    sample(ViewKind::Layer, 3)
}

/// Layers `1..=count`, each with a blob of its own.
fn layers(world: &World, count: u32) -> Vec<LayerEntry> {
    let layer = |number: u32| {
        let mut layer = world.layer(&mut model(), number, &[1]);
        layer.unpacked_bytes = 1000 + u64::from(number);
        layer.blobs = vec![BlobEntry {
            digest: Digest::of(format!("blob {number}").as_bytes()),
            len: u64::from(number),
            compression: Compression::Zstd,
        }];
        layer
    };
    (1..=count).map(layer).collect()
}

fn image(world: &World, tag: &str, number: u32, layers: &[&LayerEntry]) -> ImageEntry {
    let name = ("r.example:5000", "a/b", tag);
    let mut image = world.image(name, &mut sample(ViewKind::Image, 3), number, &[1]);
    image.diff_ids = layers.iter().map(|layer| layer.diff_id).collect();
    image
}

/// The name that engines give a layer on top of others, told in another way.
fn chain(layers: &[&LayerEntry]) -> String {
    let mut ids = layers.iter().map(|layer| layer.diff_id.hex());
    let bottom = ids.next().unwrap();
    ids.fold(bottom, |below, id| {
        Digest::of(format!("{below}+{id}").as_bytes()).hex()
    })
}

fn record<'a>(list: &'a Value, id: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|one| one["id"] == id);
    found.unwrap_or_else(|| panic!("no {id} in {list}"))
}

struct Scene {
    world: Arc<World>,
    layers: Vec<LayerEntry>,
    images: Vec<ImageEntry>,
    fs: Arc<Fs>,
}

/// An image with two names, and one that shares its two lower layers.
fn scene() -> Scene {
    let world = World::new();
    let layers = layers(&world, 4);
    let [a, b, c, d] = &layers[..] else { panic!() };
    let one = image(&world, "1", 11, &[a, b, c]);
    let mut digest = one.clone();
    digest.tag = one.manifest.to_string();
    let other = image(&world, "2", 12, &[a, b, d]);
    let images = vec![one, digest, other];
    world.show(images.clone(), layers.clone());
    let fs = world.fs(Config {
        mountpoint: "/at".into(),
        ..Config::default()
    });
    Scene {
        world,
        layers,
        images,
        fs,
    }
}

#[test]
fn layers_stand_as_engines_want_them() {
    let Scene { layers, fs, .. } = scene();
    let [a, b, c, d] = &layers[..] else { panic!() };
    let top = chain(&[a, b, c]);
    let mut all = vec![chain(&[a]), chain(&[a, b]), top.clone(), chain(&[a, b, d])];
    all.push("l".into());
    all.sort();
    assert_eq!(names(&fs, "store/overlay"), all);
    let members = ["diff", "link", "lower", "merged", "work"];
    assert_eq!(names(&fs, &format!("store/overlay/{top}")), members);
    let bottom = format!("store/overlay/{}", chain(&[a]));
    assert_eq!(
        names(&fs, &bottom),
        ["diff", "empty", "link", "merged", "work"]
    );
    assert_eq!(names(&fs, &format!("{bottom}/empty")), [] as [&str; 0]);
    // `..` of what is made when it is looked at leads up again.
    let (dir, empty) = (find(&fs, &bottom).unwrap().node, format!("{bottom}/empty"));
    let up = |node| fs.patiently(|fs| fs.lookup(node, b"..")).unwrap().attr;
    assert_eq!(up(find(&fs, &empty).unwrap().node).unwrap().node, dir);
    let overlay = find(&fs, "store/overlay").unwrap();
    assert_eq!(up(dir).unwrap().node, overlay.node);
    assert_eq!(overlay.nlink, 2 + 5);

    let short = |layer: &LayerEntry| layer.diff_id.short();
    assert_eq!(
        link(&fs, &format!("store/overlay/{top}/diff")),
        format!("/at/layers/{}", short(c))
    );
    let name = |ids: &[&LayerEntry]| text(&fs, &format!("store/overlay/{}/link", chain(ids)));
    let lower = text(&fs, &format!("store/overlay/{top}/lower"));
    assert_eq!(lower, format!("l/{}:l/{}", name(&[a, b]), name(&[a])));
    for ids in [&[a][..], &[a, b], &[a, b, c]] {
        assert_eq!(name(ids).len(), 6);
        assert_eq!(
            link(&fs, &format!("store/overlay/l/{}", name(ids))),
            format!("../{}/diff", chain(ids))
        );
    }

    let list = json(&fs, LAYERS);
    assert_eq!(list.as_array().unwrap().len(), 4);
    let record = record(&list, &top);
    assert_eq!(record["parent"], chain(&[a, b]));
    assert_eq!(record["diff-digest"], c.diff_id.to_string());
    assert_eq!(record["diff-size"], 1003);
    assert_eq!(
        record["compressed-diff-digest"],
        c.blobs[0].digest.to_string()
    );
    assert_eq!(
        (&record["compressed-size"], &record["compression"]),
        (&3.into(), &4.into())
    );
    assert!(list[0].get("parent").is_none());
    assert_eq!(
        find(&fs, "store/overlay-layers/layers.lock").unwrap().size,
        0
    );
}

#[test]
fn images_have_all_their_names_and_documents() {
    let Scene {
        images, fs, layers, ..
    } = scene();
    let [a, b, c, _] = &layers[..] else { panic!() };
    let list = json(&fs, IMAGES);
    assert_eq!(list.as_array().unwrap().len(), 2);
    let id = images[0].config.hex();
    let one = record(&list, &id);
    let name = |tail: String| Value::from(format!("r.example:5000/a/b{tail}"));
    let names_wanted = [name(":1".into()), name(format!("@{}", images[0].manifest))];
    assert_eq!(one["names"], Value::from(names_wanted.to_vec()));
    assert_eq!(one["layer"], chain(&[a, b, c]));
    assert_eq!(one["created"], "1970-01-01T00:00:00Z");
    let dir = format!("store/overlay-images/{id}");
    let sizes = one["big-data-sizes"].as_object().unwrap();
    assert_eq!(sizes.len(), 3);
    assert_eq!(names(&fs, &dir).len(), 3);
    assert_eq!(text(&fs, &format!("{dir}/manifest")), "{\"manifest\":11}");
    assert_eq!(sizes["manifest"], 15);
    assert_eq!(
        one["big-data-digests"]["manifest"],
        images[0].manifest.to_string()
    );
}

#[test]
fn a_new_state_of_a_list_is_a_new_file_and_the_old_one_can_be_read_on() {
    let Scene {
        world,
        layers,
        mut images,
        fs,
    } = scene();
    let before = [LAYERS, IMAGES].map(|path| find(&fs, path).unwrap());
    let old = before.map(|attr| read(&fs, attr.node));
    // A change that says nothing new to engines.
    world.show(images.clone(), layers.clone());
    let changes = fs.snapshot_changed();
    assert!(changes.is_empty(), "{changes:?}");
    assert_eq!(
        [LAYERS, IMAGES].map(|path| find(&fs, path).unwrap()),
        before
    );

    images.pop();
    world.show(images.clone(), layers.clone());
    let changes = fs.snapshot_changed();
    let overlay = find(&fs, "store/overlay").unwrap().node;
    let gone = chain(&[&layers[0], &layers[1], &layers[3]]);
    for (dir, name) in [
        ("store/overlay-layers", "layers.json"),
        ("store/overlay-images", "images.json"),
        ("store/overlay", &gone),
    ] {
        let dir = find(&fs, dir).unwrap().node;
        assert!(changes.entries.contains(&(dir, name.into())), "{changes:?}");
    }
    assert!(changes.nodes.contains(&overlay));
    assert!(matches!(
        find(&fs, &format!("store/overlay/{gone}")),
        Err(Error::NotFound)
    ));
    for (place, path) in [LAYERS, IMAGES].into_iter().enumerate() {
        let now = find(&fs, path).unwrap();
        assert_ne!(now.node, before[place].node);
        assert!(now.mtime > before[place].mtime, "engines look at the time");
        // Who opened it earlier gets the rest of what they began with.
        assert_eq!(read(&fs, before[place].node), old[place]);
        assert_eq!(fs.getattr(before[place].node).unwrap().0, before[place]);
        assert_ne!(read(&fs, now.node), old[place]);
    }
    // Those who read very old ones hear that they are gone.
    for number in 20..30 {
        images[0].manifest = Digest::of(&[number]);
        world.show(images.clone(), layers.clone());
        fs.snapshot_changed();
        find(&fs, LAYERS).unwrap();
        find(&fs, IMAGES).unwrap();
    }
    assert!(matches!(fs.getattr(before[1].node), Err(Error::Stale(_))));
}

#[test]
fn a_layer_that_an_image_has_twice_counts_where_it_is_highest() {
    let world = World::new();
    let layers = layers(&world, 2);
    let [a, b] = &layers[..] else { panic!() };
    let image = image(&world, "1", 11, &[a, b, a, a]);
    world.show(vec![image], layers.clone());
    let fs = world.fs(Config::default());
    let lower = |ids: &[&LayerEntry]| {
        let dir = format!("store/overlay/{}", chain(ids));
        text(&fs, &format!("{dir}/lower"))
    };
    let name = |ids: &[&LayerEntry]| text(&fs, &format!("store/overlay/{}/link", chain(ids)));
    assert_eq!(lower(&[a, b]), format!("l/{}", name(&[a])));
    assert_eq!(lower(&[a, b, a]), format!("l/{}", name(&[a, b])));
    assert_eq!(lower(&[a, b, a, a]), format!("l/{}", name(&[a, b])));
}

#[test]
fn a_document_that_cannot_be_had_takes_its_image_out_and_waits_for_metad() {
    let Scene {
        world, images, fs, ..
    } = scene();
    // A thread that serves the kernel asks nobody.
    let dir = find(&fs, "store/overlay-images").unwrap().node;
    let quick = fs.quickly(|fs| fs.lookup(dir, b"images.json"));
    assert!(matches!(quick, Err(Error::Later)));
    world.metad_down(true);
    assert!(matches!(find(&fs, IMAGES), Err(Error::Document { .. })));
    assert!(find(&fs, LAYERS).is_ok());
    world.metad_down(false);
    world.corrupt_document(&images[2].config);
    let list = json(&fs, IMAGES);
    assert_eq!(list.as_array().unwrap().len(), 1);
    // From then on nobody needs to be asked.
    world.metad_down(true);
    assert_eq!(json(&fs, IMAGES), list);
}

#[test]
fn the_layer_store_knows_layers_by_reference_and_blob() {
    let Scene { layers, fs, .. } = scene();
    // base64 of "r.example:5000/a/b:1".
    let dir = "layerstore/ci5leGFtcGxlOjUwMDAvYS9iOjE=";
    assert_eq!(names(&fs, "layerstore").len(), 3);
    assert_eq!(names(&fs, dir).len(), 3);
    let layer = format!("{dir}/{}", layers[0].blobs[0].digest);
    assert_eq!(names(&fs, &layer), ["blob", "diff", "info", "use"]);
    let info = json(&fs, &format!("{layer}/info"));
    assert_eq!(info["diff-digest"], layers[0].diff_id.to_string());
    assert_eq!(info["compression"], 4);
    assert!(info.get("id").is_none());
    assert_eq!(
        link(&fs, &format!("{layer}/diff")),
        format!("/at/layers/{}", layers[0].diff_id.short())
    );
    // A file cannot be made through a link to nowhere, and that is what engines expect.
    let attr = find(&fs, &format!("{layer}/use")).unwrap();
    assert_eq!(attr.kind, FileType::Symlink);
    for unknown in [
        format!("{dir}/{}", Digest::of(b"unknown")),
        format!("{dir}/{}", layers[3].blobs[0].digest),
        "layerstore/dW5rbm93bg==".into(),
    ] {
        assert!(matches!(find(&fs, &unknown), Err(Error::NotFound)));
    }
}
