//! What `docker save` and `podman save` write: `manifest.json`, configs, and layers as tars.
//!
//! Two shapes: before Docker 25 every layer is `<id>/layer.tar`, with links between equal ones;
//! since then layers are `blobs/sha256/<digest>`. There is no manifest with digests, so one is
//! made, always the same for the same archive.
//!
//! Source: the "Combined Image JSON + Filesystem Changeset Format" of Docker's image
//! specification 1.2.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use super::{Slice, Store};
use crate::{
    digest::Digest,
    manifest::{
        CONFIG_MAX, Compression, Descriptor, ImageConfig, ImageManifest, LAYERS_MAX, MANIFEST_MAX,
        ManifestError, media,
    },
    reference::{LOCAL_REGISTRY, Reference},
    source::error::SourceError,
};

/// One image of an open archive.
#[derive(Debug)]
pub(crate) struct DockerArchive {
    /// Made manifest.
    pub(crate) manifest: Vec<u8>,
    /// Config as it stands in the archive.
    pub(crate) config: Vec<u8>,
    /// Its first name, if it has any.
    pub(crate) name: Option<String>,
    layers: HashMap<Digest, Slice>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl DockerArchive {
    /// Reads the archive's list and the image called `image`, or its only one.
    ///
    /// Blocks; compressed layers whose names do not tell their digest are read once.
    pub(crate) fn open(store: &Store, image: Option<&str>) -> Result<Self, SourceError> {
        let path = store.path();
        let list = match store.open("manifest.json") {
            Err(SourceError::NotFound { .. }) => {
                let mut reason = "this is no docker-archive: it has no manifest.json".to_owned();
                if store.open("oci-layout").is_ok() {
                    reason.push_str("; it looks like oci-archive:");
                }
                return Err(SourceError::archive(path, reason));
            }
            other => other?.read_all(MANIFEST_MAX)?,
        };
        let items: Vec<Item> = serde_json::from_slice(&list).map_err(|e| {
            SourceError::archive(path, format!("manifest.json is not what it should be: {e}"))
        })?;
        let (item, name) = choose(&items, image, store)?;
        let config = store.open(&item.config)?.read_all(CONFIG_MAX)?;
        let config_digest = Digest::of(&config);
        if let Some(want) = digest_in_name(&item.config).filter(|want| *want != config_digest) {
            let what = format!("config {} in {}", item.config, path.display());
            return Err(SourceError::WrongDigest {
                what,
                want,
                got: config_digest,
            });
        }
        let manifest_error = |source| SourceError::Manifest {
            what: format!("config in {}", path.display()),
            source,
        };
        let diff_ids = ImageConfig::parse(&config)
            .map_err(manifest_error)?
            .diff_ids;
        let names = item.layers.as_deref().unwrap_or_default();
        if names.len() != diff_ids.len() || names.len() > LAYERS_MAX {
            let (layers, diff_ids) = (names.len(), diff_ids.len());
            return Err(manifest_error(ManifestError::Count { layers, diff_ids }));
        }
        let mut layers = HashMap::new();
        let mut descriptors = Vec::with_capacity(names.len());
        for (name, diff_id) in names.iter().zip(&diff_ids) {
            let slice = store.open(name)?;
            let descriptor = describe(name, &slice, diff_id)?;
            layers.insert(descriptor.digest, slice);
            descriptors.push(descriptor);
        }
        let config_descriptor = descriptor(media::OCI_CONFIG, config_digest, config.len() as u64);
        let manifest =
            ImageManifest::to_oci_json(&config_descriptor, &descriptors).map_err(manifest_error)?;
        Ok(Self {
            manifest,
            config,
            name,
            layers,
        })
    }

    /// The layer called `digest`.
    pub(crate) fn layer(&self, digest: &Digest) -> Option<&Slice> {
        self.layers.get(digest)
    }
}

fn choose<'a>(
    items: &'a [Item],
    image: Option<&str>,
    store: &Store,
) -> Result<(&'a Item, Option<String>), SourceError> {
    let tags = |item: &'a Item| item.repo_tags.as_deref().unwrap_or_default();
    let not_found = |what: String| {
        let names: Vec<&str> = items
            .iter()
            .flat_map(tags)
            .map(String::as_str)
            .take(40)
            .collect();
        let names = if names.is_empty() {
            "only images without names".to_owned()
        } else {
            names.join(", ")
        };
        let at = store.path().display().to_string();
        SourceError::NotFound {
            what: format!("{what}; there is: {names}"),
            at,
        }
    };
    match (image, items) {
        (_, []) => Err(SourceError::archive(
            store.path(),
            "the archive holds no image",
        )),
        (None, [one]) => Ok((one, tags(one).first().cloned())),
        (None, _) => Err(not_found(
            "single image: give its name after a colon".to_owned(),
        )),
        (Some(wanted), _) => {
            let full = |text: &str| Reference::parse_with_default(text, LOCAL_REGISTRY).ok();
            let is_it = |tag: &&String| {
                *tag == wanted || (full(tag).is_some() && full(tag) == full(wanted))
            };
            let found = items
                .iter()
                .find_map(|item| Some((item, tags(item).iter().find(is_it)?)));
            let (item, tag) = found.ok_or_else(|| not_found(format!("image {wanted:?}")))?;
            Ok((item, Some(tag.clone())))
        }
    }
}

/// A layer's descriptor: by its name where that tells the digest, else by its diff ID if it is a
/// plain tar, else by reading it. Whatever it is, it is checked when the blob is read.
fn describe(name: &str, slice: &Slice, diff_id: &Digest) -> Result<Descriptor, SourceError> {
    let compression = slice.sniff()?;
    let digest = match (
        compression,
        name.starts_with("blobs/")
            .then(|| digest_in_name(name))
            .flatten(),
    ) {
        (_, Some(digest)) => digest,
        (Compression::None, None) => *diff_id,
        (_, None) => slice.digest()?,
    };
    Ok(descriptor(compression.oci_layer_type(), digest, slice.len))
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        platform: None,
        annotations: BTreeMap::new(),
    }
}

/// The digest that `<hex>.json` or `blobs/sha256/<hex>` promises.
fn digest_in_name(name: &str) -> Option<Digest> {
    let last = name.rsplit('/').next()?;
    let hex = last.strip_suffix(".json").unwrap_or(last);
    format!("sha256:{hex}").parse().ok()
}
