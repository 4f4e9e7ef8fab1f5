//! Questions of readers, which never wait for a pull's transactions.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::Ordering,
};

use harbour_metad_client::{INDEX_CHUNK_MAX, LOCATE_MAX, v1};
use prost::Message;

use super::{
    Around, Engine,
    collect::{Reach, collect},
    commit::name_row,
    donors::Tokens,
};
use crate::{
    error::{Error, hash},
    space::Place,
    store::{CataloguePart, Counter, Sync},
};

/// Target size of one page of a snapshot in bytes.
pub const PAGE_BYTES: usize = 512 << 10;

/// A place as the wire has it.
pub(super) fn extent(place: &Place, epoch: u64) -> v1::Extent {
    v1::Extent {
        donor: place.donor,
        epoch,
        region: place.region,
        offset: place.offset,
        len: place.len,
    }
}

impl Engine {
    /// Everything visible, in pages below the frame limit, all of one generation.
    pub fn snapshot(&self) -> Result<Vec<v1::SnapshotPage>, Error> {
        self.store.read(|read| {
            let mut pages = Vec::new();
            let mut page = v1::SnapshotPage::default();
            let mut bytes = 0;
            read.for_each_visible(|part| {
                let more = 16
                    + match &part {
                        CataloguePart::Image(image) => image.encoded_len(),
                        CataloguePart::Layer(layer) => layer.encoded_len(),
                    };
                if bytes > 0 && bytes + more > PAGE_BYTES {
                    pages.push(std::mem::take(&mut page));
                    bytes = 0;
                }
                bytes += more;
                match part {
                    CataloguePart::Image(image) => page.images.push(image),
                    CataloguePart::Layer(layer) => page.layers.push(layer),
                }
            })?;
            page.last = true;
            page.generation = read.counter(Counter::Generation)?;
            pages.push(page);
            Ok(pages)
        })
    }

    /// A manifest or config.
    pub fn document(&self, request: &v1::DocumentRequest) -> Result<v1::Document, Error> {
        let digest = hash(&request.digest, "a document's digest")?;
        match self.store.read(|read| read.document(&digest))? {
            Some((content, media_type)) => Ok(v1::Document {
                content,
                media_type,
            }),
            None => Err(Error::NotFound(format!(
                "no image refers to a document {}",
                hex::encode(digest)
            ))),
        }
    }

    /// A range of an index file.
    pub fn read_index(&self, request: &v1::ReadIndexRequest) -> Result<v1::ReadIndexReply, Error> {
        let digest = hash(&request.digest, "an index's digest")?;
        let len = request.len as usize;
        if len > INDEX_CHUNK_MAX {
            return Err(Error::Invalid(format!(
                "{len} bytes of an index, at most {INDEX_CHUNK_MAX} at a time"
            )));
        }
        match self.store.files().read(&digest, request.offset, len)? {
            Some(content) => Ok(v1::ReadIndexReply { content }),
            None => Err(Error::NotFound(format!(
                "no layer or image has the index {}",
                hex::encode(digest)
            ))),
        }
    }

    /// Live replicas of packs.
    pub fn locate(&self, request: &v1::LocateRequest) -> Result<v1::LocateReply, Error> {
        let digests = super::find::hashes(&request.packs, LOCATE_MAX, "packs")?;
        // Read first: what this generation freed is then missing from the answer for sure.
        let freed_generation = self.freed.load(Ordering::SeqCst);
        self.store.read(|read| {
            let mut seen = HashSet::new();
            let mut packs = Vec::with_capacity(digests.len());
            for digest in &digests {
                let replicas = read.locate(digest)?;
                seen.extend(replicas.iter().map(|replica| replica.place.donor));
                let extents = replicas
                    .iter()
                    .map(|replica| extent(&replica.place, replica.epoch))
                    .collect();
                packs.push(v1::PackReplicas { extents });
            }
            let mut donors = Vec::with_capacity(seen.len());
            for id in seen {
                let row = read.donor(id)?;
                donors.extend(row.map(|row| super::donors::message(row, Tokens::Read)));
            }
            Ok(v1::LocateReply {
                packs,
                donors,
                freed_generation,
            })
        })
    }

    /// Takes a name away, and what was only there for it.
    pub fn remove_name(
        &self,
        request: &v1::RemoveNameRequest,
    ) -> Result<v1::RemoveNameReply, Error> {
        let name = name_row(&request.registry, &request.repository, &request.tag)?;
        let mut state = self.lock();
        let reach = Reach::of(&state, self.now_ms());
        let around = Around("remove_name.before", "remove_name.after");
        let done = self.change(&mut state, Sync::Full, Some(around), |tx, effects| {
            if !tx.delete_name(&name)? {
                return Err(Error::NotFound(format!(
                    "no image is named {}/{}:{}",
                    name.registry, name.repository, name.tag
                )));
            }
            effects.touch();
            collect(tx, effects, &reach, Vec::new())
        })?;
        state.collect = true;
        self.release(&mut state)?;
        drop(state);
        self.tell_space_freed();
        Ok(v1::RemoveNameReply {
            image_removed: done.images > 0,
            layers_removed: done.layers,
            bytes_freed: done.freed_bytes,
        })
    }

    /// Messages of donors, of all or of some, with their books and when they were heard.
    pub(super) fn donor_messages(
        &self,
        state: &super::State,
        read: &crate::store::Read<'_>,
        only: Option<&HashSet<u64>>,
        tokens: Tokens,
    ) -> Result<Vec<v1::Donor>, Error> {
        let now_ms = self.now_ms();
        let heard: HashMap<u64, u64> = state
            .donors
            .iter()
            .map(|(id, donor)| (*id, now_ms.saturating_sub(donor.heard_ms)))
            .collect();
        let rows = match only {
            None => read.donors()?,
            Some(ids) => {
                let rows = ids
                    .iter()
                    .map(|id| read.donor(*id))
                    .collect::<Result<Vec<_>, _>>()?;
                rows.into_iter().flatten().collect()
            }
        };
        let messages = rows.into_iter().map(|row| {
            let id = row.id;
            let heard_ms_ago = heard
                .get(&id)
                .map_or(u32::MAX, |ms| u32::try_from(*ms).unwrap_or(u32::MAX));
            let used_bytes = state
                .space
                .donor_books(id)
                .map_or(0, |books| books.lent - books.free);
            v1::Donor {
                heard_ms_ago,
                used_bytes,
                ..super::donors::message(row, tokens)
            }
        });
        Ok(messages.collect())
    }
}
