//! Manifests, manifest lists and configs: bounded, strict parsing of what registries and archives
//! give.
//!
//! Sources: the OCI image specification ("manifest", "image-index", "config") and the Docker
//! "Image Manifest Version 2, Schema 2" page. Bytes are parsed only after their digest was checked.
//!
//! A document that could be read both as a list and as an image is refused: two readers that
//! disagree about such bytes would see two images under one digest (CVE-2021-41190).

pub mod config;
pub mod media;
pub mod platform;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::media::MediaTypeError;
pub use self::{config::ImageConfig, media::Compression, platform::Platform};
use crate::digest::{Digest, DigestError};

/// Largest manifest, manifest list or layout index that is read, in bytes.
pub const MANIFEST_MAX: u64 = 4 << 20;

/// Largest config that is read, in bytes.
pub const CONFIG_MAX: u64 = 8 << 20;

/// Most layers of an image. Overlayfs takes 500.
pub const LAYERS_MAX: usize = 1000;

/// A manifest of one image, or a list of manifests for several platforms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Manifest {
    /// OCI image index or Docker manifest list.
    Index(Index),
    /// OCI image manifest or Docker schema 2 manifest.
    Image(ImageManifest),
}

/// A list of manifests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Media type of the list.
    pub media_type: String,
    /// Those entries whose digest is one that we use.
    pub manifests: Vec<Descriptor>,
    /// The digests of the other entries, as written.
    pub unusable: Vec<String>,
}

/// A manifest of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageManifest {
    /// Media type of the manifest.
    pub media_type: String,
    /// Where the config is.
    pub config: Descriptor,
    /// Where the layers are, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// Reference to a blob by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// Digest of the blob's bytes.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// For entries of a list: what it runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Free text; the reference's name in layouts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// One layer: where its bytes are and what they are when unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// Digest of the blob as it is stored.
    pub digest: Digest,
    /// Size of the blob as it is stored, in bytes.
    pub size: u64,
    /// Media type as the manifest gives it.
    pub media_type: String,
    /// What has to be undone to get the tar stream.
    pub compression: Compression,
    /// Digest of the tar stream.
    pub diff_id: Digest,
}

/// Why a manifest or config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Larger than [`MANIFEST_MAX`] or [`CONFIG_MAX`].
    #[error("it has {size} bytes, {limit} are the most")]
    TooLarge {
        /// Bytes given.
        size: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// Not JSON, nested too deep, or not of the shape the specification gives.
    #[error("it is not the JSON that was expected")]
    Json(#[from] serde_json::Error),
    /// The format from before 2016, which names no config.
    #[error(
        "it is a Docker schema 1 manifest ({media_type}), which is not supported: push the image \
         again with a client from 2017 or later"
    )]
    Schema1 {
        /// Media type, or `schemaVersion 1`.
        media_type: String,
    },
    /// A `schemaVersion` that nobody defined.
    #[error("its schemaVersion is {version}, only 2 is known")]
    SchemaVersion {
        /// The version given.
        version: u64,
    },
    /// Neither layers nor manifests.
    #[error("it has neither \"layers\" nor \"manifests\": this is not an image")]
    Shapeless,
    /// Layers and manifests in one document.
    #[error("it has the fields of both a list and an image, so readers could disagree about it")]
    Ambiguous,
    /// A media type that is neither a manifest nor a list.
    #[error("its media type {media_type:?} is not that of an image or a list of images")]
    MediaType {
        /// The type, cut to 200 characters.
        media_type: String,
    },
    /// The type that it was served with contradicts the document.
    #[error("it was served as {served:?} but says of itself {own:?}")]
    MediaTypeConflict {
        /// The `Content-Type`, or the descriptor's type.
        served: String,
        /// What the document says, or its shape means.
        own: String,
    },
    /// The config is not an image's, as for Helm charts and other artifacts.
    #[error("its config has media type {media_type:?}: this is not a container image")]
    ConfigType {
        /// The type, cut to 200 characters.
        media_type: String,
    },
    /// A layer that cannot be used.
    #[error("layer {number} cannot be used")]
    Layer {
        /// Number of the layer, the lowest is 0.
        number: usize,
        /// Why.
        source: MediaTypeError,
    },
    /// A digest that cannot be used.
    #[error("the digest of {what} cannot be used")]
    Digest {
        /// `config` or `layer 3`.
        what: String,
        /// Why.
        source: DigestError,
    },
    /// The config does not say what its layers are.
    #[error("the config has no rootfs with diff_ids: this is not a container image")]
    NoRootfs,
    /// A rootfs that is not made of layers.
    #[error("the config's rootfs has type {kind:?}, only \"layers\" is known")]
    RootfsType {
        /// The type, cut to 200 characters.
        kind: String,
    },
    /// Manifest and config disagree.
    #[error("the manifest has {layers} layers but the config has {diff_ids} diff IDs")]
    Count {
        /// Layers in the manifest.
        layers: usize,
        /// Diff IDs in the config.
        diff_ids: usize,
    },
    /// More than [`LAYERS_MAX`] layers.
    #[error("it has {layers} layers, {LAYERS_MAX} are the most")]
    TooManyLayers {
        /// Layers in the manifest.
        layers: usize,
    },
    /// No entry of a list fits.
    #[error("there is no image for {wanted}; there is one for: {available}")]
    NoPlatform {
        /// What was asked for.
        wanted: String,
        /// What there is, by commas.
        available: String,
    },
    /// An image that is not in a list was asked for by platform and is for another.
    #[error("the image is for {found}, not for {wanted}, and it is the only one")]
    PlatformMismatch {
        /// What was asked for.
        wanted: String,
        /// What it is for.
        found: String,
    },
    /// Lists in lists.
    #[error("lists of images are nested deeper than {limit}")]
    Nested {
        /// The deepest that is followed.
        limit: usize,
    },
}

