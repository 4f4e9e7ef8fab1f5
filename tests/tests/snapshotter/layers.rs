//! Snapshots that are layers of the mount.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use harbour::snapshotter::proto::types::Mount;
use harbour_tests::{
    cluster::{Cluster, Part, Pulled},
    layers::{Blob, Entry, Layout, digest, tar},
    registry::Registry,
    shell, web,
};
use tonic::{Code, Status};

use super::client::{Client, Mounted, labels};

const LIMIT: Duration = Duration::from_secs(30);

/// The page is brought up to date four times a second.
const PAGE: Duration = Duration::from_millis(700);

const REF: &str = "containerd.io/snapshot.ref";

struct Image {
    layout: Layout,
    blobs: Vec<Blob>,
    manifest: String,
}

impl Image {
    /// Three layers: the second hides a file of the first and all that was in a directory, the third is new.
    fn new(dir: &Path) -> Self {
        let first = vec![
            Entry::dir("dir"),
            Entry::file("dir/old", "old"),
            Entry::file("gone", "gone"),
            Entry::file("stays", "1"),
        ];
        let second = vec![
            Entry::file(".wh.gone", ""),
            Entry::dir("dir"),
            Entry::file("dir/.wh..wh..opq", ""),
            Entry::file("dir/new", "new"),
        ];
        let third = vec![Entry::file("third", vec![3; 100_000])];
        Self::of(dir, &[first, second, third])
    }

    fn of(dir: &Path, layers: &[Vec<Entry>]) -> Self {
        let mut layout = Layout::create(dir).unwrap();
        let blobs: Vec<_> = layers
            .iter()
            .map(|layer| Blob::gzip(&tar(layer)).unwrap())
            .collect();
        layout.blobs("i", &blobs).unwrap();
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        Self {
            layout,
            blobs,
            manifest,
        }
    }

    /// What containerd says of each layer: chain ID and labels.
    fn layers(&self, image: &str) -> Vec<(String, HashMap<String, String>)> {
        let mut chain = None;
        let label = |blob: &Blob| {
            let diff_id: harbour_image::digest::Digest = blob.diff_id.parse().unwrap();
            let top = diff_id.chained(chain);
            chain = Some(top);
            let pairs = [
                (REF, top.to_string()),
                ("containerd.io/snapshot/cri.image-ref", image.to_owned()),
                (
                    "containerd.io/snapshot/cri.manifest-digest",
                    self.manifest.clone(),
                ),
                (
                    "containerd.io/snapshot/cri.layer-digest",
                    digest(&blob.bytes),
                ),
            ];
            let pairs: Vec<_> = pairs
                .iter()
                .map(|(key, value)| (*key, value.as_str()))
                .collect();
            (top.to_string(), labels(&pairs))
        };
        self.blobs.iter().map(label).collect()
    }
}

/// Does what containerd does to unpack an image: asks for each layer whether it is there. Gives the name of
/// the highest, or the first answer that is another.
fn unpack(
    client: &Client,
    space: &str,
    layers: &[(String, HashMap<String, String>)],
) -> Result<String, Result<Vec<Mount>, Status>> {
    let mut parent = String::new();
    for (number, (chain, labels)) in layers.iter().enumerate() {
        let key = format!("{space}/{number}/extract-1 {chain}");
        match client.prepare_with(&key, &parent, labels.clone()) {
            Err(status) if status.code() == Code::AlreadyExists => {}
            other => return Err(other),
        }
        let filter = format!("labels.\"{REF}\"=={chain},parent==\"{parent}\"");
        let found = client.list(&[&filter]).unwrap();
        assert_eq!(found.len(), 1, "{filter}: {found:?}");
        parent = found.into_keys().next().unwrap();
    }
    Ok(parent)
}

struct Scene {
    cluster: Cluster,
    client: Client,
}

impl Scene {
    fn new(toml: &str) -> Self {
        let cluster = Cluster::configured("128MiB", toml).unwrap();
        let client = Client::connect(&cluster.run_dir());
        Self { cluster, client }
    }

    fn pull(&self, image: &Image) -> Pulled {
        self.cluster.pull(&image.layout.reference("i")).unwrap()
    }

