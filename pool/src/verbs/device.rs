//! The RDMA devices of this host: what the kernel lists, and the one that an address belongs to.
//!
//! Addresses are RoCE's: a port has a table of GIDs, and the IP address of its network interface is
//! one of them, at an index that differs from host to host and once for each version of RoCE.
//! Version 2 is taken, which is the one that travels in UDP.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::sys::verbs::{self, Device, Domain, LibraryError, Limits};

/// Where the kernel lists devices.
const SYSFS: &str = "/sys/class/infiniband";
/// What the kernel calls a GID that is reached by UDP.
const ROCE_V2: &str = "RoCE v2";
/// GIDs of a port that are looked at.
const MAX_GIDS: usize = 1024;

/// Which RDMA devices of this host may be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Devices {
    /// Those that have the addresses in question: for a donor the ones it listens on, for a reader
    /// the one from which this host reaches the donor.
    #[default]
    Any,
    /// The one of this name alone. A reader uses it whatever address this host reaches a donor
    /// from; a donor lends through it where it has an address that is listened on.
    Named(String),
    /// None: RDMA is turned off.
    Off,
}

impl Devices {
    /// The name, where one is given.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Any | Self::Off => None,
        }
    }

    /// Whether the device of this name may be used.
    pub fn allow(&self, device: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => name == device,
            Self::Off => false,
        }
    }
}

/// Why there is no RDMA here, or not to that address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// libibverbs is not installed or unusable.
    #[error("libibverbs cannot be used: {0}")]
    Library(#[from] LibraryError),
    /// No device has this address.
    #[error("no RDMA device has the address {0}")]
    NoAddress(String),
    /// The device is not the library's.
    #[error("libibverbs has no driver for {0}")]
    NoDriver(String),
    /// The port does not carry data.
    #[error("port {port} of {device} is down")]
    Down {
        /// Name of the device.
        device: String,
        /// Number of the port.
        port: u8,
    },
    /// A call failed.
    #[error("{what} failed on {device}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Name of the device.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One address of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gid {
    /// Name of the device.
    pub(crate) device: String,
    /// Number of its port.
    pub(crate) port: u8,
    /// Index in the port's table.
    pub(crate) index: u8,
    /// The address.
    pub(crate) bytes: [u8; 16],
}

impl Gid {
    /// The IP address that it stands for.
    pub(crate) fn ip(&self) -> IpAddr {
        IpAddr::from(self.bytes).to_canonical()
    }
}

/// The form that an IP address has in a table of GIDs.
pub(crate) fn gid_of(ip: IpAddr) -> [u8; 16] {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The names of all devices, as the kernel lists them.
pub(crate) fn names() -> Vec<String> {
    entries(Path::new(SYSFS))
}

/// The RoCE v2 addresses of a device.
pub(crate) fn gids(device: &str) -> Vec<Gid> {
    gids_below(Path::new(SYSFS), device)
}

fn gids_below(sysfs: &Path, device: &str) -> Vec<Gid> {
    let ports = sysfs.join(device).join("ports");
    let mut found = Vec::new();
    for name in entries(&ports) {
        let (Ok(port), dir) = (name.parse(), ports.join(&name)) else {
            continue;
        };
        for entry in entries(&dir.join("gids")).into_iter().take(MAX_GIDS) {
            // Only the first 256 can be named to the hardware.
            let Ok(index) = entry.parse() else { continue };
            // Most places of a table are empty: of those nothing more is read.
            let bytes = read(dir.join("gids").join(&entry)).and_then(|text| parse_gid(&text));
            let Some(bytes) = bytes else { continue };
            let kind = read(dir.join("gid_attrs/types").join(&entry));
            if kind.as_deref() == Some(ROCE_V2) {
                found.push(Gid {
                    device: device.to_owned(),
                    port,
                    index,
                    bytes,
                });
            }
        }
    }
    found.sort_by_key(|gid| (gid.port, gid.index));
    found
}

/// `fe80:0000:…` as the kernel writes it; empty places are all zeros and give `None`.
fn parse_gid(text: &str) -> Option<[u8; 16]> {
    let ip: std::net::Ipv6Addr = text.parse().ok()?;
    (!ip.is_unspecified()).then(|| ip.octets())
}

fn read(path: PathBuf) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The GID that is `address`, or the first of its family on the device of this name.
pub(crate) fn choose(address: IpAddr, device: Option<&str>) -> Option<Gid> {
    let wanted = gid_of(address);
    match device {
        None => names()
            .into_iter()
            .flat_map(|name| gids(&name))
            .find(|gid| gid.bytes == wanted),
        Some(device) => {
            let family = address.to_canonical().is_ipv4();
            let mut own = gids(device).into_iter();
            own.find(|gid| gid.ip().is_ipv4() == family)
        }
    }
}

/// An open device at one of its addresses.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    /// The address.
    pub(crate) gid: Gid,
    /// Largest packet of the port, as verbs write it.
    pub(crate) mtu: u8,
    /// Bounds of the device.
    pub(crate) limits: Limits,
    /// Where keys and queue pairs are made.
    pub(crate) domain: Arc<Domain>,
}

