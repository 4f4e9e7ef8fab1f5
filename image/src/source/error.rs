//! What can go wrong between a source and the bytes of a layer.

use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};

use crate::{digest::Digest, manifest::ManifestError, reference::ReferenceError};

/// What the caller of a source can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again later: the network or the registry is at fault.
    Retry,
    /// There is no such image, blob or file.
    Gone,
    /// The source gave bytes that are not what their digest, size or format says.
    Corrupt,
    /// The source wants other credentials.
    Denied,
    /// What was asked for is not supported or not allowed; asking again changes nothing.
    Refused,
}

/// Why a source gave no image.
///
/// No variant holds a credential or a token: addresses are printed without their query and
/// without user and password.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The text names no source.
    #[error("{text:?} names no image source")]
    Reference {
        /// What was given, cut to 200 characters.
        text: String,
        /// Why it is no reference.
        source: ReferenceError,
    },
    /// The text names a source in a way that makes no sense.
    #[error("{text:?} names no image source: {reason}")]
    Spec {
        /// What was given, cut to 200 characters.
        text: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// A manifest, list or config cannot be used.
    #[error("{what} cannot be used")]
    Manifest {
        /// Which, and where it came from.
        what: String,
        /// Why.
        source: ManifestError,
    },
    /// The registry or the local source has nothing by this name.
    #[error("there is no {what} at {at}")]
    NotFound {
        /// `manifest latest`, `blob sha256:…`, `image "x:1"; there is: …`.
        what: String,
        /// Address or path.
        at: String,
    },
    /// The registry answered with an error.
    #[error("{url} answered {status}{}", code.as_ref().map(|c| format!(" ({c})")).unwrap_or_default())]
    Status {
        /// Address, without query.
        url: String,
        /// HTTP status.
        status: u16,
        /// The registry's error code, as `TOOMANYREQUESTS`.
        code: Option<String>,
        /// How long it asked to wait.
        retry_after: Option<Duration>,
    },
    /// The registry wants other credentials.
    #[error("{url} denies access to {repository} ({status}): {hint}")]
    Denied {
        /// Address, without query.
        url: String,
        /// Repository that was asked for.
        repository: String,
        /// HTTP status: 401 or 403.
        status: u16,
        /// What to do.
        hint: String,
    },
    /// No connection, or it broke.
    #[error("{url} could not be read{hint}")]
    Transport {
        /// Address, without query.
        url: String,
        /// What to do, starting with `: `; may be empty.
        hint: &'static str,
        /// Why.
        source: reqwest::Error,
    },
    /// A deadline ran out.
    #[error("{url} gave no {what} within {after:?}")]
    Timeout {
        /// Address, without query.
        url: String,
        /// `answer`, `data`, or `complete blob`.
        what: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The answer breaks the protocol.
    #[error("{url} broke the protocol: {reason}")]
    Protocol {
        /// Address, without query.
        url: String,
        /// How.
        reason: String,
    },
    /// An answer or file larger than what is read of its kind.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// Address or path.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// Bytes that are not what their digest says.
    #[error("{what} has digest {got}, but {want} was expected: the copy is damaged or was changed")]
    WrongDigest {
        /// What was read, and where.
        what: String,
        /// The digest asked for.
        want: Digest,
        /// The digest of what came.
        got: Digest,
    },
    /// More or fewer bytes than the descriptor says.
    #[error("{what} has {got} bytes, but its descriptor says {want}")]
    WrongSize {
        /// What was read, and where.
        what: String,
        /// Bytes the descriptor says.
        want: u64,
        /// Bytes there are.
        got: u64,
    },
    /// A local file cannot be read.
    #[error("{}: cannot {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `open`, `read`, …
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A local archive or layout is not one, or leads out of itself.
    #[error("{}: {reason}", path.display())]
    Archive {
        /// The archive or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// An option cannot be used: a CA file, a mirror, a proxy.
    #[error("the option {option} cannot be used: {reason}")]
    Option {
        /// Which, with its value where that is no secret.
        option: String,
        /// Why.
        reason: String,
    },
    /// An internal task of the source ended early, as when the runtime shuts down.
    #[error("the transfer was stopped")]
    Stopped,
}

impl SourceError {
    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Transport { .. } | Self::Timeout { .. } | Self::Stopped => ErrorKind::Retry,
            Self::Status { status, .. } if is_transient_status(*status) => ErrorKind::Retry,
            Self::NotFound { .. } => ErrorKind::Gone,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::Gone,
            Self::WrongDigest { .. } | Self::WrongSize { .. } | Self::Archive { .. } => {
                ErrorKind::Corrupt
            }
            Self::Denied { .. } => ErrorKind::Denied,
            Self::Reference { .. }
            | Self::Spec { .. }
            | Self::Manifest { .. }
            | Self::Status { .. }
            | Self::Protocol { .. }
            | Self::TooLarge { .. }
            | Self::Io { .. }
            | Self::Option { .. } => ErrorKind::Refused,
        }
    }

    /// Whether the same request may succeed when it is sent again at once or a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => is_transient_status(*status),
            Self::Timeout { .. } => true,
            Self::Transport { source, .. } => !source.is_builder() && !is_certificate_error(source),
            _ => false,
        }
    }

    /// How long the server asked to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, doing: &'static str, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            doing,
            source,
        }
    }

    pub(crate) fn archive(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Archive {
            path: path.into(),
            reason: reason.into(),
        }
    }

    /// A failed request; the address inside `error` is dropped because its query may be a secret.
    pub(crate) fn transport(url: &url::Url, error: reqwest::Error) -> Self {
        let hint = if is_certificate_error(&error) {
            ": its certificate is not trusted; name the CA file of this registry, or allow it as insecure"
        } else if error.is_connect() && is_tls_error(&error) {
            ": if it speaks plain HTTP, allow it as insecure"
        } else {
            ""
        };
        Self::Transport {
            url: public_url(url),
            hint,
            source: error.without_url(),
        }
    }
}

fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 520..=527)
}

/// An address as it may be shown: no user, no password, no query, no fragment.
pub(crate) fn public_url(url: &url::Url) -> String {
    let mut url = url.clone();
    // Both fail only for addresses that cannot have a user at all.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// Whether the server's certificate, and not the connection, is the problem.
pub(crate) fn is_certificate_error(error: &reqwest::Error) -> bool {
    matches!(
        find_tls_error(error),
        Some(rustls::Error::InvalidCertificate(_))
    )
}

/// Whether TLS failed in any way, as it does against a server of plain HTTP.
pub(crate) fn is_tls_error(error: &reqwest::Error) -> bool {
    find_tls_error(error).is_some()
}

fn find_tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // `io::Error::source` passes over the error that it wraps.
        next = match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// A [`SourceError`] that ended the stream of a blob, cheap to keep and to hand out twice.
///
/// [`super::BlobReader`] gives it inside an [`io::Error`]; [`BlobError::from_io`] finds it there.
#[derive(Clone, Debug)]
pub struct BlobError {
    digest: Digest,
    error: Arc<SourceError>,
}

impl BlobError {
    pub(crate) fn new(digest: Digest, error: SourceError) -> Self {
        Self {
            digest,
            error: Arc::new(error),
        }
    }

    /// The blob that was read.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What went wrong.
    pub fn cause(&self) -> &SourceError {
        &self.error
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// The blob error inside `error`, also when a decompressor passed it on.
    pub fn from_io(error: &io::Error) -> Option<&Self> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(found);
            }
            next = match error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
            {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }

    pub(crate) fn to_io(&self) -> io::Error {
        let kind = match self.kind() {
            ErrorKind::Retry => io::ErrorKind::ConnectionAborted,
            ErrorKind::Gone => io::ErrorKind::NotFound,
            ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::Denied => io::ErrorKind::PermissionDenied,
            ErrorKind::Refused => io::ErrorKind::Unsupported,
        };
        io::Error::new(kind, self.clone())
    }
}

impl fmt::Display for BlobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blob {} could not be read to its end", self.digest)
    }
}

impl std::error::Error for BlobError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.error)
    }
}
