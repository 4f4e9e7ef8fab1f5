//! From a snapshot to directories.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use harbour_image::{digest::Digest, object::hash_object, tree::Time};

use super::{
    Child, Control, ControlNode, Kind, MadeDir, Status, Target, names,
    store::{Item, Page, Store},
};
use crate::{
    inode::{Part, control_number, made_number},
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
pub(super) enum Leaf {
    Dir,
    Symlink(String),
    Document(Digest),
    Status(Status),
    Root(u32),
    Erofs(u32, Part),
    Bytes(Vec<u8>),
    /// With a print of what will stand there: another content is another node, so that who reads one
    /// state of it never gets the rest from the next.
    Page(Page, u64),
    Made(Item),
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
    /// and time. Links that have to be absolute go through `mountpoint`.
    pub(crate) fn next(&self, snapshot: &Arc<Snapshot>, mountpoint: &Path, now: Time) -> Self {
        let names = names::assign(snapshot, &self.names);
        let links = names::assign_links(snapshot, &self.links);
        let store = Store::new(snapshot, &names, &links, mountpoint);
        let plan = Plan::new(snapshot, &names, &store);
        let numbers = self.number(&plan);
        let mut nodes = HashMap::new();
        let mut homes = HashMap::new();
        let made = plan.freeze(&numbers, &mut |number, node| {
            let node = self.keep_time(number, node, now);
            for child in node.children().unwrap_or_default() {
                if let Target::Root(view) = child.target {
                    homes.insert(view, number);
                }
            }
            nodes.insert(number, Arc::new(node));
        });
        let made = made.into_iter().map(|(number, parent, item)| {
            let print = store.print(item);
            let before = (self.made.get(&number)).filter(|before| before.print == print);
            let dir = MadeDir {
                parent,
                item,
                print,
                mtime: before.map_or(now, |before| before.mtime),
            };
            (number, dir)
        });
        Self {
            generation: snapshot.generation,
            nodes,
            numbers,
            names,
            homes,
            links,
            made: made.collect(),
            store: Arc::new(store),
        }
    }

    /// Numbers for the paths of `plan`. Those that had one keep it, whatever the order they come in
    /// now.
    fn number(&self, plan: &Plan) -> HashMap<Box<str>, u64> {
        let mut numbers: HashMap<Box<str>, u64> = HashMap::new();
        let mut taken: HashSet<u64> = HashSet::new();
        for (path, _) in plan.paths() {
            if let Some(number) = self.numbers.get(path.as_str()) {
                numbers.insert(path.into(), *number);
                taken.insert(*number);
            }
        }
        for (path, made) in plan.paths() {
            let choice = if made { made_number } else { control_number };
            numbers.entry(path.as_str().into()).or_insert_with(|| {
                let number = (0..)
                    .map(|attempt| choice(&path, attempt))
                    .find(|number| taken.insert(*number));
                number.unwrap_or(0)
            });
        }
        numbers
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
pub(super) struct Plan {
    dirs: BTreeMap<String, BTreeMap<String, Leaf>>,
}

impl Plan {
    fn new(snapshot: &Snapshot, names: &HashMap<u32, String>, store: &Store) -> Self {
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
        store.lay_out(&mut plan);
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
    pub(super) fn dir(&mut self, path: &str) {
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

    pub(super) fn put(&mut self, dir: &str, name: &str, leaf: Leaf) {
        self.dirs
            .entry(dir.to_owned())
            .or_default()
            .insert(name.to_owned(), leaf);
    }

    /// What tells nodes that are ours apart, mostly their paths; and whether it is a directory whose
    /// members are made when they are looked at.
    fn paths(&self) -> impl Iterator<Item = (String, bool)> {
        let named = self.dirs.iter().flat_map(|(dir, names)| {
            names
                .iter()
                .filter(|(_, leaf)| !matches!(leaf, Leaf::Root(_) | Leaf::Erofs(..)))
                .map(|(name, leaf)| (key(dir, name, leaf), matches!(leaf, Leaf::Made(_))))
        });
        std::iter::once((String::new(), false)).chain(named)
    }

    /// Gives out all nodes, with numbers for names. Returns directories that are made when they are
    /// looked at, with the number of the directory above.
    fn freeze(
        self,
        numbers: &HashMap<Box<str>, u64>,
        give: &mut dyn FnMut(u64, ControlNode),
    ) -> Vec<(u64, u64, Item)> {
        let number = |path: &str| numbers.get(path).copied().unwrap_or(0);
        let mtime = Time::default();
        let mut made = Vec::new();
        for (dir, names) in self.dirs {
            let this = number(&dir);
            let parent = number(dir.rsplit_once('/').map_or("", |(parent, _)| parent));
            let mut children = Vec::with_capacity(names.len());
            for (name, leaf) in names {
                let child = number(&key(&dir, &name, &leaf));
                let target = match leaf {
                    Leaf::Root(view) => Target::Root(view),
                    Leaf::Erofs(view, part) => Target::Erofs(view, part),
                    _ => Target::Control(child),
                };
                if let Leaf::Made(item) = leaf {
                    made.push((child, this, item));
                }
                let kind = match leaf {
                    Leaf::Symlink(target) => Some(Kind::Symlink(target)),
                    Leaf::Document(digest) => Some(Kind::Document(digest)),
                    Leaf::Status(page) => Some(Kind::Status(page)),
                    Leaf::Bytes(bytes) => Some(Kind::Bytes(bytes.into())),
                    Leaf::Page(page, _) => Some(Kind::Page(page)),
                    Leaf::Dir | Leaf::Root(_) | Leaf::Erofs(..) | Leaf::Made(_) => None,
                };
                if let Some(kind) = kind {
                    give(
                        child,
                        ControlNode {
                            parent: this,
                            kind,
                            mtime,
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
                    mtime,
                },
            );
        }
        made
    }
}

/// Cookies ascend and differ; two names with one hash, should they ever meet, get neighbours.
pub(super) fn sort_by_cookie(children: &mut [Child]) {
    children.sort_by(|a, b| (a.cookie, &a.name).cmp(&(b.cookie, &b.name)));
    for place in 1..children.len() {
        let before = children[place - 1].cookie;
        if children[place].cookie <= before {
            children[place].cookie = before + 1;
        }
    }
}

/// What the number of a node is made from: its path, and for a page what stands there.
fn key(dir: &str, name: &str, leaf: &Leaf) -> String {
    let path = join(dir, name);
    match leaf {
        Leaf::Page(_, print) => format!("{path}\0{print:x}"),
        _ => path,
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
