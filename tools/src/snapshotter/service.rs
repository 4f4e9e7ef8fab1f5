//! containerd's protocol: `containerd.services.snapshots.v1`.

use std::{collections::HashMap, fs, pin::Pin, sync::Arc, time::Duration};

use tokio::sync::Notify;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{
    LABEL_REF,
    bring::Bringer,
    figures::Figures,
    filter::Filter,
    known::Catalogue,
    mounts::{Lower, MountsError, Places},
    proto::{
        types::Mount,
        v1::{self, snapshots_server::Snapshots},
    },
    store::{Store, StoreError, Wanted},
    table::{Kind, Labels, Record, Refused},
};

/// Snapshots in one message of a list.
const PAGE: usize = 100;

/// Most filters of one list.
const FILTERS_MAX: usize = 64;

/// The snapshotter of one host.
pub struct Service {
    /// Snapshots.
    pub store: Arc<Store>,
    /// The cluster's catalogue.
    pub catalogue: Arc<Catalogue>,
    /// Pulls what is missing; without, that is left to containerd.
    pub bringer: Option<Arc<Bringer>>,
    /// Longest wait for a pull.
    pub pull_limit: Duration,
    /// Where layers are.
    pub places: Places,
    /// Counters.
    pub figures: Arc<Figures>,
    /// Told when a layer came into use or went out of it.
    pub used: Arc<Notify>,
}

/// Runs what blocks.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let outcome = tokio::task::spawn_blocking(call).await;
    outcome.unwrap_or_else(|error| Err(Status::internal(error.to_string())))
}

impl Service {
    /// A snapshot for a container, a build, or to unpack a layer into.
    async fn make(&self, wanted: Wanted) -> Result<Vec<Mount>, Status> {
        let target = wanted.labels.get(LABEL_REF);
        if let (Some(target), Kind::Active) = (target.cloned(), wanted.kind)
            && self.share(&target, &wanted).await?
        {
            let text = format!("{target} is there already: nothing has to be unpacked");
            return Err(Status::already_exists(text));
        }
        // Before there is a snapshot: what it stands on may have to be pulled again.
        let below = self.standing_on(&wanted.parent).await?;
        self.with_lower(below, move |service, _, lower| {
            let root = match lower.first() {
                Some(top) => Some(fs::metadata(&top.dir).map_err(|error| {
                    Status::unavailable(format!("cannot read {}: {error}", top.dir.display()))
                })?),
                None => None,
            };
            let record = service
                .store
                .create(wanted.clone(), root.as_ref())
                .map_err(status)?;
            let dir = service.store.dir_of(record.id);
            service
                .places
                .mounts(&record, lower, &dir)
                .map_err(unmountable)
        })
        .await
    }

    /// The parent and all that it stands on.
    pub(super) async fn standing_on(&self, parent: &str) -> Result<Vec<Record>, Status> {
        if parent.is_empty() {
            return Ok(Vec::new());
        }
        let (store, parent) = (Arc::clone(&self.store), parent.to_owned());
        blocking(move || {
            let (record, mut below) = store.with_below(&parent).map_err(status)?;
            below.insert(0, record);
            Ok(below)
        })
        .await
    }

    /// Finds the directories of `below` and does something with them. A layer that the cluster has lost is
    /// pulled again, from the image that it was first wanted for.
    async fn with_lower<T: Send + 'static>(
        &self,
        below: Vec<Record>,
        call: impl Fn(&Parts, &[Record], &[Lower]) -> Result<T, Status> + Send + Sync + 'static,
    ) -> Result<T, Status> {
        let call = Arc::new(call);
        let mut repaired = false;
        loop {
            let (parts, below, call) = (self.parts(), below.clone(), Arc::clone(&call));
            let known = self.catalogue.now();
            let outcome = blocking({
                let below = below.clone();
                move || match parts.places.lower(&parts.store, &below, &known) {
                    Ok(lower) => call(&parts, &below, &lower).map(Ok),
                    Err(MountsError::Missing { layer, dir, source }) => {
                        Ok(Err((layer, dir, source)))
                    }
                    Err(error) => Err(unmountable(error)),
                }
            })
            .await?;
            let (layer, dir, source) = match outcome {
                Ok(done) => return Ok(done),
                Err(missing) => missing,
            };
            let record = below.iter().find(|record| record.layer == Some(layer));
            if repaired || !self.repair(record, layer).await {
                let dir = dir.display();
                return Err(Status::unavailable(format!(
                    "layer {layer} is not at {dir}: {source}; see: harbour doctor"
                )));
            }
            repaired = true;
        }
    }

    fn parts(&self) -> Parts {
        Parts {
            store: Arc::clone(&self.store),
            places: self.places.clone(),
        }
    }
}

/// What blocking calls need of a service.
struct Parts {
    store: Arc<Store>,
    places: Places,
}

fn labels(map: HashMap<String, String>) -> Labels {
    map.into_iter().collect()
}

pub(super) fn status(error: StoreError) -> Status {
    let text = error.to_string();
    match error {
        StoreError::Refused(Refused::NotFound(_)) => Status::not_found(text),
        StoreError::Refused(Refused::Exists(_)) => Status::already_exists(text),
        StoreError::Refused(Refused::Precondition(_)) => Status::failed_precondition(text),
        StoreError::Refused(Refused::Invalid(_)) => Status::invalid_argument(text),
        StoreError::Refused(Refused::Exhausted(_)) => Status::resource_exhausted(text),
        StoreError::Disk { .. } => {
            tracing::error!(error = text, "the snapshots' disk failed");
            Status::internal(text)
        }
    }
}

