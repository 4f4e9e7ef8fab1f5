//! One method for each call that is a question and an answer.

use crate::{Client, Error, v1};

/// Writes the methods of one service: our name, the generated one, request, reply.
macro_rules! calls {
    ($service:ident, $title:literal: $($(#[$doc:meta])* $method:ident = $inner:ident, $rpc:literal, $request:ty => $reply:ty;)*) => {
        impl Client {
            $(
                $(#[$doc])*
                pub async fn $method(&self, request: $request) -> Result<$reply, Error> {
                    let mut service = self.$service();
                    self.call(concat!($title, ".", $rpc), self.timeout(), request, |r| async move {
                        service.$inner(r).await
                    })
                    .await
                }
            )*
        }
    };
}

calls! { catalogue, "Catalogue":
    /// A manifest or config as the registry gave it.
    get_document = get_document, "GetDocument", v1::DocumentRequest => v1::Document;
    /// A range of an index file and the granule table behind it.
    read_index = read_index, "ReadIndex", v1::ReadIndexRequest => v1::ReadIndexReply;
    /// Live replicas of at most [`crate::LOCATE_MAX`] packs.
    locate = locate, "Locate", v1::LocateRequest => v1::LocateReply;
    /// Takes a name away.
    remove_name = remove_name, "RemoveName", v1::RemoveNameRequest => v1::RemoveNameReply;
}

calls! { ingest, "Ingest":
    /// Begins a pull.
    begin = begin, "Begin", v1::BeginRequest => v1::PullLease;
    /// Keeps a pull's lease.
    renew = renew, "Renew", v1::PullRef => v1::PullLease;
    /// Which layers are there and whole.
    find_layers = find_layers, "FindLayers", v1::FindLayersRequest => v1::FindLayersReply;
    /// Which of at most [`crate::FIND_OBJECTS_MAX`] objects are in the pool.
    find_objects = find_objects, "FindObjects", v1::FindObjectsRequest => v1::FindObjectsReply;
    /// Space for at most [`crate::RESERVE_MAX`] packs. May wait for readers to let go of freed
    /// space: give it a deadline of 20 s or more where the pool can be full.
    reserve = reserve, "Reserve", v1::ReserveRequest => v1::ReserveReply;
    /// Makes a staged layer visible by itself.
    commit_layer = commit_layer, "CommitLayer", v1::CommitLayerRequest => v1::CommitLayerReply;
    /// Makes an image visible.
    commit = commit, "Commit", v1::CommitRequest => v1::CommitReply;
    /// Gives a name to an image that is there.
    commit_name = commit_name, "CommitName", v1::CommitNameRequest => v1::CommitReply;
    /// Makes packs of a refill live.
    commit_refill = commit_refill, "CommitRefill", v1::CommitRefillRequest => v1::CommitReply;
    /// Gives everything of a pull back.
    abort = abort, "Abort", v1::PullRef => v1::AbortReply;
    /// Gives back reserved extents that could not be written.
    give_back = give_back, "GiveBack", v1::GiveBackRequest => v1::GiveBackReply;
}

calls! { donors, "Donors":
    /// Registers a donor.
    register_donor = register, "Register", v1::RegisterDonorRequest => v1::DonorLease;
    /// Keeps a donor's lease.
    donor_heartbeat = heartbeat, "Heartbeat", v1::DonorHeartbeat => v1::DonorLease;
    /// Takes a donor out, with all that it held.
    donor_leave = leave, "Leave", v1::DonorRef => v1::LeaveReply;
    /// Tells of regions that came and went, and of the wish to leave.
    donor_resize = resize, "Resize", v1::ResizeDonor => v1::DonorLease;
    /// Tells what became of copy tasks.
    donor_copied = copied, "Copied", v1::CopiedReport => v1::DonorLease;
    /// Objects of a pack from a number on.
    list_objects = list_objects, "ListObjects", v1::ListObjectsRequest => v1::ListObjectsReply;
    /// All donors that metad knows.
    list_donors = list, "List", v1::ListDonorsRequest => v1::ListDonorsReply;
}

calls! { nodes, "Nodes":
    /// Registers a node.
    register_node = register, "Register", v1::RegisterNodeRequest => v1::NodeLease;
    /// Keeps a node's lease and acknowledges freed packs.
    node_heartbeat = heartbeat, "Heartbeat", v1::NodeHeartbeat => v1::NodeLease;
    /// Tells the policy what was read.
    report_use = report_use, "ReportUse", v1::UseReport => v1::UseReply;
    /// Tells of a replica that could not be read or was wrong.
    report_lost = report_lost, "ReportLost", v1::LostReport => v1::LostReply;
}

calls! { admin, "Admin":
    /// Figures for people.
    status = status, "Status", v1::StatusRequest => v1::StatusReply;
    /// Everything counted again, and what differs. Looks at every row: give it a deadline of 60 s
    /// or more where there are millions of objects.
    audit = audit, "Audit", v1::AuditRequest => v1::AuditReply;
}
