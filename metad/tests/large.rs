//! A large catalogue: what is in it is found, and how quickly is printed. `HARBOUR_CATALOGUE_IMAGES=20` makes
//! it a million objects; the short version has fifty thousand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "support/common.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Daemon, hash, pull_image};
use harbour_metad_client::v1;

/// Objects of one image.
const OBJECTS: u32 = 50_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_a_large_catalogue_is_found() {
    let images = match std::env::var("HARBOUR_CATALOGUE_IMAGES") {
        Ok(text) => text.parse().expect("HARBOUR_CATALOGUE_IMAGES is a number"),
        Err(_) => 1,
    };
    let daemon = Daemon::start(|config| {
        config.options.timing.donor_lease_ms = 600_000;
    })
    .await;
    let client = daemon.client().await.with_timeout(Duration::from_secs(60));
    common::donor(&client, "d", 1, 1 << 30).await;
    for number in 0..images {
        let start = Instant::now();
        let commit = pull_image(&client, &format!("n{number}"), number, OBJECTS).await;
        println!(
            "pull of {OBJECTS} objects: {:?}, of which commit {commit:?}",
            start.elapsed()
        );
    }
    let pull = common::begin(&client).await;
    for round in 0..5u32 {
        let number = |i: u32| (i * 7 % images) * 1_000_000 + (i * 31 + round * 1000) % OBJECTS;
        let objects = (0..8192)
            .map(|i| hash("object", number(i)).to_vec())
            .collect();
        let start = Instant::now();
        let reply = client
            .find_objects(v1::FindObjectsRequest {
                pull: Some(pull),
                objects,
            })
            .await
            .unwrap();
        println!("8192 objects: {:?}", start.elapsed());
        assert!(reply.objects.iter().all(|object| object.found));
    }
    let folder = daemon.stop().await;
    let start = Instant::now();
    let daemon = Daemon::start_in(folder, |_| {}).await;
    println!("open: {:?}", start.elapsed());
    let client = daemon.client().await;
    let start = Instant::now();
    let status = client.status(v1::StatusRequest {}).await.unwrap();
    println!(
        "status: {:?}, {} objects, {} bytes",
        start.elapsed(),
        status.objects,
        status.database_bytes
    );
    assert_eq!(status.objects, u64::from(images * OBJECTS));
    daemon.stop().await;
}
