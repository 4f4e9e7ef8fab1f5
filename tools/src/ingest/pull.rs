//! A whole image into the pool.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::failpoint::Failpoints;
use harbour_image::{
    decode::DecodeLimits,
    digest::Digest,
    index::{self, ViewKind},
    manifest::{LayerDescriptor, Platform},
    reference::ImageName,
    source::{ResolvedImage, Source, SourceOptions, SourceSpec},
};
use harbour_metad_client::{Client, Error as ClientError, v1};

use super::{
    IngestError,
    claims::{self, Claims, Said},
    index_store, layer,
    lease::Pull,
    refill, together,
};
use crate::{link::Link, progress::PullProgress};

/// Longest manifest and config together, in bytes: one message with room for the rest of it.
const DOCUMENTS_MAX: usize = harbour_metad_client::FRAME_MAX - (64 << 10);

/// What a pull needs to know besides the image.
pub struct PullOptions {
    /// Platform to take from an index; that of this host when there is none.
    pub platform: Option<Platform>,
    /// Layers unpacked at the same time.
    pub jobs: usize,
    /// Limits of one layer.
    pub limits: DecodeLimits,
    /// Replicas that are wanted of each pack; 0 for metad's default.
    pub replicas: u32,
    /// How sources are reached.
    pub source: SourceOptions,
    /// Named steps where a test may end the process.
    pub failpoints: Failpoints,
}

/// What a pull did.
#[derive(Debug)]
pub struct PullReport {
    /// Name in the catalogue.
    pub name: ImageName,
    /// Manifest digest.
    pub manifest: Digest,
    /// Layers of the image.
    pub layers: usize,
    /// Of those, unpacked by this pull.
    pub fetched: usize,
    /// Of those, unpacked by other pulls while this one waited for them.
    pub elsewhere: usize,
    /// Of those, put back because the pool had lost some of their content.
    pub refilled: usize,
    /// Compressed bytes of the layers that this pull fetched.
    pub fetched_bytes: u64,
    /// Bytes written to the pool.
    pub stored_bytes: u64,
    /// Sum of the sizes of the files in the image.
    pub unpacked_bytes: u64,
    /// Generation of the catalogue that has the image.
    pub generation: u64,
    /// From the first question to the commit.
    pub took: Duration,
}

/// Pulls `spec` into the pool. When `stopped` becomes true it ends soon, leaving nothing.
pub async fn pull(
    client: Client,
    link: Arc<Link>,
    spec: &SourceSpec,
    options: &Arc<PullOptions>,
    progress: Arc<dyn PullProgress>,
    stopped: Arc<AtomicBool>,
) -> Result<PullReport, IngestError> {
    let begun = Instant::now();
    let what = spec.to_string();
    let source_error = |source| IngestError::Source {
        what: what.clone(),
        source,
    };
    progress.resolving(&what);
    let source = Arc::new(
        Source::open(spec, &options.source)
            .await
            .map_err(source_error)?,
    );
    let image = Arc::new(
        source
            .resolve(options.platform.as_ref())
            .await
            .map_err(source_error)?,
    );
    check_documents(&image, &what)?;
    let lease = Pull::begin(
        client,
        link,
        &what,
        options.replicas,
        stopped,
        options.failpoints.clone(),
    )
    .await?;
    let outcome = run(&lease, spec, &source, &image, options, &progress, begun).await;
    if outcome.is_err() {
        lease.stop();
        lease.abort().await;
    }
    progress.finished();
    outcome
}

/// Manifest and config travel to metad in one message.
fn check_documents(image: &ResolvedImage, what: &str) -> Result<(), IngestError> {
    let len = image.manifest.len() + image.raw_config.len();
    if len <= DOCUMENTS_MAX {
        return Ok(());
    }
    Err(IngestError::Limit(format!(
        "manifest and config of {what} have {len} bytes together; at most {DOCUMENTS_MAX} are kept"
    )))
}

