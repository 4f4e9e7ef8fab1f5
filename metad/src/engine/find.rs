//! What is there already: layers and objects, pinned for the pull that asks.

use std::collections::HashSet;

use harbour_metad_client::{FIND_LAYERS_MAX, FIND_OBJECTS_MAX, v1};

use super::Engine;
use crate::{
    error::{Error, Hash, hash},
    store::Sync,
};

/// Reads a list of digests of bounded length.
pub(super) fn hashes(list: &[Vec<u8>], most: usize, what: &str) -> Result<Vec<Hash>, Error> {
    if list.len() > most {
        return Err(Error::Invalid(format!(
            "{} of {what} in one call, at most {most} are allowed",
            list.len()
        )));
    }
    list.iter().map(|bytes| hash(bytes, what)).collect()
}

impl Engine {
    /// Which layers are committed and whole. They are pinned, and of those that lost something the rest:
    /// what is brought back must not push out what is still there.
    pub fn find_layers(
        &self,
        request: &v1::FindLayersRequest,
    ) -> Result<v1::FindLayersReply, Error> {
        let diff_ids = hashes(&request.diff_ids, FIND_LAYERS_MAX, "diff IDs")?;
        let mut state = self.lock();
        let pull = state.pull(request.pull.as_ref(), self.now_ms())?;
        let layers = self.change(&mut state, Sync::Process, None, |tx, _| {
            let mut layers = Vec::with_capacity(diff_ids.len());
            for diff_id in &diff_ids {
                let Some((id, layer)) = tx.layer_message(diff_id)? else {
                    layers.push(v1::FoundLayer::default());
                    continue;
                };
                tx.pin_layer(pull, id)?;
                tx.pin_packs_of_layer(pull, id)?;
                layers.push(v1::FoundLayer {
                    found: layer.state() == v1::LayerState::Ready,
                    layer: Some(layer),
                });
            }
            Ok(layers)
        })?;
        Ok(v1::FindLayersReply { layers })
    }

    /// Which objects are in the pool; their packs are pinned.
    pub fn find_objects(
        &self,
        request: &v1::FindObjectsRequest,
    ) -> Result<v1::FindObjectsReply, Error> {
        let digests = hashes(&request.objects, FIND_OBJECTS_MAX, "objects")?;
        // Looked up without the lock; what went meanwhile is found out when it is pinned.
        let found = self.store.read(|r| r.find_objects(&digests))?;
        let mut state = self.lock();
        let pull = state.pull(request.pull.as_ref(), self.now_ms())?;
        let packs: HashSet<u64> = found.iter().flatten().map(|place| place.pack_id).collect();
        let read = state.writer.read();
        let mut pinned = HashSet::new();
        let mut fresh = Vec::new();
        for pack in packs {
            if read.live_replicas(pack)? == 0 {
                continue;
            }
            pinned.insert(pack);
            if !read.pinned_by(pull, pack)? {
                fresh.push(pack);
            }
        }
        if !fresh.is_empty() {
            self.change(&mut state, Sync::Process, None, |tx, _| {
                fresh.iter().try_for_each(|pack| tx.pin(pull, *pack))
            })?;
        }
        drop(state);
        let objects = found.into_iter().map(|place| match place {
            Some(place) if pinned.contains(&place.pack_id) => v1::FoundObject {
                found: true,
                pack: place.pack.to_vec(),
                offset: place.offset,
                pack_len: place.pack_len,
            },
            _ => v1::FoundObject::default(),
        });
        Ok(v1::FindObjectsReply {
            objects: objects.collect(),
        })
    }
}
