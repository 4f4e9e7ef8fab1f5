//! What stands between this host and RDMA.

use std::{fs, net::IpAddr};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::device::{Adapter, DeviceError, gids, names};
use crate::sys::verbs::{self, Device};

/// With less, a donor can hardly lend anything: every byte that it registers counts.
const MIN_LOCKED_BYTES: u64 = 1 << 30;
/// The capability that lifts the limit of locked memory, by its number.
const CAP_IPC_LOCK: u32 = 14;

/// The state of RDMA on this host, or of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// libibverbs cannot be opened.
    NoLibrary(String),
    /// The kernel has no RDMA device.
    NoDevice,
    /// The kernel has devices and libibverbs has no driver for any, or may not open them.
    NoDriver {
        /// The devices.
        devices: Vec<String>,
    },
    /// No port of the device has an IP address.
    NoAddress {
        /// The device.
        device: String,
    },
    /// The port does not carry data.
    Down {
        /// The device.
        device: String,
        /// Its port.
        port: u8,
    },
    /// A call failed on a device.
    Broken {
        /// The device.
        device: String,
        /// What and why.
        why: String,
    },
    /// Too little memory may be locked to register any worth the name.
    LockedMemory {
        /// The limit in bytes.
        limit: u64,
    },
    /// It works.
    Works {
        /// The device.
        device: String,
        /// Its port.
        port: u8,
        /// Index of the address in the port's table.
        gid_index: u8,
        /// The address.
        address: IpAddr,
        /// Largest packet in bytes.
        mtu: u32,
    },
}

/// A state, in words and with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The state.
    pub state: State,
    /// What is so.
    pub detail: String,
    /// What would make it better; empty when nothing needs to.
    pub next: String,
}

impl Finding {
    /// RDMA can be used.
    pub fn works(&self) -> bool {
        matches!(self.state, State::Works { .. })
    }

    /// The one device that it is about; `None` when it is about all of RDMA.
    pub fn device(&self) -> Option<&str> {
        match &self.state {
            State::NoLibrary(_) | State::NoDevice | State::LockedMemory { .. } => None,
            State::NoDriver { devices } => match devices.as_slice() {
                [device] => Some(device),
                _ => None,
            },
            State::NoAddress { device }
            | State::Down { device, .. }
            | State::Broken { device, .. }
            | State::Works { device, .. } => Some(device),
        }
    }
}

/// Looks at the library, every device and the limits of this process. One finding at least.
pub fn check() -> Vec<Finding> {
    let verbs = match verbs::library() {
        Ok(verbs) => verbs,
        Err(error) => return vec![say(State::NoLibrary(error.to_string()))],
    };
    let devices = names();
    if devices.is_empty() {
        return vec![say(State::NoDevice)];
    }
    if Device::count(verbs).unwrap_or(0) == 0 {
        return vec![say(State::NoDriver { devices })];
    }
    let mut states: Vec<_> = devices.into_iter().map(look).collect();
    if let Some(limit) = locked_limit().filter(|limit| *limit < MIN_LOCKED_BYTES) {
        states.push(State::LockedMemory { limit });
    }
    states.into_iter().map(say).collect()
}

/// Tries a device as a reader would.
fn look(device: String) -> State {
    let gids = gids(&device);
    // Addresses of links only are the last choice: they mean nothing without their interface.
    let routed = gids.iter().find(|gid| match gid.ip() {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    });
    let Some(gid) = routed.cloned() else {
        return State::NoAddress { device };
    };
    match Adapter::open(gid) {
        Ok(adapter) => State::Works {
            port: adapter.gid.port,
            gid_index: adapter.gid.index,
            address: adapter.gid.ip(),
            mtu: 128 << adapter.mtu,
            device,
        },
        Err(DeviceError::Down { device, port }) => State::Down { device, port },
        Err(DeviceError::NoDriver(device)) => State::NoDriver {
            devices: vec![device],
        },
        Err(DeviceError::Call { what, source, .. }) => State::Broken {
            device,
            why: format!("{what}: {source}"),
        },
        Err(error) => State::Broken {
            device,
            why: error.to_string(),
        },
    }
}

/// How many bytes this process may lock; `None` when as many as it likes.
fn locked_limit() -> Option<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let free = effective.is_some_and(|bits| bits >> CAP_IPC_LOCK & 1 == 1);
    (!free && soft != RLIM_INFINITY).then_some(soft)
}

fn say(state: State) -> Finding {
    let (detail, next) = match &state {
        State::NoLibrary(why) => (
            format!("off: {why}"),
            "apt install libibverbs1 ibverbs-providers; without it TCP is used".to_owned(),
        ),
        State::NoDevice => (
            "off: the kernel has no RDMA device".to_owned(),
            "a network card with RoCE and its driver; to try without one: modprobe rdma_rxe, then \
             rdma link add rxe0 type rxe netdev eth0. Without it TCP is used"
                .to_owned(),
        ),
        State::NoDriver { devices } => (
            format!("off: libibverbs cannot use {}", devices.join(", ")),
            "apt install ibverbs-providers; modprobe ib_uverbs; in a container, pass /dev/infiniband"
                .to_owned(),
        ),
        State::NoAddress { device } => (
            format!("off: {device} has no IP address for RoCE v2"),
            "give its network interface an address and bring it up (rdma link shows which it is); \
             InfiniBand fabrics are not supported"
                .to_owned(),
        ),
        State::Down { device, port } => (
            format!("off: port {port} of {device} is down"),
            "ip link set up its network interface (rdma link shows which it is)".to_owned(),
        ),
        State::Broken { device, why } => (
            format!("off: {device}: {why}"),
            "see dmesg; in a container, pass /dev/infiniband".to_owned(),
        ),
        State::LockedMemory { limit } => (
            format!("only {limit} bytes of memory may be locked, and lent memory is"),
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit".to_owned(),
        ),
        State::Works {
            device,
            port,
            gid_index,
            address,
            mtu,
        } => (
            format!("{device} port {port} at {address} (GID {gid_index}), packets of {mtu} bytes"),
            String::new(),
        ),
    };
    Finding {
        state,
        detail,
        next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_says_what_to_do_next() {
        let device = || "rxe0".to_owned();
        for state in [
            State::NoLibrary("libibverbs.so.1: cannot open shared object file".to_owned()),
            State::NoDevice,
            State::NoDriver {
                devices: vec![device()],
            },
            State::NoAddress { device: device() },
            State::Down {
                device: device(),
                port: 1,
            },
            State::Broken {
                device: device(),
                why: "opening: no".to_owned(),
            },
            State::LockedMemory { limit: 8 << 20 },
        ] {
            let finding = say(state);
            assert!(
                !finding.works() && !finding.detail.is_empty() && !finding.next.is_empty(),
                "{finding:?}"
            );
        }
        let works = say(State::Works {
            device: device(),
            port: 1,
            gid_index: 3,
            address: "10.7.0.1".parse().unwrap(),
            mtu: 128 << 5,
        });
        assert_eq!(
            works.detail,
            "rxe0 port 1 at 10.7.0.1 (GID 3), packets of 4096 bytes"
        );
        assert!(works.works() && works.next.is_empty());
    }

    #[test]
    fn a_host_is_checked_without_trouble() {
        assert!(!check().is_empty());
    }
}
