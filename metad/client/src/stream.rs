//! Calls whose lists are longer than a frame.

use std::time::Duration;

use prost::Message;
use tonic::Streaming;

use crate::{Client, Error, INDEX_CHUNK_MAX, v1};

/// Target size of one part of a streamed list in bytes: far enough below the frame limit that one
/// more entry of any kind still fits.
const PART_BYTES: usize = 512 << 10;

/// Most objects of one pack in one entry; a pack with more goes on in the next.
const OBJECTS_PER_ENTRY: usize = 4096;

/// Slowest upload that is waited for, in bytes a second, on top of the call's own deadline.
const UPLOAD_FLOOR: u64 = 4 << 20;

/// Everything visible at one generation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Generation of the catalogue that this is of.
    pub generation: u64,
    /// Named images.
    pub images: Vec<v1::Image>,
    /// Their layers, each once.
    pub layers: Vec<v1::Layer>,
}

/// Changes of the catalogue as they come; generations between two answers are skipped.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    stream: Streaming<v1::Change>,
}

impl Watch {
    /// Waits, without a deadline, for the next change and gives the newest generation.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when metad has gone: watch again.
    pub async fn next(&mut self) -> Result<u64, Error> {
        const ASKED: &str = "Catalogue.Watch";
        match self.stream.message().await {
            Ok(Some(change)) => Ok(change.generation),
            Ok(None) => Err(self
                .client
                .error(tonic::Status::unavailable("metad ended the watch"), ASKED)),
            Err(status) => Err(self.client.error(status, ASKED)),
        }
    }
}

impl Client {
    /// Everything visible now, all pages together.
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        const ASKED: &str = "Catalogue.Snapshot";
        let mut service = self.catalogue();
        let collect = async {
            let mut pages = self
                .call(
                    ASKED,
                    self.timeout(),
                    v1::SnapshotRequest {},
                    |r| async move { service.snapshot(r).await },
                )
                .await?;
            let mut snapshot = Snapshot::default();
            while let Some(page) = pages
                .message()
                .await
                .map_err(|status| self.error(status, ASKED))?
            {
                snapshot.images.extend(page.images);
                snapshot.layers.extend(page.layers);
                if page.last {
                    snapshot.generation = page.generation;
                    return Ok(snapshot);
                }
            }
            Err(self.error(
                tonic::Status::unavailable("the list ended before its last page"),
                ASKED,
            ))
        };
        tokio::time::timeout(self.timeout(), collect)
            .await
            .map_err(|_| Error::Deadline {
                asked: ASKED,
                after: self.timeout(),
            })?
    }

    /// Watches the catalogue; the first [`Watch::next`] answers at once.
    pub async fn watch(&self) -> Result<Watch, Error> {
        const ASKED: &str = "Catalogue.Watch";
        let mut service = self.catalogue();
        // The deadline is for the beginning only, so it does not travel with the request.
        let begin = service.watch(v1::WatchRequest {});
        match tokio::time::timeout(self.timeout(), begin).await {
            Ok(Ok(stream)) => Ok(Watch {
                client: self.clone(),
                stream: stream.into_inner(),
            }),
            Ok(Err(status)) => Err(self.error(status, ASKED)),
            Err(_) => Err(Error::Deadline {
                asked: ASKED,
                after: self.timeout(),
            }),
        }
    }

    /// Puts an index onto metad's disk. `content` is the index, `len_bytes` long, and the granule
    /// table behind it; `digest` is the table's BLAKE3.
    pub async fn put_index(
        &self,
        pull: v1::PullRef,
        digest: [u8; 32],
        len_bytes: u64,
        content: impl AsRef<[u8]> + Send + 'static,
    ) -> Result<(), Error> {
        let total = content.as_ref().len();
        let cuts = (0..total).step_by(INDEX_CHUNK_MAX).map(move |start| {
            let all = content.as_ref();
            all[start..total.min(start + INDEX_CHUNK_MAX)].to_vec()
        });
        self.put_index_chunks(pull, digest, len_bytes, total as u64, cuts)
            .await
    }

    /// As [`Client::put_index`], from chunks of at most [`INDEX_CHUNK_MAX`] bytes that are made one
    /// at a time; `total_bytes` is their sum and only used for the deadline.
    pub async fn put_index_chunks<I>(
        &self,
        pull: v1::PullRef,
        digest: [u8; 32],
        len_bytes: u64,
        total_bytes: u64,
        chunks: I,
    ) -> Result<(), Error>
    where
        I: Iterator<Item = Vec<u8>> + Send + 'static,
    {
        let head = v1::IndexChunk {
            pull: Some(pull),
            digest: digest.to_vec(),
            len_bytes,
            content: Vec::new(),
        };
        let rest = chunks.map(|content| v1::IndexChunk {
            content,
            ..Default::default()
        });
        let stream = tokio_stream::iter(std::iter::once(head).chain(rest));
        let timeout = self.timeout() + Duration::from_secs(total_bytes / UPLOAD_FLOOR);
        let mut service = self.ingest();
        self.call("Ingest.PutIndex", timeout, stream, |r| async move {
            service.put_index(r).await
        })
        .await?;
        Ok(())
    }

    /// Stages a layer and gives the number that it will have. `packs` are all that its index
    /// refers to, with the objects of those that this pull stored, and the packs of the index
    /// itself with none.
    pub async fn stage_layer<I>(&self, head: v1::LayerHead, packs: I) -> Result<u32, Error>
    where
        I: IntoIterator<Item = v1::PackObjects>,
        I::IntoIter: Send + 'static,
    {
        let head = v1::LayerPart {
            head: Some(head),
            packs: Vec::new(),
        };
        let parts = Parts {
            packs: packs.into_iter().flat_map(split).fuse(),
            kept: None,
        };
        let stream = tokio_stream::iter(std::iter::once(head).chain(parts));
        // How much is to come is the iterator's secret: leave room for a million objects.
        let timeout = self.timeout() + Duration::from_secs(20);
        let mut service = self.ingest();
        let reply = self
            .call("Ingest.StageLayer", timeout, stream, |r| async move {
                service.stage_layer(r).await
            })
            .await?;
        Ok(reply.number)
    }
}

