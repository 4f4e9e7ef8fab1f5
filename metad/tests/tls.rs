//! gRPC between hosts: who is let in, who is not, and what strangers on the port can do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/authority.rs"]
mod authority;
#[path = "support/common.rs"]
mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use authority::Authority;
use common::Daemon;
use harbour_metad::server::{Config, Server, ServerError};
use harbour_metad_client::{
    Client, Endpoint, Error, Trust,
    tls::{CA_FILE, CERTIFICATE_FILE, Certificate, Identity, KEY_FILE, TlsError},
    v1,
};

const SECOND: Duration = Duration::from_secs(1);

fn https(host: &str, address: SocketAddr) -> Endpoint {
    format!("https://{host}:{}", address.port())
        .parse()
        .unwrap()
}

async fn daemon(authority: &Authority, listen: &str, names: &[&str]) -> Daemon {
    let identity = authority.identity("metad", names);
    let listen = listen.parse().unwrap();
    Daemon::start(|config| {
        config.listen = Some(listen);
        config.identity = Some(identity);
    })
    .await
}

/// The error of a connection that must not come about.
async fn refused(endpoint: &Endpoint, trust: &Trust) -> TlsError {
    match Client::connect_with(endpoint, trust, 5 * SECOND).await {
        Err(Error::Tls { source, .. }) => {
            assert!(!source.next().is_empty());
            source
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_of_one_authority_talk_over_both_families() {
    let authority = Authority::new("one");
    for (listen, host) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("[::1]:0", "[::1]"),
        ("127.0.0.1:0", "localhost"),
    ] {
        let daemon = daemon(
            &authority,
            listen,
            &["metad", "localhost", "127.0.0.1", "::1"],
        )
        .await;
        let endpoint = https(host, daemon.tcp.unwrap());
        let client = Client::connect_with(&endpoint, &authority.trust("node"), 5 * SECOND)
            .await
            .unwrap();
        common::donor(&client, "d", 1, 64 << 20).await;
        common::pull_image(&client, "one", 1, 300).await;
        let mut watch = client.watch().await.unwrap();
        watch.next().await.unwrap();
        assert_eq!(client.snapshot().await.unwrap().images.len(), 1);
        // The unix socket is as it always was.
        assert_eq!(
            daemon.client().await.snapshot().await.unwrap().images.len(),
            1
        );
        daemon.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_stranger_is_told_why() {
    let (authority, other) = (Authority::new("one"), Authority::new("two"));
    let daemon = daemon(&authority, "127.0.0.1:0", &["127.0.0.1", "metad"]).await;
    let address = daemon.tcp.unwrap();
    let endpoint = https("127.0.0.1", address);

    // Ours is of another authority, and so does not trust metad's either.
    let error = refused(&endpoint, &other.trust("node")).await;
    assert!(
        matches!(&error, TlsError::ForeignPeer { ca, .. } if ca.ends_with(CA_FILE)),
        "{error}"
    );

    // One that trusts metad's authority but shows another's certificate: metad says no.
    let mixed = other.dir("mixed", &["mixed"], -1, 30);
    let ours = authority.dir("ours", &["ours"], -1, 30);
    let both = [ours.join(CA_FILE), mixed.join(CA_FILE)].map(|ca| fs::read_to_string(ca).unwrap());
    authority::write(&mixed.join(CA_FILE), &both.concat(), 0o644);
    let trust = Trust {
        identity: Some(Identity::load(&mixed).unwrap().into()),
        plain: false,
    };
    let error = refused(&endpoint, &trust).await;
    assert!(
        matches!(&error, TlsError::Refused { certificate, .. } if certificate.ends_with(CERTIFICATE_FILE)),
        "{error}"
    );

    // Called by a name that its certificate does not have.
    let error = refused(&https("localhost", address), &authority.trust("node")).await;
    assert!(
        matches!(&error, TlsError::WrongName { host, names, .. } if host == "localhost" && names.contains("metad")),
        "{error}"
    );
    assert!(error.next().contains("--san localhost"), "{}", error.next());

    // No certificate at all, and plain text to another host.
    let error = refused(&endpoint, &Trust::default()).await;
    assert!(matches!(error, TlsError::NoIdentity { .. }), "{error}");
    let plain: Endpoint = "http://192.0.2.1:7480".parse().unwrap();
    let error = refused(&plain, &authority.trust("node")).await;
    assert!(matches!(error, TlsError::Plain { .. }), "{error}");
    assert!(error.next().contains("--insecure-metad"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_does_not_speak_tls_is_named() {
    let authority = Authority::new("one");
    let plain = Daemon::start(|config| config.listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let endpoint = https("127.0.0.1", plain.tcp.unwrap());
    let error = refused(&endpoint, &authority.trust("node")).await;
    assert!(matches!(error, TlsError::Handshake { .. }), "{error}");
    plain.stop().await;
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let (authority, other) = (Authority::new("one"), Authority::new("two"));
    let load = |dir: &std::path::Path| Identity::load(dir).unwrap_err();
    let dir = |name: &str| authority.dir(name, &[name], -1, 30);

    for file in [CA_FILE, CERTIFICATE_FILE, KEY_FILE] {
        let missing = dir("missing");
        fs::remove_file(missing.join(file)).unwrap();
        let error = load(&missing);
        assert!(
            matches!(&error, TlsError::Read { path, .. } if path.ends_with(file)),
            "{error}"
        );
        assert!(error.next().contains("harbour certs issue"));
        let garbage = dir("garbage");
        authority::write(&garbage.join(file), "-----BEGIN NONSENSE-----\nxx\n", 0o600);
        let error = load(&garbage);
        assert!(
            matches!(&error, TlsError::Content { path, .. } if path.ends_with(file)),
            "{error}"
        );
    }
    let error = load(&authority.dir("ended", &["x"], -60, -30));
    assert!(
        matches!(&error, TlsError::Time { path, when } if path.ends_with(CERTIFICATE_FILE) && when.contains("ended on 20")),
        "{error}"
    );
    let error = load(&authority.dir("early", &["x"], 30, 60));
    assert!(
        matches!(&error, TlsError::Time { when, .. } if when.contains("begins on 20")),
        "{error}"
    );

    let foreign = dir("foreign");
    let theirs = other.dir("theirs", &["x"], -1, 30);
    fs::copy(theirs.join(CA_FILE), foreign.join(CA_FILE)).unwrap();
    let error = load(&foreign);
    assert!(matches!(error, TlsError::Foreign { .. }), "{error}");

    let apart = dir("apart");
    fs::copy(dir("another").join(KEY_FILE), apart.join(KEY_FILE)).unwrap();
    let error = load(&apart);
    assert!(matches!(error, TlsError::KeyMismatch { .. }), "{error}");

    let open = dir("open");
    fs::set_permissions(open.join(KEY_FILE), fs::Permissions::from_mode(0o644)).unwrap();
    let error = load(&open);
    assert!(
        matches!(error, TlsError::Exposed { mode: 0o644, .. }),
        "{error}"
    );
    assert!(error.next().starts_with("chmod 600"));

    let read = Certificate::read(&dir("read").join(CERTIFICATE_FILE)).unwrap();
    assert_eq!(
        (read.names, read.issuer.as_str()),
        (vec!["read".to_owned()], "one")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_text_beyond_loopback_needs_to_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| Config {
        listen: Some("0.0.0.0:0".parse().unwrap()),
        ..Config::new(
            folder.path().join(name),
            folder.path().join(format!("{name}.sock")),
        )
    };
    match Server::bind(at("a")).await {
        Err(ServerError::Plain { source, .. }) => {
            assert!(source.next().contains("--insecure-metad"))
        }
        other => panic!("{other:?}"),
    }
    assert!(
        !folder.path().join("a.sock").exists(),
        "refused before anything is made"
    );
    let plain = Config {
        plain: true,
        ..at("b")
    };
    drop(Server::bind(plain).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewed_certificates_are_taken_at_the_next_connection() {
    let authority = Authority::new("one");
    let dir = authority.dir("metad", &["127.0.0.1"], -1, 30);
    let identity = std::sync::Arc::new(Identity::load(&dir).unwrap());
    let daemon = Daemon::start(|config| {
        config.listen = Some("127.0.0.1:0".parse().unwrap());
        config.identity = Some(identity);
    })
    .await;
    let address = daemon.tcp.unwrap();
    let trust = authority.trust("node");
    let first = Client::connect_with(&https("127.0.0.1", address), &trust, 5 * SECOND)
        .await
        .unwrap();
    // A half-copied renewal is not used, and what was there goes on.
    let spare = authority.dir("spare", &["localhost", "127.0.0.1"], -1, 30);
    fs::copy(spare.join(KEY_FILE), dir.join(KEY_FILE)).unwrap();
    Client::connect_with(&https("127.0.0.1", address), &trust, 5 * SECOND)
        .await
        .unwrap();
    refused(&https("localhost", address), &trust).await;
    // And whole it is.
    let renewed = fs::read_to_string(spare.join(CERTIFICATE_FILE)).unwrap();
    authority::write(&dir.join(CERTIFICATE_FILE), &renewed, 0o644);
    let second = Client::connect_with(&https("localhost", address), &trust, 5 * SECOND)
        .await
        .unwrap();
    for client in [first, second] {
        client.status(v1::StatusRequest {}).await.unwrap();
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_ended_lets_nobody_in() {
    let authority = Authority::new("one");
    // Good for a few more seconds when it is loaded, so that the client's own check passes.
    let dir = authority.dir("node", &["node"], -1, 30);
    let trust = Trust {
        identity: Some(Identity::load(&dir).unwrap().into()),
        plain: false,
    };
    let ended = authority.dir("ended", &["node"], -60, -30);
    let daemon = daemon(&authority, "127.0.0.1:0", &["127.0.0.1"]).await;
    let address = daemon.tcp.unwrap();
    // The client does not load one that has ended, so a bare one shows it.
    let config = bare_client(&dir, &ended);
    let outcome = tokio::task::spawn_blocking(move || {
        let name = "127.0.0.1".try_into().unwrap();
        let mut session = rustls::ClientConnection::new(config, name).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(10 * SECOND)).unwrap();
        let mut tls = rustls::Stream::new(&mut session, &mut stream);
        tls.read(&mut [0; 100])
    });
    let error = outcome.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("CertificateExpired"), "{error}");
    Client::connect_with(&https("127.0.0.1", address), &trust, 5 * SECOND)
        .await
        .unwrap();
    daemon.stop().await;
}

/// A client that trusts what `good` trusts and shows the certificate of `shown`.
fn bare_client(
    good: &std::path::Path,
    shown: &std::path::Path,
) -> std::sync::Arc<rustls::ClientConfig> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(good.join(CA_FILE)).unwrap())
        .unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let mut config = rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(shown.join(CERTIFICATE_FILE)).unwrap()],
            PrivateKeyDer::from_pem_file(shown.join(KEY_FILE)).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_on_the_port_keep_nobody_out() {
    let authority = Authority::new("one");
    let daemon = daemon(&authority, "127.0.0.1:0", &["127.0.0.1"]).await;
    let address = daemon.tcp.unwrap();
    let noise: Vec<u8> = (0..20_000u32)
        .flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes())
        .collect();
    // A record that claims to be a ClientHello of 16 KiB and goes on for ever; one cut short.
    let endless = [&[0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &noise].concat();
    let messages: [&[u8]; 6] = [
        b"",
        b"\x16",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &noise,
        &endless,
    ];
    // Twice as many as may shake hands at a time, all of them holding on.
    let mut open = Vec::new();
    for message in messages.iter().cycle().take(600) {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_write_timeout(Some(SECOND)).unwrap();
        let _ = stream.write_all(message);
        open.push(stream);
    }
    let trust = authority.trust("node");
    let start = Instant::now();
    for _ in 0..5 {
        let client = Client::connect_with(&https("127.0.0.1", address), &trust, 5 * SECOND)
            .await
            .unwrap();
        client.list_donors(v1::ListDonorsRequest {}).await.unwrap();
    }
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    // Whoever says nothing is let go, long before a call's own deadline.
    let mut silent = TcpStream::connect(address).unwrap();
    silent.set_read_timeout(Some(20 * SECOND)).unwrap();
    let ended = tokio::task::spawn_blocking(move || silent.read_to_end(&mut Vec::new()));
    let ended = ended.await.unwrap();
    assert!(
        matches!(ended, Ok(0..100))
            || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset)
    );
    assert!(start.elapsed() < 12 * SECOND);
    // One that is let in by TLS and then says nothing goes the same way.
    let dir = authority.dir("quiet", &["quiet"], -1, 30);
    let config = bare_client(&dir, &dir);
    let quiet = tokio::task::spawn_blocking(move || {
        let mut session =
            rustls::ClientConnection::new(config, "127.0.0.1".try_into().unwrap()).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(20 * SECOND)).unwrap();
        let mut tls = rustls::Stream::new(&mut session, &mut stream);
        // The server's own greeting comes, and then the end.
        let mut got = 0;
        let mut part = [0; 100];
        while let Ok(more @ 1..) = tls.read(&mut part) {
            got += more;
        }
        got
    });
    let start = Instant::now();
    assert!(quiet.await.unwrap() < 200);
    assert!(start.elapsed() < 15 * SECOND, "{:?}", start.elapsed());
    drop(open);
    daemon.stop().await;
}
