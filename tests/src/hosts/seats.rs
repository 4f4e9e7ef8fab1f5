//! Hosts that share a network and differ in what they take themselves for: see [`super`].

use std::net::IpAddr;

use anyhow::Result;

use super::{Hosts, Wires};

/// What one host has of the network that all share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Its address; several hosts may have the same.
    pub address: IpAddr,
    /// The RDMA device that it may use, or `none`.
    pub rdma_device: String,
}

/// A function of the shell: `split FILE COMMAND…` runs a command in a mount namespace of its own, which
/// FILE keeps. A namespace can be kept only where its number is larger than that of the one it is kept in,
/// and kernels from 6.18 on give each processor numbers of its own: so it is tried on one after the other.
pub(super) const SPLIT: &str = "split() {\n\
    keep=$1; shift\n\
    for cpu in $(seq 0 $(($(nproc --all) - 1))); do\n\
      taskset -c \"$cpu\" unshare --mount=\"$keep\" -- \"$@\" && return\n\
    done\n\
    return 1\n\
    }\n";

/// Where the mount namespace of a host is kept, seen from the keel.
pub(super) fn namespace(host: usize) -> String {
    format!("/run/hosts/h{host}")
}

impl Hosts {
    /// A host in each seat, with nothing running on them. Which transport its parts use is left to
    /// them: shared memory only on their own host.
    pub fn in_seats(seats: Vec<Seat>) -> Result<Self> {
        Self::make(seats.len(), Wires::Seats(seats))
    }

    /// A mount namespace for each host, with a boot ID that no other has: by it a node knows whether
    /// a donor is on its own host.
    pub(super) fn part_ways(&self) -> Result<()> {
        let mut script = format!("{SPLIT}mkdir /run/hosts\n");
        for host in 0..self.count {
            let id = self.host_dir(host).join("boot_id");
            std::fs::write(&id, format!("00000000-0000-4000-8000-{host:012}\n"))?;
            let (namespace, id) = (namespace(host), id.display());
            script += &format!(
                "touch {namespace}\n\
                 split {namespace} mount --bind {id} /proc/sys/kernel/random/boot_id\n"
            );
        }
        self.keel_script(&script)
    }
}
