//! Index files and layers on their way in: in the store, and invisible.

use std::sync::Arc;

use harbour_metad_client::{INDEX_CHUNK_MAX, v1};

use super::Engine;
use crate::{
    error::{Error, Hash, hash, text},
    store::{Counter, IndexDraft, NewLayer, ObjectRow, PackRow, Sync, Tx},
};

/// Largest object in bytes.
const OBJECT_MAX: u32 = 1 << 20;

/// Objects that are gathered before they are written.
const OBJECTS_GATHERED: usize = 65_536;

/// Largest number of a layer or image: 24 bits of an inode number.
const NUMBER_MAX: u64 = (1 << 24) - 1;

/// Descriptors that one layer may be seen under.
const BLOBS_MAX: usize = 64;

/// An index file that is being uploaded. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct IndexUpload {
    engine: Arc<Engine>,
    pull: v1::PullRef,
    /// `None` when metad has it already, and what comes is only counted.
    draft: Option<IndexDraft>,
    digest: Hash,
    middle: bool,
}

/// A layer whose packs are being named.
#[derive(Debug)]
pub struct LayerUpload {
    pull: v1::PullRef,
    diff_id: Hash,
    row: u64,
    number: u32,
    /// Not written down yet.
    objects: Vec<ObjectRow>,
}

impl Engine {
    /// Begins to take an index file.
    pub fn begin_index(self: &Arc<Self>, head: &v1::IndexChunk) -> Result<IndexUpload, Error> {
        let digest = hash(&head.digest, "an index's digest")?;
        let reference = head
            .pull
            .ok_or_else(|| Error::Invalid("the first chunk names no pull".into()))?;
        let mut state = self.lock();
        let pull = state.pull(Some(&reference), self.now_ms())?;
        let known = state.writer.read().index_len(&digest)?;
        if let Some(len) = known {
            if len != head.len_bytes {
                return Err(Error::Invalid(format!(
                    "index {} is {len} bytes long, not {}",
                    hex::encode(digest),
                    head.len_bytes
                )));
            }
            self.change(&mut state, Sync::Process, None, |tx, _| {
                tx.add_index(pull, &digest, len)
            })?;
        }
        drop(state);
        let draft = match known {
            Some(_) => None,
            None => Some(self.store.files().draft(digest, head.len_bytes)?),
        };
        Ok(IndexUpload {
            engine: self.clone(),
            pull: reference,
            draft,
            digest,
            middle: false,
        })
    }

    /// Begins a layer. Its index must be on disk.
    pub fn begin_layer(&self, head: &v1::LayerHead) -> Result<LayerUpload, Error> {
        let reference = head
            .pull
            .ok_or_else(|| Error::Invalid("the layer names no pull".into()))?;
        let message = head
            .layer
            .as_ref()
            .ok_or_else(|| Error::Invalid("the first part has no layer".into()))?;
        let mut layer = new_layer(message)?;
        let index_len = message.index.as_ref().map_or(0, |index| index.len_bytes);
        let mut state = self.lock();
        let pull = state.pull(Some(&reference), self.now_ms())?;
        let around = super::Around("stage_layer.before", "stage_layer.middle");
        let (row, number) = self.change(&mut state, Sync::Process, Some(around), |tx, _| {
            if tx.index_len(&layer.index)? != Some(index_len) {
                return Err(Error::Refused(format!(
                    "index {} of {index_len} bytes is not on disk: put it first",
                    hex::encode(layer.index)
                )));
            }
            tx.add_index(pull, &layer.index, index_len)?;
            let committed = tx
                .layer(&layer.diff_id)?
                .filter(|known| known.index == layer.index);
            let staged = tx.staged_layer(pull, &layer.diff_id)?;
            layer.number = match committed.or(staged) {
                Some(known) => known.number,
                None => next_number(tx)?,
            };
            if let Some(known) = committed {
                tx.pin_layer(pull, known.id)?;
            }
            let row = tx.stage_layer(pull, &layer)?;
            for digest in &layer.index_packs {
                let pack = tx.pack(digest)?;
                match pack {
                    Some(pack) if tx.pinned_by(pull, pack.id)? => {
                        tx.add_layer_pack(row, pack.id)?
                    }
                    _ => return Err(not_reserved(digest)),
                }
            }
            Ok((row, layer.number))
        })?;
        Ok(LayerUpload {
            pull: reference,
            diff_id: layer.diff_id,
            row,
            number,
            objects: Vec::new(),
        })
    }

    /// Takes some packs of a layer, with their objects. Those are gathered: digests are random, so
    /// a transaction with few of them costs almost as much as one with many.
    pub fn layer_packs(
        &self,
        upload: &mut LayerUpload,
        packs: &[v1::PackObjects],
    ) -> Result<(), Error> {
        let mut state = self.lock();
        let pull = state.pull(Some(&upload.pull), self.now_ms())?;
        let mut gathered = std::mem::take(&mut upload.objects);
        let around = super::Around("stage_layer.before", "stage_layer.middle");
        let left = self.change(&mut state, Sync::Process, Some(around), |tx, _| {
            self.check_upload(tx, pull, upload)?;
            for named in packs {
                let pack = named_pack(tx, pull, named)?;
                tx.add_layer_pack(upload.row, pack.id)?;
                for object in &named.objects {
                    gathered.push(checked(object, &pack)?);
                }
            }
            if gathered.len() >= OBJECTS_GATHERED {
                tx.add_objects(&mut gathered)?;
                gathered.clear();
            }
            Ok(gathered)
        })?;
        upload.objects = left;
        Ok(())
    }

