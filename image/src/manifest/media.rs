//! Media types: which are manifests, which are configs, and how a layer is compressed.

use std::fmt;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, not compressed; `+gzip` and `+zstd` follow it.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, not compressed; `.gzip` and `.zstd` follow it.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// What manifests are asked for, best first: the `Accept` header.
pub const MANIFEST_ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

const SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1";

pub use crate::decode::Compression;

/// Why a layer's media type cannot be unpacked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediaTypeError {
    /// Content that the registry does not hold.
    #[error(
        "{media_type:?} is not distributed with the image (a foreign layer, as in Windows images)"
    )]
    Foreign {
        /// The type, cut to 200 characters.
        media_type: String,
    },
    /// Content that needs a key.
    #[error("{media_type:?} is encrypted: decrypt the image first, for example with skopeo copy")]
    Encrypted {
        /// The type, cut to 200 characters.
        media_type: String,
    },
    /// Nothing that we know how to unpack.
    #[error("{media_type:?} is not a layer type that can be unpacked: want tar, gzip or zstd")]
    Unknown {
        /// The type, cut to 200 characters.
        media_type: String,
    },
}

impl Compression {
    /// Compression of a layer by its media type.
    ///
    /// # Errors
    /// [`MediaTypeError`] naming the type.
    pub fn of_layer(media_type: &str) -> Result<Self, MediaTypeError> {
        let kind = essence(media_type);
        let named = || super::cut(kind);
        if kind.ends_with("+encrypted") {
            return Err(MediaTypeError::Encrypted {
                media_type: named(),
            });
        }
        if kind.contains(".nondistributable.") || kind.contains(".foreign.") {
            return Err(MediaTypeError::Foreign {
                media_type: named(),
            });
        }
        let suffix = kind
            .strip_prefix(OCI_LAYER)
            .or_else(|| kind.strip_prefix(DOCKER_LAYER));
        match suffix {
            Some("") => Ok(Self::None),
            Some("+gzip" | ".gzip") => Ok(Self::Gzip),
            Some("+zstd" | ".zstd") => Ok(Self::Zstd),
            _ => Err(MediaTypeError::Unknown {
                media_type: named(),
            }),
        }
    }

    /// Compression by the first bytes of a stream, for archives that do not tell.
    ///
    /// `None` for compressions that images do not use (xz, bzip2); a stream with no known mark
    /// is taken for a tar.
    pub fn sniff(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', ..] | [b'B', b'Z', b'h', b'1'..=b'9', ..] => None,
            _ => Some(Self::None),
        }
    }

    /// The OCI media type of a layer compressed like this.
    pub const fn oci_layer_type(self) -> &'static str {
        match self {
            Self::None => OCI_LAYER,
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// What a manifest document is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A list of manifests.
    Index,
    /// The manifest of one image.
    Image,
}

impl Shape {
    /// The OCI media type of such a document.
    pub const fn oci_media_type(self) -> &'static str {
        match self {
            Self::Index => OCI_INDEX,
            Self::Image => OCI_MANIFEST,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Index => "a list of images",
            Self::Image => "one image",
        })
    }
}

/// The shape that a media type promises; `None` when it is not a manifest's.
pub fn manifest_shape(media_type: &str) -> Option<Shape> {
    match essence(media_type) {
        OCI_INDEX | DOCKER_LIST => Some(Shape::Index),
        OCI_MANIFEST | DOCKER_MANIFEST => Some(Shape::Image),
        _ => None,
    }
}

/// Whether a config of this type describes a container image.
pub fn is_image_config(media_type: &str) -> bool {
    matches!(essence(media_type), OCI_CONFIG | DOCKER_CONFIG)
}

/// Whether the type is one of Docker's schema 1.
pub(crate) fn is_schema1(media_type: &str) -> bool {
    essence(media_type).starts_with(SCHEMA1)
}

/// Types that servers send when they do not know better.
pub(crate) fn is_generic(media_type: &str) -> bool {
    matches!(
        media_type,
        "" | "application/json" | "application/octet-stream" | "text/plain"
    )
}

/// A media type without its parameters.
pub(crate) fn essence(media_type: &str) -> &str {
    media_type.split(';').next().unwrap_or_default().trim()
}
