//! Pulls.

use std::time::{Duration, Instant};

use harbour_metad_client::v1;
use tonic::{Request, Response, Status, Streaming};
use v1::ingest_server::Ingest;

use super::{Lane, Service, next};
use crate::engine::Reserving;

/// Longest between two looks at freed space, when nothing is told.
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[tonic::async_trait]
impl Ingest for Service {
    async fn begin(
        &self,
        request: Request<v1::BeginRequest>,
    ) -> Result<Response<v1::PullLease>, Status> {
        let request = request.into_inner();
        self.call("Ingest.Begin", Lane::Write, move |engine| {
            engine.begin(&request)
        })
        .await
    }

    async fn renew(
        &self,
        request: Request<v1::PullRef>,
    ) -> Result<Response<v1::PullLease>, Status> {
        let request = request.into_inner();
        self.call("Ingest.Renew", Lane::Lease, move |engine| {
            engine.renew(&request)
        })
        .await
    }

    async fn find_layers(
        &self,
        request: Request<v1::FindLayersRequest>,
    ) -> Result<Response<v1::FindLayersReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.FindLayers", Lane::Write, move |engine| {
            engine.find_layers(&request)
        })
        .await
    }

    async fn find_objects(
        &self,
        request: Request<v1::FindObjectsRequest>,
    ) -> Result<Response<v1::FindObjectsReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.FindObjects", Lane::Write, move |engine| {
            engine.find_objects(&request)
        })
        .await
    }

    async fn reserve(
        &self,
        request: Request<v1::ReserveRequest>,
    ) -> Result<Response<v1::ReserveReply>, Status> {
        self.counted("Ingest.Reserve", self.wait_for_space(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn put_index(
        &self,
        request: Request<Streaming<v1::IndexChunk>>,
    ) -> Result<Response<v1::PutIndexReply>, Status> {
        self.counted("Ingest.PutIndex", self.take_index(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn stage_layer(
        &self,
        request: Request<Streaming<v1::LayerPart>>,
    ) -> Result<Response<v1::StageLayerReply>, Status> {
        self.counted("Ingest.StageLayer", self.take_layer(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.Commit", Lane::Write, move |engine| {
            engine.commit(&request)
        })
        .await
    }

    async fn commit_layer(
        &self,
        request: Request<v1::CommitLayerRequest>,
    ) -> Result<Response<v1::CommitLayerReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.CommitLayer", Lane::Write, move |engine| {
            engine.commit_layer(&request)
        })
        .await
    }

    async fn commit_name(
        &self,
        request: Request<v1::CommitNameRequest>,
    ) -> Result<Response<v1::CommitReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.CommitName", Lane::Write, move |engine| {
            engine.commit_name(&request)
        })
        .await
    }

    async fn commit_refill(
        &self,
        request: Request<v1::CommitRefillRequest>,
    ) -> Result<Response<v1::CommitReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.CommitRefill", Lane::Write, move |engine| {
            engine.commit_refill(&request)
        })
        .await
    }

    async fn abort(
        &self,
        request: Request<v1::PullRef>,
    ) -> Result<Response<v1::AbortReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.Abort", Lane::Write, move |engine| {
            engine.abort(&request).map(|()| v1::AbortReply {})
        })
        .await
    }

    async fn give_back(
        &self,
        request: Request<v1::GiveBackRequest>,
    ) -> Result<Response<v1::GiveBackReply>, Status> {
        let request = request.into_inner();
        self.call("Ingest.GiveBack", Lane::Write, move |engine| {
            engine.give_back(&request)
        })
        .await
    }
}

impl Service {
    /// Asks for space until there is some, at most for as long as readers can hold freed space.
    async fn wait_for_space(
        &self,
        request: v1::ReserveRequest,
    ) -> Result<v1::ReserveReply, Status> {
        let request = std::sync::Arc::new(request);
        let timing = self.inner.engine.timing();
        let longest = Duration::from_millis(timing.node_lease_ms + 2 * timing.margin_ms);
        let deadline = Instant::now() + longest;
        let mut freed = self.inner.engine.watch_space();
        loop {
            freed.mark_unchanged();
            let may_wait = Instant::now() < deadline;
            let asked = request.clone();
            match self
                .blocking(Lane::Write, move |engine| engine.reserve(&asked, may_wait))
                .await?
            {
                Reserving::Done(reply) => return Ok(reply),
                Reserving::Wait => {
                    let _ = tokio::time::timeout(LOOK_EVERY, freed.changed()).await;
                }
            }
        }
    }

    async fn take_index(
        &self,
        mut stream: Streaming<v1::IndexChunk>,
    ) -> Result<v1::PutIndexReply, Status> {
        let head = next(&mut stream)
            .await?
            .ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        let mut upload = self
            .blocking(Lane::Write, move |engine| {
                let mut upload = engine.begin_index(&head)?;
                upload.chunk(&head.content)?;
                Ok(upload)
            })
            .await?;
        while let Some(chunk) = next(&mut stream).await? {
            // Files are not behind the engine's lock, so this is a reader's lane.
            upload = self
                .blocking(Lane::Read, move |_| {
                    upload.chunk(&chunk.content)?;
                    Ok(upload)
                })
                .await?;
        }
        self.blocking(Lane::Write, move |_| upload.finish()).await?;
        Ok(v1::PutIndexReply {})
    }

    async fn take_layer(
        &self,
        mut stream: Streaming<v1::LayerPart>,
    ) -> Result<v1::StageLayerReply, Status> {
        let first = next(&mut stream)
            .await?
            .ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        let mut upload = self
            .blocking(Lane::Write, move |engine| {
                let head = first.head.ok_or_else(|| {
                    crate::error::Error::Invalid("the first part of a layer has no head".into())
                })?;
                let mut upload = engine.begin_layer(&head)?;
                engine.layer_packs(&mut upload, &first.packs)?;
                Ok(upload)
            })
            .await?;
        while let Some(part) = next(&mut stream).await? {
            upload = self
                .blocking(Lane::Write, move |engine| {
                    engine.layer_packs(&mut upload, &part.packs)?;
                    Ok(upload)
                })
                .await?;
        }
        self.blocking(Lane::Write, move |engine| engine.finish_layer(&mut upload))
            .await
    }
}
