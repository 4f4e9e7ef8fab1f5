//! What an operation can fail with, by what the caller should do about it.

use std::path::PathBuf;

use tonic::{Code, Status};

pub use crate::store::DatabaseError;

/// Why an operation was not done. Nothing of it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense: a bug in the caller.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing (any more).
    #[error("{0}")]
    NotFound(String),
    /// Not in the present state: begin again.
    #[error("{0}")]
    Refused(String),
    /// The claim under which it was to be done is not held (any more): another has taken over.
    #[error("{0}")]
    Fenced(String),
    /// No room, with figures.
    #[error("{0}")]
    Exhausted(String),
    /// The database failed.
    #[error("the database failed")]
    Store(#[source] DatabaseError),
    /// A file of the state directory failed.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// gRPC's code for it.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::Refused(_) => Code::FailedPrecondition,
            Self::Fenced(_) => Code::Aborted,
            Self::Exhausted(_) => Code::ResourceExhausted,
            // A full disk is for the person who runs this to mend, and says so.
            Self::Store(error) if error.is_disk_full() => Code::ResourceExhausted,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Code::ResourceExhausted
            }
            Self::Store(_) | Self::Io { .. } => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Status::new(error.code(), text)
    }
}

/// A digest of 32 bytes, whichever kind.
pub type Hash = [u8; 32];

/// Reads a digest out of a message.
pub(crate) fn hash(bytes: &[u8], what: &str) -> Result<Hash, Error> {
    bytes.try_into().map_err(|_| {
        Error::Invalid(format!(
            "{what} is {} bytes long, a digest is 32",
            bytes.len()
        ))
    })
}

/// Checks the length of a string from outside.
pub(crate) fn text<'a>(value: &'a str, max: usize, what: &str) -> Result<&'a str, Error> {
    if value.len() > max {
        return Err(Error::Invalid(format!(
            "{what} is {} bytes long, at most {max} are allowed",
            value.len()
        )));
    }
    if value.chars().any(char::is_control) {
        return Err(Error::Invalid(format!("{what} has control characters")));
    }
    Ok(value)
}
