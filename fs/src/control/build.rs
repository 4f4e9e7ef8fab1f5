//! From a snapshot to directories.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use harbour_image::{digest::Digest, object::hash_object, tree::Time};

use super::{Child, Control, ControlNode, Kind, Status, Target, names};
use crate::{
    inode::{Part, control_number},
    source::{ImageEntry, Snapshot},
};

/// Names that an image's directory has of itself.
const OWN: [&str; 4] = ["rootfs", "layers", "config.json", "manifest.json"];
/// Longest name in bytes, as everywhere in Linux.
const NAME_MAX: usize = 255;
/// Components of a repository: more would be longer than a path can be.
const COMPONENTS_MAX: usize = 64;
/// Cookies 0 to 2 are the start and the places behind `.` and `..`.
const COOKIE_MIN: u64 = 3;

/// A name before numbers are given.
enum Leaf {
    Dir,
    Symlink(String),
    Document(Digest),
    Status(Status),
    Root(u32),
    Erofs(u32, Part),
}

/// Position behind an entry called `name`.
pub(super) fn cookie(name: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash_object(name).id.0[..8]);
    // Positions are signed in the kernel.
    (u64::from_le_bytes(bytes) >> 1).max(COOKIE_MIN)
}

impl Control {
    /// The directories of `snapshot`, after `self`. Things that did not change keep their number
    /// and time.
    pub(crate) fn next(&self, snapshot: &Snapshot, now: Time) -> Self {
        let names = names::assign(snapshot, &self.names);
        let plan = Plan::new(snapshot, &names);
        let mut numbers: HashMap<Box<str>, u64> = HashMap::new();
        let mut taken: HashSet<u64> = HashSet::new();
        // Paths that had a number keep it, whatever the order they come in now.
        for path in plan.paths() {
            if let Some(number) = self.numbers.get(path.as_str()) {
                numbers.insert(path.into(), *number);
                taken.insert(*number);
            }
        }
        for path in plan.paths() {
            numbers.entry(path.as_str().into()).or_insert_with(|| {
                let number = (0..)
                    .map(|attempt| control_number(&path, attempt))
                    .find(|number| taken.insert(*number));
                number.unwrap_or(0)
            });
        }
        let mut nodes = HashMap::new();
        let mut homes = HashMap::new();
        plan.freeze(&numbers, &mut |number, node| {
            let node = self.keep_time(number, node, now);
            for child in node.children().unwrap_or_default() {
                if let Target::Root(view) = child.target {
                    homes.insert(view, number);
                }
            }
            nodes.insert(number, Arc::new(node));
        });
        Self {
            generation: snapshot.generation,
            nodes,
            numbers,
            names,
            homes,
        }
    }

    fn keep_time(&self, number: u64, mut node: ControlNode, now: Time) -> ControlNode {
        let before = self
            .nodes
            .get(&number)
            .filter(|before| before.kind == node.kind);
        node.mtime = before.map_or(now, |before| before.mtime);
        node
    }
}

/// Names by directory, directories by path.
#[derive(Default)]
struct Plan {
    dirs: BTreeMap<String, BTreeMap<String, Leaf>>,
}

impl Plan {
    fn new(snapshot: &Snapshot, names: &HashMap<u32, String>) -> Self {
        let mut plan = Self::default();
        for dir in ["images", "layers", "erofs", ".status", ".devices"] {
            plan.dir(dir);
        }
        plan.put(".status", "status.json", Leaf::Status(Status::Status));
        plan.put(".status", "views.json", Leaf::Status(Status::Views));
        let layer_names: HashMap<Digest, &String> = snapshot
            .layers
            .iter()
            .filter_map(|layer| Some((layer.diff_id, names.get(&layer.number)?)))
            .collect();
        for layer in &snapshot.layers {
            if let Some(name) = names.get(&layer.number) {
                plan.put("layers", name, Leaf::Root(layer.number));
                plan.erofs(name, layer.number);
            }
        }
        let mut images: Vec<&ImageEntry> = snapshot.images.iter().collect();
        images.sort_by(|a, b| {
            (&a.registry, &a.repository, &a.tag).cmp(&(&b.registry, &b.repository, &b.tag))
        });
        let mut first: HashMap<u32, String> = HashMap::new();
        for image in images {
            let Some(path) = image_path(&image.registry, &image.repository, &image.tag) else {
                tracing::warn!(
                    registry = image.registry,
                    repository = image.repository,
                    tag = image.tag,
                    "an image whose name makes no path is not shown"
                );
                continue;
            };
            if let Some(name) = names.get(&image.number) {
                plan.erofs(name, image.number);
            }
            plan.image(image, &path, &layer_names, &mut first);
        }
        plan
    }

    /// The EROFS file of a view and its parts.
    fn erofs(&mut self, name: &str, number: u32) {
        for (dir, part) in [
            ("erofs", Part::Whole),
            (".devices", Part::Head),
            (".devices", Part::Bulk),
        ] {
            let name = format!("{name}.{}", part.suffix());
            self.put(dir, &name, Leaf::Erofs(number, part));
        }
    }

