//! Donors.

use harbour_metad_client::v1;
use tonic::{Request, Response, Status};
use v1::donors_server::Donors;

use super::{Lane, Service};

#[tonic::async_trait]
impl Donors for Service {
    async fn register(
        &self,
        request: Request<v1::RegisterDonorRequest>,
    ) -> Result<Response<v1::DonorLease>, Status> {
        let request = request.into_inner();
        self.call("Donors.Register", Lane::Lease, move |engine| {
            engine.register_donor(&request)
        })
        .await
    }

    async fn heartbeat(
        &self,
        request: Request<v1::DonorHeartbeat>,
    ) -> Result<Response<v1::DonorLease>, Status> {
        let request = request.into_inner();
        self.call("Donors.Heartbeat", Lane::Lease, move |engine| {
            engine.donor_heartbeat(&request)
        })
        .await
    }

    async fn leave(
        &self,
        request: Request<v1::DonorRef>,
    ) -> Result<Response<v1::LeaveReply>, Status> {
        let request = request.into_inner();
        let work = move |engine: &std::sync::Arc<crate::engine::Engine>| {
            engine.donor_leave(&request).map(|()| v1::LeaveReply {})
        };
        self.call("Donors.Leave", Lane::Write, work).await
    }

    async fn resize(
        &self,
        request: Request<v1::ResizeDonor>,
    ) -> Result<Response<v1::DonorLease>, Status> {
        let request = request.into_inner();
        self.call("Donors.Resize", Lane::Lease, move |engine| {
            engine.donor_resize(&request)
        })
        .await
    }

    async fn list(
        &self,
        _: Request<v1::ListDonorsRequest>,
    ) -> Result<Response<v1::ListDonorsReply>, Status> {
        self.call("Donors.List", Lane::Read, |engine| engine.list_donors())
            .await
    }
}
