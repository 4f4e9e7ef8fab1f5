//! Why two hosts do not trust each other, by file, and what to do about it.

use std::{io, path::PathBuf, sync::Arc};

use rustls::{AlertDescription, CertificateError, InconsistentKeys};

use super::Files;

/// Why there is no TLS.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not there, or not for us to read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file holds something else than it should.
    #[error("{} {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, as the rest of a sentence.
        reason: String,
    },
    /// A key that others can read is no secret.
    #[error("{} can be read by anybody (mode {mode:o})", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// Our certificate is not valid now.
    #[error("{} is not valid now: {when}", path.display())]
    Time {
        /// The file.
        path: PathBuf,
        /// Since when, or from when.
        when: String,
    },
    /// Our certificate is another CA's.
    #[error("{} is not of the CA in {}", certificate.display(), ca.display())]
    Foreign {
        /// The certificate.
        certificate: PathBuf,
        /// The CA.
        ca: PathBuf,
    },
    /// Our key is for another certificate.
    #[error("{} is not the key of {}", key.display(), certificate.display())]
    KeyMismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// The other end's certificate is for other names.
    #[error("the certificate of {endpoint} is not for {host:?}, but for {names}")]
    WrongName {
        /// The other end.
        endpoint: String,
        /// What it was called.
        host: String,
        /// What its certificate is for.
        names: String,
    },
    /// The other end's certificate is another CA's.
    #[error("the certificate of {endpoint} is not of the CA in {}", ca.display())]
    ForeignPeer {
        /// The other end.
        endpoint: String,
        /// The CA.
        ca: PathBuf,
    },
    /// The other end's certificate is not valid now.
    #[error("the certificate of {endpoint} is not valid now: {when}")]
    PeerTime {
        /// The other end.
        endpoint: String,
        /// Since when, or from when.
        when: String,
    },
    /// The other end does not take our certificate.
    #[error("{endpoint} does not take {}: {why}", certificate.display())]
    Refused {
        /// The other end.
        endpoint: String,
        /// What we showed.
        certificate: PathBuf,
        /// Its alert.
        why: String,
    },
    /// The other end speaks something else, or broke off.
    #[error("{endpoint} does not answer in TLS: {why}")]
    Handshake {
        /// The other end.
        endpoint: String,
        /// What came.
        why: String,
    },
    /// Plain text would leave this host.
    #[error("{address} is not a loopback address, and gRPC there would be in plain text")]
    Plain {
        /// The address.
        address: String,
    },
    /// There is nothing to show.
    #[error("{endpoint} needs a certificate of this host")]
    NoIdentity {
        /// The other end.
        endpoint: String,
    },
}

const ISSUE: &str = "where the CA is: harbour certs issue NAME; then copy its directory hosts/NAME to --tls-dir here";

impl TlsError {
    /// The next step, for a person.
    pub fn next(&self) -> String {
        match self {
            Self::Read { .. } | Self::Content { .. } | Self::Time { .. } | Self::NoIdentity { .. } => {
                ISSUE.into()
            }
            Self::KeyMismatch { .. } => format!("the two were made apart; {ISSUE}"),
            Self::Exposed { path, .. } => format!("chmod 600 {}", path.display()),
            Self::Foreign { .. } => format!("both must come from one CA; {ISSUE}"),
            Self::WrongName { host, .. } => format!(
                "call metad by one of those names, or where the CA is: harbour certs issue NAME --san {host}, for metad's host"
            ),
            Self::ForeignPeer { .. } => {
                "metad and this host must have certificates of one CA: see harbour certs show on both".into()
            }
            Self::PeerTime { .. } => {
                "where the CA is: harbour certs issue NAME, for metad's host; and check both clocks".into()
            }
            Self::Refused { .. } => {
                "metad trusts another CA, or this certificate has ended: see harbour certs show on both hosts".into()
            }
            Self::Handshake { .. } => {
                "metad speaks TLS when it has --tls-dir or listens beyond loopback; else write http://".into()
            }
            Self::Plain { .. } => {
                "use https:// and certificates (harbour certs --help); or accept it with --insecure-metad".into()
            }
        }
    }
}

