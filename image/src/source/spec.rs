//! Naming a source: `docker://…`, `oci:…`, `oci-archive:…`, `docker-archive:…`, or just what
//! people type.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use super::{
    error::SourceError,
    local::{self, Found},
};
use crate::reference::{ImageName, LOCAL_REGISTRY, Reference, check_tag, component_from};

/// Where an image comes from. Printing it gives the canonical text, which parses back to the same
/// from any working directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceSpec {
    /// An image in a registry: `docker://quay.io/org/app:1`, or the bare reference.
    Registry(Reference),
    /// An OCI layout in a directory: `oci:/srv/layout:tag`.
    OciLayout {
        /// The directory, absolute.
        dir: PathBuf,
        /// Name of the image in it; needed when there are several.
        tag: Option<String>,
    },
    /// An OCI layout in a tar archive, which may be compressed: `oci-archive:/srv/app.tar:tag`.
    OciArchive {
        /// The archive, absolute.
        file: PathBuf,
        /// Name of the image in it; needed when there are several.
        tag: Option<String>,
    },
    /// What `docker save` writes, which may be compressed: `docker-archive:/srv/app.tar:app:1`.
    DockerArchive {
        /// The archive, absolute.
        file: PathBuf,
        /// Name of the image in it; needed when there are several.
        image: Option<String>,
    },
}

const LONGEST: usize = 8 << 10;

impl SourceSpec {
    /// Parses what a person typed. Relative paths are made absolute.
    ///
    /// Text with no known prefix is a path if it starts with `/`, `./` or `../`, or if it names
    /// an existing layout or archive; else a reference. What a path holds is found by reading it:
    /// this blocks on local files, and for a compressed archive unpacks up to where its kind shows.
    ///
    /// # Errors
    /// [`SourceError::Reference`], [`SourceError::Spec`], or what reading a path gave.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let spec_error = |reason: &str| SourceError::Spec {
            text: cut(text),
            reason: reason.to_owned(),
        };
        if text.len() > LONGEST || text.contains('\0') {
            return Err(spec_error("it is too long or holds a NUL"));
        }
        if let Some(reference) = text.strip_prefix("docker://") {
            return parse_reference(reference);
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) =
                split_path(rest, Path::is_dir).ok_or_else(|| spec_error("it has no path"))?;
            return Ok(Self::OciLayout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) =
                split_path(rest, Path::is_file).ok_or_else(|| spec_error("it has no path"))?;
            return Ok(Self::OciArchive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, image) =
                split_path(rest, Path::is_file).ok_or_else(|| spec_error("it has no path"))?;
            return Ok(Self::DockerArchive { file, image });
        }
        for prefix in [
            "http://",
            "https://",
            "dir:",
            "docker-daemon:",
            "containers-storage:",
        ] {
            if text.starts_with(prefix) {
                return Err(spec_error(
                    "want docker://REFERENCE, oci:DIR, oci-archive:FILE, docker-archive:FILE, a bare \
                     reference, or the path of a layout or archive",
                ));
            }
        }
        let is_path = ["/", "./", "../"]
            .iter()
            .any(|start| text.starts_with(start));
        let existing = split_path(text, Path::exists).filter(|(path, _)| path.exists());
        match existing {
            Some((path, name)) if is_path => Self::of_path(path, name),
            // Typed without a slash in front it is a path only if there is no doubt.
            Some((path, name)) => Self::of_path(path, name).or_else(|_| parse_reference(text)),
            None if is_path => Err(SourceError::NotFound {
                what: "layout or archive".to_owned(),
                at: cut(text),
            }),
            None => parse_reference(text),
        }
    }

    /// The name that the image gets in the catalogue if the source itself names none: see
    /// [`super::ResolvedImage::name`].
    pub fn name(&self) -> ImageName {
        match self {
            Self::Registry(reference) => reference.name(),
            Self::OciLayout {
                dir: path,
                tag: name,
            }
            | Self::OciArchive {
                file: path,
                tag: name,
            }
            | Self::DockerArchive {
                file: path,
                image: name,
            } => local_name(path, name.as_deref()),
        }
    }

    fn of_path(path: PathBuf, name: Option<String>) -> Result<Self, SourceError> {
        match local::detect(&path)? {
            Found::OciLayout => Ok(Self::OciLayout {
                dir: path,
                tag: name,
            }),
            Found::OciArchive => Ok(Self::OciArchive {
                file: path,
                tag: name,
            }),
            Found::DockerArchive => Ok(Self::DockerArchive {
                file: path,
                image: name,
            }),
        }
    }
}

impl std::str::FromStr for SourceSpec {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        Self::parse(text)
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, path, name) = match self {
            Self::Registry(reference) => return write!(f, "docker://{reference}"),
            Self::OciLayout { dir, tag } => ("oci", dir, tag),
            Self::OciArchive { file, tag } => ("oci-archive", file, tag),
            Self::DockerArchive { file, image } => ("docker-archive", file, image),
        };
        write!(f, "{prefix}:{}", path.display())?;
        match name {
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

/// The catalogue's name for an image in `path` that calls itself `name`: a tag, or a reference.
///
/// A name without a registry stands under [`LOCAL_REGISTRY`], never under `docker.io`: an archive
/// cannot pass for an official image by leaving the registry out.
pub(crate) fn local_name(path: &Path, name: Option<&str>) -> ImageName {
    if let Some(name) = name.filter(|name| name.contains(['/', ':']))
        && let Ok(reference) = Reference::parse_with_default(name, LOCAL_REGISTRY)
    {
        return reference.name();
    }
    let stem = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let stem = [".gz", ".zst", ".tgz", ".tar"]
        .iter()
        .fold(stem.as_str(), |stem, ending| {
            stem.strip_suffix(ending).unwrap_or(stem)
        });
    let tag = name
        .filter(|name| check_tag(name).is_ok())
        .unwrap_or(crate::reference::DEFAULT_TAG);
    ImageName {
        registry: LOCAL_REGISTRY.to_owned(),
        repository: component_from(stem),
        tag: tag.to_owned(),
    }
}

fn parse_reference(text: &str) -> Result<SourceSpec, SourceError> {
    let error = |source| SourceError::Reference {
        text: cut(text),
        source,
    };
    text.parse().map(SourceSpec::Registry).map_err(error)
}

/// Splits `path[:name]`. Both may hold colons: the longest path that exists is taken, and where
/// none does, the first colon ends the path. `None` for an empty path.
fn split_path(text: &str, exists: impl Fn(&Path) -> bool) -> Option<(PathBuf, Option<String>)> {
    let whole = std::iter::once(text.len());
    let colons = text.rmatch_indices(':').map(|(at, _)| at);
    let found = whole
        .chain(colons)
        .find(|at| *at > 0 && exists(Path::new(&text[..*at])));
    let at = found.or_else(|| text.find(':')).unwrap_or(text.len());
    let (path, name) = text.split_at(at);
    if path.is_empty() {
        return None;
    }
    let name = name
        .strip_prefix(':')
        .filter(|name| !name.is_empty())
        .map(str::to_owned);
    Some((absolute(Path::new(path)), name))
}

/// The path without links where it exists, so that a later change of a link does not change what
/// a refill reads; else made absolute as it is.
fn absolute(path: &Path) -> PathBuf {
    let real = fs::canonicalize(path)
        .ok()
        .filter(|real| real.to_str().is_some());
    real.or_else(|| std::path::absolute(path).ok())
        .unwrap_or_else(|| path.to_owned())
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}
