//! What becomes visible by itself: a layer under its claim, and a name of an image that is there.

use harbour_metad_client::v1;

use super::{
    Around, Engine,
    commit::{choose_layer, digest_of, name_row, replicas},
    state::State,
};
use crate::{
    error::{Error, Hash, hash, text},
    locks::Key,
    store::Sync,
};

impl Engine {
    /// Makes a layer that a pull has staged visible, and gives up the claim on it. The pull, and
    /// those that waited for the claim, hold on to the layer for as long as they live: no image
    /// refers to it yet.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the pull does not hold the layer exclusively under this token, and
    /// [`Error::Refused`] when the pull is not under way or has not staged the whole layer.
    pub fn commit_layer(
        &self,
        request: &v1::CommitLayerRequest,
    ) -> Result<v1::CommitLayerReply, Error> {
        let diff_id = hash(&request.diff_id, "a diff ID")?;
        let committed_ms = self.options.clock.unix_ms();
        let mut state = self.lock();
        let pull = state.pull(request.pull.as_ref(), self.now_ms())?;
        if let Some(number) = committed_before(&state, pull, &diff_id)? {
            let generation = *self.changed.borrow();
            return Ok(v1::CommitLayerReply { generation, number });
        }
        let replicas = self.replicas_of_pull(&state, pull);
        let reply =
            self.change_locked(&mut state, Sync::Process, None, |tx, effects, claims| {
                let waited = claims.commit(pull, &Key::Layer(diff_id), request.fence)?;
                let staged = tx.staged_layer(pull, &diff_id)?;
                let staged = staged.filter(|staged| staged.complete).ok_or_else(|| {
                    let diff_id = hex::encode(diff_id);
                    Error::Refused(format!("layer {diff_id} is not staged by this pull"))
                })?;
                let packs = tx.packs_of_layer(staged.id)?.into_iter().collect();
                self.attach(tx, effects, pull, replicas, &packs)?;
                let layer = choose_layer(tx, pull, &diff_id, committed_ms)?.layer;
                for holder in waited.into_iter().chain([pull]) {
                    tx.pin_layer(holder, layer)?;
                    tx.pin_packs_of_layer(holder, layer)?;
                }
                effects.touch();
                let generation = effects.sealed_generation(tx)?;
                let number = tx.layer(&diff_id)?.map_or(0, |layer| layer.number);
                Ok(v1::CommitLayerReply { generation, number })
            })?;
        // One that had lost content may have been replaced.
        state.collect = true;
        Ok(reply)
    }

    /// Gives a name to an image that is visible and whole, and ends the pull.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such image; then the pull goes on.
    pub fn commit_name(&self, request: &v1::CommitNameRequest) -> Result<v1::CommitReply, Error> {
        let name = name_row(&request.registry, &request.repository, &request.tag)?;
        let manifest = hash(&request.manifest, "a manifest's digest")?;
        let source = text(&request.source, 4096, "the source")?;
        let wanted = replicas(request.replicas)?;
        self.end_with(
            request.pull.as_ref(),
            digest_of("name", request),
            Around("commit.before", "commit.after"),
            |tx, _, _, _| {
                let image = match tx.image(&manifest)? {
                    Some((image, _)) if tx.image_whole(image)? => image,
                    _ => {
                        let manifest = hex::encode(manifest);
                        let text = format!("there is no image {manifest}, or not all of it");
                        return Err(Error::NotFound(text));
                    }
                };
                if wanted > 0 {
                    tx.set_image_replicas(image, wanted)?;
                }
                tx.put_name(&name, image, source)
            },
        )
    }
}

/// The number of a layer that this pull has committed before: the answer was lost.
fn committed_before(state: &State, pull: u64, diff_id: &Hash) -> Result<Option<u32>, Error> {
    let read = state.writer.read();
    if read.staged_layer(pull, diff_id)?.is_some() {
        return Ok(None);
    }
    match read.layer(diff_id)? {
        Some(layer) if read.layer_pinned_by(pull, layer.id)? => Ok(Some(layer.number)),
        _ => Ok(None),
    }
}