impl Adapter {
    /// Opens the device that has `address`, or the device of this name at the first of its addresses
    /// of the same family.
    pub(crate) fn find(address: IpAddr, device: Option<&str>) -> Result<Self, DeviceError> {
        let gid = choose(address, device);
        let missing = || match device {
            Some(device) => DeviceError::NoAddress(format!("of {device} for {address}")),
            None => DeviceError::NoAddress(address.to_string()),
        };
        Self::open(gid.ok_or_else(missing)?)
    }

    /// Opens the device of an address.
    pub(crate) fn open(gid: Gid) -> Result<Self, DeviceError> {
        let call = |what| {
            let device = gid.device.clone();
            move |source| DeviceError::Call {
                what,
                device,
                source,
            }
        };
        let device = Device::open(verbs::library()?, &gid.device).map_err(call("opening"))?;
        let device = device.ok_or_else(|| DeviceError::NoDriver(gid.device.clone()))?;
        let port = device.port(gid.port).map_err(call("asking for the port"))?;
        if !port.active {
            return Err(DeviceError::Down {
                device: gid.device.clone(),
                port: gid.port,
            });
        }
        let limits = device.limits().map_err(call("asking for limits"))?;
        let domain = Domain::new(&device).map_err(call("making a protection domain"))?;
        Ok(Self {
            mtu: port.mtu.clamp(1, 5),
            limits,
            domain,
            gid,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_whatever_their_index() {
        let dir = tempfile::tempdir().unwrap();
        let port = dir.path().join("mlx5_0/ports/1");
        fs::create_dir_all(port.join("gids")).unwrap();
        fs::create_dir_all(port.join("gid_attrs/types")).unwrap();
        for (index, gid, kind) in [
            (
                "0",
                "fe80:0000:0000:0000:0a00:00ff:fe07:0001",
                Some("IB/RoCE v1\n"),
            ),
            (
                "1",
                "fe80:0000:0000:0000:0a00:00ff:fe07:0001",
                Some("RoCE v2\n"),
            ),
            (
                "2",
                "0000:0000:0000:0000:0000:ffff:0a07:0001",
                Some("IB/RoCE v1\n"),
            ),
            (
                "10",
                "0000:0000:0000:0000:0000:ffff:0a07:0001",
                Some("RoCE v2\n"),
            ),
            ("11", "0000:0000:0000:0000:0000:0000:0000:0000", None),
            (
                "300",
                "0000:0000:0000:0000:0000:ffff:0a07:0002",
                Some("RoCE v2\n"),
            ),
        ] {
            fs::write(port.join("gids").join(index), format!("{gid}\n")).unwrap();
            if let Some(kind) = kind {
                fs::write(port.join("gid_attrs/types").join(index), kind).unwrap();
            }
        }
        let found = gids_below(dir.path(), "mlx5_0");
        let short: Vec<_> = found
            .iter()
            .map(|gid| (gid.port, gid.index, gid.ip().to_string()))
            .collect();
        let expected = [
            (1, 1, "fe80::a00:ff:fe07:1".to_owned()),
            (1, 10, "10.7.0.1".to_owned()),
        ];
        assert_eq!(short, expected);
        assert_eq!(found[1].bytes, gid_of("10.7.0.1".parse().unwrap()));
        assert_eq!(found[1].bytes, gid_of("::ffff:10.7.0.1".parse().unwrap()));
        assert_eq!(gids_below(dir.path(), "none"), []);
    }
}
