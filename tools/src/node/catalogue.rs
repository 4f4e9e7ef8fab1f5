//! metad, as the file system asks for it.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use harbour_fs::source::{
    BlobEntry, Catalogue, Extent, ImageEntry, IndexRef, LayerEntry, Pool, Snapshot, SourceError,
};
use harbour_image::{digest::Digest, manifest::Compression, object::PackId};
use harbour_metad_client::{Client, Error as ClientError, v1};
use harbour_pool::transport::{Read, RegionId, TransportError};
use tokio::runtime::Handle;

use super::spool::{self, Spool};
use crate::link::Link;

/// Reports that wait to be sent; more are dropped, they are hints.
const REPORTS_MAX: usize = 1024;

/// Longest range of an index asked at once, in bytes.
const RANGE: usize = 512 << 10;

/// metad, and a snapshot of its catalogue.
pub struct Remote {
    client: Client,
    link: Arc<Link>,
    spool: Arc<Spool>,
    handle: Handle,
    snapshot: RwLock<Arc<Snapshot>>,
    reports: SyncSender<Report>,
    /// Freeing generation that this node has acknowledged.
    acknowledged: AtomicU64,
    /// This node's number at metad; 0 before it has one.
    node: AtomicU64,
}

/// Something for metad to know that nobody waits for.
pub enum Report {
    /// Packs that were read.
    Used(Vec<PackId>),
    /// A replica that was not good.
    Lost {
        /// Who says so.
        node: u64,
        /// Pack.
        pack: PackId,
        /// Replica.
        extent: Extent,
        /// What was wrong.
        why: String,
    },
}

impl Remote {
    /// A catalogue with an empty snapshot, and the end where its reports come out.
    pub fn new(
        client: Client,
        link: Arc<Link>,
        spool: Arc<Spool>,
        handle: Handle,
    ) -> (Arc<Self>, Receiver<Report>) {
        let (reports, receiver) = sync_channel(REPORTS_MAX);
        let remote = Self {
            client,
            link,
            spool,
            handle,
            snapshot: RwLock::default(),
            reports,
            acknowledged: AtomicU64::new(0),
            node: AtomicU64::new(0),
        };
        (Arc::new(remote), receiver)
    }

    /// Asks metad for the whole catalogue and puts it in place of the present one.
    pub async fn refresh(&self) -> Result<(), ClientError> {
        let fresh = convert(self.client.snapshot().await?);
        *self
            .snapshot
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
        Ok(())
    }

    /// Takes in this node's lease: to be called before the places of freed packs are dropped.
    pub fn leased(&self, lease: &v1::NodeLease) {
        self.node.store(lease.node, Ordering::Release);
        self.acknowledged
            .fetch_max(lease.freed_generation, Ordering::AcqRel);
    }

    /// Waits for an answer of metad until `deadline`.
    fn ask<T>(
        &self,
        what: &str,
        deadline: Instant,
        call: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, SourceError> {
        let limited = async { tokio::time::timeout_at(deadline.into(), call).await };
        match self.handle.block_on(limited) {
            Err(_) | Ok(Err(ClientError::Deadline { .. })) => {
                Err(SourceError::Deadline(what.to_owned()))
            }
            Ok(Err(ClientError::NotFound { .. })) => Err(SourceError::Gone(what.to_owned())),
            Ok(Err(error)) => Err(SourceError::Unavailable {
                what: what.to_owned(),
                source: Box::new(error),
            }),
            Ok(Ok(value)) => Ok(value),
        }
    }
}

impl Catalogue for Remote {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn document(&self, digest: &Digest, deadline: Instant) -> Result<Arc<[u8]>, SourceError> {
        let request = v1::DocumentRequest {
            digest: digest.as_bytes().to_vec(),
        };
        let document = self.ask(
            &digest.to_string(),
            deadline,
            self.client.get_document(request),
        )?;
        Ok(document.content.into())
    }

    fn read_index(
        &self,
        index: &IndexRef,
        offset: u64,
        into: &mut [u8],
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let mut done = 0;
        while done < into.len() {
            let request = v1::ReadIndexRequest {
                digest: index.digest.to_vec(),
                offset: offset + done as u64,
                len: RANGE.min(into.len() - done) as u32,
            };
            let what = format!("index {}", hex::encode(index.digest));
            let part = self
                .ask(&what, deadline, self.client.read_index(request))?
                .content;
            let room = into.len() - done;
            if part.is_empty() || part.len() > room {
                return Err(SourceError::Gone(format!(
                    "byte {} of {what}",
                    offset + done as u64
                )));
            }
            into[done..done + part.len()].copy_from_slice(&part);
            done += part.len();
        }
        Ok(())
    }

    fn locate(
        &self,
        packs: &[PackId],
        _fresh: bool,
        deadline: Instant,
    ) -> Result<Vec<Vec<Extent>>, SourceError> {
        // The file system remembers places itself, so every question that comes here goes on.
        let mut places = Vec::with_capacity(packs.len());
        for part in packs.chunks(harbour_metad_client::LOCATE_MAX) {
            let reply = loop {
                let request = v1::LocateRequest {
                    packs: part.iter().map(|p| p.0.to_vec()).collect(),
                };
                let reply =
                    self.ask("the places of packs", deadline, self.client.locate(request))?;
                // An answer from before what was acknowledged meanwhile may name space that others
                // write by now.
                if reply.freed_generation >= self.acknowledged.load(Ordering::Acquire) {
                    break reply;
                }
            };
            self.link.learn(&reply.donors);
            let mut replicas = reply.packs.into_iter();
            for pack in part {
                let extents = replicas.next().unwrap_or_default().extents;
                let pool = extents.iter().map(extent);
                places.push(pool.chain(self.spool.find(pack)).collect());
            }
        }
        Ok(places)
    }

