//! What Podman and CRI-O read: an *additional image store* and an *additional layer store*, as
//! containers/storage has them.
//!
//! ```text
//! store/overlay/<layer>/{diff,link,lower}     diff leads to layers/…; lower names those below
//! store/overlay/l/<6 characters>              leads to a layer's diff, with a name that is short
//! store/overlay-layers/layers.{json,lock}
//! store/overlay-images/images.{json,lock}
//! store/overlay-images/<image>/…              manifest and config
//! layerstore/<base64 of a reference>/<digest of a blob>/{diff,info,blob,use}
//! ```
//!
//! A *layer* here is a layer on top of certain others: its name is the chain of them, as engines
//! compute it. So there are as many as images have layers, with up to six names in each. Only the
//! directories are kept; what is in them is made when it is looked at. The two lists are made at the
//! first look, and each state of them is a node of its own: engines see a new time and read again,
//! and who reads one state gets all of it.
//!
//! Engines make containers of `link` and `lower`, and write these names into layers that they put on
//! top of ours. So they come from the layers' digests and nothing else.

mod records;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use harbour_image::{digest::Digest, index::FileType, reference::Reference};

pub(crate) use self::records::DocumentFacts;
use self::records::{BlobRecord, ImageRecord, LayerRecord, file_name};
use super::{
    Child, Kind, Target,
    build::{Leaf, Plan, cookie, sort_by_cookie},
};
use crate::source::{ImageEntry, Snapshot};

/// Longest name in bytes.
const NAME_MAX: usize = 255;
/// When an image was made that does not say so.
const LONG_AGO: &str = "1970-01-01T00:00:00Z";
/// Most that is looked for at the end of a chain of layers, which cannot be longer than a config.
const DEPTH_MAX: usize = 1 << 16;

/// Members of directories that are made when they are looked at, by the end of their numbers.
mod member {
    pub(super) const DIFF: u64 = 1;
    pub(super) const LINK: u64 = 2;
    pub(super) const LOWER: u64 = 3;
    pub(super) const EMPTY: u64 = 4;
    pub(super) const MERGED: u64 = 5;
    pub(super) const WORK: u64 = 6;
    pub(super) const INFO: u64 = 7;
    pub(super) const BLOB: u64 = 8;
    pub(super) const USE: u64 = 9;
}

/// Everything that the stores show of one snapshot.
#[derive(Debug, Default)]
pub(crate) struct Store {
    snapshot: Arc<Snapshot>,
    /// Path of the layers, from the root of the host.
    layers_dir: String,
    /// By place in the snapshot's layers; `None` for one that is not shown.
    lowers: Vec<Option<Lower>>,
    /// Parents come before children.
    chains: Vec<Chain>,
    images: Vec<Image>,
}

/// A layer's names.
#[derive(Debug)]
struct Lower {
    dir: String,
    link: String,
}

/// A layer on top of others.
#[derive(Debug)]
struct Chain {
    id: Digest,
    parent: Option<u32>,
    /// Place in the snapshot's layers.
    layer: u32,
    print: u64,
}

/// An image by its config, with all its names.
#[derive(Debug)]
struct Image {
    config: Digest,
    manifests: Vec<Digest>,
    top: Option<u32>,
    names: Vec<String>,
}

/// What a directory that is made when it is looked at shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A layer of the image store.
    Chain(u32),
    /// A layer of the layer store: place in the snapshot's layers, and in its blobs.
    Blob(u32, u32),
}

/// A list for engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Page {
    /// `layers.json`.
    Layers,
    /// `images.json`.
    Images,
}

/// What kind of file a member of a made directory is; 0 is the directory.
pub(super) const fn file_type(member: u64) -> FileType {
    match member {
        0 | member::EMPTY | member::MERGED | member::WORK => FileType::Dir,
        member::DIFF | member::USE => FileType::Symlink,
        _ => FileType::File,
    }
}

