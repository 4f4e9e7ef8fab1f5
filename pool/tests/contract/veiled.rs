//! `tcp` under TLS: what a listener sees, and who is not let in.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use harbour_pool::{
    donor::DonorConfig,
    tcp::{TcpTransport, Veil},
    transport::{Access, Read, RegionId, Transport, TransportError, Write},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};

use crate::{
    subjects::{Listening as _, Threaded, loopback},
    suite::soon,
};

/// A CA, and one host of it.
pub struct Authority {
    root: CertificateDer<'static>,
    host: CertificateDer<'static>,
    key: KeyPair,
}

impl Authority {
    pub fn new() -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let mut host = CertificateParams::new(Vec::<String>::new()).unwrap();
        host.subject_alt_names = [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ]
        .map(SanType::IpAddress)
        .to_vec();
        let host = host.signed_by(&key, &issuer).unwrap();
        Self {
            root: root.der().clone(),
            host: host.der().clone(),
            key,
        }
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.serialize_der()).unwrap()
    }

    /// What the host connects with and is connected to by.
    pub fn veil(&self) -> Veil {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let roots = Arc::new(roots);
        let versions = [&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .unwrap()
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(vec![self.host.clone()], self.key())
            .unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .unwrap();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.host.clone()], self.key())
            .unwrap();
        server.send_tls13_tickets = 0;
        let (client, server) = (Arc::new(client), Arc::new(server));
        Veil::new(move || Arc::clone(&client), move || Arc::clone(&server))
    }
}

fn donor(veil: Option<Veil>) -> Threaded {
    Threaded::with(|config: &mut DonorConfig| {
        config.listen = loopback();
        config.veil = veil;
    })
}

fn connect(
    at: SocketAddr,
    donor: &Threaded,
    veil: Option<&Veil>,
) -> Result<TcpTransport, TransportError> {
    let (_, keys) = donor.tcp().unwrap();
    TcpTransport::connect(at, veil, 0, Access::ReadWrite, &keys, soon())
}

/// Writes `bytes` and reads them back.
fn there_and_back(transport: &TcpTransport, bytes: &[u8]) -> Result<(), TransportError> {
    let region = RegionId(0);
    transport.write(
        &[Write {
            region,
            offset: 0,
            from: bytes,
        }],
        soon(),
    )?;
    let mut into = vec![0; bytes.len()];
    let mut batch = [Read {
        region,
        offset: 0,
        into: &mut into,
    }];
    transport.read(&mut batch, soon())?;
    assert!(into == bytes);
    Ok(())
}

/// Passes connections on to `peer`, and keeps what goes either way.
fn listener(peer: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = door.local_addr().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heard);
    // Ends with the test's process.
    thread::spawn(move || {
        for reader in door.incoming().flatten() {
            let Ok(donor) = TcpStream::connect(peer) else {
                return;
            };
            let ways = [
                (reader.try_clone(), donor.try_clone()),
                (Ok(donor), Ok(reader)),
            ];
            for (from, to) in ways {
                let kept = Arc::clone(&kept);
                thread::spawn(move || pass_on(from?, to?, &kept));
            }
        }
    });
    (at, heard)
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, kept: &Mutex<Vec<u8>>) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = from.read(&mut buffer)?;
        if len == 0 {
            return to.shutdown(Shutdown::Write);
        }
        kept.lock().unwrap().extend_from_slice(&buffer[..len]);
        to.write_all(&buffer[..len])?;
    }
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

#[test]
fn who_listens_sees_nothing_of_it() {
    let word = b"a line that everybody would know again";
    let bytes = word.repeat(9_000);
    for veil in [None, Some(Authority::new().veil())] {
        let donor = donor(veil.clone());
        let (sockets, _) = donor.tcp().unwrap();
        let peer = *sockets.iter().find(|at| at.is_ipv4()).unwrap();
        let (at, heard) = listener(peer);
        let transport = connect(at, &donor, veil.as_ref()).unwrap();
        there_and_back(&transport, &bytes).unwrap();
        let heard = heard.lock().unwrap();
        assert!(heard.len() > 2 * bytes.len(), "{} bytes", heard.len());
        assert_eq!(contains(&heard, word), veil.is_none());
    }
}

#[test]
fn without_tls_nobody_is_served_who_has_to_have_it() {
    let donor = donor(Some(Authority::new().veil()));
    let at = donor.tcp().unwrap().0[0];
    // The welcome shows nothing; the first request does.
    let transport = connect(at, &donor, None).unwrap();
    let error = there_and_back(&transport, b"bytes").unwrap_err();
    assert!(
        matches!(
            error,
            TransportError::Unreachable { .. } | TransportError::Refused { .. }
        ),
        "{error:?}"
    );
}

#[test]
fn hosts_of_another_authority_are_strangers() {
    let (ours, theirs) = (Authority::new().veil(), Authority::new().veil());
    let donor = donor(Some(ours));
    let at = donor.tcp().unwrap().0[0];
    let error = connect(at, &donor, Some(&theirs)).unwrap_err();
    let said = format!("{error:?}");
    assert!(said.contains("TLS"), "{said}");
}

#[test]
fn a_donor_without_tls_is_found_out() {
    let donor = donor(None);
    let at = donor.tcp().unwrap().0[0];
    let veil = Authority::new().veil();
    let error = connect(at, &donor, Some(&veil)).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
}