/// A pack as entries of at most [`OBJECTS_PER_ENTRY`] objects; one entry when it has none.
fn split(mut pack: v1::PackObjects) -> impl Iterator<Item = v1::PackObjects> + Send {
    let mut objects = std::mem::take(&mut pack.objects).into_iter();
    let mut first = true;
    std::iter::from_fn(move || {
        let some: Vec<_> = objects.by_ref().take(OBJECTS_PER_ENTRY).collect();
        if some.is_empty() && !first {
            return None;
        }
        first = false;
        Some(v1::PackObjects {
            pack: pack.pack.clone(),
            len: pack.len,
            objects: some,
        })
    })
}

/// Gathers entries into parts of about [`PART_BYTES`].
struct Parts<I> {
    packs: I,
    kept: Option<v1::PackObjects>,
}

impl<I: Iterator<Item = v1::PackObjects>> Iterator for Parts<I> {
    type Item = v1::LayerPart;

    fn next(&mut self) -> Option<v1::LayerPart> {
        let mut part = v1::LayerPart::default();
        let mut bytes = 0;
        while let Some(pack) = self.kept.take().or_else(|| self.packs.next()) {
            let more = pack.encoded_len() + 8;
            if bytes + more > PART_BYTES && !part.packs.is_empty() {
                self.kept = Some(pack);
                break;
            }
            bytes += more;
            part.packs.push(pack);
        }
        (!part.packs.is_empty()).then_some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FRAME_MAX;

    fn pack(name: u8, objects: usize) -> v1::PackObjects {
        let object = |i: usize| v1::PackObject {
            object: vec![name; 32],
            offset: i as u32,
            len: 7,
        };
        v1::PackObjects {
            pack: vec![name; 32],
            len: 4 << 20,
            objects: (0..objects).map(object).collect(),
        }
    }

    #[test]
    fn parts_stay_under_the_frame_and_lose_nothing() {
        for counts in [
            vec![],
            vec![0],
            vec![1; 9],
            vec![50_000],
            vec![0, 40_000, 3, 4096, 4097, 0],
        ] {
            let packs: Vec<_> = counts
                .iter()
                .enumerate()
                .map(|(i, n)| pack(i as u8, *n))
                .collect();
            let parts = Parts {
                packs: packs.clone().into_iter().flat_map(split).fuse(),
                kept: None,
            };
            let mut seen = vec![Vec::new(); counts.len()];
            for part in parts {
                assert!(part.encoded_len() < FRAME_MAX, "{}", part.encoded_len());
                assert!(!part.packs.is_empty());
                for entry in part.packs {
                    seen[entry.pack[0] as usize].push(entry.objects);
                }
            }
            for (packs, seen) in packs.iter().zip(&seen) {
                assert!(!seen.is_empty());
                assert_eq!(packs.objects, seen.concat());
            }
        }
    }
}