impl Store {
    /// What is to be shown of `snapshot`, whose views have these names and links.
    pub(super) fn new(
        snapshot: &Arc<Snapshot>,
        names: &HashMap<u32, String>,
        links: &HashMap<u32, String>,
        mountpoint: &Path,
    ) -> Self {
        let lower = |number: &u32| {
            let (dir, link) = (names.get(number)?.clone(), links.get(number)?.clone());
            Some(Lower { dir, link })
        };
        let layers = &snapshot.layers;
        let mut store = Self {
            snapshot: Arc::clone(snapshot),
            layers_dir: format!("{}/layers", mountpoint.display()),
            lowers: layers.iter().map(|layer| lower(&layer.number)).collect(),
            chains: Vec::new(),
            images: Vec::new(),
        };
        let places: HashMap<Digest, u32> = (0..)
            .zip(layers)
            .filter(|(place, _)| store.lower(*place).is_some())
            .map(|(place, layer)| (layer.diff_id, place))
            .collect();
        let mut entries: Vec<&ImageEntry> = snapshot.images.iter().collect();
        entries.sort_by_key(|image| (&image.registry, &image.repository, &image.tag));
        let mut chains = HashMap::new();
        let mut images = HashMap::new();
        for entry in entries {
            store.add(entry, &places, &mut chains, &mut images);
        }
        store
    }

    /// Adds an image, unless a layer of it is not shown.
    fn add(
        &mut self,
        entry: &ImageEntry,
        places: &HashMap<Digest, u32>,
        chains: &mut HashMap<Digest, u32>,
        images: &mut HashMap<Digest, usize>,
    ) {
        let known = entry
            .diff_ids
            .iter()
            .all(|layer| places.contains_key(layer));
        if !known {
            return;
        }
        let mut top: Option<u32> = None;
        for diff_id in &entry.diff_ids {
            let parent = top.and_then(|top| self.chains.get(top as usize));
            let id = parent.map_or(*diff_id, |parent| {
                Digest::of(format!("{}+{}", parent.id.hex(), diff_id.hex()).as_bytes())
            });
            let layer = places[diff_id];
            let mut hasher = DefaultHasher::new();
            parent.map(|parent| parent.print).hash(&mut hasher);
            if let Some(lower) = self.lower(layer) {
                (&lower.dir, &lower.link).hash(&mut hasher);
            }
            let chain = chains.entry(id).or_insert_with(|| {
                self.chains.push(Chain {
                    id,
                    parent: top,
                    layer,
                    print: hasher.finish(),
                });
                (self.chains.len() - 1) as u32
            });
            top = Some(*chain);
        }
        let place = *images.entry(entry.config).or_insert_with(|| {
            self.images.push(Image {
                config: entry.config,
                manifests: Vec::new(),
                top,
                names: Vec::new(),
            });
            self.images.len() - 1
        });
        let image = &mut self.images[place];
        if !image.manifests.contains(&entry.manifest) {
            image.manifests.push(entry.manifest);
        }
        image.names.extend(full_name(entry));
    }

    /// Puts all names into `plan`.
    pub(super) fn lay_out(&self, plan: &mut Plan) {
        for dir in ["overlay/l", "overlay-layers", "overlay-images"] {
            plan.dir(&format!("store/{dir}"));
        }
        plan.dir("layerstore");
        let mut linked = HashSet::new();
        for chain in &self.chains {
            let lower = self.lower(chain.layer);
            let Some(lower) = lower.filter(|_| linked.insert(chain.layer)) else {
                continue;
            };
            // Podman 5.8 takes the layer's name out of it.
            let target = format!("../{}/diff", chain.id.hex());
            plan.put("store/overlay/l", &lower.link, Leaf::Symlink(target));
        }
        for (place, chain) in (0..).zip(&self.chains) {
            let item = Item::Chain(place);
            plan.put("store/overlay", &chain.id.hex(), Leaf::Made(item));
        }
        for image in &self.images {
            let dir = format!("store/overlay-images/{}", image.config.hex());
            plan.dir(&dir);
            for (key, digest) in image.documents() {
                plan.put(&dir, &file_name(&key), Leaf::Document(digest));
            }
        }
        let (layers, images) = self.page_prints();
        for (dir, name, page, print) in [
            ("store/overlay-layers", "layers", Page::Layers, layers),
            ("store/overlay-images", "images", Page::Images, images),
        ] {
            plan.put(dir, &format!("{name}.json"), Leaf::Page(page, print));
            plan.put(dir, &format!("{name}.lock"), Leaf::Bytes(Vec::new()));
        }
        self.lay_out_blobs(plan);
    }

