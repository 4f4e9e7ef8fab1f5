//! Which blob is which layer: `image/overlay2/distribution`. With it a `docker pull` of an image that
//! shares layers with one of ours knows those before it fetches them.
//!
//! Docker never removes these itself. What we add to them is noted in `DATA-ROOT/harbour/maps`, before it
//! is done, and taken back when no layer of ours with that content is left.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::Context as _;
use harbour_image::{
    digest::Digest,
    reference::{ImageName, LOCAL_REGISTRY},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    files::{self, Scratch},
    record::Record,
    root::DataRoot,
};

/// Largest of the files.
const FILE_MAX: u64 = 1 << 20;

/// What we have added for one blob.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Added {
    diff_id: String,
    /// The way from the blob to the layer is ours.
    by_blob: bool,
    /// Where the layer was said to come from, by us.
    repositories: BTreeSet<String>,
}

impl DataRoot {
    fn by_blob(&self, blob: &Digest) -> PathBuf {
        let dir = self.images().join("distribution/diffid-by-digest/sha256");
        dir.join(blob.hex())
    }

    fn by_layer(&self, diff_id: &Digest) -> PathBuf {
        let dir = self
            .images()
            .join("distribution/v2metadata-by-diffid/sha256");
        dir.join(diff_id.hex())
    }

    fn added(&self, blob: &Digest) -> PathBuf {
        self.own().join("maps").join(blob.hex())
    }

    /// Says of each layer of an image which blob it is.
    pub(super) fn ensure_maps(&self, scratch: &Scratch, record: &Record) -> anyhow::Result<()> {
        let repository = source(&record.image());
        for layer in &record.layers {
            let (diff_id, blob) = (layer.diff_id.parse()?, layer.blob.parse()?);
            let path = self.added(&blob);
            let known = files::read(&path, FILE_MAX)?;
            let known: Option<Added> = known.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let mut added = known.unwrap_or_default();
            added.diff_id.clone_from(&layer.diff_id);
            let missing = !self.by_blob(&blob).exists();
            let mut sources = self.sources(&diff_id)?;
            let unknown = repository
                .as_ref()
                .filter(|name| !has(&sources, &blob, name));
            if !missing && unknown.is_none() {
                continue;
            }
            added.by_blob |= missing;
            added.repositories.extend(unknown.cloned());
            scratch.replace(&path, &serde_json::to_vec(&added)?, 0o600)?;
            if missing {
                scratch.replace(&self.by_blob(&blob), layer.diff_id.as_bytes(), 0o644)?;
            }
            if let Some(name) = unknown {
                sources.push(json!({ "Digest": blob.to_string(), "SourceRepository": name }));
                let bytes = serde_json::to_vec(&sources)?;
                scratch.replace(&self.by_layer(&diff_id), &bytes, 0o644)?;
            }
        }
        Ok(())
    }

    /// Takes back what was added for layers, but for those that are ours still.
    pub(super) fn remove_maps(
        &self,
        scratch: &Scratch,
        left: &BTreeSet<Digest>,
    ) -> anyhow::Result<()> {
        let dir = self.own().join("maps");
        for name in files::names(&dir)? {
            let path = dir.join(&name);
            let bytes = files::read(&path, FILE_MAX)?.unwrap_or_default();
            let what = || format!("{} is damaged: remove it", path.display());
            let added: Added = serde_json::from_slice(&bytes).with_context(what)?;
            let blob: Digest = format!("sha256:{name}").parse().with_context(what)?;
            let diff_id: Digest = added.diff_id.parse().with_context(what)?;
            if left.contains(&diff_id) {
                continue;
            }
            if added.by_blob {
                scratch.remove(&self.by_blob(&blob))?;
            }
            let mut sources = self.sources(&diff_id)?;
            let before = sources.len();
            sources.retain(|source| {
                let ours = |name: &String| is(source, &blob, name);
                !added.repositories.iter().any(ours)
            });
            if sources.is_empty() {
                scratch.remove(&self.by_layer(&diff_id))?;
            } else if sources.len() < before {
                let bytes = serde_json::to_vec(&sources)?;
                scratch.replace(&self.by_layer(&diff_id), &bytes, 0o644)?;
            }
            scratch.remove(&path)?;
        }
        Ok(())
    }

    /// Where Docker thinks that a layer comes from.
    fn sources(&self, diff_id: &Digest) -> anyhow::Result<Vec<Value>> {
        let bytes = files::read(&self.by_layer(diff_id), FILE_MAX)?;
        // Docker begins anew when it cannot read one.
        Ok(bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default())
    }
}

/// The repository that an image comes from, when it is one of a registry.
fn source(image: &ImageName) -> Option<String> {
    let registry = image.registry.as_str();
    (registry != LOCAL_REGISTRY).then(|| format!("{registry}/{}", image.repository))
}

fn has(sources: &[Value], blob: &Digest, repository: &str) -> bool {
    sources.iter().any(|source| is(source, blob, repository))
}

fn is(source: &Value, blob: &Digest, repository: &str) -> bool {
    source["Digest"] == blob.to_string() && source["SourceRepository"] == repository
}
