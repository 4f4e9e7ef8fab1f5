//! The donor's side: registers what is lent with the devices of this host and makes the answering
//! half of each queue pair. After that the devices serve readers without the donor's process.
//!
//! Registering pins: a donor with RDMA takes all its memory from the host when it begins to lend it.
//! Each region is registered twice on each device, for reading and for reading and writing, so that
//! the remote key is the capability that the token bought; the queue pair of a reader that may write
//! nothing is made so that it cannot, whatever key is shown.

use std::{collections::HashSet, net::SocketAddr, sync::Arc};

use parking_lot::Mutex;

use super::{
    MAX_READS,
    device::{Adapter, DeviceError, Devices, Gid, gid_of, gids, names},
    frames::{Answer, End, RemoteKey, Request},
};
use crate::{
    donor::{DonorConfig, Lent},
    memory::Memory,
    sys::{
        Mapping,
        verbs::{Completions, Path, QueuePair, Registration, Rights},
    },
    tcp::frames::Grant,
    token::random_bytes,
    transport::RegionId,
};

/// Devices that one donor lends through.
const MAX_DEVICES: usize = 8;

/// The devices that a donor lends through.
#[derive(Debug)]
pub(crate) struct Lender {
    doors: Vec<Arc<Door>>,
}

/// One device at one address.
#[derive(Debug)]
struct Door {
    adapter: Adapter,
    /// Queue pairs that only answer complete nothing; they need a queue all the same.
    completions: Arc<Completions>,
}

/// One region as the devices know it, until it is taken back.
#[derive(Debug, Default)]
pub(crate) struct Registered(Mutex<Vec<Arc<Keys>>>);

#[derive(Debug)]
struct Keys {
    door: Arc<Door>,
    read: Registration,
    write: Registration,
}

/// The donor's half of a connection.
pub(crate) struct SetUp {
    /// The payload of the welcome.
    pub(crate) answer: Vec<u8>,
    /// Answers the reader until it is dropped: when the reader hangs up, the donor stops, the epoch
    /// ends or a region is taken back.
    pub(crate) alive: QueuePair,
}

impl Registered {
    /// Takes it from the devices: no transfer reaches it any more, and its pages can go back to the
    /// host. To be done before they are given back, which has no effect on pages that devices hold.
    pub(crate) fn withdraw(&self) {
        self.0.lock().clear();
    }

    fn at(&self, door: &Arc<Door>) -> Option<Arc<Keys>> {
        let all = self.0.lock();
        all.iter()
            .find(|keys| Arc::ptr_eq(&keys.door, door))
            .cloned()
    }
}

impl Lender {
    /// The devices of a donor; `None` where there are none, which is the usual case and no error.
    pub(crate) fn open(config: &DonorConfig) -> Option<Self> {
        if config.listen.is_empty() || config.rdma == Devices::Off {
            return None;
        }
        match Self::new(&config.listen, &config.rdma) {
            Ok(lender) => {
                let addresses = lender.addresses();
                tracing::info!(name = config.name, ?addresses, "lending over RDMA");
                Some(lender)
            }
            // Who names a device expects it to be used.
            Err(error) if config.rdma.name().is_some() => {
                tracing::warn!(name = config.name, device = config.rdma.name(), %error, "lending without RDMA");
                None
            }
            Err(error) => {
                tracing::info!(name = config.name, %error, "lending without RDMA");
                None
            }
        }
    }

    /// Opens the devices, of those allowed, that have the addresses listened on; where that is all
    /// of a host's, all devices.
    ///
    /// # Errors
    /// When there is none; the error says why.
    fn new(listen: &[SocketAddr], allowed: &Devices) -> Result<Self, DeviceError> {
        let wanted: HashSet<_> = listen.iter().map(|address| gid_of(address.ip())).collect();
        let any = listen.iter().any(|address| address.ip().is_unspecified());
        let names = names().into_iter().filter(|name| allowed.allow(name));
        let all = names.flat_map(|name| gids(&name));
        let mine: Vec<Gid> = all
            .filter(|gid| any || wanted.contains(&gid.bytes))
            .collect();
        let mut doors: Vec<Arc<Door>> = Vec::new();
        let mut failed = None;
        for gid in mine {
            if doors.len() == MAX_DEVICES {
                tracing::warn!(
                    device = gid.device,
                    "lending through {MAX_DEVICES} devices already"
                );
                break;
            }
            match Door::open(gid) {
                Ok(door) => doors.push(Arc::new(door)),
                Err(error) => failed = Some(error),
            }
        }
        if doors.is_empty() {
            let listen: Vec<_> = listen
                .iter()
                .map(|address| address.ip().to_string())
                .collect();
            return Err(failed.unwrap_or_else(|| DeviceError::NoAddress(listen.join(", "))));
        }
        Ok(Self { doors })
    }