    fn lay_out_blobs(&self, plan: &mut Plan) {
        for image in &self.images {
            for name in &image.names {
                let name = STANDARD.encode(name);
                if name.len() > NAME_MAX || name.contains('/') {
                    continue;
                }
                let dir = format!("layerstore/{name}");
                plan.dir(&dir);
                for chain in self.chain(image.top) {
                    for (blob, entry) in
                        (0..).zip(&self.snapshot.layers[chain.layer as usize].blobs)
                    {
                        let item = Item::Blob(chain.layer, blob);
                        plan.put(&dir, &entry.digest.to_string(), Leaf::Made(item));
                    }
                }
            }
        }
    }

    /// Prints of what the two lists say.
    fn page_prints(&self) -> (u64, u64) {
        let (mut layers, mut images) = (DefaultHasher::new(), DefaultHasher::new());
        for chain in &self.chains {
            chain.id.hash(&mut layers);
            let blob = self.snapshot.layers[chain.layer as usize].blobs.first();
            blob.map(|blob| blob.digest).hash(&mut layers);
        }
        for image in &self.images {
            (image.config, &image.manifests, &image.names).hash(&mut images);
        }
        (layers.finish(), images.finish())
    }

    /// What tells two states of a directory apart.
    pub(super) fn print(&self, item: Item) -> u64 {
        match item {
            Item::Chain(place) => self
                .chains
                .get(place as usize)
                .map_or(0, |chain| chain.print),
            Item::Blob(layer, _) => {
                let mut hasher = DefaultHasher::new();
                self.lower(layer).map(|lower| &lower.dir).hash(&mut hasher);
                hasher.finish()
            }
        }
    }

    /// What is in the directory with number `dir`.
    pub(super) fn members(&self, dir: u64, item: Item) -> Vec<Child> {
        let parent = match item {
            Item::Chain(place) => self.chains.get(place as usize).map(|chain| chain.parent),
            Item::Blob(..) => None,
        };
        let names: &[(&str, u64)] = match parent {
            Some(Some(_)) => &[
                ("diff", member::DIFF),
                ("link", member::LINK),
                ("lower", member::LOWER),
                ("merged", member::MERGED),
                ("work", member::WORK),
            ],
            // The lowest has nothing below, so engines mount it over an empty directory.
            Some(None) => &[
                ("diff", member::DIFF),
                ("empty", member::EMPTY),
                ("link", member::LINK),
                ("merged", member::MERGED),
                ("work", member::WORK),
            ],
            None => &[
                ("blob", member::BLOB),
                ("diff", member::DIFF),
                ("info", member::INFO),
                ("use", member::USE),
            ],
        };
        let child = |(name, member): &(&str, u64)| Child {
            name: (*name).into(),
            target: Target::Control(dir + member),
            cookie: cookie(name.as_bytes()),
        };
        let mut children: Vec<Child> = names.iter().map(child).collect();
        sort_by_cookie(&mut children);
        children
    }

    /// One of [`Self::members`].
    pub(super) fn member(&self, item: Item, member: u64) -> Option<Kind> {
        let (layer, chain) = match item {
            Item::Chain(place) => {
                let chain = self.chains.get(place as usize)?;
                (chain.layer, Some(chain))
            }
            Item::Blob(layer, _) => (layer, None),
        };
        let lower = self.lower(layer)?;
        Some(match (member, item) {
            // Engines look themselves where it leads, and refuse to when it is relative.
            (member::DIFF, _) => Kind::Symlink(format!("{}/{}", self.layers_dir, lower.dir)),
            (member::LINK, _) => Kind::Bytes(lower.link.as_bytes().into()),
            (member::LOWER, _) => Kind::Bytes(self.below(chain?).into_bytes().into()),
            (member::EMPTY | member::MERGED | member::WORK, _) => Kind::Dir(Vec::new()),
            (member::INFO, Item::Blob(layer, blob)) => {
                let layer = self.snapshot.layers.get(layer as usize)?;
                let record = LayerRecord {
                    blob: layer.blobs.get(blob as usize).map(BlobRecord::from),
                    ..LayerRecord::of(&layer.diff_id, layer.unpacked_bytes)
                };
                Kind::Bytes(serde_json::to_vec(&record).ok()?.into())
            }
            (member::BLOB, _) => Kind::Bytes(Box::default()),
            // Engines try to make this file to say that they use the layer, and take "not found" for
            // a store that does not want to know. On a mount that is read-only they would hear that;
            // a link to nowhere has them hear what they know.
            (member::USE, _) => Kind::Symlink("nobody/asks".into()),
            _ => return None,
        })
    }

