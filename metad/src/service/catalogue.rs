//! Catalogue and figures.

use harbour_metad_client::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use v1::{admin_server::Admin, catalogue_server::Catalogue};

use super::{Lane, Service};

type Pages = std::vec::IntoIter<Result<v1::SnapshotPage, Status>>;

#[tonic::async_trait]
impl Catalogue for Service {
    type SnapshotStream = tokio_stream::Iter<Pages>;
    type WatchStream = ReceiverStream<Result<v1::Change, Status>>;

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let pages = self
            .call("Catalogue.Snapshot", Lane::Read, |engine| engine.snapshot())
            .await?;
        let pages: Vec<_> = pages.into_inner().into_iter().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(pages)))
    }

    async fn watch(
        &self,
        _: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.counted("Catalogue.Watch", async {
            let turn = self.inner.watches.clone().try_acquire_owned();
            let turn = turn.map_err(|_| Status::resource_exhausted("too many watches"))?;
            let mut changed = self.inner.engine.watch();
            let mut closing = self.inner.closing.clone();
            // One message in flight: a slow watcher gets the newest generation when it looks.
            let (send, receive) = mpsc::channel(1);
            tokio::spawn(async move {
                let _turn = turn;
                changed.mark_changed();
                loop {
                    tokio::select! {
                        news = changed.changed() => if news.is_err() { return },
                        _ = closing.wait_for(|closing| *closing) => return,
                        () = send.closed() => return,
                    }
                    let Ok(place) = send.reserve().await else {
                        return;
                    };
                    let generation = *changed.borrow_and_update();
                    place.send(Ok(v1::Change { generation }));
                }
            });
            Ok(Response::new(ReceiverStream::new(receive)))
        })
        .await
    }

    async fn get_document(
        &self,
        request: Request<v1::DocumentRequest>,
    ) -> Result<Response<v1::Document>, Status> {
        let request = request.into_inner();
        self.call("Catalogue.GetDocument", Lane::Read, move |engine| {
            engine.document(&request)
        })
        .await
    }

    async fn read_index(
        &self,
        request: Request<v1::ReadIndexRequest>,
    ) -> Result<Response<v1::ReadIndexReply>, Status> {
        let request = request.into_inner();
        self.call("Catalogue.ReadIndex", Lane::Read, move |engine| {
            engine.read_index(&request)
        })
        .await
    }

    async fn locate(
        &self,
        request: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateReply>, Status> {
        let request = request.into_inner();
        self.call("Catalogue.Locate", Lane::Read, move |engine| {
            engine.locate(&request)
        })
        .await
    }

    async fn remove_name(
        &self,
        request: Request<v1::RemoveNameRequest>,
    ) -> Result<Response<v1::RemoveNameReply>, Status> {
        let request = request.into_inner();
        self.call("Catalogue.RemoveName", Lane::Write, move |engine| {
            engine.remove_name(&request)
        })
        .await
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusReply>, Status> {
        self.call("Admin.Status", Lane::Read, |engine| engine.status())
            .await
    }

    async fn audit(
        &self,
        _: Request<v1::AuditRequest>,
    ) -> Result<Response<v1::AuditReply>, Status> {
        self.call("Admin.Audit", Lane::Read, |engine| engine.audit())
            .await
    }
}