/// What is wrong with our own certificate; nothing when it is a matter for the other end.
pub(super) fn own(files: &Files, error: &rustls::Error) -> Option<TlsError> {
    use CertificateError as E;
    let rustls::Error::InvalidCertificate(error) = error else {
        return Some(unusable(files, error));
    };
    let path = files.certificate.clone();
    match error {
        E::UnknownIssuer | E::BadSignature => Some(TlsError::Foreign {
            certificate: path,
            ca: files.ca.clone(),
        }),
        E::BadEncoding => Some(TlsError::Content {
            path,
            reason: "holds no certificate that can be understood".into(),
        }),
        other => when(other).map(|when| TlsError::Time { path, when }),
    }
}

/// Since or from when a certificate is not valid, when it is that.
fn when(error: &CertificateError) -> Option<String> {
    use CertificateError as E;
    let day = |time: &rustls::pki_types::UnixTime| {
        super::date(i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
    };
    match error {
        E::Expired => Some("it has ended".into()),
        E::ExpiredContext { not_after, .. } => Some(format!("it ended on {}", day(not_after))),
        E::NotValidYet => Some("it has not begun".into()),
        E::NotValidYetContext { not_before, .. } => {
            Some(format!("it begins on {}", day(not_before)))
        }
        _ => None,
    }
}

/// Key and certificate cannot be used together.
pub(super) fn unusable(files: &Files, error: &rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::KeyMismatch {
            key: files.key.clone(),
            certificate: files.certificate.clone(),
        },
        other => TlsError::Content {
            path: files.key.clone(),
            reason: format!("cannot be used: {other}"),
        },
    }
}

/// What a failed handshake with `endpoint`, called `host`, was about.
pub(super) fn of_peer(
    files: &Files,
    endpoint: &str,
    host: &str,
    error: &rustls::Error,
) -> TlsError {
    use rustls::Error as E;
    let endpoint = endpoint.to_owned();
    let handshake = |endpoint, why: String| TlsError::Handshake { endpoint, why };
    match error {
        E::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                TlsError::ForeignPeer {
                    endpoint,
                    ca: files.ca.clone(),
                }
            }
            CertificateError::NotValidForName => TlsError::WrongName {
                endpoint,
                host: host.into(),
                names: "other names".into(),
            },
            CertificateError::NotValidForNameContext { presented, .. } => TlsError::WrongName {
                endpoint,
                host: host.into(),
                names: plain_names(presented),
            },
            other => match when(other) {
                Some(when) => TlsError::PeerTime { endpoint, when },
                None => handshake(endpoint, other.to_string()),
            },
        },
        E::AlertReceived(alert) => {
            let why = match alert {
                AlertDescription::UnknownCA => "it is of another CA".into(),
                AlertDescription::CertificateExpired => "it is not valid now".into(),
                AlertDescription::BadCertificate
                | AlertDescription::DecryptError
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateRequired
                | AlertDescription::AccessDenied => format!("{alert:?}"),
                other => return handshake(endpoint, format!("alert {other:?}")),
            };
            TlsError::Refused {
                endpoint,
                certificate: files.certificate.clone(),
                why,
            }
        }
        other => handshake(endpoint, other.to_string()),
    }
}

/// `DnsName("a")` as `a`: the library gives names in the form of its own debug output.
fn plain_names(presented: &[String]) -> String {
    const SHOWN: usize = 8;
    let plain = presented.iter().take(SHOWN).map(|name| {
        let inside = name.split_once('(').map_or(name.as_str(), |(_, rest)| rest);
        inside.trim_end_matches(')').trim_matches('"')
    });
    let names: Vec<&str> = plain.collect();
    if names.is_empty() {
        "no name".into()
    } else {
        names.join(", ")
    }
}
