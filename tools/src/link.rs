//! The pool as this process sees it: donors by metad's number, over whatever transport reaches them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use harbour_metad_client::v1;
use harbour_pool::{
    connector::{AddressDialer, Connector, ConnectorConfig, Endpoint, Preference},
    tcp::Veil,
    token::{RegionKey, Token},
    transport::{Access, Read, RegionId, TransportError, TransportKind, Write},
    verbs::Devices,
};

/// The longest that who writes waits for a connection. Nobody waits for a pull's single pack as for a
/// read, and a donor that is passed over for being slow to answer once may be the only one.
const WRITER_CONNECT: Duration = Duration::from_secs(5);

/// Which ways to donors may be taken.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    /// Transports.
    pub preference: Preference,
    /// RDMA devices of this host.
    pub devices: Devices,
    /// TLS, where this host has certificates.
    pub veil: Option<Veil>,
    /// Bytes may not leave a host without it.
    pub veiled_only: bool,
}

impl Ways {
    /// What connects by them.
    pub fn dialer(&self, access: Access) -> AddressDialer {
        AddressDialer::new(access, Token::NONE, self.preference)
            .with_devices(self.devices.clone())
            .with_veil(self.veil.clone(), self.veiled_only)
    }
}

/// How this host reads from one donor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Travel {
    /// The transport.
    pub transport: &'static str,
    /// Why it is TCP and not RDMA, where there is something to say.
    pub remark: Option<String>,
}

/// Donors that were heard of, and connections to them.
pub struct Link {
    dialer: Arc<AddressDialer>,
    connector: Connector,
    donors: RwLock<HashMap<u64, Endpoint>>,
}

impl Link {
    /// A link that may read, and write too when `access` says so, by the `ways` that are allowed.
    pub fn new(access: Access, ways: &Ways) -> Self {
        let dialer = Arc::new(ways.dialer(access));
        let mut config = ConnectorConfig::default();
        if access == Access::ReadWrite {
            config.connect_timeout = WRITER_CONNECT;
        }
        Self {
            connector: Connector::new(Arc::clone(&dialer) as _, config),
            dialer,
            donors: RwLock::default(),
        }
    }

    /// Takes in where donors are; a newer epoch replaces an older one.
    pub fn learn(&self, donors: &[v1::Donor]) {
        if donors.is_empty() {
            return;
        }
        let mut known = self.donors.write().unwrap_or_else(PoisonError::into_inner);
        for donor in donors {
            known.insert(
                donor.id,
                Endpoint {
                    donor: donor.id,
                    epoch: donor.epoch,
                    addresses: donor.addresses.clone(),
                    keys: donor.regions.iter().map(key).collect(),
                },
            );
        }
    }

    /// Writes `bytes` at `offset` of `extent`.
    pub fn write(
        &self,
        extent: &v1::Extent,
        offset: u32,
        bytes: &[u8],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let end = u64::from(offset) + bytes.len() as u64;
        if end > u64::from(extent.len) {
            return Err(TransportError::OutOfBounds {
                region: RegionId(extent.region),
                offset: extent.offset.saturating_add(u64::from(offset)),
                len: bytes.len() as u64,
            });
        }
        let endpoint = self.endpoint(extent.donor, extent.epoch)?;
        let write = Write {
            region: RegionId(extent.region),
            offset: extent.offset + u64::from(offset),
            from: bytes,
        };
        self.connector.write(&endpoint, &[write], deadline)
    }

    /// Reads a batch from one donor in one epoch.
    pub fn read(
        &self,
        donor: u64,
        epoch: u64,
        batch: &mut [Read<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let endpoint = self.endpoint(donor, epoch)?;
        self.connector.read(&endpoint, batch, deadline)
    }

    /// How bytes from that donor travel: over the connection to it, else over the one that would
    /// be tried first.
    pub fn describe(&self, donor: u64) -> String {
        let kind = self.connector.kind(donor).or_else(|| {
            let known = self.donors.read().unwrap_or_else(PoisonError::into_inner);
            let endpoint = known.get(&donor)?;
            self.dialer.first_choice(&endpoint.addresses)
        });
        kind.map_or("unknown", |kind| kind.name()).to_owned()
    }

    /// Why bytes from that donor travel by TCP, or would, where RDMA might carry them.
    pub fn remark(&self, donor: u64) -> Option<String> {
        match self.connector.kind(donor) {
            Some(TransportKind::Tcp) => self.dialer.remark(donor),
            Some(_) => None,
            None => {
                let known = self.donors.read().unwrap_or_else(PoisonError::into_inner);
                let endpoint = known.get(&donor)?;
                let first = self.dialer.first_choice(&endpoint.addresses);
                (first == Some(TransportKind::Tcp))
                    .then(|| self.dialer.why_tcp(&endpoint.addresses))?
            }
        }
    }

    /// How every donor is read that there is a connection to, by metad's number. Cheap: looks at no
    /// device.
    pub fn travels(&self) -> BTreeMap<u64, Travel> {
        let known = self.donors.read().unwrap_or_else(PoisonError::into_inner);
        let travel = |donor: &u64| {
            let kind = self.connector.kind(*donor)?;
            let tcp = kind == TransportKind::Tcp;
            let remark = tcp.then(|| self.dialer.remark(*donor)).flatten();
            let transport = kind.name();
            Some((*donor, Travel { transport, remark }))
        };
        known.keys().filter_map(travel).collect()
    }

    fn endpoint(&self, donor: u64, epoch: u64) -> Result<Endpoint, TransportError> {
        let known = self.donors.read().unwrap_or_else(PoisonError::into_inner);
        let endpoint = known
            .get(&donor)
            .ok_or_else(|| TransportError::Unreachable {
                address: format!("donor {donor}"),
                source: std::io::Error::new(
                    std::io::ErrorKind::NotFound,
                    "metad has not told where it is",
                ),
            })?;
        if endpoint.epoch != epoch {
            return Err(TransportError::WrongEpoch {
                wanted: epoch,
                actual: endpoint.epoch,
            });
        }
        Ok(endpoint.clone())
    }
}

fn key(region: &v1::Region) -> RegionKey {
    RegionKey {
        region: RegionId(region.id),
        read: Token::from_bytes(&region.read_token),
        write: Token::from_bytes(&region.write_token),
    }
}
