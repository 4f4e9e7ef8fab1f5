//! The connections of a process to the donors it uses.
//!
//! A [`Connector`] connects when bytes are first wanted, keeps the connection, drops it when it
//! dies, and tries once more before it says so. When a caller knows of a region that the connection
//! was made without, a new one takes its place. Callers that want the same donor at the same time
//! share one attempt. A donor that failed is left alone for a while, longer each time, and callers
//! get its last error at once instead of waiting for the next. Where a faster way failed it is tried
//! again now and then, beside the connection that there is.

use std::{
    fmt, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    token::{RegionKey, Token},
    transport::{
        Access, Read, Transport, TransportError, TransportKind, Write, in_time, unreachable,
    },
};

mod cache;
mod dialer;

use cache::{Cache, Lookup};
pub use dialer::{AddressDialer, Preference};

/// A donor in one epoch, and where it can be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Donor by metad's number.
    pub donor: u64,
    /// The epoch that the caller's locations are of.
    pub epoch: u64,
    /// Where it listens: `"shm:/run/harbour/donor.sock"`, `"tcp:192.0.2.1:7481"`, and which host
    /// that is on (`"host:…"`). Those of transports that this process does not know are passed over.
    pub addresses: Vec<String>,
    /// The tokens of its regions that the caller holds; none for a donor on this host alone.
    pub keys: Vec<RegionKey>,
}

