//! From a source's name to one image: lists followed by platform, config fetched, layers paired.

use super::{
    Inner, Source, blocking,
    error::SourceError,
    local::oci::Root,
    registry::Fetched,
    spec::{SourceSpec, local_name},
};
use crate::{
    digest::Digest,
    manifest::{
        CONFIG_MAX, Descriptor, ImageConfig, ImageManifest, LayerDescriptor, MANIFEST_MAX,
        Manifest, ManifestError, Platform, media,
    },
    reference::ImageName,
};

/// Deepest list of lists that is followed.
const NESTING_MAX: usize = 3;

/// Everything about an image but its layers' content.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// Its name in the catalogue.
    pub name: ImageName,
    /// Digest of the manifest: the image's identity.
    pub manifest_digest: Digest,
    /// The manifest as the source gave it. For `docker-archive:` it was made from the archive.
    pub manifest: Vec<u8>,
    /// Media type of the manifest.
    pub media_type: String,
    /// Digest of the config: what Docker calls the image ID.
    pub config_digest: Digest,
    /// The config as the source gave it.
    pub raw_config: Vec<u8>,
    /// What we use of it.
    pub config: ImageConfig,
    /// The layers, the lowest first.
    pub layers: Vec<LayerDescriptor>,
}

impl Source {
    /// Picks the image for `platform` and reads its manifest and config.
    ///
    /// With no platform that of the host is picked from a list, and an image that is not in a
    /// list is taken whatever it was made for. With one, an image for another is refused.
    ///
    /// # Errors
    /// [`SourceError`] naming the document or platform.
    pub async fn resolve(&self, platform: Option<&Platform>) -> Result<ResolvedImage, SourceError> {
        let wanted = platform
            .cloned()
            .map_or_else(Platform::host, Platform::normalised);
        let (root, name) = self.root().await?;
        let (fetched, image) = match root {
            Step::Manifest(first) => self.descend(*first, &wanted).await?,
            Step::Index(index) => {
                let entry = index
                    .select(&wanted)
                    .map_err(|e| self.manifest_error("the list of images", e))?;
                self.descend(self.manifest(entry).await?, &wanted).await?
            }
        };
        let raw_config = self.config(&image.config).await?;
        let describe = || format!("the config {}", image.config.digest);
        let config =
            ImageConfig::parse(&raw_config).map_err(|e| self.manifest_error(&describe(), e))?;
        if platform.is_some() && wanted.rank(&config.platform).is_none() {
            let error = ManifestError::PlatformMismatch {
                wanted: wanted.to_string(),
                found: config.platform.to_string(),
            };
            return Err(self.manifest_error("the image", error));
        }
        let what = format!("the manifest {}", fetched.digest);
        let layers = image
            .layers(&config)
            .map_err(|e| self.manifest_error(&what, e))?;
        Ok(ResolvedImage {
            name,
            manifest_digest: fetched.digest,
            manifest: fetched.bytes,
            media_type: image.media_type,
            config_digest: image.config.digest,
            raw_config,
            config,
            layers,
        })
    }

    /// What the source's own name leads to, and the image's name.
    async fn root(&self) -> Result<(Step, ImageName), SourceError> {
        match (&*self.inner, &self.spec) {
            (Inner::Registry(registry), SourceSpec::Registry(reference)) => {
                let fetched = registry
                    .manifest(&reference.manifest_name(), reference.digest())
                    .await?;
                let manifest = self.parse(&fetched)?;
                Ok((
                    Step::Manifest(Box::new((fetched, manifest))),
                    reference.name(),
                ))
            }
            (
                Inner::Oci(layout),
                SourceSpec::OciLayout { dir: path, tag }
                | SourceSpec::OciArchive { file: path, tag },
            ) => {
                let (root, name) = layout.root(tag.as_deref())?;
                let name = local_name(path, name.as_deref());
                match root {
                    Root::ByPlatform(index) => Ok((Step::Index(index), name)),
                    Root::One(entry) => {
                        let first = self.manifest(&entry).await?;
                        Ok((Step::Manifest(Box::new(first)), name))
                    }
                }
            }
            (Inner::Docker(archive), SourceSpec::DockerArchive { file, image }) => {
                let bytes = archive.manifest.clone();
                let content_type = Some(media::OCI_MANIFEST.to_owned());
                let fetched = Fetched {
                    digest: Digest::of(&bytes),
                    bytes,
                    content_type,
                    more: false,
                };
                let manifest = self.parse(&fetched)?;
                let name = local_name(file, archive.name.as_deref().or(image.as_deref()));
                Ok((Step::Manifest(Box::new((fetched, manifest))), name))
            }
            // `open` makes only the pairs above.
            _ => Err(SourceError::Stopped),
        }
    }