fn unmountable(error: MountsError) -> Status {
    match &error {
        MountsError::Missing { .. } => Status::unavailable(error.to_string()),
        MountsError::TooMany(_) => Status::resource_exhausted(error.to_string()),
        MountsError::Links { .. } => Status::internal(error.to_string()),
    }
}

fn info(record: Record) -> v1::Info {
    let kind = match record.kind {
        Kind::View => v1::Kind::View,
        Kind::Active => v1::Kind::Active,
        Kind::Committed => v1::Kind::Committed,
    };
    let time = |ns: i64| prost_types::Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        nanos: i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0),
    };
    v1::Info {
        kind: kind.into(),
        created_at: Some(time(record.created_ns)),
        updated_at: Some(time(record.updated_ns)),
        name: record.name,
        parent: record.parent,
        labels: record.labels.into_iter().collect(),
    }
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<v1::PrepareSnapshotRequest>,
    ) -> Result<Response<v1::PrepareSnapshotResponse>, Status> {
        let request = request.into_inner();
        let wanted = Wanted {
            kind: Kind::Active,
            key: request.key,
            parent: request.parent,
            labels: labels(request.labels),
        };
        let mounts = self.make(wanted).await?;
        Ok(Response::new(v1::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<v1::ViewSnapshotRequest>,
    ) -> Result<Response<v1::ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let wanted = Wanted {
            kind: Kind::View,
            key: request.key,
            parent: request.parent,
            labels: labels(request.labels),
        };
        let mounts = self.make(wanted).await?;
        Ok(Response::new(v1::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<v1::MountsRequest>,
    ) -> Result<Response<v1::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let store = Arc::clone(&self.store);
        let (record, below) = blocking(move || store.with_below(&key).map_err(status)).await?;
        if record.kind == Kind::Committed {
            let text = format!(
                "snapshot {:?} is committed: nothing is mounted for it",
                record.name
            );
            return Err(Status::failed_precondition(text));
        }
        let mounts = self
            .with_lower(below, move |parts, _, lower| {
                let dir = parts.store.dir_of(record.id);
                parts
                    .places
                    .mounts(&record, lower, &dir)
                    .map_err(unmountable)
            })
            .await?;
        Ok(Response::new(v1::MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let store = Arc::clone(&self.store);
        blocking(move || {
            let parent = Some(request.parent.as_str()).filter(|parent| !parent.is_empty());
            let labels = labels(request.labels);
            store
                .commit(&request.name, &request.key, parent, labels)
                .map_err(status)
        })
        .await?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let store = Arc::clone(&self.store);
        blocking(move || store.remove(&key).map_err(status)).await?;
        self.used.notify_one();
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<v1::StatSnapshotRequest>,
    ) -> Result<Response<v1::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let store = Arc::clone(&self.store);
        let record = blocking(move || store.get(&key).map_err(status)).await?;
        let info = Some(info(record));
        Ok(Response::new(v1::StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<v1::UpdateSnapshotRequest>,
    ) -> Result<Response<v1::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let Some(wanted) = request.info else {
            return Err(Status::invalid_argument("the request names no snapshot"));
        };
        let paths = request
            .update_mask
            .map(|mask| mask.paths)
            .unwrap_or_default();
        let store = Arc::clone(&self.store);
        let record = blocking(move || {
            let labels = labels(wanted.labels);
            store.relabel(&wanted.name, &labels, &paths).map_err(status)
        })
        .await?;
        let info = Some(info(record));
        Ok(Response::new(v1::UpdateSnapshotResponse { info }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<v1::ListSnapshotsResponse, Status>> + Send>>;

    async fn list(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        if filters.len() > FILTERS_MAX {
            return Err(Status::invalid_argument(format!(
                "more than {FILTERS_MAX} filters"
            )));
        }
        let filters: Result<Vec<_>, _> = filters.iter().map(|text| Filter::parse(text)).collect();
        let filters = filters.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let store = Arc::clone(&self.store);
        let records = blocking(move || {
            let any = |record: &Record| filters.iter().any(|filter| filter.holds(record));
            Ok(store.list(|record| filters.is_empty() || any(record)))
        })
        .await?;
        let pages: Vec<_> = records
            .chunks(PAGE)
            .map(|page| {
                let info = page.iter().cloned().map(info).collect();
                Ok(v1::ListSnapshotsResponse { info })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pages))))
    }

    async fn usage(
        &self,
        request: Request<v1::UsageRequest>,
    ) -> Result<Response<v1::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let store = Arc::clone(&self.store);
        let usage = blocking(move || store.usage(&key).map_err(status)).await?;
        Ok(Response::new(v1::UsageResponse {
            size: usage.bytes,
            inodes: usage.inodes,
        }))
    }

    async fn cleanup(&self, _request: Request<v1::CleanupRequest>) -> Result<Response<()>, Status> {
        let store = Arc::clone(&self.store);
        let removed = blocking(move || store.sweep().map_err(status)).await?;
        if removed > 0 {
            tracing::info!(removed, "directories of removed snapshots taken away");
        }
        Ok(Response::new(()))
    }
}