    /// A container's root on top of `parent` has to be right, and can be written.
    fn check(&self, key: &str, parent: &str) -> Vec<Mount> {
        let mounts = self.client.prepare(key, parent).unwrap();
        let mounted = Mounted::new(&self.cluster.dir().join("work").join(key), &mounts);
        let at = mounted.path();
        assert_eq!(fs::read(at.join("third")).unwrap(), vec![3; 100_000]);
        assert!(!at.join("gone").exists());
        let dir: Vec<_> = fs::read_dir(at.join("dir"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(dir, ["new"]);
        assert_eq!(fs::read_to_string(at.join("stays")).unwrap(), "1");
        fs::write(at.join("dir/written"), "w").unwrap();
        fs::remove_file(at.join("stays")).unwrap();
        drop(mounted);
        mounts
    }

    fn page(&self) -> serde_json::Value {
        let page = fs::read(self.cluster.run_dir().join("snapshotter.json")).unwrap();
        serde_json::from_slice(&page).unwrap()
    }
}

fn lower(mounts: &[Mount]) -> Vec<String> {
    let options = mounts[0].options.iter();
    let lower = options
        .filter_map(|option| option.strip_prefix("lowerdir="))
        .next()
        .unwrap();
    lower.split(':').map(str::to_owned).collect()
}

fn layers_are_shared(fast_view: &str) {
    let mut scene = Scene::new(&format!("[node]\nfast_view = \"{fast_view}\"\n"));
    let image = Image::new(&scene.cluster.dir().join("layout"));
    let pulled = scene.pull(&image);
    if fast_view == "auto" {
        scene.cluster.view(&pulled.manifest).unwrap();
    }
    let layers = image.layers("registry.invalid/i:1");
    let top = unpack(&scene.client, "default", &layers).unwrap();
    let usage = scene.client.usage(&top).unwrap();
    assert_eq!((usage.size, usage.inodes), (0, 0));
    let mounts = scene.check("one", &top);
    let views = scene.cluster.run_dir().join("view").display().to_string();
    match fast_view {
        "auto" => assert!(lower(&mounts).len() == 1 && lower(&mounts)[0].starts_with(&views)),
        _ => assert_eq!(lower(&mounts).len(), 3),
    }
    // Another namespace has its own names for what it made itself, and the same layers.
    assert_eq!(unpack(&scene.client, "k8s.io", &layers).unwrap(), top);
    // What a build makes of it.
    scene.client.commit("built", "one").unwrap();
    let mounts = scene.client.prepare("two", "built").unwrap();
    assert_eq!(
        lower(&mounts).len(),
        if fast_view == "auto" { 2 } else { 4 }
    );
    let mounted = Mounted::new(&scene.cluster.dir().join("work/two"), &mounts);
    assert_eq!(
        fs::read_to_string(mounted.path().join("dir/written")).unwrap(),
        "w"
    );
    assert!(!mounted.path().join("stays").exists());
    drop(mounted);

    // Killed and started again, it has all of it.
    let before = scene.client.list(&[]).unwrap();
    scene.cluster.kill(Part::Node).unwrap();
    scene.cluster.start_part(Part::Node, None).unwrap();
    scene.cluster.wait_ready().unwrap();
    if fast_view == "auto" {
        scene.cluster.view(&pulled.manifest).unwrap();
    }
    scene.client = Client::connect(&scene.cluster.run_dir());
    assert_eq!(scene.client.list(&[]).unwrap(), before);
    assert_eq!(scene.client.mounts("two").unwrap(), mounts);
    let mounted = Mounted::new(&scene.cluster.dir().join("work/two"), &mounts);
    assert!(mounted.path().join("third").exists());
    drop(mounted);
    std::thread::sleep(PAGE);
    let page = scene.page();
    assert_eq!(
        (&page["snapshots_of_layers"], &page["snapshots"]),
        (&3.into(), &5.into())
    );
}

#[test]
fn layers_are_shared_by_the_fast_view() {
    layers_are_shared("auto");
}

#[test]
fn layers_are_shared_one_by_one() {
    layers_are_shared("off");
}

#[test]
fn what_snapshots_stand_on_outlives_its_image() {
    let scene = Scene::new("[node]\nfast_view = \"off\"\n");
    let image = Image::new(&scene.cluster.dir().join("layout"));
    scene.pull(&image);
    let top = unpack(
        &scene.client,
        "default",
        &image.layers("registry.invalid/i:1"),
    )
    .unwrap();
    // metad has to have been told.
    std::thread::sleep(Duration::from_secs(1));
    let name = image.layout.reference("i");
    scene.cluster.harbour(["rm", &name]).unwrap();
    let count = |listing| {
        scene
            .cluster
            .json(listing)
            .unwrap()
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((count("images"), count("layers")), (0, 3));
    scene.check("one", &top);
    // They go when nothing stands on them any more.
    scene.client.remove("one").unwrap();
    let mut name = top;
    while !name.is_empty() {
        let parent = scene.client.stat(&name).unwrap().parent;
        scene.client.remove(&name).unwrap();
        name = parent;
    }
    shell::until("the layers are gone", LIMIT, || {
        Ok((count("layers") == 0).then_some(()))
    })
    .unwrap();
}

#[test]
fn what_is_missing_is_pulled_once_and_what_cannot_be_is_left_to_containerd() {
    let registry = Registry::start().unwrap();
    let port = web::free_port().unwrap();
    let host = registry.host();
    let toml = format!(
        "[snapshotter]\nmetrics = \"127.0.0.1:{port}\"\n[registry.\"{host}\"]\ninsecure = true\n"
    );
    let scene = Scene::new(&toml);
    let image = Image::new(&scene.cluster.dir().join("layout"));
    let name = format!("{host}/i:1");
    let from = image.layout.reference("i");
    let to = format!("docker://{name}");
    let copy = ["copy", "-q", "--dest-tls-verify=false", &from, &to];
    shell::check("skopeo", copy, LIMIT).unwrap();
    let layers = image.layers(&name);
    let top = unpack(&scene.client, "default", &layers).unwrap();
    scene.check("one", &top);
    assert_eq!(
        scene
            .cluster
            .json("images")
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        1
    );
    std::thread::sleep(PAGE);
    let page = scene.page();
    assert_eq!(
        (&page["pulls"], &page["layers_shared"]),
        (&1.into(), &3.into())
    );

    // One that the registry does not have either.
    let other = Image::of(
        &scene.cluster.dir().join("other"),
        &[vec![Entry::file("x", "x")]],
    );
    let unknown = other.layers(&format!("{host}/nothing:1"));
    let mounts = unpack(&scene.client, "default", &unknown)
        .unwrap_err()
        .unwrap();
    assert_eq!(mounts[0].r#type, "bind");
    // And containerd goes on by itself.
    let key = format!("default/0/extract-1 {}", unknown[0].0);
    let mounted = Mounted::new(&scene.cluster.dir().join("work/x"), &mounts);
    fs::write(mounted.path().join("x"), "x").unwrap();
    drop(mounted);
    let name = format!("default/9/{}", unknown[0].0);
    scene.client.commit(&name, &key).unwrap();
    scene.client.prepare("container", &name).unwrap();
    // Without an image's name there is nothing to pull, and nothing to be asked twice.
    let bare = labels(&[(REF, &other.layers("")[0].0)]);
    scene.client.prepare_with("bare", "", bare).unwrap();
    let metrics = web::get(port, "/metrics").unwrap();
    for line in [
        "harbour_snapshotter_layers_shared_total 3",
        "harbour_snapshotter_fallbacks_total{reason=\"pull-failed\"} 1",
        "harbour_snapshotter_fallbacks_total{reason=\"not-in-pool\"} 1",
        "harbour_snapshotter_pulls_total{outcome=\"failed\"} 1",
        "harbour_snapshotter_layer_snapshots 3",
    ] {
        assert!(
            metrics.lines().any(|given| given == line),
            "{line}\n{metrics}"
        );
    }
    let log = scene.cluster.log(Part::Node);
    assert!(
        log.contains("containerd fetches and unpacks a layer by itself"),
        "{log}"
    );
}

#[test]
fn an_image_of_many_layers_fits_one_mount() {
    let scene = Scene::new("[node]\nfast_view = \"off\"\n");
    let layers: Vec<_> = (0..120)
        .map(|n| vec![Entry::file(format!("layer-{n}"), n.to_string())])
        .collect();
    let image = Image::of(&scene.cluster.dir().join("tall"), &layers);
    scene.pull(&image);
    let top = unpack(
        &scene.client,
        "default",
        &image.layers("registry.invalid/i:1"),
    )
    .unwrap();
    let mounts = scene.client.prepare("one", &top).unwrap();
    // However long the run directory's own name is: clients give names from the directory that all are in.
    let links = scene.cluster.run_dir().join("l");
    let names = lower(&mounts);
    let short = |dir: &String| {
        Path::new(dir).parent() == Some(&links) && dir.len() - 8 < links.as_os_str().len() + 2
    };
    assert!(names.len() == 120 && names.iter().all(short), "{names:?}");
    let mounted = Mounted::new(&scene.cluster.dir().join("work/one"), &mounts);
    assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), 120);
    assert_eq!(
        fs::read_to_string(mounted.path().join("layer-7")).unwrap(),
        "7"
    );
}
