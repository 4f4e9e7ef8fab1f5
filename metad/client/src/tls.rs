//! Mutual TLS between hosts: both ends show a certificate of the cluster's own CA.
//!
//! A host has one directory with three files, for whatever runs there: `ca.crt`, the CA that it
//! trusts and nothing else; `host.crt`, its own certificate; `host.key`. They are read again when
//! they have changed, at the next connection, so that a renewed certificate needs no restart.
//! TLS 1.3 only, no session is resumed: every connection proves anew who its ends are.

mod connect;
mod data;
mod error;
mod files;

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::UnixTime,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};

pub(crate) use connect::connector;
pub use error::TlsError;
pub use files::{Certificate, date};
use files::{Pem, Stamp};

/// The CA's certificate in a host's directory.
pub const CA_FILE: &str = "ca.crt";
/// The host's certificate.
pub const CERTIFICATE_FILE: &str = "host.crt";
/// Its private key, which nobody but its owner and their group may read.
pub const KEY_FILE: &str = "host.key";

/// The protocol inside.
const ALPN: &[u8] = b"h2";

/// What connections between hosts rest on.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// This host's certificate and the CA; without it there is no TLS.
    pub identity: Option<Arc<Identity>>,
    /// Whether gRPC may go in plain text to another host.
    pub plain: bool,
}

/// A host's certificate, its key and the CA, as the files have them now.
pub struct Identity {
    files: Files,
    state: Mutex<State>,
}

#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) ca: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

struct State {
    stamp: Stamp,
    loaded: Loaded,
    /// What was last found unusable, so that it is said once.
    refused: Option<Stamp>,
}

#[derive(Clone)]
struct Loaded {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    data_server: Arc<ServerConfig>,
    data_client: Arc<ClientConfig>,
}

impl Identity {
    /// Reads and checks the files in `dir`.
    ///
    /// # Errors
    /// [`TlsError`], which names the file; [`TlsError::next`] says what to do.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let files = Files {
            ca: dir.join(CA_FILE),
            certificate: dir.join(CERTIFICATE_FILE),
            key: dir.join(KEY_FILE),
        };
        let stamp = Stamp::of(&files);
        let loaded = Loaded::read(&files)?;
        Ok(Self {
            files,
            state: Mutex::new(State {
                stamp,
                loaded,
                refused: None,
            }),
        })
    }

    /// For accepting connections, of the files as they are now. New files that cannot be used are
    /// complained of, and what was there before goes on.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.current().server
    }

    /// For making connections, likewise.
    pub fn client(&self) -> Arc<ClientConfig> {
        self.current().client
    }

    /// For lending to other hosts under TLS, likewise.
    pub fn data_server(&self) -> Arc<ServerConfig> {
        self.current().data_server
    }

    /// For reading from donors under TLS, likewise: any certificate of the CA is taken.
    pub fn data_client(&self) -> Arc<ClientConfig> {
        self.current().data_client
    }

    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    fn current(&self) -> Loaded {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = Stamp::of(&self.files);
        if stamp != state.stamp && state.refused.as_ref() != Some(&stamp) {
            match Loaded::read(&self.files) {
                Ok(loaded) => {
                    tracing::info!(certificate = %self.files.certificate.display(), "certificates were renewed");
                    state.loaded = loaded;
                    state.stamp = stamp;
                    state.refused = None;
                }
                // Half of the files may be new and half old: the next connection looks again once
                // they have changed further.
                Err(error) => {
                    tracing::warn!(%error, next = error.next(), "changed certificates are not used");
                    state.refused = Some(stamp);
                }
            }
        }
        state.loaded.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("certificate", &self.files.certificate)
            .finish_non_exhaustive()
    }
}

impl Loaded {
    fn read(files: &Files) -> Result<Self, TlsError> {
        let pem = Pem::read(files)?;
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for ca in pem.ca {
            roots.add(ca).map_err(|error| TlsError::Content {
                path: files.ca.clone(),
                reason: format!("holds no certificate of a CA: {error}"),
            })?;
        }
        let roots = Arc::new(roots);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| TlsError::Content {
                    path: files.ca.clone(),
                    reason: error.to_string(),
                })?;
        let (own, between) = pem.chain.split_first().ok_or_else(|| TlsError::Content {
            path: files.certificate.clone(),
            reason: "holds no certificate".into(),
        })?;
        if let Err(error) = verifier.verify_client_cert(own, between, UnixTime::now()) {
            error::own(files, &error).map_or(Ok(()), Err)?;
        }
        let fail = |error| error::unusable(files, &error);
        let mut server = server_builder(&provider, verifier)
            .and_then(|b| b.with_single_cert(pem.chain.clone(), pem.key.clone_key()))
            .map_err(fail)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would let in a certificate that has ended meanwhile.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let names =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| TlsError::Content {
                    path: files.ca.clone(),
                    reason: error.to_string(),
                })?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map(|b| b.with_root_certificates(roots))
            .and_then(|b| b.with_client_auth_cert(pem.chain, pem.key))
            .map_err(fail)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();
        let mut data_server = server.clone();
        data_server.alpn_protocols = vec![data::ALPN.to_vec()];
        let mut data_client = client.clone();
        data_client.alpn_protocols = vec![data::ALPN.to_vec()];
        let member = Arc::new(data::Member(names));
        data_client.dangerous().set_certificate_verifier(member);
        Ok(Self {
            server: Arc::new(server),
            client: Arc::new(client),
            data_server: Arc::new(data_server),
            data_client: Arc::new(data_client),
        })
    }
}

fn server_builder(
    provider: &Arc<CryptoProvider>,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::server::WantsServerCert>, rustls::Error> {
    Ok(ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier))
}

/// Whether `host`, a name or an address, is this host and nothing else.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_loopback() {
        for host in [
            "localhost",
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "localhost.evil.example",
            "0.0.0.0",
            "::",
            "10.0.0.1",
            "127.0.0.1.nip.io",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