    /// The addresses at which readers reach its devices.
    pub(crate) fn addresses(&self) -> Vec<std::net::IpAddr> {
        self.doors
            .iter()
            .map(|door| door.adapter.gid.ip())
            .collect()
    }
}

impl Door {
    fn open(gid: Gid) -> Result<Self, DeviceError> {
        let device = gid.device.clone();
        let adapter = Adapter::open(gid)?;
        let completions =
            Completions::new(adapter.domain.device(), 1).map_err(|source| DeviceError::Call {
                what: "making a completion queue",
                device,
                source,
            })?;
        Ok(Self {
            adapter,
            completions,
        })
    }
}

impl Lender {
    /// Makes `memory` known to all devices. One that refuses is left out, with a warning: readers
    /// come over TCP instead.
    pub(crate) fn register(&self, id: RegionId, memory: &Memory) -> Registered {
        let mapping = match Mapping::new(memory, true) {
            Ok(mapping) => Arc::new(mapping),
            Err(error) => {
                tracing::warn!(?id, %error, "a region cannot be mapped to be registered");
                return Registered::default();
            }
        };
        // Registering takes every page from the host, and pages that a device knows stay as they are.
        memory.prepare(&mapping, 0..memory.len());
        let mut registered = Vec::with_capacity(self.doors.len());
        for door in &self.doors {
            let with =
                |rights| Registration::new(&door.adapter.domain, Arc::clone(&mapping), rights);
            match with(Rights::Read).and_then(|read| Ok((read, with(Rights::ReadWrite)?))) {
                Ok((read, write)) => registered.push(Arc::new(Keys {
                    door: Arc::clone(door),
                    read,
                    write,
                })),
                Err(error) => {
                    let device = &door.adapter.gid.device;
                    tracing::warn!(
                        ?id, device, %error,
                        "a region cannot be registered: readers get it over TCP; raise the limit of locked memory (ulimit -l)"
                    );
                }
            }
        }
        Registered(Mutex::new(registered))
    }

    /// Makes the donor's half of a connection for a reader that proved `grants` (by growing id, all
    /// of them regions of `lent`). `request` is the payload of its hello. The error says why not.
    pub(crate) fn set_up(
        &self,
        lent: &Arc<Lent>,
        grants: &[Grant],
        request: &[u8],
    ) -> Result<SetUp, String> {
        let Request(peer) = Request::parse(request).map_err(|error| error.to_string())?;
        // The address that was dialled, or, where that leads here by other ways, any of its kind.
        let of = |exact: bool| {
            self.doors.iter().find(|door| {
                let gid = door.adapter.gid.bytes;
                gid == peer.peer_gid || !exact && is_mapped(&gid) == is_mapped(&peer.gid)
            })
        };
        let door = of(true)
            .or_else(|| of(false))
            .ok_or("no device with such an address")?;
        let adapter = &door.adapter;
        let mut keys = Vec::with_capacity(grants.len());
        for grant in grants {
            let region = lent.get(grant.info.id).ok_or("a region is gone")?;
            let known = region
                .devices
                .at(door)
                .ok_or("a region is not registered")?;
            let registration = if grant.write {
                &known.write
            } else {
                &known.read
            };
            keys.push(RemoteKey {
                region: grant.info.id,
                key: registration.remote_key(),
                address: registration.address(),
            });
        }
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        let pair = QueuePair::new(&adapter.domain, &door.completions, None, 1);
        let pair = pair.map_err(failed("making a queue pair"))?;
        let psn = random_bytes().map_err(failed("drawing a number"))?;
        let psn = u32::from_le_bytes(psn) & 0xFF_FFFF;
        let reads = peer
            .reads
            .min(adapter.limits.reads_answered.clamp(1, MAX_READS));
        let path = Path {
            port: adapter.gid.port,
            gid_index: adapter.gid.index,
            peer_gid: peer.gid,
            peer_number: peer.number,
            peer_psn: peer.psn,
            psn,
            mtu: peer.mtu.min(adapter.mtu),
            reads_asked: 0,
            reads_answered: reads,
        };
        let writes = grants.iter().any(|grant| grant.write);
        let rights = if writes {
            Rights::ReadWrite
        } else {
            Rights::Read
        };
        pair.connect(&path, rights)
            .map_err(failed("connecting a queue pair"))?;
        let answer = Answer {
            end: End {
                number: pair.number(),
                psn,
                mtu: path.mtu,
                reads,
                gid: adapter.gid.bytes,
                peer_gid: peer.gid,
            },
            keys,
        };
        Ok(SetUp {
            answer: answer.encode(),
            alive: pair,
        })
    }
}

/// It stands for an IPv4 address.
fn is_mapped(gid: &[u8; 16]) -> bool {
    std::net::Ipv6Addr::from(*gid).to_ipv4_mapped().is_some()
}