    /// All packs of a layer have been named. Gives its number.
    pub fn finish_layer(&self, upload: &mut LayerUpload) -> Result<v1::StageLayerReply, Error> {
        let mut state = self.lock();
        let pull = state.pull(Some(&upload.pull), self.now_ms())?;
        let mut gathered = std::mem::take(&mut upload.objects);
        let around = super::Around("stage_layer.before", "stage_layer.after");
        self.change(&mut state, Sync::Process, Some(around), |tx, _| {
            self.check_upload(tx, pull, upload)?;
            tx.add_objects(&mut gathered)?;
            tx.complete_layer(pull, upload.row)
        })?;
        Ok(v1::StageLayerReply {
            number: upload.number,
        })
    }

    /// A second upload of the same layer by the same pull takes the place of the first.
    fn check_upload(&self, tx: &Tx<'_>, pull: u64, upload: &LayerUpload) -> Result<(), Error> {
        match tx.staged_layer(pull, &upload.diff_id)? {
            Some(staged) if staged.id == upload.row => Ok(()),
            _ => Err(Error::Refused(format!(
                "layer {} was staged again by this pull meanwhile",
                hex::encode(upload.diff_id)
            ))),
        }
    }
}

impl IndexUpload {
    /// Takes the next bytes.
    pub fn chunk(&mut self, content: &[u8]) -> Result<(), Error> {
        if content.len() > INDEX_CHUNK_MAX {
            return Err(Error::Invalid(format!(
                "a chunk of {} bytes, at most {INDEX_CHUNK_MAX} are allowed",
                content.len()
            )));
        }
        let Some(draft) = &mut self.draft else {
            return Ok(());
        };
        draft.write(content)?;
        if !std::mem::replace(&mut self.middle, true) {
            self.engine.options.failpoints.hit("put_index.middle");
        }
        Ok(())
    }

    /// Checks it, syncs it, and writes down that it is there.
    pub fn finish(self) -> Result<(), Error> {
        let Some(mut draft) = self.draft else {
            return Ok(());
        };
        draft.seal()?;
        let engine = &self.engine;
        let mut state = engine.lock();
        let pull = state.pull(Some(&self.pull), engine.now_ms())?;
        let len = draft.len();
        engine.options.failpoints.hit("put_index.before_rename");
        draft.publish()?;
        let around = super::Around("put_index.after_rename", "put_index.after");
        engine.change(&mut state, Sync::Process, Some(around), |tx, _| {
            tx.add_index(pull, &self.digest, len)
        })
    }
}

fn not_reserved(digest: &Hash) -> Error {
    Error::Refused(format!(
        "pack {} was neither reserved nor found by this pull",
        hex::encode(digest)
    ))
}

/// The next number of a layer or image.
pub(super) fn next_number(tx: &Tx<'_>) -> Result<u32, Error> {
    let number = tx.bump(Counter::Number, 1)?;
    match u32::try_from(number) {
        Ok(small) if number <= NUMBER_MAX => Ok(small),
        _ => Err(Error::Exhausted(format!(
            "all {NUMBER_MAX} numbers of layers and images have been used"
        ))),
    }
}

fn checked(object: &v1::PackObject, pack: &PackRow) -> Result<ObjectRow, Error> {
    let digest = hash(&object.object, "an object's digest")?;
    let end = object.offset.checked_add(object.len);
    if object.len == 0 || object.len > OBJECT_MAX || end.is_none_or(|end| end > pack.len) {
        return Err(Error::Invalid(format!(
            "object {} at {}+{} does not fit a pack of {} bytes",
            hex::encode(digest),
            object.offset,
            object.len,
            pack.len
        )));
    }
    Ok(ObjectRow {
        digest,
        pack: pack.id,
        offset: object.offset,
        len: object.len,
    })
}

/// A pack of a layer, which this pull must hold on to.
fn named_pack(tx: &Tx<'_>, pull: u64, named: &v1::PackObjects) -> Result<PackRow, Error> {
    let digest = hash(&named.pack, "a pack's name")?;
    match tx.pack(&digest)? {
        Some(pack) if pack.len != named.len => Err(Error::Invalid(format!(
            "pack {} is {} bytes long, not {}",
            hex::encode(digest),
            pack.len,
            named.len
        ))),
        Some(pack) if tx.pinned_by(pull, pack.id)? => Ok(pack),
        _ => Err(not_reserved(&digest)),
    }
}

fn new_layer(layer: &v1::Layer) -> Result<NewLayer, Error> {
    let index = layer
        .index
        .as_ref()
        .ok_or_else(|| Error::Invalid("the layer has no index".into()))?;
    if layer.blobs.len() > BLOBS_MAX {
        return Err(Error::Invalid(format!(
            "{} descriptors of a layer, at most {BLOBS_MAX}",
            layer.blobs.len()
        )));
    }
    let blob = |blob: &v1::Blob| {
        text(&blob.media_type, 255, "a media type")?;
        Ok((
            hash(&blob.digest, "a descriptor's digest")?,
            blob.len_bytes,
            blob.media_type.clone(),
        ))
    };
    Ok(NewLayer {
        diff_id: hash(&layer.diff_id, "a diff ID")?,
        number: 0,
        index: hash(&index.digest, "an index's digest")?,
        index_packs: super::find::hashes(&index.packs, 8192, "packs of an index")?,
        entries: layer.entries,
        unpacked: layer.unpacked_bytes,
        blobs: layer.blobs.iter().map(blob).collect::<Result<_, Error>>()?,
    })
}