    /// Follows lists down to one image.
    async fn descend(
        &self,
        (mut fetched, mut manifest): (Fetched, Manifest),
        wanted: &Platform,
    ) -> Result<(Fetched, ImageManifest), SourceError> {
        for _ in 0..=NESTING_MAX {
            let index = match manifest {
                Manifest::Image(image) => return Ok((fetched, image)),
                Manifest::Index(index) => index,
            };
            let what = format!("the list {}", fetched.digest);
            let entry = index
                .select(wanted)
                .map_err(|e| self.manifest_error(&what, e))?;
            (fetched, manifest) = self.manifest(entry).await?;
        }
        Err(self.manifest_error(
            "the list of images",
            ManifestError::Nested { limit: NESTING_MAX },
        ))
    }

    /// The manifest or list that `entry` points at, of the size it says.
    async fn manifest(&self, entry: &Descriptor) -> Result<(Fetched, Manifest), SourceError> {
        let mut fetched = match &*self.inner {
            Inner::Registry(registry) => {
                registry
                    .manifest(&entry.digest.to_string(), Some(entry.digest))
                    .await?
            }
            Inner::Oci(_) | Inner::Docker(_) => {
                let bytes = self.local_blob(entry.digest, MANIFEST_MAX).await?;
                Fetched {
                    bytes,
                    content_type: None,
                    digest: entry.digest,
                    more: false,
                }
            }
        };
        self.check_size(&format!("manifest {}", entry.digest), entry, &fetched.bytes)?;
        // The list's word on the type binds as much as the server's.
        fetched.content_type = fetched
            .content_type
            .or_else(|| Some(entry.media_type.clone()));
        let manifest = self.parse(&fetched)?;
        Ok((fetched, manifest))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>, SourceError> {
        let bytes = match &*self.inner {
            Inner::Registry(registry) => registry.small_blob(descriptor.digest, CONFIG_MAX).await?,
            Inner::Docker(archive) => archive.config.clone(),
            Inner::Oci(_) => self.local_blob(descriptor.digest, CONFIG_MAX).await?,
        };
        self.check_size(&format!("config {}", descriptor.digest), descriptor, &bytes)?;
        Ok(bytes)
    }

    /// A small blob of a local source, its digest checked.
    async fn local_blob(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, SourceError> {
        let inner = std::sync::Arc::clone(&self.inner);
        let place = self.place();
        blocking(move || {
            let Inner::Oci(layout) = &*inner else {
                return Err(SourceError::Stopped);
            };
            let bytes = layout.blob(&digest)?.read_all(limit)?;
            let got = Digest::of(&bytes);
            if got == digest {
                Ok(bytes)
            } else {
                let what = format!("blob {digest} in {place}");
                Err(SourceError::WrongDigest {
                    what,
                    want: digest,
                    got,
                })
            }
        })
        .await
    }

    fn parse(&self, fetched: &Fetched) -> Result<Manifest, SourceError> {
        let parsed = Manifest::parse(&fetched.bytes, fetched.content_type.as_deref());
        parsed.map_err(|e| self.manifest_error(&format!("the manifest {}", fetched.digest), e))
    }

    fn check_size(
        &self,
        what: &str,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), SourceError> {
        let (want, got) = (descriptor.size, bytes.len() as u64);
        if want == got {
            return Ok(());
        }
        Err(SourceError::WrongSize {
            what: format!("{what} from {}", self.place()),
            want,
            got,
        })
    }

    fn manifest_error(&self, what: &str, source: ManifestError) -> SourceError {
        SourceError::Manifest {
            what: format!("{what} from {}", self.place()),
            source,
        }
    }

    /// Where the source is, for messages.
    fn place(&self) -> String {
        match &*self.inner {
            Inner::Registry(registry) => registry.describe(),
            Inner::Oci(layout) => layout.path().display().to_string(),
            Inner::Docker(_) => self.spec.to_string(),
        }
    }
}

/// Where the way to an image starts.
enum Step {
    Manifest(Box<(Fetched, Manifest)>),
    Index(crate::manifest::Index),
}
