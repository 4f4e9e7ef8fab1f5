//! Names of images: tags that move, digests, and all tags of a repository of a real registry.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use harbour_tests::{
    cluster::{Cluster, Pulled},
    layers::{Entry, Layout, noise},
    registry::Registry,
    shell,
};

/// Bytes of each layer.
const LEN: usize = 300_000;
const LIMIT: Duration = Duration::from_secs(60);

fn layer(number: u64) -> Vec<Entry> {
    vec![Entry::file(format!("layer-{number}"), noise(number, LEN))]
}

struct Scene {
    cluster: Cluster,
    registry: Registry,
    layout: Layout,
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::start("64MiB").unwrap();
        let layout = Layout::create(&cluster.dir().join("layout")).unwrap();
        Self {
            cluster,
            registry: Registry::start().unwrap(),
            layout,
        }
    }

    /// Pushes an image of these layers under a tag.
    fn push(&mut self, tag: &str, layers: &[u64]) {
        let layers: Vec<_> = layers.iter().map(|number| layer(*number)).collect();
        // Each has a name of its own in the layout: what is pushed may be given another meaning later.
        let name = format!("{tag}-{}", self.registry.host().len() + layers.len());
        self.layout.image(&name, &layers).unwrap();
        let (from, to) = (
            self.layout.reference(&name),
            format!("docker://{}:{tag}", self.repository()),
        );
        let args = ["copy", "--quiet", "--dest-tls-verify=false", &from, &to];
        shell::check("skopeo", args, LIMIT).unwrap();
    }

    fn repository(&self) -> String {
        format!("{}/team/app", self.registry.host())
    }

    fn names(&self) -> Vec<(String, String)> {
        let images = self.cluster.json("images").unwrap();
        let images = images.as_array().unwrap().iter();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let mut names: Vec<_> = images
            .map(|image| (text(&image["tag"]), text(&image["manifest"])))
            .collect();
        names.sort();
        names
    }

    fn files(&self, image: &Pulled) -> Vec<String> {
        let root = self.cluster.rootfs(image).unwrap();
        let names = std::fs::read_dir(root).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn a_tag_that_moved_brings_only_what_is_new() {
    let mut scene = Scene::new();
    scene.push("1", &[1, 2, 3]);
    let tagged = format!("{}:1", scene.repository());
    let first = scene.cluster.pull(&tagged).unwrap();
    assert_eq!((first.layers, first.fetched), (3, 3));
    let again = scene.cluster.pull(&tagged).unwrap();
    assert_eq!(
        (again.fetched, again.fetched_bytes, again.stored_bytes),
        (0, 0, 0)
    );
    assert_eq!(again.manifest, first.manifest);
    scene.push("1", &[1, 2, 3, 4]);
    let moved = scene.cluster.pull(&tagged).unwrap();
    assert_eq!((moved.layers, moved.fetched), (4, 1));
    assert!(moved.fetched_bytes < 2 * LEN as u64, "{moved:?}");
    assert_ne!(moved.manifest, first.manifest);
    assert_eq!(
        scene.files(&moved),
        ["layer-1", "layer-2", "layer-3", "layer-4"]
    );
    assert_eq!(scene.names(), [("1".to_owned(), moved.manifest.clone())]);
    // By digest the old one is still to be had, and nothing of it has to come.
    let digest = format!("{}@{}", scene.repository(), first.manifest);
    let old = scene.cluster.pull(&digest).unwrap();
    assert_eq!((&old.manifest, old.fetched), (&first.manifest, 0));
    assert_eq!(scene.files(&old), ["layer-1", "layer-2", "layer-3"]);
    assert_eq!(scene.names().len(), 2);
    // Taking one name away leaves the layers that the other needs.
    scene.cluster.harbour(["rm", &tagged]).unwrap();
    assert_eq!(scene.files(&old), ["layer-1", "layer-2", "layer-3"]);
    scene.cluster.harbour(["audit"]).unwrap();
}

/// Names that an image's own directory has stand with a colon behind them, and are told so.
#[test]
fn a_repository_called_layers() {
    let scene = {
        let mut scene = Scene::new();
        scene.push("rootfs", &[1]);
        scene
    };
    let (from, to) = (
        format!("docker://{}:rootfs", scene.repository()),
        format!("docker://{}/team/layers:rootfs", scene.registry.host()),
    );
    let plain = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let args = [["copy", "--quiet"], plain].concat();
    shell::check("skopeo", [&args[..], &[&from, &to]].concat(), LIMIT).unwrap();
    let name = to.replace("docker://", "");
    let told = scene
        .cluster
        .harbour(["pull", "--insecure", &name])
        .unwrap()
        .text();
    let told = told.lines().last().unwrap();
    assert!(told.ends_with("/team/layers:/rootfs:/rootfs"), "{told}");
    assert!(
        std::path::Path::new(told).join("layer-1").is_file(),
        "{told}"
    );
    let images = scene.cluster.json("images").unwrap();
    assert_eq!(images[0]["rootfs"], told);
}

#[test]
fn all_tags_of_a_repository() {
    let mut scene = Scene::new();
    for (tag, layers) in [("1", &[1, 2][..]), ("2", &[1, 2, 3]), ("3-rc", &[1, 4])] {
        scene.push(tag, layers);
    }
    let repository = scene.repository();
    let pulled = scene
        .cluster
        .harbour(["pull", "--insecure", "--json", "--all-tags", &repository])
        .unwrap();
    let pulled: Vec<Pulled> = serde_json::from_slice(&pulled.stdout).unwrap();
    let tags: Vec<_> = pulled.iter().map(|image| image.tag.as_str()).collect();
    assert_eq!(tags, ["1", "2", "3-rc"]);
    // Layers that they share come once.
    assert_eq!(pulled.iter().map(|image| image.fetched).sum::<u64>(), 4);
    assert_eq!(scene.names().len(), 3);
    for (image, files) in pulled.iter().zip([2, 3, 2]) {
        assert_eq!(scene.files(image).len(), files);
    }
}

#[test]
fn what_is_no_repository_has_no_tags() {
    let mut scene = Scene::new();
    scene.push("1", &[1]);
    let host = scene.registry.host();
    for (wrong, code, text) in [
        (format!("{host}/team/app:1"), 2, "has a tag or digest"),
        (format!("{host}/team/none"), 3, "team/none"),
        (scene.layout.reference("x"), 2, "only repositories"),
    ] {
        let pull = scene
            .cluster
            .run(["pull", "--insecure", "-a", &wrong])
            .unwrap();
        assert!(pull.stderr.contains(text), "{wrong}: {}", pull.stderr);
        assert_eq!(pull.status.code(), Some(code), "{wrong}: {}", pull.stderr);
    }
    assert!(scene.names().is_empty());
}