impl Manifest {
    /// Parses `bytes`. `served` is the `Content-Type` or the descriptor's media type they came
    /// with; parameters after `;` are ignored.
    ///
    /// # Errors
    /// [`ManifestError`] naming what is wrong; schema 1 is refused by name.
    pub fn parse(bytes: &[u8], served: Option<&str>) -> Result<Self, ManifestError> {
        check_size(bytes, MANIFEST_MAX)?;
        let raw: RawManifest = serde_json::from_slice(bytes)?;
        if let Some(old) = schema1(&raw, served) {
            return Err(ManifestError::Schema1 { media_type: old });
        }
        if raw.schema_version != 2 {
            return Err(ManifestError::SchemaVersion {
                version: raw.schema_version,
            });
        }
        let image_fields = raw.layers.is_some() || raw.config.is_some();
        let own = match (&raw.manifests, image_fields) {
            (Some(_), true) => return Err(ManifestError::Ambiguous),
            (Some(_), false) => media::Shape::Index,
            (None, true) => media::Shape::Image,
            (None, false) => return Err(ManifestError::Shapeless),
        };
        let media_type = agreed_media_type(own, raw.media_type.as_deref(), served)?;
        match own {
            media::Shape::Index => Ok(Self::Index(raw.into_index(media_type))),
            media::Shape::Image => raw.into_image(media_type).map(Self::Image),
        }
    }

    /// Media type of the document.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Index(index) => &index.media_type,
            Self::Image(image) => &image.media_type,
        }
    }
}

impl Index {
    /// The entry for `wanted`, by the order in [`Platform::rank`].
    ///
    /// # Errors
    /// [`ManifestError::NoPlatform`] listing what there is.
    pub fn select(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        let usable = |entry: &&Descriptor| media::manifest_shape(&entry.media_type).is_some();
        let ranked = self.manifests.iter().filter(usable).filter_map(|entry| {
            let rank = match &entry.platform {
                Some(platform) => wanted.rank(platform)?,
                // A list of one that names no platform means that one.
                None if self.manifests.len() == 1 => u32::MAX,
                None => return None,
            };
            Some((rank, entry))
        });
        ranked
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, entry)| entry)
            .ok_or_else(|| {
                let mut names: Vec<String> = self.manifests.iter().map(describe).collect();
                names.extend(
                    self.unusable
                        .iter()
                        .map(|d| format!("an entry with digest {}", cut(d))),
                );
                names.dedup();
                names.truncate(40);
                let available = if names.is_empty() {
                    "nothing".to_owned()
                } else {
                    names.join(", ")
                };
                ManifestError::NoPlatform {
                    wanted: wanted.to_string(),
                    available,
                }
            })
    }
}

impl ImageManifest {
    /// Joins the manifest's layers with the config's diff IDs.
    ///
    /// # Errors
    /// [`ManifestError::Count`], [`ManifestError::TooManyLayers`], or [`ManifestError::Layer`] for
    /// a media type that cannot be unpacked.
    pub fn layers(&self, config: &ImageConfig) -> Result<Vec<LayerDescriptor>, ManifestError> {
        let counts = (self.layers.len(), config.diff_ids.len());
        if counts.0 != counts.1 {
            return Err(ManifestError::Count {
                layers: counts.0,
                diff_ids: counts.1,
            });
        }
        if counts.0 > LAYERS_MAX {
            return Err(ManifestError::TooManyLayers { layers: counts.0 });
        }
        let pairs = self.layers.iter().zip(&config.diff_ids).enumerate();
        pairs
            .map(|(number, (layer, diff_id))| {
                let compression = Compression::of_layer(&layer.media_type)
                    .map_err(|source| ManifestError::Layer { number, source })?;
                Ok(LayerDescriptor {
                    digest: layer.digest,
                    size: layer.size,
                    media_type: layer.media_type.clone(),
                    compression,
                    diff_id: *diff_id,
                })
            })
            .collect()
    }