    /// What is below a layer, topmost first, as `lower` has it. The kernel takes a directory once in
    /// an overlay; one that an image has twice counts where it is highest, as what it puts there
    /// covers what it put lower down.
    fn below(&self, chain: &Chain) -> String {
        let mut seen = vec![chain.layer];
        let mut text = String::new();
        for below in self.chain(chain.parent) {
            if seen.contains(&below.layer) {
                continue;
            }
            seen.push(below.layer);
            if let Some(lower) = self.lower(below.layer) {
                let colon = if text.is_empty() { "" } else { ":" };
                text.push_str(&format!("{colon}l/{}", lower.link));
            }
        }
        text
    }

    /// The layers of a chain from its top down.
    fn chain(&self, top: Option<u32>) -> impl Iterator<Item = &Chain> {
        let at = |place: Option<u32>| self.chains.get(place? as usize);
        std::iter::successors(at(top), move |chain| at(chain.parent)).take(DEPTH_MAX)
    }

    fn lower(&self, layer: u32) -> Option<&Lower> {
        self.lowers.get(layer as usize)?.as_ref()
    }

    /// `layers.json`.
    pub(crate) fn layers_page(&self) -> serde_json::Result<Vec<u8>> {
        let records = self.chains.iter().map(|chain| {
            let layer = &self.snapshot.layers[chain.layer as usize];
            let parent = chain
                .parent
                .map(|parent| self.chains[parent as usize].id.hex());
            LayerRecord {
                id: Some(chain.id.hex()),
                parent,
                blob: layer.blobs.first().map(BlobRecord::from),
                ..LayerRecord::of(&layer.diff_id, layer.unpacked_bytes)
            }
        });
        serde_json::to_vec(&records.collect::<Vec<_>>())
    }

    /// Manifests and configs that `images.json` speaks of; those of configs with `true`.
    pub(crate) fn documents(&self) -> impl Iterator<Item = (Digest, bool)> {
        self.images.iter().flat_map(|image| {
            let manifests = image.manifests.iter().map(|manifest| (*manifest, false));
            manifests.chain([(image.config, true)])
        })
    }

    /// `images.json`, without images of which `facts` knows a document not.
    pub(crate) fn images_page(
        &self,
        facts: &HashMap<Digest, DocumentFacts>,
    ) -> serde_json::Result<Vec<u8>> {
        let records = (self.images.iter()).filter_map(|image| self.image_record(image, facts));
        serde_json::to_vec(&records.collect::<Vec<_>>())
    }

    fn image_record<'a>(
        &self,
        image: &'a Image,
        facts: &'a HashMap<Digest, DocumentFacts>,
    ) -> Option<ImageRecord<'a>> {
        let (mut sizes, mut digests) = (BTreeMap::new(), BTreeMap::new());
        for (key, digest) in image.documents() {
            sizes.insert(key.clone(), facts.get(&digest)?.len);
            digests.insert(key, digest.to_string());
        }
        let created = facts.get(&image.config)?.created.as_deref();
        let top = image.top.map(|top| self.chains[top as usize].id.hex());
        Some(ImageRecord {
            id: image.config.hex(),
            digest: image.manifests.first()?.to_string(),
            names: &image.names,
            layer: top.unwrap_or_default(),
            metadata: "{}",
            created: created.unwrap_or(LONG_AGO),
            big_data_names: sizes.keys().cloned().collect(),
            big_data_sizes: sizes,
            big_data_digests: digests,
        })
    }
}

impl Image {
    /// Documents under the keys that engines look for them by.
    fn documents(&self) -> impl Iterator<Item = (String, Digest)> {
        let first = self
            .manifests
            .first()
            .map(|digest| ("manifest".to_owned(), *digest));
        let manifests =
            (self.manifests.iter()).map(|digest| (format!("manifest-{digest}"), *digest));
        let config = (self.config.to_string(), self.config);
        first.into_iter().chain(manifests).chain([config])
    }
}

/// What engines call an image, if its name is one for them.
fn full_name(image: &ImageEntry) -> Option<String> {
    let ImageEntry {
        registry,
        repository,
        tag,
        ..
    } = image;
    let mark = if tag.contains(':') { '@' } else { ':' };
    let name = format!("{registry}/{repository}{mark}{tag}");
    let parsed: Reference = name.parse().ok()?;
    (parsed.registry() == registry && parsed.to_string() == name).then_some(name)
}
