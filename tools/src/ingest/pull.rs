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
use harbour_metad_client::{Client, v1};

use super::{IngestError, index_store, layer, lease::Pull, refill};
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
    /// Of those, put back because the pool had lost some of their content.
    pub refilled: usize,
    /// Compressed bytes of the layers that were fetched.
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
    let fetched_bytes = missing.iter().chain(brought_back).map(|l| l.size).sum();
    let fetched = missing.len();
    for staged in fetch_all(lease, source, missing, options, progress).await? {
        let diff_id = layer::digest(&staged.layer.diff_id)?;
        unpacked.insert(diff_id, staged.layer.unpacked_bytes);
        indexes.insert(diff_id, staged.index);
    }
    lease.check()?;
    let unpacked_bytes = image
        .layers
        .iter()
        .filter_map(|l| unpacked.get(&l.diff_id))
        .sum();
    let name = image.name.clone();
    let blocking = {
        let (lease, image) = (lease.clone(), Arc::clone(image));
        tokio::task::spawn_blocking(move || merge_and_store(&lease, &image, indexes))
    };
    let (index, index_packs) = join(blocking).await?;
    let request = commit_request(
        lease,
        image,
        &name,
        index,
        index_packs,
        unpacked_bytes,
        spec,
        options.replicas,
    );
    lease.step("pull.committing");
    let generation = lease.client().commit(request).await?.generation;
    lease.step("pull.committed");
    Ok(PullReport {
        name,
        manifest: image.manifest_digest,
        layers: image.layers.len(),
        fetched,
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
async fn find_layers(
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
        let reply = lease.client().find_layers(request).await?;
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

/// Unpacks layers, [`PullOptions::jobs`] at a time, largest first so that no long one is left alone
/// at the end. The first failure stops the others.
async fn fetch_all(
    lease: &Pull,
    source: &Arc<Source>,
    mut missing: Vec<LayerDescriptor>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<Vec<layer::Staged>, IngestError> {
    let bars: HashMap<Digest, Arc<dyn crate::progress::LayerProgress>> = missing
        .iter()
        .map(|descriptor| (descriptor.diff_id, progress.layer(descriptor)))
        .collect();
    missing.sort_by_key(|descriptor| std::cmp::Reverse(descriptor.size));
    let stored = super::packer::Stored::default();
    let mut queue = missing.into_iter();
    let mut tasks = tokio::task::JoinSet::new();
    let mut done = Vec::new();
    let mut first_error = None;
    loop {
        while tasks.len() < options.jobs.max(1) && first_error.is_none() {
            let Some(descriptor) = queue.next() else {
                break;
            };
            let bar = bars.get(&descriptor.diff_id).cloned();
            let (lease, source, options, stored) = (
                lease.clone(),
                Arc::clone(source),
                Arc::clone(options),
                Arc::clone(&stored),
            );
            tasks.spawn_blocking(move || {
                let bar = bar.ok_or_else(|| IngestError::Bug("a layer without a bar".into()))?;
                let outcome = layer::ingest(
                    &lease,
                    &source,
                    &descriptor,
                    &options.limits,
                    stored,
                    bar.as_ref(),
                );
                if let Err(error) = &outcome {
                    bar.failed(error);
                }
                outcome
            });
        }
        match tasks.join_next().await {
            None => break,
            Some(Ok(Ok(staged))) => done.push(staged),
            Some(Ok(Err(error))) => {
                lease.stop();
                // What the others say after being stopped is not the reason.
                if first_error.is_none() {
                    first_error = Some(error);
                }
            }
            Some(Err(error)) => {
                lease.stop();
                first_error.get_or_insert(IngestError::Bug(error.to_string()));
            }
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(done),
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

#[allow(clippy::too_many_arguments)]
fn commit_request(
    lease: &Pull,
    image: &ResolvedImage,
    name: &ImageName,
    index: v1::IndexRef,
    index_packs: Vec<index::PackRef>,
    unpacked_bytes: u64,
    spec: &SourceSpec,
    replicas: u32,
) -> v1::CommitRequest {
    v1::CommitRequest {
        pull: Some(lease.reference()),
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
            unpacked_bytes,
            committed_unix_ms: 0,
            platform: image.config.platform.to_string(),
            source: spec.to_string(),
            replicas,
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
        fence: 0,
    }
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
