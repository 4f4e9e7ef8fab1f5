//! One layer, from its blob to a staged row at metad.

use std::sync::Arc;

use harbour_image::{
    decode::{DecodeLimits, DecodeOptions, decode_layer},
    digest::Digest,
    index::{self, PackRef, ViewKind},
    manifest::LayerDescriptor,
    object::PackId,
    source::Source,
};
use harbour_metad_client::v1;

use super::{
    IngestError, index_store,
    lease::Pull,
    packer::{Packer, Stored},
};
use crate::progress::LayerProgress;

/// A layer's index and what metad was told of it.
pub struct Staged {
    /// The whole index file.
    pub index: Arc<[u8]>,
    /// As metad will show it, but for its number.
    pub layer: v1::Layer,
}

/// Fetches, unpacks, stores and stages `descriptor`. To be called on a thread that may block.
pub fn ingest(
    pull: &Pull,
    source: &Source,
    descriptor: &LayerDescriptor,
    limits: &DecodeLimits,
    stored: Stored,
    progress: &dyn LayerProgress,
) -> Result<Staged, IngestError> {
    pull.check()?;
    let mut blob = source.blob(descriptor);
    progress.started(descriptor.size, blob.progress());
    let mut packer = Packer::new(pull, stored);
    let decoded = decode_layer(&mut blob, &decode_options(descriptor, limits), &mut packer)?;
    blob.finish()?;
    let packed = packer.finish()?;
    pull.step("pull.unpacked");
    progress.indexing();
    let name = descriptor.diff_id.to_string();
    let written =
        index::write(&decoded.tree, &packed.placement, ViewKind::Layer).map_err(|source| {
            IngestError::Write {
                layer: name.clone(),
                source,
            }
        })?;
    drop(packed.placement);
    let bytes: Arc<[u8]> = written.bytes.into();
    let (reference, index_packs) = index_store::store(pull, written.digest, written.len, &bytes)?;
    let pool_bytes = packed
        .packs
        .iter()
        .map(|record| u64::from(record.pack.len))
        .sum::<u64>();
    let layer = v1::Layer {
        diff_id: descriptor.diff_id.as_bytes().to_vec(),
        number: 0,
        index: Some(reference),
        state: v1::LayerState::Ready.into(),
        blobs: vec![v1::Blob {
            digest: descriptor.digest.as_bytes().to_vec(),
            len_bytes: descriptor.size,
            media_type: descriptor.media_type.clone(),
        }],
        entries: decoded.stats.entries,
        unpacked_bytes: decoded.stats.logical_bytes,
        pool_bytes: pool_bytes
            + index_packs
                .iter()
                .map(|pack| u64::from(pack.len))
                .sum::<u64>(),
        new_bytes: packed.new_bytes,
        committed_unix_ms: 0,
    };
    let packs: Vec<v1::PackObjects> = packed
        .packs
        .iter()
        .map(v1::PackObjects::from)
        .chain(index_packs.iter().map(|pack| v1::PackObjects {
            pack: pack.id.0.to_vec(),
            len: pack.len,
            objects: Vec::new(),
        }))
        .collect();
    pull.check()?;
    let head = v1::LayerHead {
        pull: Some(pull.reference()),
        layer: Some(layer.clone()),
    };
    let stage = || pull.client().stage_layer(head.clone(), packs.clone());
    pull.wait(pull.ask(stage))?;
    pull.step("pull.staged");
    progress.done(packed.new_bytes);
    Ok(Staged {
        index: bytes,
        layer,
    })
}

/// How `descriptor` is decoded.
pub fn decode_options(descriptor: &LayerDescriptor, limits: &DecodeLimits) -> DecodeOptions {
    DecodeOptions {
        label: descriptor.digest.to_string(),
        compression: descriptor.compression,
        diff_id: Some(descriptor.diff_id),
        limits: limits.clone(),
        ..DecodeOptions::default()
    }
}

/// A pack reference out of a message.
pub fn pack_ref(id: &[u8], len: u32) -> Result<PackRef, IngestError> {
    let id = id
        .try_into()
        .map_err(|_| IngestError::Bug("metad gave a pack name that is not 32 bytes".into()))?;
    Ok(PackRef {
        id: PackId(id),
        len,
    })
}

/// A SHA-256 digest out of a message.
pub fn digest(bytes: &[u8]) -> Result<Digest, IngestError> {
    let bytes = bytes
        .try_into()
        .map_err(|_| IngestError::Bug("metad gave a digest that is not 32 bytes".into()))?;
    Ok(Digest::from_bytes(bytes))
}

/// An index file opened for reading.
pub fn open_index(bytes: Arc<[u8]>, layer: &str) -> Result<index::Index<Arc<[u8]>>, IngestError> {
    index::Index::open(bytes).map_err(|source| IngestError::Index {
        layer: layer.to_owned(),
        source,
    })
}
