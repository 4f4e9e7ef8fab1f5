//! Small images made in memory, and what a registry answers about them.

use std::{collections::BTreeMap, io::Write};

use harbour_image::{digest::Digest, manifest::media};

use crate::server::{Reply, Request};

/// An image and all its documents.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    /// Compressed layers.
    pub(crate) layers: Vec<Vec<u8>>,
    /// The same, not compressed.
    pub(crate) tars: Vec<Vec<u8>>,
}

impl Image {
    /// An image for `linux/<architecture>` whose layers each hold one file of `len` bytes that
    /// gzip cannot make smaller.
    pub(crate) fn new(architecture: &str, layers: usize, len: usize) -> Self {
        let tars: Vec<Vec<u8>> = (0..layers)
            .map(|n| tar(&[(&format!("file{n}"), &noise(n as u64 + 1, len))]))
            .collect();
        let blobs: Vec<Vec<u8>> = tars.iter().map(|tar| gzip(tar)).collect();
        let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let config = serde_json::json!({
            "os": "linux", "architecture": architecture,
            "config": {"Env": ["A=b"], "Cmd": ["/run"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layer =
            |blob: &Vec<u8>| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob);
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
            "config": descriptor(media::OCI_CONFIG, &config),
            "layers": blobs.iter().map(layer).collect::<Vec<_>>(),
        });
        Self {
            manifest: serde_json::to_vec(&manifest).unwrap(),
            config,
            layers: blobs,
            tars,
        }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Every blob by digest.
    pub(crate) fn blobs(&self) -> BTreeMap<Digest, Vec<u8>> {
        let all = self.layers.iter().chain([&self.config]);
        all.map(|blob| (Digest::of(blob), blob.clone())).collect()
    }

    /// What an honest registry without authorisation answers, under any repository name.
    pub(crate) fn answer(&self, request: &Request) -> Reply {
        answer(&[self], request)
    }
}

/// What a registry with these images answers; a tag gives the first one.
pub(crate) fn answer(images: &[&Image], request: &Request) -> Reply {
    let (before, name) = request.path.rsplit_once('/').unwrap();
    if before.ends_with("/manifests") {
        let by_name = |image: &&&Image| !name.contains(':') || image.digest().to_string() == name;
        let Some(image) = images.iter().find(by_name) else {
            return Reply::new(404, "");
        };
        return Reply::new(200, image.manifest.clone())
            .with("Content-Type", media::OCI_MANIFEST)
            .with("Docker-Content-Digest", image.digest().to_string());
    }
    let digest: Digest = name.parse().unwrap();
    let Some(blob) = images
        .iter()
        .find_map(|image| image.blobs().remove(&digest))
    else {
        return Reply::new(
            404,
            r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"no"}]}"#,
        );
    };
    ranged(&blob, request)
}

/// The blob, or the part of it that the request asks for.
pub(crate) fn ranged(blob: &[u8], request: &Request) -> Reply {
    match request.range_start() {
        Some(start) => Reply::new(206, &blob[start..]).with(
            "Content-Range",
            format!("bytes {start}-{}/{}", blob.len() - 1, blob.len()),
        ),
        None => Reply::new(200, blob),
    }
}

pub(crate) fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": Digest::of(blob).to_string(), "size": blob.len()})
}

/// A tar of regular files.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes without a pattern, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .take(len)
        .collect()
}