async fn run(
    lease: &Pull,
    spec: &SourceSpec,
    source: &Arc<Source>,
    image: &Arc<ResolvedImage>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
    begun: Instant,
) -> Result<PullReport, IngestError> {
    let (known, refilled) = known_layers(lease, source, image, options, progress).await?;
    let mut indexes: HashMap<Digest, Arc<[u8]>> = HashMap::new();
    let mut unpacked: HashMap<Digest, u64> = HashMap::new();
    let mut missing: Vec<LayerDescriptor> = Vec::new();
    // In the order of the manifest, which is the order of the bars.
    for descriptor in &image.layers {
        let diff_id = descriptor.diff_id;
        if indexes.contains_key(&diff_id) || missing.iter().any(|m| m.diff_id == diff_id) {
            continue;
        }
        let Some(layer) = known.get(&diff_id) else {
            missing.push(descriptor.clone());
            continue;
        };
        progress.present(descriptor);
        let reference = layer.index.clone().unwrap_or_default();
        let bytes = index_store::fetch(lease.client(), &reference, &diff_id.to_string()).await?;
        indexes.insert(diff_id, bytes);
        unpacked.insert(diff_id, layer.unpacked_bytes);
    }
    let brought_back = image
        .layers
        .iter()
        .filter(|l| refilled.contains(&l.diff_id));
    let mut fetched_bytes = brought_back.map(|l| l.size).sum();
    let (mut fetched, mut elsewhere) = (0, 0);
    let mut claims = Claims::open(lease).await?;
    for layer in together::fetch(&mut claims, lease, source, missing, options, progress).await? {
        unpacked.insert(layer.diff_id, layer.unpacked_bytes);
        indexes.insert(layer.diff_id, layer.index);
        match layer.fetched_bytes {
            Some(bytes) => (fetched, fetched_bytes) = (fetched + 1, fetched_bytes + bytes),
            None => elsewhere += 1,
        }
    }
    lease.check()?;
    let unpacked_bytes = image
        .layers
        .iter()
        .filter_map(|l| unpacked.get(&l.diff_id))
        .sum();
    let one = OneImage {
        lease,
        image,
        spec,
        unpacked_bytes,
        replicas: options.replicas,
    };
    let generation = one.commit(&mut claims, indexes).await?;
    Ok(PullReport {
        name: image.name.clone(),
        manifest: image.manifest_digest,
        layers: image.layers.len(),
        fetched,
        elsewhere,
        refilled: refilled.len(),
        fetched_bytes,
        stored_bytes: lease.stored_bytes(),
        unpacked_bytes,
        generation,
        took: begun.elapsed(),
    })
}

/// Layers of the image that metad has whole, after what the pool had lost of them was brought back;
/// and those that had lost something.
async fn known_layers(
    lease: &Pull,
    source: &Source,
    image: &ResolvedImage,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<(HashMap<Digest, v1::Layer>, Vec<Digest>), IngestError> {
    let unique: BTreeSet<Digest> = image.layers.iter().map(|l| l.diff_id).collect();
    let (known, partial) = find_layers(lease, &unique).await?;
    if partial.is_empty() {
        return Ok((known, partial));
    }
    // A refill is a pull of its own: it commits whatever becomes of this one.
    let refill = lease.again("lost content").await?;
    let outcome = refill::layers(
        &refill,
        &partial,
        (source, &image.layers),
        options,
        progress,
    )
    .await;
    if !matches!(outcome, Ok(1..)) {
        refill.abort().await;
    }
    outcome?;
    let (known, still) = find_layers(lease, &unique).await?;
    match still.first() {
        None => Ok((known, partial)),
        Some(diff_id) => Err(IngestError::Changed(format!(
            "layer {diff_id} was lost again while it was brought back"
        ))),
    }
}

/// What metad has of these layers: whole ones, and those of which the pool has lost something.
pub(super) async fn find_layers(
    lease: &Pull,
    unique: &BTreeSet<Digest>,
) -> Result<(HashMap<Digest, v1::Layer>, Vec<Digest>), IngestError> {
    let (mut known, mut partial) = (HashMap::new(), Vec::new());
    let diff_ids: Vec<Digest> = unique.iter().copied().collect();
    for part in diff_ids.chunks(256) {
        let request = v1::FindLayersRequest {
            pull: Some(lease.reference()),
            diff_ids: part.iter().map(|d| d.as_bytes().to_vec()).collect(),
        };
        let find = || lease.client().find_layers(request.clone());
        let reply = lease.ask(find).await?;
        for (diff_id, answer) in part.iter().zip(reply.layers) {
            match (answer.found, answer.layer) {
                (true, Some(layer)) => {
                    known.insert(*diff_id, layer);
                }
                (false, Some(_)) => partial.push(*diff_id),
                _ => {}
            }
        }
    }
    Ok((known, partial))
}

/// An image whose layers are all in the pool, on its way into the catalogue.
struct OneImage<'a> {
    lease: &'a Pull,
    image: &'a Arc<ResolvedImage>,
    spec: &'a SourceSpec,
    unpacked_bytes: u64,
    replicas: u32,
}

