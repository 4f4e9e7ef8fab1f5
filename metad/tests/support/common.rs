//! A daemon in this process, and a pull in a few words.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use harbour_metad::server::{Config, Server, ServerError};
use harbour_metad_client::{Client, Endpoint, v1};
use tokio::{sync::oneshot, task::JoinHandle};

pub(crate) struct Daemon {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) socket: PathBuf,
    pub(crate) tcp: Option<SocketAddr>,
    pub(crate) metrics: Option<SocketAddr>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ServerError>>,
}

pub(crate) fn endpoint(socket: &Path) -> Endpoint {
    Endpoint::Unix(socket.into())
}

impl Daemon {
    pub(crate) async fn start(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), change).await
    }

    pub(crate) async fn start_in(
        folder: tempfile::TempDir,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let socket = folder.path().join("metad.sock");
        let mut config = Config::new(folder.path().join("state"), &socket);
        change(&mut config);
        let server = Server::bind(config).await.unwrap();
        let (tcp, metrics) = (server.tcp_address(), server.metrics_address());
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        Self {
            folder,
            socket,
            tcp,
            metrics,
            stop,
            task,
        }
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&endpoint(&self.socket), Duration::from_secs(5))
            .await
            .unwrap()
    }

    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
        self.folder
    }
}

pub(crate) fn hash(kind: &str, number: u32) -> [u8; 32] {
    *blake3::hash(format!("{kind} {number}").as_bytes()).as_bytes()
}

/// An index of `len` bytes with its table behind it, and its digest.
pub(crate) fn content(number: u32, len: usize) -> (Vec<u8>, [u8; 32]) {
    let index: Vec<u8> = (0..len)
        .map(|i| (i as u32).wrapping_mul(number + 7) as u8)
        .collect();
    let table: Vec<u8> = index
        .chunks(16 << 10)
        .flat_map(|granule| *blake3::hash(granule).as_bytes())
        .collect();
    let named = [&(len as u64).to_le_bytes()[..], &table].concat();
    ([index, table].concat(), *blake3::hash(&named).as_bytes())
}

pub(crate) fn wanted(packs: &[(u32, u32)]) -> Vec<v1::PackWanted> {
    packs
        .iter()
        .map(|(number, len)| v1::PackWanted {
            pack: hash("pack", *number).to_vec(),
            len: *len,
        })
        .collect()
}

pub(crate) async fn donor(client: &Client, name: &str, epoch: u64, len: u64) -> v1::DonorLease {
    let donor = v1::Donor {
        name: name.into(),
        epoch,
        addresses: vec!["shm:/nowhere".into()],
        regions: vec![v1::Region {
            id: 0,
            len,
            ..Default::default()
        }],
        ..Default::default()
    };
    client
        .register_donor(v1::RegisterDonorRequest {
            donor: Some(donor),
            replaces_epoch: 0,
        })
        .await
        .unwrap()
}

pub(crate) async fn begin(client: &Client) -> v1::PullRef {
    begin_of(client, "x").await
}

/// A pull that is shown as one of `what`.
pub(crate) async fn begin_of(client: &Client, what: &str) -> v1::PullRef {
    let request = v1::BeginRequest {
        what: what.into(),
        host: "h".into(),
        pid: 1,
        ..Default::default()
    };
    let lease = client.begin(request).await.unwrap();
    v1::PullRef {
        pull: lease.pull,
        token: lease.token,
    }
}

/// A pull of one layer with one pack of `objects` objects; pack, layer and indexes are of `number`.
/// Gives the time that the commit took.
pub(crate) async fn pull_image(client: &Client, name: &str, number: u32, objects: u32) -> Duration {
    let pull = begin(client).await;
    let len = (objects * 8).max(4096);
    let (index, digest) = content(number, 200_000);
    let packs = wanted(&[(number, len), (1_000_000 + number, index.len() as u32)]);
    client
        .reserve(v1::ReserveRequest {
            pull: Some(pull),
            packs: packs.clone(),
            ..Default::default()
        })
        .await
        .unwrap();
    client
        .put_index(pull, digest, 200_000, index)
        .await
        .unwrap();
    let reference = v1::IndexRef {
        digest: digest.to_vec(),
        len_bytes: 200_000,
        packs: vec![packs[1].pack.clone()],
    };
    let layer = v1::Layer {
        diff_id: hash("diff", number).to_vec(),
        index: Some(reference.clone()),
        unpacked_bytes: u64::from(len),
        ..Default::default()
    };
    let object = move |at| v1::PackObject {
        object: hash("object", number * 1_000_000 + at).to_vec(),
        offset: at * 8,
        len: 8,
    };
    let named = v1::PackObjects {
        pack: packs[0].pack.clone(),
        len,
        objects: (0..objects).map(object).collect(),
    };
    client
        .stage_layer(
            v1::LayerHead {
                pull: Some(pull),
                layer: Some(layer),
            },
            [named],
        )
        .await
        .unwrap();
    let document = |text: &str| v1::Document {
        content: text.into(),
        media_type: "application/json".into(),
    };
    let image = v1::Image {
        registry: "r".into(),
        repository: "p".into(),
        tag: name.into(),
        manifest: hash("manifest", number).to_vec(),
        config: hash("config", number).to_vec(),
        diff_ids: vec![hash("diff", number).to_vec()],
        index: Some(reference),
        ..Default::default()
    };
    let commit = v1::CommitRequest {
        pull: Some(pull),
        image: Some(image),
        manifest: Some(document("manifest")),
        config: Some(document("config")),
        index_packs: packs[1..].to_vec(),
        fence: 0,
    };
    let start = std::time::Instant::now();
    client.commit(commit).await.unwrap();
    start.elapsed()
}
