//! Registries that behave well, badly, and worse: a scripted server on loopback plays all of them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "source_support/fixture.rs"]
mod fixture;
#[path = "source_support/server.rs"]
mod server;

#[path = "source_http/auth.rs"]
mod auth;
#[path = "source_http/blobs.rs"]
mod blobs;
#[path = "source_http/manifests.rs"]
mod manifests;
#[path = "source_http/mirrors.rs"]
mod mirrors;
#[path = "source_http/tags.rs"]
mod tags;

use std::{error::Error, io::Read, time::Duration};

use fixture::Image;
use harbour_image::{
    manifest::LayerDescriptor,
    source::{
        BlobError, Deadlines, ResolvedImage, RetryPolicy, Source, SourceError, SourceOptions,
        SourceSpec,
    },
};
use server::Server;

/// Options for a server of plain HTTP, with waits that a test can bear.
fn options() -> SourceOptions {
    SourceOptions {
        insecure: true,
        retry: RetryPolicy {
            base: Duration::from_millis(5),
            max: Duration::from_millis(200),
            ..RetryPolicy::default()
        },
        deadlines: Deadlines {
            connect: Duration::from_secs(5),
            read: Duration::from_secs(5),
            request: Duration::from_secs(10),
            blob: Duration::from_secs(20),
            helper: Duration::from_secs(5),
            ..Deadlines::default()
        },
        ..SourceOptions::default()
    }
}

async fn open(server: &Server, options: &SourceOptions) -> Source {
    let spec = SourceSpec::parse(&format!("docker://{}/org/app:1", server.host())).unwrap();
    Source::open(&spec, options).await.unwrap()
}

async fn resolve(server: &Server, options: &SourceOptions) -> Result<ResolvedImage, SourceError> {
    open(server, options).await.resolve(None).await
}

/// Reads a layer to its end on a thread that may block.
async fn read(source: &Source, layer: &LayerDescriptor) -> Result<Vec<u8>, BlobError> {
    let mut reader = source.blob(layer);
    tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        match reader.read_to_end(&mut bytes) {
            Ok(_) => {
                assert_eq!(
                    reader.progress().load(std::sync::atomic::Ordering::Relaxed),
                    bytes.len() as u64
                );
                reader.finish().map(|_| bytes)
            }
            Err(error) => {
                let typed = BlobError::from_io(&error).expect("a typed error").clone();
                let again = reader.finish().expect_err("an error stays");
                assert_eq!(again.to_string(), typed.to_string());
                Err(typed)
            }
        }
    })
    .await
    .unwrap()
}

/// Reads every layer of an image and compares.
async fn pull(server: &Server, image: &Image, options: &SourceOptions) {
    let source = open(server, options).await;
    let resolved = source.resolve(None).await.unwrap();
    check(&resolved, image);
    for (layer, want) in resolved.layers.iter().zip(&image.layers) {
        assert!(
            &read(&source, layer).await.unwrap() == want,
            "layer {}",
            layer.digest
        );
    }
}

fn check(resolved: &ResolvedImage, image: &Image) {
    assert_eq!(resolved.manifest_digest, image.digest());
    assert_eq!(resolved.manifest, image.manifest);
    assert_eq!(resolved.raw_config, image.config);
    assert_eq!(resolved.layers.len(), image.layers.len());
    for (layer, tar) in resolved.layers.iter().zip(&image.tars) {
        assert_eq!(layer.diff_id, harbour_image::digest::Digest::of(tar));
    }
}

/// An error with all its causes, as it would be logged.
fn whole(error: &dyn Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause} {cause:?}"));
        next = cause.source();
    }
    text
}
