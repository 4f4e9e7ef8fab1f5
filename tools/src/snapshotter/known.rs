//! What the cluster has, as a snapshotter asks for it: layers by chain ID.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use harbour_image::digest::Digest;
use harbour_metad_client::{Client, Error as ClientError, Snapshot};
use tokio::sync::watch;

use crate::stop::Stop;

/// Pause before metad is asked again after a failure.
const RETRY: Duration = Duration::from_millis(250);

/// One generation of the catalogue.
#[derive(Debug, Default)]
pub struct Known {
    /// Of metad's catalogue; 0 before the first answer.
    pub generation: u64,
    /// Number of each layer, by diff ID.
    numbers: HashMap<Digest, u32>,
    /// Diff ID by the digest of a blob.
    blobs: HashMap<Digest, Digest>,
    /// Manifests of images by the chain ID of their highest layer.
    images: HashMap<Digest, Vec<Digest>>,
}

impl Known {
    fn of(snapshot: &Snapshot) -> Self {
        let mut known = Self {
            generation: snapshot.generation,
            ..Self::default()
        };
        for layer in &snapshot.layers {
            let Some(diff_id) = digest(&layer.diff_id) else {
                continue;
            };
            known.numbers.insert(diff_id, layer.number);
            let blobs = layer.blobs.iter().filter_map(|blob| digest(&blob.digest));
            known.blobs.extend(blobs.map(|blob| (blob, diff_id)));
        }
        for image in &snapshot.images {
            let diff_ids: Option<Vec<_>> = image.diff_ids.iter().map(|id| digest(id)).collect();
            let diff_ids = diff_ids.unwrap_or_default().into_iter();
            let top = diff_ids.fold(None, |chain, diff_id| Some(diff_id.chained(chain)));
            if let (Some(top), Some(manifest)) = (top, digest(&image.manifest)) {
                let manifests = known.images.entry(top).or_default();
                if !manifests.contains(&manifest) {
                    manifests.push(manifest);
                }
            }
        }
        known
    }

    /// The layer that makes the chain `wanted` on top of `parent`: its diff ID. A blob's digest, where one is
    /// known, saves looking through all layers.
    pub fn layer(
        &self,
        parent: Option<Digest>,
        wanted: Digest,
        blob: Option<Digest>,
    ) -> Option<Digest> {
        let fits = |diff_id: &Digest| diff_id.chained(parent) == wanted;
        let by_blob = blob
            .and_then(|blob| self.blobs.get(&blob))
            .filter(|id| fits(id));
        by_blob
            .or_else(|| self.numbers.keys().find(|id| fits(id)))
            .copied()
    }

    /// The number of a layer.
    pub fn number(&self, diff_id: &Digest) -> Option<u32> {
        self.numbers.get(diff_id).copied()
    }

    /// Manifests of images whose layers are this chain.
    pub fn images(&self, chain: &Digest) -> &[Digest] {
        self.images.get(chain).map_or(&[], Vec::as_slice)
    }
}

fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.try_into().ok().map(Digest::from_bytes)
}

/// The newest generation, followed.
pub struct Catalogue {
    client: Client,
    now: RwLock<Arc<Known>>,
    told: watch::Sender<u64>,
}

impl Catalogue {
    /// One that knows nothing yet.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            now: RwLock::default(),
            told: watch::Sender::new(0),
        }
    }

    /// The newest that was heard of.
    pub fn now(&self) -> Arc<Known> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for this generation, or for any at all; false when it did not come within `limit`.
    pub async fn reach(&self, generation: u64, limit: Duration) -> bool {
        let mut told = self.told.subscribe();
        let wanted = told.wait_for(|now| *now >= generation.max(1));
        tokio::time::timeout(limit, wanted)
            .await
            .is_ok_and(|told| told.is_ok())
    }

    /// Told of each generation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// Follows metad's catalogue until `stop`.
    pub async fn follow(&self, stop: &Stop) {
        loop {
            let outcome = tokio::select! {
                () = stop.wait() => return,
                outcome = self.follow_once() => outcome,
            };
            if let Err(error) = outcome {
                tracing::debug!(%error, "the watch of the catalogue broke off; beginning again");
            }
            if stop.within(RETRY).await {
                return;
            }
        }
    }

    async fn follow_once(&self) -> Result<(), ClientError> {
        let mut watch = self.client.watch().await?;
        loop {
            watch.next().await?;
            let known = Arc::new(Known::of(&self.client.snapshot().await?));
            let generation = known.generation;
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = known;
            self.told.send_replace(generation);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use harbour_metad_client::v1;

    #[test]
    fn layers_are_found_by_chain() {
        let [a, b, c, blob, manifest] = [b"a", b"b", b"c", b"x", b"m"].map(|text| Digest::of(text));
        let layer = |diff_id: Digest, number| v1::Layer {
            diff_id: diff_id.as_bytes().to_vec(),
            number,
            blobs: vec![v1::Blob {
                digest: blob.as_bytes().to_vec(),
                ..v1::Blob::default()
            }],
            ..v1::Layer::default()
        };
        let known = Known::of(&Snapshot {
            generation: 4,
            images: vec![v1::Image {
                manifest: manifest.as_bytes().to_vec(),
                diff_ids: vec![a.as_bytes().to_vec(), b.as_bytes().to_vec()],
                ..v1::Image::default()
            }],
            layers: vec![layer(a, 7), layer(b, 8)],
        });
        let two = Digest::of(format!("{a} {b}").as_bytes());
        assert_eq!(known.layer(None, a, None), Some(a));
        assert_eq!(known.layer(Some(a), two, Some(blob)), Some(b));
        // A blob's digest is a hint and no more.
        assert_eq!(known.layer(None, a, Some(blob)), Some(a));
        assert_eq!(known.layer(Some(b), two, None), None);
        assert_eq!(known.layer(None, c, None), None);
        assert_eq!((known.number(&b), known.number(&c)), (Some(8), None));
        assert_eq!(
            (known.images(&two), known.images(&a)),
            (&[manifest][..], &[][..])
        );
    }
}
