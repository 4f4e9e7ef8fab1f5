//! Layers of the mount as committed snapshots: finding them, pulling what is missing, and saying why not.

use std::{sync::Arc, time::Duration};

use harbour_image::digest::Digest;
use tonic::Status;

use super::{
    LABEL_IMAGE, LABEL_LAYER, LABEL_MANIFEST, LABEL_REF,
    figures::Why,
    service::{Service, blocking, status},
    store::Wanted,
    table::{Kind, Labels, Record},
};

/// Longest wait for metad's first answer after a start.
const FIRST: Duration = Duration::from_secs(5);

/// Longest wait for the mount to show what metad has.
const SHOWN: Duration = Duration::from_secs(5);

/// Between looks.
const LOOK: Duration = Duration::from_millis(10);

impl Service {
    /// Pulls a layer again that is gone from the catalogue, though a snapshot is of it.
    pub(super) async fn repair(&self, record: Option<&Record>, layer: Digest) -> bool {
        if self.catalogue.now().number(&layer).is_some() {
            // It is the mount that does not show it.
            return self.shown(layer).await;
        }
        let labels = record.map(|record| &record.labels);
        let Some(labels) = labels.filter(|labels| labels.contains_key(LABEL_IMAGE)) else {
            return false;
        };
        tracing::warn!(%layer, "a layer that containerd has snapshots of is gone; pulling it again");
        self.bring(labels).await.is_ok() && self.shown(layer).await
    }

    /// Whether the layer that containerd is about to unpack is one of ours, and then noted as a committed
    /// snapshot. What cannot be is left to containerd, and said so.
    pub(super) async fn share(&self, target: &str, wanted: &Wanted) -> Result<bool, Status> {
        let Ok(chain) = target.parse::<Digest>() else {
            return Ok(false);
        };
        let parent = self.standing_on(&wanted.parent).await?;
        // One that another client of containerd has had noted on the same parent will do.
        let same = |record: &Record| {
            record.kind == Kind::Committed
                && record.parent == wanted.parent
                && record
                    .labels
                    .get(LABEL_REF)
                    .is_some_and(|label| label == target)
        };
        if !self.store.list(same).is_empty() {
            self.figures.shared();
            return Ok(true);
        }
        let found = match parent_chain(&parent) {
            Ok(below) => self.find(below, chain, &wanted.labels).await,
            Err(()) => Err((
                Why::Unknown,
                "it is on top of a layer without a chain ID".to_owned(),
            )),
        };
        let layer = match found {
            Ok(layer) => layer,
            Err((why, text)) => {
                self.figures.fallback(why);
                tracing::warn!(
                    chain = target,
                    why = text,
                    image = wanted.labels.get(LABEL_IMAGE),
                    "containerd fetches and unpacks a layer by itself"
                );
                return Ok(false);
            }
        };
        let (store, wanted, target) = (Arc::clone(&self.store), wanted.clone(), target.to_owned());
        blocking(move || {
            let Wanted { parent, labels, .. } = wanted;
            store.adopt(&target, &parent, labels, layer).map_err(status)
        })
        .await?;
        self.figures.shared();
        self.used.notify_one();
        Ok(true)
    }

    /// The layer that makes `chain` on top of `below`, pulled if need be, once the mount shows it.
    async fn find(
        &self,
        below: Option<Digest>,
        chain: Digest,
        labels: &Labels,
    ) -> Result<Digest, (Why, String)> {
        if !self.catalogue.reach(0, FIRST).await {
            return Err((Why::Metad, "metad does not answer".to_owned()));
        }
        let blob = labels.get(LABEL_LAYER).and_then(|text| text.parse().ok());
        let look = || self.catalogue.now().layer(below, chain, blob);
        let layer = match look() {
            Some(layer) => layer,
            None => {
                self.bring(labels).await?;
                let text = "the image that was pulled does not have it".to_owned();
                look().ok_or((Why::Unknown, text))?
            }
        };
        match self.shown(layer).await {
            true => Ok(layer),
            false => Err((
                Why::Mount,
                "the mount of this host does not show it".to_owned(),
            )),
        }
    }

    /// Pulls the image that labels name.
    async fn bring(&self, labels: &Labels) -> Result<(), (Why, String)> {
        let unknown = |text: &str| (Why::Unknown, text.to_owned());
        let image = labels.get(LABEL_IMAGE);
        let image =
            image.ok_or_else(|| unknown("the pool does not have it, and no image is named"))?;
        let bringer = self.bringer.as_ref();
        let bringer = bringer.ok_or_else(|| unknown("the pool does not have it"))?;
        let manifest = labels
            .get(LABEL_MANIFEST)
            .and_then(|text| text.parse().ok());
        let pulled = bringer.bring(image, manifest, self.pull_limit).await;
        let generation = pulled.map_err(|text| (Why::Pull, text))?;
        match self.catalogue.reach(generation, FIRST).await {
            true => Ok(()),
            false => Err((
                Why::Metad,
                "metad does not tell of what was pulled".to_owned(),
            )),
        }
    }

    /// Waits a little for the mount to show a layer.
    async fn shown(&self, layer: Digest) -> bool {
        let places = self.places.clone();
        let look = tokio::task::spawn_blocking(move || {
            crate::bounded::within(SHOWN, move || {
                let there = || places.check(&layer).ok();
                crate::bounded::poll(SHOWN.saturating_sub(LOOK), there).is_some()
            })
        });
        look.await.ok().flatten().unwrap_or(false)
    }
}

/// The chain ID of a layer with all that it stands on; `Err` when there is a snapshot without one.
fn parent_chain(below: &[Record]) -> Result<Option<Digest>, ()> {
    let Some(record) = below.first() else {
        return Ok(None);
    };
    let label = record.labels.get(LABEL_REF).map(String::as_str);
    // containerd's own names of unpacked layers end in it: "default/3/sha256:…".
    let name = record.name.rsplit('/').next();
    let chain = label.or(name).and_then(|text| text.parse().ok());
    chain.map(Some).ok_or(())
}
