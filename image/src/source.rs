//! Where images come from: registries, OCI layouts, `docker save` archives.
//!
//! [`SourceSpec`] names a source, [`Source::open`] opens it, [`Source::resolve`] picks the image
//! for a platform and gives everything but its layers, and [`Source::blob`] streams a layer's
//! blob. Every byte is checked against a digest: manifests and configs before they are parsed,
//! blobs as they pass, with the verdict at their end.
//!
//! ```no_run
//! use harbour_image::source::{Source, SourceOptions, SourceSpec};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let spec = SourceSpec::parse("docker://quay.io/org/app:1")?;
//! let source = Source::open(&spec, &SourceOptions::from_env()).await?;
//! let image = source.resolve(None).await?;
//! println!("{} is {}", image.name, image.manifest_digest);
//! for layer in &image.layers {
//!     let blob = source.blob(layer);
//!     let progress = blob.progress();
//!     // Reading blocks, so it is done on a thread of its own. A decompressor takes the reader by
//!     // reference and stops at the end of its stream; `finish` reads and checks what is left.
//!     let worker = std::thread::spawn(move || {
//!         let mut blob = blob;
//!         let mut tar = flate2::bufread::MultiGzDecoder::new(&mut blob);
//!         std::io::copy(&mut tar, &mut std::io::sink())?;
//!         blob.finish().map_err(std::io::Error::other)
//!     });
//!     worker.join().map_err(|_| "the worker panicked")??;
//!     println!("{} bytes", progress.load(std::sync::atomic::Ordering::Relaxed));
//! }
//! # Ok(())
//! # }
//! ```

mod blob;
mod error;
mod local;
mod options;
mod registry;
mod resolve;
mod spec;

use std::sync::Arc;

use tokio::runtime::Handle;

pub use self::{
    blob::BlobReader,
    error::{BlobError, ErrorKind, SourceError},
    options::{
        ArchiveOptions, AuthOptions, Credential, Deadlines, Proxy, RegistryOptions, RetryPolicy,
        SourceOptions,
    },
    resolve::ResolvedImage,
    spec::SourceSpec,
};
use self::{
    local::{Store, docker::DockerArchive, oci::OciLayout},
    registry::Registry,
};
use crate::{manifest::LayerDescriptor, reference::Reference};

/// An open source. Cheap to clone; one serves any number of transfers at a time.
#[derive(Clone, Debug)]
pub struct Source {
    spec: SourceSpec,
    runtime: Handle,
    inner: Arc<Inner>,
}

#[derive(Debug)]
enum Inner {
    Registry(Registry),
    Oci(OciLayout),
    Docker(DockerArchive),
}

impl Source {
    /// Opens what `spec` names. A registry is not asked for anything yet; an archive is read for
    /// where its members lie, and unpacked into a temporary file if it is compressed.
    ///
    /// Transfers run on the runtime that this is called in.
    ///
    /// # Errors
    /// [`SourceError`]: an option or local file that cannot be used.
    pub async fn open(spec: &SourceSpec, options: &SourceOptions) -> Result<Self, SourceError> {
        let (wanted, archives) = (spec.clone(), options.archives.clone());
        let inner = match wanted {
            SourceSpec::Registry(reference) => Inner::Registry(Registry::new(&reference, options)?),
            SourceSpec::OciLayout { dir, .. } => {
                blocking(move || Ok(Inner::Oci(OciLayout::open(Store::dir(&dir)?)?))).await?
            }
            SourceSpec::OciArchive { file, .. } => {
                blocking(move || Ok(Inner::Oci(OciLayout::open(Store::tar(&file, &archives)?)?)))
                    .await?
            }
            SourceSpec::DockerArchive { file, image } => {
                blocking(move || {
                    let store = Store::tar(&file, &archives)?;
                    Ok(Inner::Docker(DockerArchive::open(
                        &store,
                        image.as_deref(),
                    )?))
                })
                .await?
            }
        };
        Ok(Self {
            spec: spec.clone(),
            runtime: Handle::current(),
            inner: Arc::new(inner),
        })
    }

    /// What it was opened from; its text opens it again.
    pub fn spec(&self) -> &SourceSpec {
        &self.spec
    }

    /// All tags of the source's repository, in the order of their bytes: older registries give them in
    /// none.
    ///
    /// # Errors
    /// [`SourceError::Spec`] when the source is no registry, else what asking gave.
    pub async fn tags(&self) -> Result<Vec<Reference>, SourceError> {
        let (Inner::Registry(registry), SourceSpec::Registry(reference)) =
            (&*self.inner, &self.spec)
        else {
            return Err(SourceError::Spec {
                text: self.spec.to_string(),
                reason: "only repositories of registries have a list of tags".to_owned(),
            });
        };
        registry.tags(reference).await
    }

    /// Starts to fetch a layer's blob. Failures, also of the first request, come from the reader.
    ///
    /// Needs nothing but digest and size of `layer`, so it may come from an earlier
    /// [`Self::resolve`] of the same image. May be called from any thread.
    pub fn blob(&self, layer: &LayerDescriptor) -> BlobReader {
        let inner = Arc::clone(&self.inner);
        let digest = layer.digest;
        BlobReader::spawn(&self.runtime, digest, layer.size, move |sink| async move {
            let slice = match &*inner {
                Inner::Registry(registry) => return registry.download(sink).await,
                Inner::Oci(layout) => layout.blob(&digest),
                Inner::Docker(archive) => {
                    archive
                        .layer(&digest)
                        .cloned()
                        .ok_or_else(|| SourceError::NotFound {
                            what: format!("layer {digest}"),
                            at: "the archive".to_owned(),
                        })
                }
            };
            match slice {
                Ok(slice) => slice.pump(sink).await,
                Err(error) => sink.fail(error).await,
            }
        })
    }
}

/// Runs work on local files on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| SourceError::Stopped)?
}
