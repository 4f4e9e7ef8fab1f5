//! References to images as people type them: `debian`, `quay.io/org/app:1.2`, `[::1]:5000/x@sha256:…`.
//!
//! The grammar is that of the distribution project's reference package and the OCI distribution
//! specification ("Pulling manifests"); the defaults (`docker.io`, `library/`, `latest`) are those
//! of Docker.

use std::{fmt, str::FromStr};

use crate::digest::{Digest, DigestError};

/// Registry of references that name none.
pub const DEFAULT_REGISTRY: &str = "docker.io";

/// Tag of references that have neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";

/// Registry under which images from archives and layouts stand when they name none.
pub const LOCAL_REGISTRY: &str = "localhost";

const REPOSITORY_MAX: usize = 255;
const HOST_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A complete reference: registry and repository, and a tag, a digest or both.
///
/// ```
/// use harbour_image::reference::Reference;
/// let reference: Reference = "debian".parse()?;
/// assert_eq!(reference.to_string(), "docker.io/library/debian:latest");
/// # Ok::<(), harbour_image::reference::ReferenceError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// The name of an image in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName {
    /// Host, with a port where one was given: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub registry: String,
    /// Path inside the registry: `library/debian`.
    pub repository: String,
    /// A tag, or `sha256:…` for an image that was asked for by digest alone.
    pub tag: String,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.tag.contains(':') { '@' } else { ':' };
        write!(f, "{}/{}{mark}{}", self.registry, self.repository, self.tag)
    }
}

/// Why a text is not a reference.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing between the separators, or nothing at all.
    #[error("the reference {text:?} has no repository: write it as registry/repository:tag")]
    Empty {
        /// What was given, cut to 100 characters.
        text: String,
    },
    /// The part before the first slash is no host.
    #[error("{registry:?} is not a registry: want a host name or address with an optional port")]
    Registry {
        /// That part, cut to 100 characters.
        registry: String,
    },
    /// The path is not one that registries take.
    #[error(
        "{repository:?} is not a repository: want lower-case letters and digits, with single '.', \
         '_' or dashes between them, and '/' between components"
    )]
    Repository {
        /// The path, cut to 100 characters.
        repository: String,
    },
    /// The path is longer than registries take.
    #[error("the repository name has {len} characters, {REPOSITORY_MAX} are the most")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The tag is not one.
    #[error(
        "{tag:?} is not a tag: want up to {TAG_MAX} letters, digits, '_', '.' and '-', the first \
         of them a letter, a digit or '_'"
    )]
    Tag {
        /// The tag, cut to 100 characters.
        tag: String,
    },
    /// The part after `@` is no digest that we use.
    #[error("the digest of the reference cannot be used")]
    Digest(#[from] DigestError),
    /// 64 hex digits could be an image ID or a name, so they are neither.
    #[error("{text:?} looks like an image ID: give a repository with a tag or a digest")]
    Identifier {
        /// The 64 digits.
        text: String,
    },
}

