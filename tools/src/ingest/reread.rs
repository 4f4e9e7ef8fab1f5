//! A layer read again from its source, for content that was lost.

use std::{collections::HashMap, sync::Arc};

use harbour_image::{
    decode::{DecodeLimits, decode_layer},
    index::{Index, What},
    manifest::LayerDescriptor,
    object::{ObjectId, PackId, hash_object},
    source::Source,
    tree::{ObjectKey, ObjectSink},
};

use super::{IngestError, home::Home, layer};
use crate::progress::LayerProgress;

/// Range of the data region whose segments are looked at together, in bytes.
const STEP: u64 = 64 << 20;

/// Reads a layer from its source, and puts every object of it where `home` wants it.
pub(super) fn read_layer(
    home: &dyn Home,
    source: &Source,
    descriptor: &LayerDescriptor,
    index: Arc<[u8]>,
    limits: &DecodeLimits,
    progress: &dyn LayerProgress,
) -> Result<(), IngestError> {
    let name = descriptor.diff_id.to_string();
    let wanted = wanted_objects(&layer::open_index(index, &name)?, home, &name)?;
    if wanted.is_empty() {
        return Ok(());
    }
    let mut blob = source.blob(descriptor);
    progress.started(descriptor.size, blob.progress());
    let mut sink = Refiller {
        home,
        wanted,
        written: 0,
        ended: false,
    };
    let decoded = decode_layer(
        &mut blob,
        &layer::decode_options(descriptor, limits),
        &mut sink,
    );
    if sink.ended {
        return Ok(());
    }
    decoded?;
    blob.finish()?;
    if let Some(id) = sink
        .wanted
        .iter()
        .find(|(_, places)| !places.done)
        .map(|(id, _)| id)
    {
        return Err(IngestError::Changed(format!(
            "layer {name} does not hold object {id:?} any more"
        )));
    }
    progress.done(sink.written);
    Ok(())
}

struct Places {
    at: Vec<(PackId, u32)>,
    done: bool,
}

fn wanted_objects(
    index: &Index<Arc<[u8]>>,
    home: &dyn Home,
    name: &str,
) -> Result<HashMap<ObjectId, Places>, IngestError> {
    let mut wanted: HashMap<ObjectId, Places> = HashMap::new();
    each_object(index, name, |pack, offset, object| {
        if !home.wants(&pack) {
            return;
        }
        let places = wanted.entry(object).or_insert(Places {
            at: Vec::new(),
            done: false,
        });
        if !places.at.contains(&(pack, offset)) {
            places.at.push((pack, offset));
        }
    })?;
    Ok(wanted)
}

/// Shows `see` every object of an index: its pack, its offset there, its name.
pub(super) fn each_object(
    index: &Index<Arc<[u8]>>,
    name: &str,
    mut see: impl FnMut(PackId, u32, ObjectId),
) -> Result<(), IngestError> {
    let fail = |source| IngestError::Index {
        layer: name.to_owned(),
        source,
    };
    let (mut at, end) = (index.header().meta_len, index.header().erofs_len());
    while at < end {
        let step = STEP.min(end - at);
        for segment in index.segments(at, step).map_err(fail)? {
            if let What::Object(object) = segment.what {
                see(object.pack.id, object.pack_offset, object.id);
            }
        }
        at += step;
    }
    Ok(())
}

/// A sink that writes wanted objects where they were.
struct Refiller<'a> {
    home: &'a dyn Home,
    wanted: HashMap<ObjectId, Places>,
    written: u64,
    /// Nothing more is wanted, so the rest was not read.
    ended: bool,
}

impl ObjectSink for Refiller<'_> {
    type Error = IngestError;

    fn put(&mut self, bytes: &[u8]) -> Result<ObjectKey, IngestError> {
        let id = hash_object(bytes).id;
        if let Some(places) = self.wanted.get_mut(&id).filter(|places| !places.done) {
            let mut packs = Vec::with_capacity(places.at.len());
            for (pack, offset) in &places.at {
                self.written += self.home.put(pack, *offset, bytes)?;
                packs.push(*pack);
            }
            places.done = true;
            if !self.home.placed(&packs)? {
                self.ended = true;
                return Err(IngestError::Cancelled);
            }
        }
        Ok(ObjectKey(0))
    }
}
