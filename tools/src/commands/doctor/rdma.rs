//! RDMA on this host, and which way each donor is read.

use harbour_metad_client::v1;
use harbour_pool::{
    transport::{Access, TransportKind},
    verbs::{self, Devices},
};

use super::{Context, Finding, Grade, finding, status};
use crate::{commands::list, link::Ways};

/// Donors that are spoken of one by one.
const DONORS_MAX: usize = 64;

/// What stands between this host and RDMA. Without it donors on other hosts are read over TCP, so
/// nothing here is worse than weak.
pub(super) fn host(devices: &Devices) -> Vec<Finding> {
    if *devices == Devices::Off {
        let detail = "off: told to use no device (--rdma-device none)";
        return vec![finding("rdma", Grade::Good, detail, "")];
    }
    let found = verbs::check();
    let missing = devices.name().filter(|name| {
        // What is wrong with all of RDMA is said anyway.
        found.iter().any(|found| found.device().is_some())
            && found.iter().all(|found| found.device() != Some(name))
    });
    let missing = missing.map(|name| {
        finding(
            "rdma",
            Grade::Weak,
            format!("off: there is no device {name}, which --rdma-device names"),
            "rdma link shows which there are",
        )
    });
    let told = found.into_iter().map(|found| {
        let unused = found.device().is_some_and(|name| !devices.allow(name));
        let grade = match found.works() || unused {
            true => Grade::Good,
            false => Grade::Weak,
        };
        let note = if unused {
            ", not used (--rdma-device)"
        } else {
            ""
        };
        finding("rdma", grade, format!("{}{note}", found.detail), found.next)
    });
    told.chain(missing).collect()
}

/// How this host reads each donor, or would, and why that is no faster.
pub(super) fn donors(context: &Context, donors: &[v1::Donor]) -> Vec<Finding> {
    let node = status::node_status(context);
    let keys = &context.file.node;
    let ways = match context.ways(keys.transport, keys.rdma_device.as_ref()) {
        Ok(ways) => ways,
        // What is wrong with the certificates is told by itself.
        Err(_) => Ways {
            devices: context.devices(keys.rdma_device.as_ref()),
            ..Ways::default()
        },
    };
    let dialer = ways.dialer(Access::Read);
    let live = donors.iter().filter(|donor| donor.live).take(DONORS_MAX);
    live.map(|donor| {
        let name = &donor.name;
        let (how, remark) = match list::transport(donor, &node) {
            Some(kind) => {
                let remark = list::remark(donor, &node).map(str::to_owned);
                (format!("{name} is read over {kind}"), remark)
            }
            None => match dialer.first_choice(&donor.addresses) {
                Some(TransportKind::Tcp) => {
                    let remark = dialer.why_tcp(&donor.addresses);
                    (format!("{name} would be read over tcp"), remark)
                }
                Some(kind) => (format!("{name} would be read over {kind}"), None),
                None => {
                    let detail =
                        format!("{name} cannot be read from here: no address of it can be used");
                    let next =
                        "the donor has to listen (--listen), on a way that --transport allows here";
                    return finding("transport", Grade::Weak, detail, next);
                }
            },
        };
        match remark {
            Some(remark) => finding("transport", Grade::Weak, format!("{how}: {remark}"), ""),
            None => finding("transport", Grade::Good, how, ""),
        }
    })
    .collect()
}