    /// An OCI manifest with this config and these layers, for images that came with none.
    ///
    /// The bytes depend on nothing but the arguments: equal archives give equal digests.
    ///
    /// # Errors
    /// [`ManifestError::Json`], which cannot happen for strings and numbers.
    pub fn to_oci_json(
        config: &Descriptor,
        layers: &[Descriptor],
    ) -> Result<Vec<u8>, ManifestError> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Out<'a> {
            schema_version: u32,
            media_type: &'a str,
            config: &'a Descriptor,
            layers: &'a [Descriptor],
        }
        let out = Out {
            schema_version: 2,
            media_type: media::OCI_MANIFEST,
            config,
            layers,
        };
        Ok(serde_json::to_vec(&out)?)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    #[serde(default)]
    schema_version: u64,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    // `null` is what Go writes for an empty list, so it counts as present.
    #[serde(default, deserialize_with = "present_list")]
    layers: Option<Vec<RawDescriptor>>,
    #[serde(default, deserialize_with = "present_list")]
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    annotations: Option<BTreeMap<String, String>>,
}

fn present_list<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<RawDescriptor>>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

impl RawManifest {
    fn into_index(self, media_type: String) -> Index {
        let mut index = Index {
            media_type,
            manifests: Vec::new(),
            unusable: Vec::new(),
        };
        for raw in self.manifests.unwrap_or_default() {
            let digest = raw.digest.clone();
            match raw.parse() {
                Ok(descriptor) => index.manifests.push(descriptor),
                Err(_) => index.unusable.push(digest),
            }
        }
        index
    }

    fn into_image(self, media_type: String) -> Result<ImageManifest, ManifestError> {
        let digest_of = |what: String| move |source| ManifestError::Digest { what, source };
        let config = self.config.ok_or(ManifestError::Shapeless)?;
        if !media::is_image_config(&config.media_type) {
            return Err(ManifestError::ConfigType {
                media_type: cut(&config.media_type),
            });
        }
        let config = config.parse().map_err(digest_of("the config".to_owned()))?;
        let layers = self.layers.unwrap_or_default().into_iter().enumerate();
        let layers = layers
            .map(|(number, raw)| raw.parse().map_err(digest_of(format!("layer {number}"))))
            .collect::<Result<_, _>>()?;
        Ok(ImageManifest {
            media_type,
            config,
            layers,
        })
    }
}

impl RawDescriptor {
    fn parse(self) -> Result<Descriptor, DigestError> {
        Ok(Descriptor {
            digest: self.digest.parse()?,
            media_type: self.media_type,
            size: self.size,
            platform: self.platform.map(Platform::normalised),
            annotations: self.annotations.unwrap_or_default(),
        })
    }
}

fn schema1(raw: &RawManifest, served: Option<&str>) -> Option<String> {
    let types = [raw.media_type.as_deref(), served];
    if let Some(old) = types
        .into_iter()
        .flatten()
        .find(|kind| media::is_schema1(kind))
    {
        return Some(media::essence(old).to_owned());
    }
    (raw.schema_version == 1 || raw.fs_layers.is_some()).then(|| "schemaVersion 1".to_owned())
}

/// The media type that document, server and shape agree on.
///
/// Generic types (`application/json`, nothing) from servers say nothing and are passed over.
fn agreed_media_type(
    shape: media::Shape,
    own: Option<&str>,
    served: Option<&str>,
) -> Result<String, ManifestError> {
    let own = own.map(media::essence).filter(|kind| !kind.is_empty());
    let served = served
        .map(media::essence)
        .filter(|kind| !media::is_generic(kind));
    for kind in [own, served].into_iter().flatten() {
        match media::manifest_shape(kind) {
            None => {
                return Err(ManifestError::MediaType {
                    media_type: cut(kind),
                });
            }
            Some(said) if said != shape => {
                return Err(ManifestError::MediaTypeConflict {
                    served: cut(kind),
                    own: shape.to_string(),
                });
            }
            Some(_) => {}
        }
    }
    match (own, served) {
        (Some(own), Some(served)) if own != served => Err(ManifestError::MediaTypeConflict {
            served: cut(served),
            own: cut(own),
        }),
        (Some(kind), _) | (None, Some(kind)) => Ok(kind.to_owned()),
        (None, None) => Ok(shape.oci_media_type().to_owned()),
    }
}

fn describe(entry: &Descriptor) -> String {
    match &entry.platform {
        Some(platform) => platform.to_string(),
        None => format!(
            "an entry of type {:?} without platform",
            cut(&entry.media_type)
        ),
    }
}

pub(crate) fn check_size(bytes: &[u8], limit: u64) -> Result<(), ManifestError> {
    let size = bytes.len() as u64;
    if size > limit {
        Err(ManifestError::TooLarge { size, limit })
    } else {
        Ok(())
    }
}

pub(crate) fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests;
