//! What is wanted of a data-root: a file for each image, in `DATA-ROOT/harbour/images`.

use std::path::PathBuf;

use anyhow::Context as _;
use harbour_image::{digest::Digest, manifest::CONFIG_MAX, reference::ImageName};
use serde::{Deserialize, Serialize};

use super::{
    files::{self, Scratch},
    root::DataRoot,
};

/// Version of the files; one of a later version is left to the program that wrote it.
const VERSION: u32 = 1;

/// Largest of the files: a config, written as a text in JSON, and some bytes for each layer.
const RECORD_MAX: u64 = 2 * CONFIG_MAX + (1 << 20);

/// How far an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Docker will have it from its next start on.
    Pending,
    /// Docker has it.
    Attached,
    /// Docker had it, and somebody removed it there: it stays away until it is attached again.
    Removed,
    /// Docker will not have it any more from its next start on.
    Leaving,
}

impl State {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Attached => "attached",
            Self::Removed => "removed",
            Self::Leaving => "leaving",
        }
    }
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of its tar stream.
    pub diff_id: String,
    /// Digest of its blob.
    pub blob: String,
    /// Bytes of its files, as Docker counts them.
    pub size_bytes: u64,
}

/// An image that is to be in the data-root, or not any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// First part of its name in the catalogue.
    pub registry: String,
    /// What stands between.
    pub repository: String,
    /// Tag, or digest.
    pub tag: String,
    /// Digest of its manifest.
    pub manifest: String,
    /// Its names in Docker.
    pub names: Vec<String>,
    /// Its config, which names its layers; Docker's ID of an image is the digest of this.
    pub config: String,
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// The mount that has them.
    pub mount: PathBuf,
    /// How far it is.
    pub state: State,
    /// It follows the catalogue.
    pub watched: bool,
    /// Those names that it has from us: others it had before, and they are not ours to take.
    #[serde(default)]
    pub given: Vec<String>,
    /// Names that it had from us before, each with the ID of the image that it meant.
    pub former: Vec<(String, String)>,
}

impl Record {
    /// One that is wanted from now on.
    pub fn new(name: &ImageName, manifest: &Digest, config: String, mount: PathBuf) -> Self {
        Self {
            version: VERSION,
            registry: name.registry.clone(),
            repository: name.repository.clone(),
            tag: name.tag.clone(),
            manifest: manifest.to_string(),
            names: super::name::names(name, manifest),
            config,
            layers: Vec::new(),
            mount,
            state: State::Pending,
            watched: false,
            given: Vec::new(),
            former: Vec::new(),
        }
    }

    /// Its name in the catalogue.
    pub fn image(&self) -> ImageName {
        ImageName {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            tag: self.tag.clone(),
        }
    }

    /// What Docker calls it first.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Docker's ID of the image.
    pub fn id(&self) -> Digest {
        Digest::of(self.config.as_bytes())
    }

    /// Diff IDs of its layers, the lowest first.
    ///
    /// # Errors
    /// A file that somebody else has written.
    pub fn diff_ids(&self) -> anyhow::Result<Vec<Digest>> {
        let parse = |layer: &Layer| layer.diff_id.parse().map_err(anyhow::Error::new);
        self.layers.iter().map(parse).collect()
    }

    /// Whether it is to be in Docker.
    pub fn is_wanted(&self) -> bool {
        matches!(self.state, State::Pending | State::Attached)
    }

    /// Takes the place of a record of the same name: names that go with it are not forgotten.
    pub fn replace(&mut self, before: &Self) {
        self.former.clone_from(&before.former);
        let id = before.id();
        if id == self.id() {
            self.given.clone_from(&before.given);
            return;
        }
        for name in &before.given {
            self.former.push((name.clone(), id.to_string()));
        }
    }

    /// Whether it wants a name for an image.
    pub fn wants(&self, name: &String, id: &str) -> bool {
        self.is_wanted() && self.names.contains(name) && self.id().to_string() == id
    }

    fn file(root: &DataRoot, image: &ImageName) -> PathBuf {
        let text = format!("{}/{}:{}", image.registry, image.repository, image.tag);
        let name = Digest::of(text.as_bytes()).short();
        root.own().join("images").join(name)
    }

    /// The record of an image, if there is one.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of(root: &DataRoot, image: &ImageName) -> anyhow::Result<Option<Self>> {
        let path = Self::file(root, image);
        let Some(bytes) = files::read(&path, RECORD_MAX)? else {
            return Ok(None);
        };
        let what = || format!("{} is damaged: remove it", path.display());
        let record: Self = serde_json::from_slice(&bytes).with_context(what)?;
        anyhow::ensure!(
            record.version == VERSION,
            "{} is of version {}, which this harbour does not know",
            path.display(),
            record.version
        );
        Ok(Some(record))
    }

    /// All records, in the order of their names in the catalogue.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn all(root: &DataRoot) -> anyhow::Result<Vec<Self>> {
        let dir = root.own().join("images");
        let mut all = Vec::new();
        for name in files::names(&dir)? {
            let path = dir.join(&name);
            let Some(bytes) = files::read(&path, RECORD_MAX)? else {
                continue;
            };
            let what = || format!("{} is damaged: remove it", path.display());
            all.push(serde_json::from_slice::<Self>(&bytes).with_context(what)?);
        }
        all.sort_by(|a, b| {
            let key = |r: &Self| (r.registry.clone(), r.repository.clone(), r.tag.clone());
            key(a).cmp(&key(b))
        });
        Ok(all)
    }

    /// Writes it down.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn write(&self, root: &DataRoot, scratch: &Scratch) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        scratch.replace(&Self::file(root, &self.image()), &bytes, 0o600)
    }

    /// Forgets it.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn forget(&self, root: &DataRoot, scratch: &Scratch) -> anyhow::Result<()> {
        scratch.remove(&Self::file(root, &self.image()))
    }
}

/// The layers of an image as chains: what a layer's directory holds depends on those below it.
pub(super) fn chains(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chains.push(diff_id.chained(chains.last().copied()));
    }
    chains
}
