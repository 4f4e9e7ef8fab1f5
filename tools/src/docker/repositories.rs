//! Names of images: `image/overlay2/repositories.json`, one file, which Docker reads at its start and
//! writes whole whenever a name changes.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{
    files::{self, Scratch},
    name::repository_of,
    root::DataRoot,
};

/// Largest file of names.
const FILE_MAX: u64 = 256 << 20;

/// The file: for each repository its names, each with the ID of an image.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Names {
    #[serde(rename = "Repositories", default)]
    repositories: BTreeMap<String, BTreeMap<String, String>>,
}

/// All names, and whether they are still as they were read.
#[derive(Debug)]
pub(super) struct Repositories {
    path: PathBuf,
    names: Names,
    changed: bool,
}

impl Repositories {
    /// Reads the names of a data-root.
    pub(super) fn read(root: &DataRoot) -> anyhow::Result<Self> {
        let path = root.images().join("repositories.json");
        let bytes = files::read(&path, FILE_MAX)?.filter(|bytes| !bytes.is_empty());
        let names = match bytes {
            Some(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged", path.display()))?,
            None => Names::default(),
        };
        let changed = false;
        Ok(Self {
            path,
            names,
            changed,
        })
    }

    /// The image that a name means.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let repository = self.names.repositories.get(repository_of(name))?;
        repository.get(name).map(String::as_str)
    }

    /// Lets a name mean an image.
    pub(super) fn set(&mut self, name: &str, id: &str) {
        if self.get(name) == Some(id) {
            return;
        }
        let repository = repository_of(name).to_owned();
        let repository = self.names.repositories.entry(repository).or_default();
        repository.insert(name.to_owned(), id.to_owned());
        self.changed = true;
    }

    /// Takes a name away, if it means this image.
    pub(super) fn remove(&mut self, name: &str, id: &str) {
        if self.get(name) != Some(id) {
            return;
        }
        if let Some(repository) = self.names.repositories.get_mut(repository_of(name)) {
            repository.remove(name);
        }
        self.names.repositories.retain(|_, names| !names.is_empty());
        self.changed = true;
    }

    /// All names of an image.
    pub(super) fn names_of(&self, id: &str) -> Vec<String> {
        let names = self.names.repositories.values().flatten();
        let of_it = names.filter(|(_, its)| its.as_str() == id);
        of_it.map(|(name, _)| name.clone()).collect()
    }

    /// Writes them down, when they are not as they were. Gives whether they were not.
    pub(super) fn write(&mut self, scratch: &Scratch) -> anyhow::Result<bool> {
        if self.changed {
            let bytes = serde_json::to_vec(&self.names)?;
            scratch.replace(&self.path, &bytes, 0o600)?;
        }
        Ok(std::mem::take(&mut self.changed))
    }
}
