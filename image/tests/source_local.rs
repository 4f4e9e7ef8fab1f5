//! Layouts and archives in files: the shapes that tools write, and what hostile ones try.
#![allow(clippy::unwrap_used, clippy::expect_used)]

// Fixture and server are shared with the registry's tests, which use more of them.
#[allow(dead_code)]
#[path = "source_support/fixture.rs"]
mod fixture;
#[allow(dead_code)]
#[path = "source_support/server.rs"]
mod server;

#[path = "source_local/docker.rs"]
mod docker;
#[path = "source_local/hostile.rs"]
mod hostile;
#[path = "source_local/oci.rs"]
mod oci;
#[path = "source_local/spec.rs"]
mod spec;

use std::io::Read;

use harbour_image::source::{
    BlobError, ResolvedImage, Source, SourceError, SourceOptions, SourceSpec,
};

async fn open(text: &str) -> Result<Source, SourceError> {
    Source::open(&SourceSpec::parse(text)?, &SourceOptions::default()).await
}

async fn resolve(text: &str) -> Result<ResolvedImage, SourceError> {
    open(text).await?.resolve(None).await
}

async fn layer(
    source: &Source,
    image: &ResolvedImage,
    number: usize,
) -> Result<Vec<u8>, BlobError> {
    let mut reader = source.blob(&image.layers[number]);
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        let got = reader.read_to_end(&mut bytes);
        got.map(|_| bytes)
            .map_err(|error| BlobError::from_io(&error).unwrap().clone())
    });
    read.await.unwrap()
}

fn whole(error: &dyn std::error::Error) -> String {
    let cause = error
        .source()
        .map(|cause| format!(": {}", whole(cause)))
        .unwrap_or_default();
    format!("{error}{cause}")
}
