//! Content that the pool has lost, brought back from where it came.
//!
//! A pack is named by what it holds, so a refill reserves space for the same pack and writes the
//! same objects to the same offsets; no index changes. A pack may hold objects for several layers,
//! so all layers that refer to it are read again, or some of its objects would stay lost.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use harbour_image::{
    digest::Digest,
    manifest::{LayerDescriptor, Platform},
    object::{PACK_MAX, PackId},
    source::{Source, SourceSpec},
};
use harbour_metad_client::{Client, Error as ClientError, LOCATE_MAX, Snapshot, v1};

use super::{
    IngestError,
    home::{InPool, Targets},
    index_store, layer,
    lease::Pull,
    pull::{PullOptions, join},
    reread,
};
use crate::{node::spool::Spool, progress::PullProgress};

/// Brings back every lost pack of the layers `wanted`.
pub async fn layers(
    lease: &Pull,
    wanted: &[Digest],
    own: OwnSource<'_>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<usize, IngestError> {
    let snapshot = lease.client().snapshot().await?;
    let mut packs = BTreeSet::new();
    for layer in &snapshot.layers {
        if !wanted.iter().any(|w| w.as_bytes()[..] == layer.diff_id) {
            continue;
        }
        packs.extend(packs_of(lease.client(), layer).await?.into_keys());
        packs.extend(index_packs(layer.index.as_ref()));
    }
    let own = Some(own);
    let have = Have { own, spool: None };
    let brought = packs_of_snapshot(lease, &snapshot, packs, &have, options, progress).await?;
    Ok(brought.len())
}

/// The source that the caller has open already, and the layers it gives: asked before those that
/// the catalogue names.
pub type OwnSource<'a> = (&'a Source, &'a [LayerDescriptor]);

/// What is at hand without asking the sources that the catalogue names.
struct Have<'a> {
    own: Option<OwnSource<'a>>,
    spool: Option<&'a Arc<Spool>>,
}

/// Names of the packs that an index itself lies in.
fn index_packs(index: Option<&v1::IndexRef>) -> impl Iterator<Item = PackId> {
    let names = index.into_iter().flat_map(|index| &index.packs);
    names.filter_map(|name| <[u8; 32]>::try_from(name.as_slice()).ok().map(PackId))
}

