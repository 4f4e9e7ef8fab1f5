//! Data-roots as files: what is made, what is left alone, and what an end at any point leaves.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use harbour_image::{digest::Digest, reference::ImageName};
use serde_json::json;

use super::*;
use crate::docker::record::Layer;

/// A data-root of a Docker that has an image of one layer itself.
struct Scene {
    dir: tempfile::TempDir,
    root: DataRoot,
}

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn put(path: PathBuf, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn config(layers: &[&str]) -> String {
    let diff_ids: Vec<_> = layers.iter().map(|name| digest(name).to_string()).collect();
    json!({ "rootfs": { "type": "layers", "diff_ids": diff_ids } }).to_string()
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = DataRoot::at(dir.path());
        let scene = Self { dir, root };
        scene.own_layer("base", None, "0base0");
        let config = config(&["base"]);
        put(scene.root.content(&digest(&config)), &config);
        let names = json!({ "Repositories": { "own": { "own:1": digest(&config).to_string() } } });
        put(
            scene.root.images().join("repositories.json"),
            &names.to_string(),
        );
        scene
    }

    /// A layer as Docker makes it, on top of a chain.
    fn own_layer(&self, name: &str, below: Option<Digest>, id: &str) -> Digest {
        let chain = match &below {
            None => digest(name),
            Some(below) => digest(&format!("{below} {}", digest(name))),
        };
        let entry = self.root.layers().join(chain.hex());
        put(entry.join("cache-id"), id);
        put(entry.join("diff"), &digest(name).to_string());
        put(entry.join("size"), "7");
        if let Some(below) = below {
            put(entry.join("parent"), &below.to_string());
        }
        put(self.root.driver().join(id).join("link"), &id.to_uppercase());
        put(self.root.driver().join(id).join("diff/file"), name);
        chain
    }

    fn record(tag: &str, layers: &[&str]) -> Record {
        let name = ImageName {
            registry: "docker.io".into(),
            repository: "library/ours".into(),
            tag: tag.into(),
        };
        let mut record = Record::new(&name, &digest(tag), config(layers), "/mnt".into());
        record.layers.extend(layers.iter().map(|layer| Layer {
            diff_id: digest(layer).to_string(),
            blob: digest(&format!("blob {layer}")).to_string(),
            size_bytes: 5,
        }));
        record
    }

    fn want(&self, record: &Record) -> Report {
        want(&self.root, record).unwrap();
        apply(&self.root).unwrap()
    }

    fn leave(&self, tag: &str) -> Report {
        let name = Self::record(tag, &[]).image();
        let mut record = Record::of(&self.root, &name).unwrap().unwrap();
        record.state = State::Leaving;
        self.want(&record)
    }

    fn state(&self, tag: &str) -> Option<State> {
        let record = Record::of(&self.root, &Self::record(tag, &[]).image()).unwrap();
        record.map(|record| record.state)
    }

    fn meaning(&self, name: &str) -> Option<String> {
        let names = Repositories::read(&self.root).unwrap();
        names.get(name).map(str::to_owned)
    }

    /// Every file and link with what it says.
    fn tree(&self) -> BTreeMap<PathBuf, String> {
        let (mut tree, mut dirs) = (BTreeMap::new(), vec![self.dir.path().to_owned()]);
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let kind = fs::symlink_metadata(&path).unwrap();
                let says = match (kind.is_symlink(), kind.is_dir()) {
                    (true, _) => fs::read_link(&path).unwrap().display().to_string(),
                    (_, true) => {
                        dirs.push(path);
                        continue;
                    }
                    _ => String::from_utf8(fs::read(&path).unwrap()).unwrap(),
                };
                tree.insert(path.strip_prefix(self.dir.path()).unwrap().to_owned(), says);
            }
        }
        tree
    }

    fn lower(&self, chain: &Digest) -> String {
        let id = self.root.cache_of(chain).unwrap().unwrap();
        let path = self.root.driver().join(id).join("lower");
        fs::read_to_string(path).unwrap_or_default()
    }
}

