//! From errors to a sentence, a next step and an exit code.

use std::{fmt, process::ExitCode};

use harbour_metad_client::tls::TlsError;

/// What a script can tell failures apart by. Documented in `harbour --help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Anything without a code of its own.
    Failed = 1,
    /// The command line or configuration is wrong (also what clap exits with).
    Usage = 2,
    /// The image, layer, path or file that was named does not exist.
    NotFound = 3,
    /// A daemon is not running or did not answer in time.
    Unavailable = 4,
    /// What was given is damaged or breaks a rule: digest, manifest, layer, limit.
    Refused = 5,
    /// No space is left in the pool or on disk.
    NoSpace = 6,
    /// Ctrl-C or SIGTERM ended it.
    Interrupted = 130,
}

/// A failure whose kind is known, with what to do next.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: Code,
    /// What failed.
    pub what: String,
    /// The next step, for a person; empty when there is none to offer.
    pub hint: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// A failure of kind `code` with a next step.
pub fn failure(code: Code, what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Failure {
        code,
        what: what.into(),
        hint: hint.into(),
    }
    .into()
}

/// Prints `error`, each cause once, and the next step; gives the exit code.
pub fn report(error: &anyhow::Error, verbose: bool) -> ExitCode {
    let mut code = Code::Failed;
    let mut hint = String::new();
    let mut said = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !said.ends_with(&text) {
            if !said.is_empty() {
                said.push_str(": ");
            }
            said.push_str(&text);
        }
        if let Some((known, next)) = classify(cause) {
            code = known;
            if hint.is_empty() {
                hint = next;
            }
        }
    }
    eprintln!("harbour: {}", crate::output::printable(&said));
    if !hint.is_empty() {
        eprintln!("  {hint}");
    }
    if verbose {
        eprintln!("{error:?}");
    }
    ExitCode::from(code as u8)
}

fn classify(cause: &(dyn std::error::Error + 'static)) -> Option<(Code, String)> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some((failure.code, failure.hint.clone()));
    }
    if let Some(error) = cause.downcast_ref::<crate::ingest::IngestError>() {
        return Some((error.code(), error.hint()));
    }
    if let Some(error) = cause.downcast_ref::<harbour_metad_client::Error>() {
        return Some(client_code(error));
    }
    if let Some(error) = cause.downcast_ref::<TlsError>() {
        return Some((tls_code(error), error.next()));
    }
    None
}

/// Whether this host or the other end is to be mended.
fn tls_code(error: &TlsError) -> Code {
    match error {
        TlsError::Plain { .. } | TlsError::NoIdentity { .. } => Code::Usage,
        TlsError::WrongName { .. }
        | TlsError::ForeignPeer { .. }
        | TlsError::PeerTime { .. }
        | TlsError::Refused { .. }
        | TlsError::Handshake { .. } => Code::Unavailable,
        _ => Code::Failed,
    }
}

/// The exit code and next step for an answer of metad.
pub fn client_code(error: &harbour_metad_client::Error) -> (Code, String) {
    use harbour_metad_client::Error as E;
    match error {
        E::Unavailable { .. } | E::Deadline { .. } => (
            Code::Unavailable,
            "is metad running? Start everything on this host with: harbour up -d".into(),
        ),
        E::Tls { source, .. } => (tls_code(source), source.next()),
        E::NotFound { .. } => (
            Code::NotFound,
            "list what there is with: harbour images".into(),
        ),
        E::Exhausted { .. } => (
            Code::NoSpace,
            "free space with harbour rm, or lend more: harbour donor --lend".into(),
        ),
        E::Refused { .. } => (Code::Refused, String::new()),
        E::Fenced { .. } => (
            Code::Unavailable,
            "another pull has taken over: pull again".into(),
        ),
        _ => (Code::Failed, String::new()),
    }
}
