//! The real daemon on real sockets, asked by the real client.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/common.rs"]
mod common;

use std::{
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    time::{Duration, Instant},
};

use common::{Daemon, content, endpoint, pull_image, wanted};
use harbour_metad::server::{Config, Server, ServerError};
use harbour_metad_client::{Client, Endpoint, Error, v1};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_over_the_wire_and_away_again() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    let mut watch = client.watch().await.unwrap();
    let first = watch.next().await.unwrap();
    common::donor(&client, "d", 1, 64 << 20).await;
    pull_image(&client, "one", 1, 300).await;
    let mut newest = first;
    let snapshot = client.snapshot().await.unwrap();
    while newest < snapshot.generation {
        newest = watch.next().await.unwrap();
    }
    assert_eq!((snapshot.images.len(), snapshot.layers.len()), (1, 1));
    assert_eq!(snapshot.layers[0].state(), v1::LayerState::Ready);
    let packs = client
        .locate(v1::LocateRequest {
            packs: vec![common::hash("pack", 1).to_vec()],
        })
        .await
        .unwrap();
    assert_eq!((packs.packs[0].extents.len(), packs.donors.len()), (1, 1));
    let index = snapshot.images[0].index.clone().unwrap();
    let range = v1::ReadIndexRequest {
        digest: index.digest,
        offset: 3,
        len: 9,
    };
    assert_eq!(
        client.read_index(range).await.unwrap().content,
        content(1, 200_000).0[3..12]
    );
    let status = client.status(v1::StatusRequest {}).await.unwrap();
    assert_eq!(
        (status.images, status.objects, status.policy.as_str()),
        (1, 300, "lru")
    );
    let name = v1::RemoveNameRequest {
        registry: "r".into(),
        repository: "p".into(),
        tag: "one".into(),
    };
    assert!(
        client
            .remove_name(name.clone())
            .await
            .unwrap()
            .image_removed
    );
    let error = client.remove_name(name).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotFound {
                asked: "Catalogue.RemoveName",
                ..
            }
        ),
        "{error}"
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_metrics_and_health() {
    let daemon = Daemon::start(|config| {
        config.listen = Some("[::1]:0".parse().unwrap());
        config.metrics = Some("127.0.0.1:0".parse().unwrap());
    })
    .await;
    let tcp: Endpoint = format!("http://{}", daemon.tcp.unwrap()).parse().unwrap();
    let client = Client::connect(&tcp, SECOND).await.unwrap();
    common::donor(&client, "d", 1, 8 << 20).await;
    let _ = client
        .get_document(v1::DocumentRequest { digest: vec![1] })
        .await
        .unwrap_err();
    let get = |path: &str| {
        let (address, request) = (
            daemon.metrics.unwrap(),
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        );
        tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    };
    assert!(get("/healthz").await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(get("/nothing").await.unwrap().starts_with("HTTP/1.1 404"));
    let text = get("/metrics").await.unwrap();
    for line in [
        "harbour_metad_lent_bytes 8388608",
        "harbour_metad_donors_live 1",
        "harbour_metad_space_bytes{book=\"free\"} 8388608",
        "harbour_metad_rpc_total{method=\"Donors.Register\",code=\"OK\"} 1",
        "harbour_metad_rpc_total{method=\"Catalogue.GetDocument\",code=\"INVALID_ARGUMENT\"} 1",
        "harbour_metad_rpc_seconds_count{method=\"Donors.Register\"} 1",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    let mut health = tonic_health::pb::health_client::HealthClient::new(
        tonic::transport::Endpoint::from_shared(tcp.to_string())
            .unwrap()
            .connect()
            .await
            .unwrap(),
    );
    let request = tonic_health::pb::HealthCheckRequest {
        service: "harbour.v1.Ingest".into(),
    };
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_are_taken_and_states_that_are_used() {
    let daemon = Daemon::start(|_| {}).await;
    let mode = std::fs::metadata(&daemon.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o660);
    let same_state = Config::new(
        daemon.folder.path().join("state"),
        daemon.folder.path().join("other"),
    );
    assert!(matches!(
        Server::bind(same_state).await,
        Err(ServerError::State { .. })
    ));
    let same_socket = Config::new(daemon.folder.path().join("state2"), &daemon.socket);
    assert!(matches!(
        Server::bind(same_socket).await,
        Err(ServerError::SocketTaken { .. })
    ));
    let file = daemon.folder.path().join("file");
    std::fs::write(&file, b"precious").unwrap();
    let on_file = Config::new(daemon.folder.path().join("state3"), &file);
    assert!(matches!(
        Server::bind(on_file).await,
        Err(ServerError::SocketTaken { .. })
    ));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let socket = daemon.socket.clone();
    let folder = daemon.stop().await;
    assert!(!socket.exists(), "the name goes with the daemon");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists(), "stale");
    drop(
        Server::bind(Config::new(folder.path().join("state"), &socket))
            .await
            .unwrap(),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_disturbs_nobody() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    common::donor(&client, "d", 1, 1 << 20).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let noise: Vec<u8> = (0..100_000u32)
        .flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes())
        .collect();
    let messages: Vec<Vec<u8>> = vec![
        noise.clone(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        preface[..10].to_vec(),
        preface.to_vec(),
        [&preface[..], &settings, &noise].concat(),
        [&preface[..], &settings, &[0xff; 3], &[0, 0, 0, 0, 0, 1]].concat(),
        [
            &preface[..],
            &settings,
            &[0, 0, 40, 1, 4, 0, 0, 0, 1, 0x83, 0x86],
        ]
        .concat(),
    ];
    let mut open = Vec::new();
    for message in messages.iter().cycle().take(70) {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        stream.set_write_timeout(Some(SECOND)).unwrap();
        let _ = stream.write_all(message);
        open.push(stream);
    }
    for _ in 0..20 {
        let start = Instant::now();
        client.list_donors(v1::ListDonorsRequest {}).await.unwrap();
        assert!(start.elapsed() < 5 * SECOND);
    }
    let silent = UnixStream::connect(&daemon.socket).unwrap();
    silent.set_read_timeout(Some(20 * SECOND)).unwrap();
    // The server's own greeting comes, and then the end.
    let ended = tokio::task::spawn_blocking(move || (&silent).read_to_end(&mut Vec::new()));
    let ended = ended.await.unwrap();
    assert!(
        matches!(ended, Ok(0..100)),
        "who says nothing is let go: {ended:?}"
    );
    assert_eq!(
        client
            .list_donors(v1::ListDonorsRequest {})
            .await
            .unwrap()
            .donors
            .len(),
        1
    );
    drop(open);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_above_the_frame_are_refused_and_the_connection_lives() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    common::donor(&client, "d", 1, 1 << 20).await;
    let pull = common::begin(&client).await;
    let long = v1::BeginRequest {
        what: "x".repeat(2 << 20),
        ..Default::default()
    };
    let error = client.begin(long).await.unwrap_err();
    assert!(
        matches!(error, Error::Other { .. } | Error::Exhausted { .. }),
        "{error:?}"
    );
    client.renew(pull).await.unwrap();
    let many = v1::FindObjectsRequest {
        pull: Some(pull),
        objects: vec![vec![0; 32]; 8193],
    };
    let error = client.find_objects(many).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Other {
                code: tonic::Code::InvalidArgument,
                ..
            }
        ),
        "{error:?}"
    );
    let most = v1::FindObjectsRequest {
        pull: Some(pull),
        objects: vec![vec![0; 32]; 8192],
    };
    assert_eq!(client.find_objects(most).await.unwrap().objects.len(), 8192);
    let none = v1::PullRef { pull: 1, token: 1 };
    assert!(matches!(
        client.renew(none).await,
        Err(Error::Refused { .. })
    ));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_watches_and_a_start_is_found_again() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    let mut watch = client.watch().await.unwrap();
    watch.next().await.unwrap();
    let start = Instant::now();
    let (socket, folder) = (daemon.socket.clone(), daemon.stop().await);
    assert!(
        start.elapsed() < 3 * SECOND,
        "a watch does not hold the daemon up"
    );
    assert!(matches!(watch.next().await, Err(Error::Unavailable { .. })));
    let error = client.status(v1::StatusRequest {}).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Unavailable {
                asked: "Admin.Status",
                ..
            }
        ),
        "{error:?}"
    );
    assert!(matches!(
        Client::connect(&endpoint(&socket), SECOND).await,
        Err(Error::Unavailable { .. })
    ));
    let daemon = Daemon::start_in(folder, |_| {}).await;
    let mut answered = client.status(v1::StatusRequest {}).await;
    for _ in 0..20 {
        if answered.is_ok() {
            break;
        }
        tokio::time::sleep(SECOND / 10).await;
        answered = client.status(v1::StatusRequest {}).await;
    }
    answered.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_do_not_wait_for_a_commit_that_takes_long() {
    let daemon = Daemon::start(|config| {
        config.options.failpoints = "commit.before=sleep:1500".parse().unwrap();
    })
    .await;
    let client = daemon.client().await;
    common::donor(&client, "d", 1, 64 << 20).await;
    let slow = client.clone();
    let commit = tokio::spawn(async move { pull_image(&slow, "one", 1, 10).await });
    let mut longest = Duration::ZERO;
    while !commit.is_finished() {
        let start = Instant::now();
        client.snapshot().await.unwrap();
        client
            .locate(v1::LocateRequest {
                packs: vec![vec![1; 32]],
            })
            .await
            .unwrap();
        longest = longest.max(start.elapsed());
        tokio::time::sleep(SECOND / 50).await;
    }
    commit.await.unwrap();
    assert!(longest < SECOND, "{longest:?}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_waits_until_readers_let_go_and_says_when_it_cannot() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await.with_timeout(20 * SECOND);
    common::donor(&client, "d", 1, (4 << 20) + (64 << 10)).await;
    pull_image(&client, "one", 1, 10).await;
    let node = client
        .register_node(v1::RegisterNodeRequest { name: "n".into() })
        .await
        .unwrap();
    let pull = common::begin(&client).await;
    let packs = wanted(&[(7, 4 << 20)]);
    let asking = client.clone();
    let reserving = tokio::spawn(async move {
        asking
            .reserve(v1::ReserveRequest {
                pull: Some(pull),
                packs,
                ..Default::default()
            })
            .await
    });
    tokio::time::sleep(SECOND / 2).await;
    assert!(!reserving.is_finished());
    let beat = |acknowledged| v1::NodeHeartbeat {
        node: node.node,
        acknowledged_generation: acknowledged,
        held: Vec::new(),
        used: Vec::new(),
    };
    let lease = client.node_heartbeat(beat(0)).await.unwrap();
    assert!(!lease.freed.is_empty());
    client
        .node_heartbeat(beat(lease.freed_generation))
        .await
        .unwrap();
    let reply = reserving.await.unwrap().unwrap();
    assert_eq!(reply.packs[0].extents.len(), 1);
    let packs = wanted(&[(8, 4 << 20), (9, 4 << 20)]);
    let error = client
        .reserve(v1::ReserveRequest {
            pull: Some(pull),
            packs,
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Exhausted { message, .. } if message.contains("8388608")),
        "{error:?}"
    );
    client.abort(pull).await.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_not_answered_ends_at_its_deadline() {
    let daemon = Daemon::start(|config| {
        config.options.failpoints = "begin.before=sleep:3000".parse().unwrap();
    })
    .await;
    let client = daemon.client().await.with_timeout(SECOND / 2);
    let start = Instant::now();
    let error = client.begin(v1::BeginRequest::default()).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Deadline {
                asked: "Ingest.Begin",
                ..
            }
        ),
        "{error:?}"
    );
    assert!(start.elapsed() < 2 * SECOND);
    daemon.stop().await;
}