    fn report_lost(&self, pack: &PackId, extent: &Extent, why: &str) {
        if extent.donor == spool::DONOR {
            return self.spool.forget(pack, extent.region);
        }
        let node = self.node.load(Ordering::Acquire);
        let _ = self.reports.try_send(Report::Lost {
            node,
            pack: *pack,
            extent: *extent,
            why: why.to_owned(),
        });
    }

    fn report_use(&self, packs: &[PackId]) {
        let _ = self.reports.try_send(Report::Used(packs.to_vec()));
    }
}

/// The pool and this node's spool, for the file system.
pub struct Reads(pub Arc<Link>, pub Arc<Spool>);

impl Pool for Reads {
    fn read(
        &self,
        donor: u64,
        epoch: u64,
        batch: &mut [Read<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        if donor == spool::DONOR {
            return self.1.read(batch);
        }
        self.0.read(donor, epoch, batch, deadline)
    }

    fn describe(&self, donor: u64) -> String {
        if donor == spool::DONOR {
            return "source".into();
        }
        self.0.describe(donor)
    }

    fn remark(&self, donor: u64) -> Option<String> {
        self.0.remark(donor)
    }
}

/// Sends reports to metad as they come, until the catalogue is dropped.
pub fn send_reports(client: &Client, handle: &Handle, reports: &Receiver<Report>) {
    while let Ok(first) = reports.recv() {
        let mut uses: HashMap<PackId, u32> = HashMap::new();
        let mut lost = Vec::new();
        for report in std::iter::once(first).chain(reports.try_iter().take(REPORTS_MAX)) {
            match report {
                Report::Used(packs) => packs
                    .into_iter()
                    .for_each(|p| *uses.entry(p).or_default() += 1),
                Report::Lost {
                    node,
                    pack,
                    extent,
                    why,
                } => lost.push((node, pack, extent, why)),
            }
        }
        let uses: Vec<_> = uses
            .into_iter()
            .map(|(pack, reads)| v1::PackUse {
                pack: pack.0.to_vec(),
                reads,
            })
            .collect();
        handle.block_on(async {
            for part in uses.chunks(4096) {
                let _ = client
                    .report_use(v1::UseReport {
                        packs: part.to_vec(),
                    })
                    .await;
            }
            for (node, pack, extent, why) in lost {
                let extent = Some(v1::Extent {
                    donor: extent.donor,
                    epoch: extent.epoch,
                    region: extent.region.0,
                    offset: extent.offset,
                    len: extent.len,
                });
                let _ = client
                    .report_lost(v1::LostReport {
                        node,
                        pack: pack.0.to_vec(),
                        extent,
                        why,
                    })
                    .await;
            }
        });
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn extent(message: &v1::Extent) -> Extent {
    Extent {
        donor: message.donor,
        epoch: message.epoch,
        region: RegionId(message.region),
        offset: message.offset,
        len: message.len,
    }
}

/// The catalogue in the file system's own types; what is malformed is left out and logged.
fn convert(snapshot: harbour_metad_client::Snapshot) -> Snapshot {
    let images = snapshot.images.iter().filter_map(|image| {
        let entry = image_entry(image);
        if entry.is_none() {
            tracing::warn!(image = %image.repository, tag = %image.tag, "metad gave a malformed image; it is not shown");
        }
        entry
    });
    let layers = snapshot.layers.iter().filter_map(|layer| {
        let entry = layer_entry(layer);
        if entry.is_none() {
            tracing::warn!(layer = %hex::encode(&layer.diff_id), "metad gave a malformed layer; it is not shown");
        }
        entry
    });
    Snapshot {
        generation: snapshot.generation,
        images: images.collect(),
        layers: layers.collect(),
    }
}

fn image_entry(image: &v1::Image) -> Option<ImageEntry> {
    Some(ImageEntry {
        registry: image.registry.clone(),
        repository: image.repository.clone(),
        tag: image.tag.clone(),
        manifest: digest(&image.manifest)?,
        config: digest(&image.config)?,
        diff_ids: image
            .diff_ids
            .iter()
            .map(|d| digest(d))
            .collect::<Option<_>>()?,
        number: image.number,
        index: index_ref(image.index.as_ref()?)?,
    })
}

fn layer_entry(layer: &v1::Layer) -> Option<LayerEntry> {
    Some(LayerEntry {
        diff_id: digest(&layer.diff_id)?,
        number: layer.number,
        index: index_ref(layer.index.as_ref()?)?,
        blobs: layer.blobs.iter().filter_map(blob_entry).collect(),
        unpacked_bytes: layer.unpacked_bytes,
    })
}

fn blob_entry(blob: &v1::Blob) -> Option<BlobEntry> {
    Some(BlobEntry {
        digest: digest(&blob.digest)?,
        len: blob.len_bytes,
        compression: Compression::of_layer(&blob.media_type).ok()?,
    })
}

fn index_ref(index: &v1::IndexRef) -> Option<IndexRef> {
    Some(IndexRef {
        digest: index.digest.as_slice().try_into().ok()?,
        len: index.len_bytes,
        packs: index
            .packs
            .iter()
            .map(|p| p.as_slice().try_into().ok().map(PackId))
            .collect::<Option<_>>()?,
    })
}

fn digest(bytes: &[u8]) -> Option<Digest> {
    Some(Digest::from_bytes(bytes.try_into().ok()?))
}
