//! The pool as this process sees it: donors by metad's number, over whatever transport reaches them.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
    time::Instant,
};

use harbour_metad_client::v1;
use harbour_pool::{
    connector::{Connector, Endpoint},
    shm::frames::Token,
    transport::{Access, Read, RegionId, TransportError, Write},
};

/// Donors that were heard of, and connections to them.
pub struct Link {
    connector: Connector,
    donors: RwLock<HashMap<u64, Endpoint>>,
}

impl Link {
    /// A link that may read, and write too when `access` says so.
    pub fn new(access: Access) -> Self {
        Self {
            connector: Connector::by_address(access, Token::NONE),
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

    /// How bytes from that donor travel.
    pub fn describe(&self, donor: u64) -> String {
        let known = self.donors.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&donor)
            .and_then(|endpoint| endpoint.addresses.first())
            .and_then(|address| address.split(':').next())
            .unwrap_or("unknown")
            .to_owned()
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