impl Reference {
    /// The registry's host, lower case, with a port where one was given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path inside the registry, with `library/` in front where Docker means it.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; none only when there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest or manifest list, when it was given. It wins over the tag.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository by digest, without a tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// The same repository's image of another tag, and of no digest.
    ///
    /// # Errors
    /// [`ReferenceError::Tag`].
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        check_tag(tag)?;
        Ok(Self {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        })
    }

    /// What registries are asked for: the digest if there is one, else the tag.
    pub fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// The name in the catalogue.
    pub fn name(&self) -> ImageName {
        let tag = match (&self.tag, &self.digest) {
            (Some(tag), _) => tag.clone(),
            (None, Some(digest)) => digest.to_string(),
            (None, None) => DEFAULT_TAG.to_owned(),
        };
        ImageName {
            registry: self.registry.clone(),
            repository: self.repository.clone(),
            tag,
        }
    }

    /// Parses `text`, taking `registry` where it names none. `library/` is put in front only for
    /// the registry `docker.io`.
    ///
    /// # Errors
    /// [`ReferenceError`] naming the part that is wrong.
    pub fn parse_with_default(text: &str, registry: &str) -> Result<Self, ReferenceError> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        let (host, rest) = match rest.split_once('/') {
            Some((first, path)) if is_host_like(first) => (parse_host(first)?, path),
            _ => (registry.to_owned(), rest),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if path.is_empty() {
            return Err(ReferenceError::Empty { text: cut(text) });
        }
        check_repository(path)?;
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        if path == text && path.len() == 64 && path.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ReferenceError::Identifier {
                text: path.to_owned(),
            });
        }
        let host = if host == "index.docker.io" {
            DEFAULT_REGISTRY.to_owned()
        } else {
            host
        };
        let repository = if host == DEFAULT_REGISTRY && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        let tag = tag
            .or(if digest.is_none() {
                Some(DEFAULT_TAG)
            } else {
                None
            })
            .map(str::to_owned);
        Ok(Self {
            registry: host,
            repository,
            tag,
            digest,
        })
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse_with_default(text, DEFAULT_REGISTRY)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Checks a tag against the grammar.
///
/// # Errors
/// [`ReferenceError::Tag`].
pub fn check_tag(tag: &str) -> Result<(), ReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    let good = bytes.len() <= TAG_MAX
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'));
    if good {
        Ok(())
    } else {
        Err(ReferenceError::Tag { tag: cut(tag) })
    }
}

/// The longest part of `text` that can stand as one component of a repository; `image` when
/// nothing is left.
///
/// Used for archives, whose only name is that of a file.
pub fn component_from(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes().take(REPOSITORY_MAX) {
        match byte.to_ascii_lowercase() {
            b @ (b'a'..=b'z' | b'0'..=b'9') => out.push(char::from(b)),
            b @ (b'.' | b'_') if out.ends_with(|c: char| c.is_ascii_alphanumeric()) => {
                out.push(char::from(b));
            }
            _ if out.ends_with(|c: char| c.is_ascii_alphanumeric()) => out.push('-'),
            _ => {}
        }
    }
    out.truncate(out.trim_end_matches(['.', '_', '-']).len());
    if out.is_empty() {
        "image".to_owned()
    } else {
        out
    }
}

/// Docker's rule for telling a host from the first component of a path, less its exception for
/// upper-case words: those would not be hosts any more once printed in lower case.
fn is_host_like(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':', '['])
}

fn parse_host(text: &str) -> Result<String, ReferenceError> {
    let error = || ReferenceError::Registry {
        registry: cut(text),
    };
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (address, after) = rest.split_once(']').ok_or_else(error)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| error())?;
        let port = match after {
            "" => None,
            after => Some(after.strip_prefix(':').ok_or_else(error)?),
        };
        (format!("[{}]", address.to_ascii_lowercase()), port)
    } else {
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        if name.len() > HOST_MAX || !name.split('.').all(is_host_label) {
            return Err(error());
        }
        (name.to_ascii_lowercase(), port)
    };
    match port {
        None => Ok(host),
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
            let port: u16 = port.parse().map_err(|_| error())?;
            if port == 0 {
                Err(error())
            } else {
                Ok(format!("{host}:{port}"))
            }
        }
        Some(_) => Err(error()),
    }
}

fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn check_repository(path: &str) -> Result<(), ReferenceError> {
    if path.len() > REPOSITORY_MAX {
        return Err(ReferenceError::TooLong { len: path.len() });
    }
    if path.split('/').all(is_component) {
        Ok(())
    } else {
        Err(ReferenceError::Repository {
            repository: cut(path),
        })
    }
}

/// Runs of letters and digits joined by `.`, `_`, `__` or any number of dashes.
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let mut rest = text.as_bytes();
    loop {
        let word = rest.iter().take_while(|b| alphanumeric(**b)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        if rest.is_empty() {
            return true;
        }
        let separator = rest.iter().take_while(|b| !alphanumeric(**b)).count();
        let (between, after) = rest.split_at(separator);
        let good = matches!(between, b"." | b"_" | b"__") || between.iter().all(|b| *b == b'-');
        if !good {
            return false;
        }
        rest = after;
    }
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests;
