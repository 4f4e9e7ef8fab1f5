//! Three donors over real sockets: replicas, a loss, a donor that joins and one that leaves. The
//! donors here lend nothing and copy nothing: metad never sees a byte, so it is told that they did.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/common.rs"]
mod common;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use common::{Daemon, hash, pull_image};
use harbour_metad_client::{Client, Error, v1};

const LEND: u64 = 64 << 20;
const IMAGES: u32 = 12;

/// A donor that says it has done whatever it is told to.
struct Willing {
    client: Client,
    reference: v1::DonorRef,
    tasks: Vec<v1::CopyTask>,
}

impl Willing {
    async fn join(client: &Client, name: &str, domain: &str) -> Self {
        let donor = v1::Donor {
            name: name.into(),
            epoch: 1,
            addresses: vec!["shm:/nowhere".into()],
            regions: vec![v1::Region {
                len: LEND,
                ..Default::default()
            }],
            failure_domain: domain.into(),
            ..Default::default()
        };
        let request = v1::RegisterDonorRequest {
            donor: Some(donor),
            replaces_epoch: 0,
        };
        let lease = client.register_donor(request).await.unwrap();
        Self {
            client: client.clone(),
            reference: v1::DonorRef {
                id: lease.id,
                epoch: 1,
            },
            tasks: lease.tasks,
        }
    }

    async fn beat(&mut self) -> v1::DonorLease {
        let beat = v1::DonorHeartbeat {
            donor: Some(self.reference),
        };
        let mut lease = self.client.donor_heartbeat(beat).await.unwrap();
        self.tasks.append(&mut lease.tasks);
        while !self.tasks.is_empty() {
            let done = self.tasks.drain(..).map(|task| v1::CopyOutcome {
                task: task.task,
                ok: true,
                ..Default::default()
            });
            let report = v1::CopiedReport {
                donor: Some(self.reference),
                outcomes: done.collect(),
            };
            lease = self.client.donor_copied(report).await.unwrap();
            self.tasks.append(&mut lease.tasks);
        }
        lease
    }
}

/// Lets donors work until something is so.
async fn until(
    donors: &mut [Willing],
    client: &Client,
    what: &str,
    so: impl Fn(&v1::StatusReply, &HashMap<String, v1::Donor>) -> bool,
) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        for donor in donors.iter_mut() {
            donor.beat().await;
        }
        let status = client.status(v1::StatusRequest {}).await.unwrap();
        let list = client.list_donors(v1::ListDonorsRequest {}).await.unwrap();
        let by_name = list
            .donors
            .into_iter()
            .map(|d| (d.name.clone(), d))
            .collect();
        if so(&status, &by_name) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {status:?} {by_name:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn replicas(client: &Client, number: u32) -> usize {
    let request = v1::LocateRequest {
        packs: vec![hash("pack", number).to_vec()],
    };
    client.locate(request).await.unwrap().packs[0].extents.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_donors_lose_one_gain_one_and_let_one_go() {
    let daemon = Daemon::start(|config| {
        config.metrics = Some("127.0.0.1:0".parse().unwrap());
        config.options.replicas = 2;
        // Longer than a pull takes on a slow machine: only who is meant to is silent.
        config.options.timing.donor_lease_ms = 4_000;
    })
    .await;
    let client = daemon.client().await;
    let mut donors = vec![
        Willing::join(&client, "a", "rack 1").await,
        Willing::join(&client, "b", "rack 1").await,
        Willing::join(&client, "c", "rack 2").await,
    ];
    for number in 0..IMAGES {
        pull_image(&client, &format!("n{number}"), number, 50_000).await;
        for donor in &mut donors {
            donor.beat().await;
        }
    }
    for number in 0..IMAGES {
        assert_eq!(replicas(&client, number).await, 2);
    }
    // The only one in its rack is heard of no more.
    let lost = donors.pop().unwrap();
    until(
        &mut donors,
        &client,
        "copied from the others",
        |status, by_name| {
            !by_name["c"].live && status.replicas_missing == 0 && status.copies_running == 0
        },
    )
    .await;
    for number in 0..IMAGES {
        assert_eq!(replicas(&client, number).await, 2);
    }
    let stranger = client.donor_heartbeat(v1::DonorHeartbeat {
        donor: Some(v1::DonorRef { id: 99, epoch: 1 }),
    });
    assert!(matches!(stranger.await, Err(Error::NotFound { .. })));
    client.donor_leave(lost.reference).await.unwrap();
    donors.push(Willing::join(&client, "d", "rack 2").await);
    until(&mut donors, &client, "even", |status, by_name| {
        let used = || by_name.values().map(|donor| donor.used_bytes);
        let mean = used().sum::<u64>() / 3;
        status.copies_running == 0
            && status.quarantined_bytes == 0
            && !status.rebalancing
            && used().all(|bytes| bytes.abs_diff(mean) * 5 <= mean)
    })
    .await;
    let drain = v1::ResizeDonor {
        donor: Some(donors[0].reference),
        draining: true,
        ..Default::default()
    };
    let lease = client.donor_resize(drain).await.unwrap();
    assert!(lease.draining);
    until(
        &mut donors,
        &client,
        "nothing is left on a",
        |status, by_name| {
            by_name["a"].draining && by_name["a"].used_bytes == 0 && status.replicas_missing == 0
        },
    )
    .await;
    assert_eq!(donors[0].beat().await.left_bytes, 0);
    let text = metrics(&daemon).await;
    for line in [
        "harbour_metad_replicas_missing 0",
        "harbour_metad_copies_running 0",
        "harbour_metad_pool_hit_ratio ",
        "harbour_metad_evictions 0",
        "harbour_metad_rebalancing 0",
        "harbour_metad_donor_bytes{donor=\"a\",book=\"used\"} 0",
        "harbour_metad_donor_bytes{donor=\"a\",book=\"free\"} 67108864",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(!text.contains("harbour_metad_copied_bytes 0\n"));
    assert!(!text.contains("donor=\"c\""), "it left");
    daemon.stop().await;
}

async fn metrics(daemon: &Daemon) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let address = daemon.metrics.unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_of_a_large_pack_come_in_pages() {
    let daemon = Daemon::start(|_| {}).await;
    let client = daemon.client().await;
    common::donor(&client, "d", 1, LEND).await;
    pull_image(&client, "n", 3, 20_000).await;
    let mut objects = Vec::new();
    loop {
        let request = v1::ListObjectsRequest {
            pack: hash("pack", 3).to_vec(),
            from: objects.len() as u32,
        };
        let reply = client.list_objects(request).await.unwrap();
        objects.extend(reply.objects);
        if reply.last {
            break;
        }
    }
    assert_eq!(objects.len(), 20_000);
    let ends = objects.iter().map(|object| object.offset + object.len);
    let starts = objects.iter().skip(1).map(|object| object.offset);
    assert!(
        ends.zip(starts).all(|(end, start)| end == start),
        "in order"
    );
    let unknown = v1::ListObjectsRequest {
        pack: vec![7; 32],
        from: 0,
    };
    assert!(matches!(
        client.list_objects(unknown).await,
        Err(Error::NotFound { .. })
    ));
    daemon.stop().await;
}