    fn image(
        &mut self,
        image: &ImageEntry,
        path: &str,
        layer_names: &HashMap<Digest, &String>,
        first: &mut HashMap<u32, String>,
    ) {
        self.dir(path);
        self.put(path, "config.json", Leaf::Document(image.config));
        self.put(path, "manifest.json", Leaf::Document(image.manifest));
        let up = |depth: usize| "../".repeat(depth);
        let depth = path.split('/').count();
        let rootfs = match first.get(&image.number) {
            Some(other) => Leaf::Symlink(format!("{}{other}/rootfs", up(depth))),
            None => Leaf::Root(image.number),
        };
        first.entry(image.number).or_insert_with(|| path.to_owned());
        self.put(path, "rootfs", rootfs);
        let layers = format!("{path}/layers");
        self.dir(&layers);
        for (number, diff_id) in image.diff_ids.iter().enumerate() {
            let short = diff_id.short();
            let name = layer_names
                .get(diff_id)
                .map_or(short.as_str(), |name| name.as_str());
            self.put(
                &layers,
                &number.to_string(),
                Leaf::Symlink(format!("{}layers/{name}", up(depth + 1))),
            );
        }
    }

    /// Makes a directory and those above it.
    fn dir(&mut self, path: &str) {
        if self.dirs.contains_key(path) {
            return;
        }
        self.dirs.insert(path.to_owned(), BTreeMap::new());
        if !path.is_empty() {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            self.dir(parent);
            self.put(parent, name, Leaf::Dir);
        }
    }

    fn put(&mut self, dir: &str, name: &str, leaf: Leaf) {
        self.dirs
            .entry(dir.to_owned())
            .or_default()
            .insert(name.to_owned(), leaf);
    }

    /// Paths of all nodes that are ours.
    fn paths(&self) -> impl Iterator<Item = String> {
        let named = self.dirs.iter().flat_map(|(dir, names)| {
            names
                .iter()
                .filter(|(_, leaf)| !matches!(leaf, Leaf::Root(_) | Leaf::Erofs(..)))
                .map(|(name, _)| join(dir, name))
        });
        std::iter::once(String::new()).chain(named)
    }

    /// Gives out all nodes, with numbers for names.
    fn freeze(self, numbers: &HashMap<Box<str>, u64>, give: &mut dyn FnMut(u64, ControlNode)) {
        let number = |path: &str| numbers.get(path).copied().unwrap_or(0);
        for (dir, names) in self.dirs {
            let this = number(&dir);
            let parent = number(dir.rsplit_once('/').map_or("", |(parent, _)| parent));
            let mut children = Vec::with_capacity(names.len());
            for (name, leaf) in names {
                let path = join(&dir, &name);
                let child = number(&path);
                let (target, kind) = match leaf {
                    Leaf::Root(view) => (Target::Root(view), None),
                    Leaf::Erofs(view, part) => (Target::Erofs(view, part), None),
                    Leaf::Dir => (Target::Control(child), None),
                    Leaf::Symlink(target) => (Target::Control(child), Some(Kind::Symlink(target))),
                    Leaf::Document(digest) => {
                        (Target::Control(child), Some(Kind::Document(digest)))
                    }
                    Leaf::Status(page) => (Target::Control(child), Some(Kind::Status(page))),
                };
                if let Some(kind) = kind {
                    give(
                        child,
                        ControlNode {
                            parent: this,
                            kind,
                            mtime: Time::default(),
                        },
                    );
                }
                children.push(Child {
                    cookie: cookie(name.as_bytes()),
                    name: name.into(),
                    target,
                });
            }
            sort_by_cookie(&mut children);
            let kind = Kind::Dir(children);
            give(
                this,
                ControlNode {
                    parent,
                    kind,
                    mtime: Time::default(),
                },
            );
        }
    }
}

/// Cookies ascend and differ; two names with one hash, should they ever meet, get neighbours.
fn sort_by_cookie(children: &mut [Child]) {
    children.sort_by(|a, b| (a.cookie, &a.name).cmp(&(b.cookie, &b.name)));
    for place in 1..children.len() {
        let before = children[place - 1].cookie;
        if children[place].cookie <= before {
            children[place].cookie = before + 1;
        }
    }
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() {
        name.to_owned()
    } else {
        format!("{dir}/{name}")
    }
}

/// The directory of an image below the mount, or `None` when its name cannot be one.
pub fn image_path(registry: &str, repository: &str, tag: &str) -> Option<String> {
    let usable = |name: &str| {
        !name.is_empty()
            && name.len() < NAME_MAX
            && !matches!(name, "." | "..")
            && !name.contains(['/', '\0'])
    };
    let own = |name: &str| {
        let colon = if OWN.contains(&name) { ":" } else { "" };
        format!("{name}{colon}")
    };
    let components: Vec<&str> = repository.split('/').collect();
    let all_usable = usable(registry) && usable(tag) && components.iter().all(|name| usable(name));
    if !all_usable || components.len() > COMPONENTS_MAX {
        return None;
    }
    let below: Vec<String> = components.into_iter().chain([tag]).map(own).collect();
    Some(format!("images/{registry}/{}", below.join("/")))
}