/// How connections are made.
pub trait Dial: Send + Sync + fmt::Debug {
    /// Connects to `endpoint` in its epoch before `deadline`, or says why not.
    fn dial(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, TransportError>;

    /// Whether it is time to look for a faster way to `donor` than the last that [`Dial::dial`] gave,
    /// because one failed then. Says so once for each time.
    fn again(&self, donor: u64) -> bool;
}

/// Bounds of a [`Connector`].
#[derive(Clone, Copy, Debug)]
pub struct ConnectorConfig {
    /// Donors known at one time, with a connection or set aside; the one unused for longest goes.
    pub max_connections: usize,
    /// The longest that one attempt may take, whatever the caller's deadline.
    pub connect_timeout: Duration,
    /// How long a donor is set aside after its first failure; doubles with each that follows.
    pub backoff_min: Duration,
    /// The longest that a donor is set aside; at once when it refused or is in another epoch.
    pub backoff_max: Duration,
}

impl Default for ConnectorConfig {
    /// 64 donors, 1 s to connect, set aside for 50 ms to 5 s.
    fn default() -> Self {
        Self {
            max_connections: 64,
            connect_timeout: Duration::from_secs(1),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// Connections by (donor, epoch). Shared between threads by reference.
#[derive(Debug)]
pub struct Connector {
    dial: Arc<dyn Dial>,
    config: ConnectorConfig,
    cache: Arc<Cache>,
}

impl Connector {
    /// A connector with no connections yet.
    pub fn new(dial: Arc<dyn Dial>, config: ConnectorConfig) -> Self {
        Self {
            dial,
            config,
            cache: Arc::new(Cache::new(config)),
        }
    }

    /// A connector over [`AddressDialer`] with the default bounds.
    pub fn by_address(access: Access, token: Token, preference: Preference) -> Self {
        Self::new(
            Arc::new(AddressDialer::new(access, token, preference)),
            ConnectorConfig::default(),
        )
    }

    /// [`Transport::read`] over the connection to `endpoint`, made when there is none.
    pub fn read(
        &self,
        endpoint: &Endpoint,
        batch: &mut [Read<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.with(endpoint, deadline, |transport| {
            transport.read(batch, deadline)
        })
    }

    /// [`Transport::write`] over the connection to `endpoint`, made when there is none.
    pub fn write(
        &self,
        endpoint: &Endpoint,
        batch: &[Write<'_>],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        if batch.is_empty() {
            return Ok(());
        }
        self.with(endpoint, deadline, |transport| {
            transport.write(batch, deadline)
        })
    }

    /// The connection to `endpoint`, made when there is none.
    pub fn connection(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, TransportError> {
        self.find(endpoint, deadline)
            .map(|(transport, _)| transport)
    }

    /// How bytes travel from `donor` now; `None` when there is no connection to it.
    pub fn kind(&self, donor: u64) -> Option<TransportKind> {
        self.cache.ready(donor).map(|transport| transport.kind())
    }

    /// Drops all that is known of `donor`, to be called when metad says that it left.
    pub fn forget(&self, donor: u64) {
        self.cache.forget(donor);
    }

    fn with(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
        mut call: impl FnMut(&dyn Transport) -> Result<(), TransportError>,
    ) -> Result<(), TransportError> {
        let key = (endpoint.donor, endpoint.epoch);
        let mut again = true;
        loop {
            let (transport, fresh) = self.find(endpoint, deadline)?;
            let Err(error) = call(&*transport) else {
                return Ok(());
            };
            match &error {
                TransportError::OutOfBounds { .. } | TransportError::Deadline => return Err(error),
                // A connection that died while it lay here says nothing of the donor as it is now.
                TransportError::Unreachable { .. } if again && !fresh => {
                    self.cache.drop_dead(key, &transport)
                }
                TransportError::Unreachable { .. }
                | TransportError::Refused { .. }
                | TransportError::WrongEpoch { .. } => {
                    self.cache.set_aside(key, &transport, &error);
                    return Err(error);
                }
            }
            again = false;
        }
    }

    /// A connection, and whether this call made it.
    fn find(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<(Arc<dyn Transport>, bool), TransportError> {
        let attempt =
            match self
                .cache
                .look_up((endpoint.donor, endpoint.epoch), &endpoint.keys, deadline)?
            {
                Lookup::Ready(transport) => {
                    if self.dial.again(endpoint.donor) {
                        self.improve(endpoint, &transport);
                    }
                    return Ok((transport, false));
                }
                Lookup::Dial(attempt) => attempt,
            };
        in_time(deadline)?;
        let limit = deadline.min(Instant::now() + self.config.connect_timeout);
        match self.dial.dial(endpoint, limit) {
            Ok(transport) => {
                attempt.succeeded(Arc::clone(&transport), &endpoint.keys);
                Ok((transport, true))
            }
            // Too little time was left to this caller: no reason to keep others from trying.
            Err(TransportError::Deadline) if limit == deadline => Err(TransportError::Deadline),
            Err(TransportError::Deadline) => {
                let error = unreachable(
                    endpoint.addresses.join(", "),
                    io::ErrorKind::TimedOut.into(),
                );
                attempt.failed(&error);
                Err(error)
            }
            Err(error) => {
                attempt.failed(&error);
                Err(error)
            }
        }
    }

    /// Looks for a faster way than `slow` without keeping anybody waiting.
    fn improve(&self, endpoint: &Endpoint, slow: &Arc<dyn Transport>) {
        let (dial, cache) = (Arc::clone(&self.dial), Arc::clone(&self.cache));
        let (endpoint, slow) = (endpoint.clone(), Arc::clone(slow));
        let limit = Instant::now() + self.config.connect_timeout;
        let look = move || match dial.dial(&endpoint, limit) {
            Ok(fast) if fast.kind() != slow.kind() => {
                tracing::info!(donor = endpoint.donor, from = %slow.kind(), to = %fast.kind(), "a faster way to a donor");
                cache.replace(
                    (endpoint.donor, endpoint.epoch),
                    &slow,
                    fast,
                    &endpoint.keys,
                );
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(donor = endpoint.donor, %error, "no faster way to a donor")
            }
        };
        let thread = thread::Builder::new().name("harbour-improve".to_owned());
        if let Err(error) = thread.spawn(look) {
            tracing::debug!(%error, "no thread to look for a faster way with");
        }
    }
}

#[cfg(test)]
mod tests;