/// Brings back those of `packs` that have no replica, and whatever else their layers have lost: the
/// layers are read through anyway, and a tree that lost one pack has mostly lost others. Where the
/// pool has no room for all of that, only what was asked for. What the spool has is taken from
/// there. Gives what was brought back.
pub async fn packs(
    lease: &Pull,
    packs: BTreeSet<PackId>,
    spool: &Arc<Spool>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<BTreeSet<PackId>, IngestError> {
    let snapshot = lease.client().snapshot().await?;
    let mut all = packs.clone();
    for layer in &snapshot.layers {
        let of_layer = packs_of(lease.client(), layer).await?;
        if of_layer.keys().any(|pack| packs.contains(pack)) {
            all.extend(of_layer.into_keys());
            all.extend(index_packs(layer.index.as_ref()));
        }
    }
    let have = Have {
        own: None,
        spool: Some(spool),
    };
    match packs_of_snapshot(lease, &snapshot, all, &have, options, progress).await {
        Err(IngestError::Metad(ClientError::Exhausted { .. })) => {
            packs_of_snapshot(lease, &snapshot, packs, &have, options, progress).await
        }
        other => other,
    }
}

async fn packs_of_snapshot(
    lease: &Pull,
    snapshot: &Snapshot,
    packs: BTreeSet<PackId>,
    have: &Have<'_>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<BTreeSet<PackId>, IngestError> {
    let lost = lost_packs(lease.client(), packs).await?;
    if lost.is_empty() {
        return Ok(lost);
    }
    let plan = Plan::new(lease.client(), snapshot, &lost).await?;
    let targets = Arc::new(Targets::new(reserve(lease, &plan.lens).await?));
    for (id, bytes) in plan.index_parts {
        let (lease, targets) = (lease.clone(), Arc::clone(&targets));
        join(tokio::task::spawn_blocking(move || {
            targets.write(&lease, &id, 0, &bytes)?;
            targets.filled(&id);
            Ok(())
        }))
        .await?;
    }
    if let Some(spool) = have.spool {
        from_spool(lease, spool, &plan.lens, &targets).await?;
    }
    if !targets.is_empty() {
        from_sources(
            lease,
            snapshot,
            &plan.users,
            &targets,
            have.own,
            options,
            progress,
        )
        .await?;
    }
    let packs = plan
        .lens
        .iter()
        .map(|(id, len)| v1::PackWanted {
            pack: id.0.to_vec(),
            len: *len,
        })
        .collect();
    let request = v1::CommitRefillRequest {
        pull: Some(lease.reference()),
        packs,
    };
    lease.client().commit_refill(request).await?;
    Ok(plan.lens.into_keys().collect())
}

/// Writes those packs that the spool has.
async fn from_spool(
    lease: &Pull,
    spool: &Arc<Spool>,
    lens: &BTreeMap<PackId, u32>,
    targets: &Arc<Targets>,
) -> Result<(), IngestError> {
    for (id, len) in lens {
        let (lease, spool, targets) = (lease.clone(), Arc::clone(spool), Arc::clone(targets));
        let (id, len) = (*id, *len);
        join(tokio::task::spawn_blocking(move || {
            lease.check()?;
            if targets.has(&id)
                && let Some(bytes) = spool.whole(&id, len)
            {
                targets.write(&lease, &id, 0, &bytes)?;
                targets.filled(&id);
            }
            Ok(())
        }))
        .await?;
    }
    Ok(())
}

/// Reads the layers of `users` from where they came, for all packs that are not filled yet.
async fn from_sources(
    lease: &Pull,
    snapshot: &Snapshot,
    users: &[&v1::Layer],
    targets: &Arc<Targets>,
    own: Option<OwnSource<'_>>,
    options: &Arc<PullOptions>,
    progress: &Arc<dyn PullProgress>,
) -> Result<(), IngestError> {
    for (source, descriptors) in sources_of(users, snapshot, own, options).await? {
        for descriptor in descriptors {
            let user = users
                .iter()
                .find(|l| l.diff_id == descriptor.diff_id.as_bytes());
            let reference = user.and_then(|l| l.index.clone()).unwrap_or_default();
            let name = descriptor.diff_id.to_string();
            let index = index_store::fetch_if_there(lease.client(), &reference, &name).await?;
            let Some(index) = index else { continue };
            let bar = progress.layer(&descriptor);
            let (lease, source, targets, limits) = (
                lease.clone(),
                source.clone(),
                Arc::clone(targets),
                options.limits.clone(),
            );
            join(tokio::task::spawn_blocking(move || {
                let home = InPool {
                    lease: &lease,
                    targets: &targets,
                };
                reread::read_layer(&home, &source, &descriptor, index, &limits, bar.as_ref())
            }))
            .await?;
        }
    }
    Ok(())
}

/// What a refill has to do.
#[derive(Default)]
pub(super) struct Plan<'a> {
    /// Lost packs that something refers to, and their lengths.
    pub(super) lens: BTreeMap<PackId, u32>,
    /// Layers that have content in them.
    pub(super) users: Vec<&'a v1::Layer>,
    /// Lost packs of indexes, which metad's disk has.
    pub(super) index_parts: Vec<(PackId, Vec<u8>)>,
}

impl<'a> Plan<'a> {
    pub(super) async fn new(
        client: &Client,
        snapshot: &'a Snapshot,
        lost: &BTreeSet<PackId>,
    ) -> Result<Self, IngestError> {
        let mut plan = Self::default();
        for layer in &snapshot.layers {
            let of_layer = packs_of(client, layer).await?;
            let shared: Vec<_> = of_layer
                .into_iter()
                .filter(|(id, _)| lost.contains(id))
                .collect();
            if !shared.is_empty() {
                plan.lens.extend(shared);
                plan.users.push(layer);
            }
        }
        // Gathered first: what borrows across an await must be plain.
        let mut indexes: Vec<&v1::IndexRef> = Vec::new();
        indexes.extend(
            snapshot
                .layers
                .iter()
                .filter_map(|layer| layer.index.as_ref()),
        );
        indexes.extend(
            snapshot
                .images
                .iter()
                .filter_map(|image| image.index.as_ref()),
        );
        for index in indexes {
            if !index_packs(Some(index)).any(|id| lost.contains(&id)) {
                continue;
            }
            let bytes = index_store::fetch_if_there(client, index, "a refilled view").await?;
            let Some(bytes) = bytes else { continue };
            for part in bytes.chunks(PACK_MAX) {
                let id = PackId(*blake3::hash(part).as_bytes());
                if lost.contains(&id) && plan.lens.insert(id, part.len() as u32).is_none() {
                    plan.index_parts.push((id, part.to_vec()));
                }
            }
        }
        Ok(plan)
    }
}