impl OneImage<'_> {
    /// Merges and commits the image, unless another pull does: then only the name is given. Tells the
    /// generation of the catalogue that has it.
    async fn commit(
        &self,
        claims: &mut Claims,
        indexes: HashMap<Digest, Arc<[u8]>>,
    ) -> Result<u64, IngestError> {
        let key = claims::image_key(&self.image.manifest_digest);
        let fence = loop {
            claims.claim(key.clone()).await?;
            let fence = self.turn(claims, &key).await?;
            if let Some(generation) = self.commit_name().await? {
                return Ok(generation);
            }
            // One that was committed and removed again while this pull waited is its own to commit.
            if let Some(fence) = fence {
                break fence;
            }
        };
        let blocking = {
            let (lease, image) = (self.lease.clone(), Arc::clone(self.image));
            tokio::task::spawn_blocking(move || merge_and_store(&lease, &image, indexes))
        };
        let (index, index_packs) = claims.during(join(blocking)).await?;
        let request = self.request(index, index_packs, fence);
        self.lease.step("pull.committing");
        let commit = || self.lease.client().commit(request.clone());
        let generation = self.lease.ask(commit).await?.generation;
        self.lease.step("pull.committed");
        Ok(generation)
    }

    /// Waits until the image is this pull's to commit, and gives the fencing token; `None` when another
    /// pull has committed it.
    async fn turn(&self, claims: &mut Claims, wanted: &str) -> Result<Option<u64>, IngestError> {
        let mut tick = tokio::time::interval(claims::TICK);
        loop {
            tokio::select! {
                said = claims.next() => match said? {
                    Said::Held { key, fence } if key == wanted => return Ok(Some(fence)),
                    Said::Committed { key } if key == wanted => return Ok(None),
                    _ => {}
                },
                _ = tick.tick() => claims.tick().await?,
            }
        }
    }

    /// Gives the name to the image, when it is there already.
    async fn commit_name(&self) -> Result<Option<u64>, IngestError> {
        let name = &self.image.name;
        let request = v1::CommitNameRequest {
            pull: Some(self.lease.reference()),
            registry: name.registry.clone(),
            repository: name.repository.clone(),
            tag: name.tag.clone(),
            manifest: self.image.manifest_digest.as_bytes().to_vec(),
            source: self.spec.to_string(),
            replicas: self.replicas,
        };
        let commit = || self.lease.client().commit_name(request.clone());
        match self.lease.ask(commit).await {
            Ok(reply) => Ok(Some(reply.generation)),
            Err(IngestError::Metad(ClientError::NotFound { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn request(
        &self,
        index: v1::IndexRef,
        index_packs: Vec<index::PackRef>,
        fence: u64,
    ) -> v1::CommitRequest {
        let image = self.image;
        let name = &image.name;
        v1::CommitRequest {
            pull: Some(self.lease.reference()),
            image: Some(v1::Image {
                registry: name.registry.clone(),
                repository: name.repository.clone(),
                tag: name.tag.clone(),
                manifest: image.manifest_digest.as_bytes().to_vec(),
                config: image.config_digest.as_bytes().to_vec(),
                diff_ids: image
                    .layers
                    .iter()
                    .map(|l| l.diff_id.as_bytes().to_vec())
                    .collect(),
                number: 0,
                index: Some(index),
                unpacked_bytes: self.unpacked_bytes,
                committed_unix_ms: 0,
                platform: image.config.platform.to_string(),
                source: self.spec.to_string(),
                replicas: self.replicas,
            }),
            manifest: Some(v1::Document {
                content: image.manifest.clone(),
                media_type: image.media_type.clone(),
            }),
            config: Some(v1::Document {
                content: image.raw_config.clone(),
                media_type: "application/vnd.oci.image.config.v1+json".into(),
            }),
            index_packs: index_packs
                .iter()
                .map(|pack| v1::PackWanted {
                    pack: pack.id.0.to_vec(),
                    len: pack.len,
                })
                .collect(),
            fence,
        }
    }
}

fn merge_and_store(
    lease: &Pull,
    image: &ResolvedImage,
    mut indexes: HashMap<Digest, Arc<[u8]>>,
) -> Result<(v1::IndexRef, Vec<index::PackRef>), IngestError> {
    let mut opened: HashMap<Digest, index::Index<Arc<[u8]>>> = HashMap::new();
    let mut order = Vec::new();
    for descriptor in &image.layers {
        let diff_id = descriptor.diff_id;
        if let Some(bytes) = indexes.remove(&diff_id) {
            opened.insert(diff_id, layer::open_index(bytes, &diff_id.to_string())?);
        }
        let one = opened
            .get(&diff_id)
            .ok_or_else(|| IngestError::Bug(format!("no index of layer {diff_id}")))?;
        order.push(one.clone());
    }
    let name = image.manifest_digest.to_string();
    let (tree, placement) = index::merge(&order).map_err(|source| IngestError::Merge {
        image: name.clone(),
        source,
    })?;
    drop((order, opened));
    let written =
        index::write(&tree, &placement, ViewKind::Image).map_err(|source| IngestError::Write {
            layer: name,
            source,
        })?;
    drop((tree, placement));
    index_store::store(lease, written.digest, written.len, &written.bytes.into())
}

/// The result of a blocking task; a panic in it is an internal error, not ours to repeat.
pub(super) async fn join<T>(
    task: tokio::task::JoinHandle<Result<T, IngestError>>,
) -> Result<T, IngestError> {
    task.await
        .unwrap_or_else(|error| Err(IngestError::Bug(error.to_string())))
}

/// Whether the caller wants to stop.
pub fn is_stopped(stopped: &AtomicBool) -> bool {
    stopped.load(Ordering::Relaxed)
}