#[test]
fn an_image_is_made_once_and_taken_back() {
    let scene = Scene::new();
    let before = scene.tree();
    let record = Scene::record("1", &["base", "a", "b"]);
    let report = scene.want(&record);
    assert_eq!(report.attached, ["ours:1"]);
    assert!(is_whole(&scene.root, &record).unwrap());
    let id = record.id().to_string();
    assert_eq!(scene.meaning("ours:1"), Some(id.clone()));
    assert_eq!(
        scene.meaning(&format!("ours@{}", record.manifest)),
        Some(id)
    );
    let after = scene.tree();
    // Docker's own layer is below ours, as it was.
    let chains = chains(&record.diff_ids().unwrap());
    assert_eq!(scene.lower(&chains[1]), "l/0BASE0");
    assert!(before.iter().all(|(path, says)| {
        path.ends_with("repositories.json") || after.get(path) == Some(says)
    }));
    assert!(!apply(&scene.root).unwrap().changed);
    assert_eq!(scene.tree(), after);
    assert_eq!(scene.leave("1").detached, ["ours:1"]);
    assert_eq!(scene.tree(), before);
}

#[test]
fn an_end_at_any_point_is_made_good() {
    let record = Scene::record("1", &["base", "a", "b", "a"]);
    let (empty, full) = {
        let scene = Scene::new();
        let empty = scene.tree();
        scene.want(&record);
        (empty, scene.tree())
    };
    let ends_after = |n: usize| {
        let mut left = n;
        move || {
            anyhow::ensure!(left > 0, "killed");
            left -= 1;
            Ok(())
        }
    };
    let mut points = 0;
    for n in 0.. {
        let scene = Scene::new();
        want(&scene.root, &record).unwrap();
        let attached = apply_in_steps(&scene.root, &mut ends_after(n));
        apply(&scene.root).unwrap();
        assert_eq!(scene.tree(), full, "attach ended after {n}");
        let leaving = || {
            let found = Record::of(&scene.root, &record.image()).unwrap();
            let mut leaving = found.unwrap();
            leaving.state = State::Leaving;
            want(&scene.root, &leaving).unwrap();
        };
        leaving();
        let detached = apply_in_steps(&scene.root, &mut ends_after(n));
        apply(&scene.root).unwrap();
        assert_eq!(scene.tree(), empty, "detach ended after {n}");
        // What was begun and is not wanted any more goes too.
        want(&scene.root, &record).unwrap();
        let _ = apply_in_steps(&scene.root, &mut ends_after(n));
        leaving();
        apply(&scene.root).unwrap();
        assert_eq!(
            scene.tree(),
            empty,
            "attach ended after {n} and was taken back"
        );
        if attached.is_ok() && detached.is_ok() {
            break;
        }
        points += 1;
    }
    assert!(points > 10, "{points}");
}

#[test]
fn a_layer_that_a_chain_has_twice_counts_where_it_is_highest() {
    let scene = Scene::new();
    let record = Scene::record("1", &["a", "b", "a", "c"]);
    scene.want(&record);
    let chains = chains(&record.diff_ids().unwrap());
    let depth = |chain| {
        scene
            .lower(chain)
            .split(':')
            .filter(|part| !part.is_empty())
            .count()
    };
    assert_eq!(chains.iter().map(depth).collect::<Vec<_>>(), [0, 1, 1, 2]);
    let targets: Vec<_> = scene
        .lower(&chains[3])
        .split(':')
        .map(|short| {
            let short = scene.root.driver().join(short);
            let diff = short.parent().unwrap().join(fs::read_link(&short).unwrap());
            fs::read_link(diff).unwrap()
        })
        .collect();
    let target = |name: &str| Path::new("/mnt/layers").join(digest(name).short());
    assert_eq!(targets, [target("a"), target("b")]);
}

#[test]
fn what_docker_uses_stays() {
    let scene = Scene::new();
    let record = Scene::record("1", &["a", "b"]);
    scene.want(&record);
    scene.want(&Scene::record("2", &["a"]));
    let id = record.id();
    // A container.
    let container = scene.dir.path().join("containers/c1/config.v2.json");
    put(
        container.clone(),
        &json!({ "Image": id.to_string(), "Name": "/web" }).to_string(),
    );
    let report = scene.leave("1");
    assert!(report.kept[0].contains("container web"), "{report:?}");
    assert_eq!(scene.state("1"), Some(State::Attached));
    assert!(is_whole(&scene.root, &record).unwrap());
    fs::remove_dir_all(container.parent().unwrap()).unwrap();
    // An image that was built on it: ours has no name any more, and is there.
    let top = *chains(&record.diff_ids().unwrap()).last().unwrap();
    let child = config(&["a", "b", "child"]);
    let child_id = digest(&child);
    let child_layer = scene.own_layer("child", Some(top), "0child0");
    put(scene.root.content(&child_id), &child);
    put(
        scene.root.metadata(&child_id).join("parent"),
        &id.to_string(),
    );
    let report = scene.leave("1");
    assert!(report.kept[0].contains("is built on it"), "{report:?}");
    assert_eq!((scene.state("1"), scene.meaning("ours:1")), (None, None));
    assert!(scene.root.content(&id).exists() && scene.root.cache_of(&top).unwrap().is_some());
    // Its layer alone, as a builder keeps it.
    fs::remove_file(scene.root.content(&child_id)).unwrap();
    fs::remove_dir_all(scene.root.metadata(&child_id)).unwrap();
    let kept = scene.root.driver().join("0child0/lower");
    let id_of = |chain| scene.root.cache_of(chain).unwrap().unwrap();
    let short = fs::read_to_string(scene.root.driver().join(id_of(&top)).join("link")).unwrap();
    fs::remove_dir_all(scene.root.layers().join(child_layer.hex())).unwrap();
    put(kept.clone(), &format!("l/{short}"));
    apply(&scene.root).unwrap();
    assert!(!scene.root.content(&id).exists() && scene.root.cache_of(&top).unwrap().is_some());
    // And then nothing.
    fs::remove_file(kept).unwrap();
    scene.leave("2");
    assert!(scene.root.cache_of(&top).unwrap().is_none());
    assert!(!scene.root.own().exists());
}

