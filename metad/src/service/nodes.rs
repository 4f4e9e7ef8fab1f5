//! Nodes.

use harbour_metad_client::v1;
use tonic::{Request, Response, Status};
use v1::nodes_server::Nodes;

use super::{Lane, Service};

#[tonic::async_trait]
impl Nodes for Service {
    async fn register(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::NodeLease>, Status> {
        let request = request.into_inner();
        self.call("Nodes.Register", Lane::Lease, move |engine| {
            engine.register_node(&request)
        })
        .await
    }

    async fn heartbeat(
        &self,
        request: Request<v1::NodeHeartbeat>,
    ) -> Result<Response<v1::NodeLease>, Status> {
        let request = request.into_inner();
        self.call("Nodes.Heartbeat", Lane::Lease, move |engine| {
            engine.node_heartbeat(&request)
        })
        .await
    }

    async fn report_use(
        &self,
        request: Request<v1::UseReport>,
    ) -> Result<Response<v1::UseReply>, Status> {
        let request = request.into_inner();
        self.call("Nodes.ReportUse", Lane::Read, move |engine| {
            engine.report_use(&request).map(|()| v1::UseReply {})
        })
        .await
    }

    async fn report_lost(
        &self,
        request: Request<v1::LostReport>,
    ) -> Result<Response<v1::LostReply>, Status> {
        let request = request.into_inner();
        self.call("Nodes.ReportLost", Lane::Write, move |engine| {
            engine.report_lost(&request).map(|()| v1::LostReply {})
        })
        .await
    }
}