/// All packs that a layer's index refers to, and the index's own, with their lengths (0 when not
/// known here); none of a layer that was removed since its snapshot was taken.
pub(super) async fn packs_of(
    client: &Client,
    layer: &v1::Layer,
) -> Result<BTreeMap<PackId, u32>, IngestError> {
    let name = layer::digest(&layer.diff_id)?.to_string();
    let reference = layer.index.clone().unwrap_or_default();
    let mut packs = BTreeMap::new();
    let Some(bytes) = index_store::fetch_if_there(client, &reference, &name).await? else {
        return Ok(packs);
    };
    let index = layer::open_index(bytes, &name)?;
    for number in 0..index.pack_count() {
        let pack = index.pack(number).map_err(|source| IngestError::Index {
            layer: name.clone(),
            source,
        })?;
        packs.insert(pack.id, pack.len);
    }
    Ok(packs)
}

/// Those of `packs` that have no live replica.
async fn lost_packs(
    client: &Client,
    packs: BTreeSet<PackId>,
) -> Result<BTreeSet<PackId>, IngestError> {
    let all: Vec<PackId> = packs.into_iter().collect();
    let mut lost = BTreeSet::new();
    for part in all.chunks(LOCATE_MAX) {
        let request = v1::LocateRequest {
            packs: part.iter().map(|id| id.0.to_vec()).collect(),
        };
        let reply = client.locate(request).await?;
        lost.extend(
            part.iter()
                .zip(reply.packs)
                .filter(|(_, r)| r.extents.is_empty())
                .map(|(id, _)| *id),
        );
    }
    Ok(lost)
}

async fn reserve(
    lease: &Pull,
    lens: &BTreeMap<PackId, u32>,
) -> Result<HashMap<PackId, Vec<v1::Extent>>, IngestError> {
    let client = lease.client().with_timeout(super::lease::RESERVE_LIMIT);
    let mut extents = HashMap::new();
    let all: Vec<_> = lens.iter().collect();
    for part in all.chunks(256) {
        let packs = part
            .iter()
            .map(|(id, len)| v1::PackWanted {
                pack: id.0.to_vec(),
                len: **len,
            })
            .collect();
        let reply = client
            .reserve(v1::ReserveRequest {
                pull: Some(lease.reference()),
                packs,
                avoid: lease.avoided(),
            })
            .await?;
        lease.link().learn(&reply.donors);
        for ((id, _), reserved) in part.iter().zip(reply.packs) {
            if !reserved.present {
                extents.insert(**id, reserved.extents);
            }
        }
    }
    Ok(extents)
}

/// For each source that has some of `users`, the source and those layers.
pub(super) async fn sources_of(
    users: &[&v1::Layer],
    snapshot: &Snapshot,
    own: Option<OwnSource<'_>>,
    options: &Arc<PullOptions>,
) -> Result<Vec<(Source, Vec<LayerDescriptor>)>, IngestError> {
    let mut open: BTreeSet<Digest> = BTreeSet::new();
    for user in users {
        open.insert(layer::digest(&user.diff_id)?);
    }
    let mut sources = Vec::new();
    if let Some((source, layers)) = own {
        let layers: Vec<_> = layers
            .iter()
            .filter(|l| open.remove(&l.diff_id))
            .cloned()
            .collect();
        sources.push((source.clone(), layers));
    }
    for image in &snapshot.images {
        if open.is_empty() {
            break;
        }
        let has_open = |d: &Vec<u8>| layer::digest(d).is_ok_and(|d| open.contains(&d));
        if !image.diff_ids.iter().any(has_open) {
            continue;
        }
        let fail = |source| IngestError::Source {
            what: image.source.clone(),
            source,
        };
        let spec = SourceSpec::parse(&image.source).map_err(fail)?;
        let platform = image.platform.parse::<Platform>().ok();
        let source = Source::open(&spec, &options.source).await.map_err(fail)?;
        let resolved = source.resolve(platform.as_ref()).await.map_err(fail)?;
        let layers: Vec<_> = resolved
            .layers
            .into_iter()
            .filter(|l| open.remove(&l.diff_id))
            .collect();
        if !layers.is_empty() {
            sources.push((source, layers));
        }
    }
    // What only a pull under way refers to is not in the catalogue's images: that pull has its source.
    let named = |diff_id: &&Digest| {
        let mut images = snapshot.images.iter();
        images.any(|image| {
            image
                .diff_ids
                .iter()
                .any(|d| d[..] == diff_id.as_bytes()[..])
        })
    };
    let lost = open.iter().find(named);
    if let Some(diff_id) = lost.or(open.first().filter(|_| sources.is_empty())) {
        return Err(IngestError::Changed(format!(
            "no source of an image gives layer {diff_id} any more"
        )));
    }
    Ok(sources)
}
