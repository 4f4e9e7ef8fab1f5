//! What a call can fail with, by what the caller should do about it.

use std::time::Duration;

use tonic::{Code, Status};

/// Why a call failed. Every kind names the call it belongs to, as in `Ingest.Begin`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// metad is not there or broke off: try again later.
    #[error("metad at {endpoint} cannot be reached for {asked}")]
    Unavailable {
        /// Where metad was looked for.
        endpoint: String,
        /// What was asked.
        asked: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The two hosts do not trust each other; [`crate::tls::TlsError::next`] says what to do.
    #[error("no trusted connection to metad for {asked}")]
    Tls {
        /// What was asked.
        asked: &'static str,
        /// Which file or certificate, and why.
        #[source]
        source: crate::tls::TlsError,
    },
    /// There is no such thing: register again, or it was removed.
    #[error("{asked}: {message}")]
    NotFound {
        /// What was asked.
        asked: &'static str,
        /// metad's words.
        message: String,
    },
    /// Not in the present state: a pull that expired or was superseded must start again.
    #[error("{asked} was refused: {message}")]
    Refused {
        /// What was asked.
        asked: &'static str,
        /// metad's words.
        message: String,
    },
    /// The lock under which it was to be done is not held (any more): another pull has taken over.
    #[error("{asked} came too late: {message}")]
    Fenced {
        /// What was asked.
        asked: &'static str,
        /// metad's words.
        message: String,
    },
    /// No room, or too much at once.
    #[error("{asked}: {message}")]
    Exhausted {
        /// What was asked.
        asked: &'static str,
        /// metad's words, with figures.
        message: String,
    },
    /// The deadline passed first; whether it was done is not known.
    #[error("{asked} was not answered within {} ms", after.as_millis())]
    Deadline {
        /// What was asked.
        asked: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// A request that metad finds malformed, or a fault in metad.
    #[error("{asked} failed ({code:?}): {message}")]
    Other {
        /// What was asked.
        asked: &'static str,
        /// gRPC's code.
        code: Code,
        /// metad's words.
        message: String,
    },
}

impl Error {
    /// Whether asking the same again later can help with nothing else changed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Deadline { .. })
    }

    /// The call that failed.
    pub fn asked(&self) -> &'static str {
        match self {
            Self::Unavailable { asked, .. }
            | Self::Tls { asked, .. }
            | Self::NotFound { asked, .. }
            | Self::Refused { asked, .. }
            | Self::Fenced { asked, .. }
            | Self::Exhausted { asked, .. }
            | Self::Deadline { asked, .. }
            | Self::Other { asked, .. } => asked,
        }
    }

    pub(crate) fn from_status(
        status: Status,
        asked: &'static str,
        endpoint: &str,
        after: Duration,
    ) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable => Self::Unavailable {
                endpoint: endpoint.to_owned(),
                asked,
                source: Box::new(status),
            },
            // A connection that dies inside a call comes as UNKNOWN with the transport's error
            // beneath it; metad itself never answers UNKNOWN.
            Code::Unknown if std::error::Error::source(&status).is_some() => Self::Unavailable {
                endpoint: endpoint.to_owned(),
                asked,
                source: Box::new(status),
            },
            // One that is closed before a call is on its way cancels it, as our own deadline does.
            Code::Cancelled if source_is_not_a_timeout(&status) => Self::Unavailable {
                endpoint: endpoint.to_owned(),
                asked,
                source: Box::new(status),
            },
            Code::NotFound => Self::NotFound { asked, message },
            Code::FailedPrecondition => Self::Refused { asked, message },
            Code::Aborted => Self::Fenced { asked, message },
            Code::ResourceExhausted => Self::Exhausted { asked, message },
            Code::DeadlineExceeded | Code::Cancelled => Self::Deadline { asked, after },
            code => Self::Other {
                asked,
                code,
                message,
            },
        }
    }
}

/// Whether something else than the deadline of a call stands beneath its status.
fn source_is_not_a_timeout(status: &Status) -> bool {
    let first = std::error::Error::source(status);
    let mut chain = std::iter::successors(first, |error| error.source());
    first.is_some() && !chain.any(|error| error.is::<tonic::TimeoutExpired>())
}