#[test]
fn what_people_do_in_docker_stands() {
    let scene = Scene::new();
    let record = Scene::record("1", &["a"]);
    scene.want(&record);
    // Somebody gave the name to another image, and then removed ours.
    let own = scene.meaning("own:1").unwrap();
    let mut names = Repositories::read(&scene.root).unwrap();
    names.set("ours:1", &own);
    names.write(&super::scratch(&scene.root).unwrap()).unwrap();
    apply(&scene.root).unwrap();
    assert_eq!(scene.meaning("ours:1"), Some(own.clone()));
    fs::remove_file(scene.root.content(&record.id())).unwrap();
    apply(&scene.root).unwrap();
    assert_eq!(scene.state("1"), Some(State::Removed));
    assert!(!scene.root.content(&record.id()).exists());
    // Attached again, the name is ours again; a newer image takes it over.
    let found = || Record::of(&scene.root, &record.image()).unwrap().unwrap();
    let mut again = record.clone();
    again.replace(&found());
    scene.want(&again);
    assert_eq!(scene.meaning("ours:1"), Some(record.id().to_string()));
    let mut newer = Scene::record("1", &["a", "b"]);
    newer.manifest = digest("newer").to_string();
    newer.names[1] = format!("ours@{}", newer.manifest);
    newer.replace(&found());
    scene.want(&newer);
    assert_eq!(scene.meaning("ours:1"), Some(newer.id().to_string()));
    assert_eq!(scene.meaning(&record.names[1]), None);
    assert!(!scene.root.content(&record.id()).exists());
    assert_eq!(scene.meaning("own:1"), Some(own));
}

#[test]
fn what_docker_has_itself_is_not_taken_from_it() {
    let scene = Scene::new();
    let before = scene.tree();
    let mut record = Scene::record("1", &["base"]);
    record.repository = "library/own".into();
    record.names = vec!["own:1".into(), "own@by-digest".into()];
    scene.want(&record);
    let id = record.id().to_string();
    assert_eq!(scene.meaning("own@by-digest"), Some(id.clone()));
    // Attached again it is no more ours than before.
    let mut again = record.clone();
    again.replace(&Record::of(&scene.root, &record.image()).unwrap().unwrap());
    scene.want(&again);
    let mut leaving = Record::of(&scene.root, &record.image()).unwrap().unwrap();
    assert_eq!(leaving.given, ["own@by-digest"]);
    leaving.state = State::Leaving;
    scene.want(&leaving);
    assert_eq!(scene.meaning("own:1"), Some(id));
    assert_eq!(scene.tree(), before);
}

#[test]
fn a_name_of_two_records_goes_with_the_second() {
    let scene = Scene::new();
    let before = scene.tree();
    for tag in ["1", "2"] {
        let mut record = Scene::record(tag, &["a"]);
        record.names[1] = "ours@shared".into();
        scene.want(&record);
    }
    scene.leave("1");
    assert!(scene.meaning("ours:1").is_none() && scene.meaning("ours@shared").is_some());
    scene.leave("2");
    assert_eq!(scene.tree(), before);
}

#[test]
fn more_layers_than_docker_takes_are_refused() {
    let scene = Scene::new();
    let names: Vec<String> = (0..126).map(|n| n.to_string()).collect();
    let layers: Vec<&str> = names.iter().map(String::as_str).collect();
    let error = want(&scene.root, &Scene::record("1", &layers)).unwrap_err();
    assert!(error.to_string().contains("Docker takes 125"), "{error}");
}
