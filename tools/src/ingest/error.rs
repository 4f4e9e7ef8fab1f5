//! What can go wrong between a source and the pool, by what to do about it.

use harbour_image::{
    decode::{DecodeError, Remedy},
    index::{IndexError, MergeError, WriteError},
    source::{BlobError, ErrorKind, SourceError},
};
use harbour_metad_client::Error as ClientError;
use harbour_pool::transport::TransportError;

use crate::failure::{self, Code};

/// Why a pull or refill failed. Nothing of it stays visible; its space goes back.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The source does not have it, refused it, or gave something damaged.
    #[error("cannot fetch {what}")]
    Source {
        /// Image or blob.
        what: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// A layer's content breaks a rule.
    #[error("cannot unpack")]
    Decode(#[from] DecodeError),
    /// A layer's tree cannot be written as an index.
    #[error("cannot index layer {layer}")]
    Write {
        /// Diff ID.
        layer: String,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// An index that was stored earlier cannot be read.
    #[error("index of layer {layer} is damaged")]
    Index {
        /// Diff ID.
        layer: String,
        /// Why.
        #[source]
        source: IndexError,
    },
    /// Layers that cannot be one image.
    #[error("layers of {image} cannot be merged")]
    Merge {
        /// Manifest digest.
        image: String,
        /// Why.
        #[source]
        source: MergeError,
    },
    /// A blob did not come, or not as its descriptor says.
    #[error("cannot fetch layer")]
    Blob(#[from] BlobError),
    /// metad refused or did not answer.
    #[error("metad")]
    Metad(#[from] ClientError),
    /// A donor could not be written or read.
    #[error("cannot reach memory of donor {donor}")]
    Pool {
        /// Donor's number.
        donor: u64,
        /// Why.
        #[source]
        source: TransportError,
    },
    /// Something is larger than what the format or a limit allows.
    #[error("{0}")]
    Limit(String),
    /// The lease was lost: another host may have taken over.
    #[error("the lease of this pull was lost ({0})")]
    LeaseLost(String),
    /// Ctrl-C, or another layer of the same pull failed.
    #[error("stopped")]
    Cancelled,
    /// The source no longer gives what the catalogue says it held.
    #[error("{0}")]
    Changed(String),
    /// A rule inside this program is broken.
    #[error("internal error: {0}")]
    Bug(String),
}

impl IngestError {
    /// The exit code.
    pub fn code(&self) -> Code {
        match self {
            Self::Source { source, .. } => source_code(source.kind()),
            Self::Blob(error) => source_code(error.kind()),
            Self::Decode(_)
            | Self::Write { .. }
            | Self::Index { .. }
            | Self::Merge { .. }
            | Self::Limit(_)
            | Self::Changed(_) => Code::Refused,
            Self::Metad(error) => failure::client_code(error).0,
            Self::Pool { .. } | Self::LeaseLost(_) => Code::Unavailable,
            Self::Cancelled => Code::Interrupted,
            Self::Bug(_) => Code::Failed,
        }
    }

    /// Whether the same could succeed a moment later: a donor or metad that is just starting again,
    /// a pool that is just being emptied, a registry that is overloaded.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Pool { .. } | Self::LeaseLost(_) => true,
            Self::Metad(error) => !matches!(error, ClientError::Other { .. }),
            Self::Source { source, .. } => source.kind() == ErrorKind::Retry,
            Self::Blob(error) => error.kind() == ErrorKind::Retry,
            // What the sink said is further down.
            Self::Decode(error) => {
                let mut cause = std::error::Error::source(error);
                while let Some(next) = cause {
                    if let Some(known) = next.downcast_ref::<Self>() {
                        return known.is_transient();
                    }
                    cause = next.source();
                }
                false
            }
            _ => false,
        }
    }

    /// The next step for a person; empty when there is none to offer.
    pub fn hint(&self) -> String {
        match self {
            Self::Metad(error) => failure::client_code(error).1,
            Self::Pool { .. } => "see whether the donor runs: harbour donors".into(),
            Self::LeaseLost(_) => "pull again".into(),
            Self::Source { source, .. } => source_hint(source.kind()),
            Self::Blob(error) => source_hint(error.kind()),
            Self::Decode(error) => match error.remedy() {
                Remedy::RaiseLimit => {
                    "if the image is trusted, raise the limit: --max-entries, --max-unpacked".into()
                }
                Remedy::Rebuild => "the layer itself is bad: have the image built again".into(),
                Remedy::Refetch => {
                    "the layer is damaged at its source: push it again, or pull from elsewhere"
                        .into()
                }
                Remedy::Retry => "pull again".into(),
                Remedy::Sink => String::new(),
            },
            _ => String::new(),
        }
    }
}

fn source_hint(kind: ErrorKind) -> String {
    match kind {
        ErrorKind::Retry => "try again; for a registry with plain HTTP: --insecure".into(),
        ErrorKind::Gone => "check the name and the tag".into(),
        ErrorKind::Denied => {
            "log in with docker login or skopeo login; harbour reads the same files".into()
        }
        ErrorKind::Corrupt | ErrorKind::Refused => String::new(),
    }
}

fn source_code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Retry => Code::Unavailable,
        ErrorKind::Gone => Code::NotFound,
        ErrorKind::Corrupt | ErrorKind::Refused => Code::Refused,
        ErrorKind::Denied => Code::Failed,
    }
}
