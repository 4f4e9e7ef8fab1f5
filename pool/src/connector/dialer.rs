//! Which of a donor's addresses is taken.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Instant};

use super::{Dial, Endpoint};
use crate::{
    host,
    shm::{self, ShmTransport},
    tcp::{self, TcpTransport},
    token::Token,
    transport::{Access, Transport, TransportError, TransportKind, unreachable},
    verbs::{self, VerbsTransport},
};

/// Which transports may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// Shared memory with a donor on this host, verbs where both sides have them, else TCP.
    #[default]
    Auto,
    /// This one and no other.
    Only(TransportKind),
}

/// Connects by address, over the transports of this crate.
#[derive(Clone, Debug)]
pub struct AddressDialer {
    access: Access,
    token: Token,
    preference: Preference,
    host: Option<String>,
    device: Option<String>,
}

/// One way to a donor.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Shm(PathBuf),
    Verbs(SocketAddr),
    Tcp(SocketAddr),
}

impl AddressDialer {
    /// A dialer of connections with `access`. `token` is for donors on this host that want one;
    /// donors on others are shown the tokens of their endpoint.
    pub fn new(access: Access, token: Token, preference: Preference) -> Self {
        Self {
            access,
            token,
            preference,
            host: host::id(),
            device: None,
        }
    }

    /// The same over the RDMA device of this name, whatever address this host reaches a donor from.
    pub fn with_device(self, device: Option<String>) -> Self {
        Self { device, ..self }
    }

    /// The ways to a donor with these addresses, best first.
    fn ways(&self, addresses: &[String]) -> Vec<Way> {
        let mut ways = Vec::new();
        // The same path may be another donor's on another host.
        if self.allows(TransportKind::Shm) && host::may_be(self.host.as_deref(), addresses) {
            let paths = addresses.iter().filter_map(|address| shm::path_of(address));
            ways.extend(paths.map(Way::Shm));
        }
        if self.allows(TransportKind::Verbs) {
            let peers = addresses
                .iter()
                .filter_map(|address| verbs::peer_of(address));
            // Where this host has no device there is nothing to try, unless nothing else may be.
            let tried = |peer: &SocketAddr| {
                self.preference != Preference::Auto
                    || verbs::may_reach(*peer, self.device.as_deref())
            };
            ways.extend(peers.filter(tried).map(Way::Verbs));
        }
        if self.allows(TransportKind::Tcp) {
            let peers = addresses.iter().filter_map(|address| tcp::peer_of(address));
            ways.extend(peers.map(Way::Tcp));
        }
        ways
    }

    /// How bytes would travel that come from a donor with these addresses, if all goes well.
    pub fn first_choice(&self, addresses: &[String]) -> Option<TransportKind> {
        self.ways(addresses).first().map(|way| match way {
            Way::Shm(_) => TransportKind::Shm,
            Way::Verbs(_) => TransportKind::Verbs,
            Way::Tcp(_) => TransportKind::Tcp,
        })
    }

    fn allows(&self, kind: TransportKind) -> bool {
        match self.preference {
            Preference::Auto => true,
            Preference::Only(only) => only == kind,
        }
    }

    fn go(
        &self,
        way: &Way,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, TransportError> {
        let (epoch, access) = (endpoint.epoch, self.access);
        Ok(match way {
            Way::Shm(path) => Arc::new(ShmTransport::connect(
                path, epoch, access, self.token, deadline,
            )?),
            Way::Verbs(peer) => Arc::new(VerbsTransport::connect(
                *peer,
                self.device.as_deref(),
                epoch,
                access,
                &endpoint.keys,
                deadline,
            )?),
            Way::Tcp(peer) => Arc::new(TcpTransport::connect(
                *peer,
                epoch,
                access,
                &endpoint.keys,
                deadline,
            )?),
        })
    }
}

impl Dial for AddressDialer {
    /// Tries one way after the other, each with its share of the time that is left. When all fail,
    /// what a donor said about epochs counts for more than that another way was closed.
    fn dial(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, TransportError> {
        let ways = self.ways(&endpoint.addresses);
        let mut first: Option<TransportError> = None;
        for (index, way) in ways.iter().enumerate() {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            let share = u32::try_from(ways.len() - index).unwrap_or(u32::MAX);
            match self.go(way, endpoint, now + left / share) {
                Ok(transport) => return Ok(transport),
                Err(error) => {
                    tracing::debug!(donor = endpoint.donor, ?way, %error, "one way to a donor is closed");
                    let epoch = matches!(error, TransportError::WrongEpoch { .. });
                    if first.is_none() || epoch {
                        first = Some(error);
                    }
                }
            }
        }
        Err(first.unwrap_or_else(|| self.nowhere(endpoint)))
    }
}

impl AddressDialer {
    fn nowhere(&self, endpoint: &Endpoint) -> TransportError {
        let reason = match self.preference {
            Preference::Auto => {
                "no address that this process can use: a donor for other hosts listens (--listen)"
                    .to_owned()
            }
            Preference::Only(kind) => {
                format!("no address of {kind}, the one transport that may be used (--transport)")
            }
        };
        let source = io::Error::new(io::ErrorKind::Unsupported, reason);
        unreachable(format!("[{}]", endpoint.addresses.join(", ")), source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(preference: Preference, addresses: &[&str]) -> Vec<Way> {
        let dialer = AddressDialer {
            host: Some("here".to_owned()),
            ..AddressDialer::new(Access::Read, Token::NONE, preference)
        };
        let addresses: Vec<_> = addresses.iter().map(|a| (*a).to_owned()).collect();
        dialer.ways(&addresses)
    }

    #[test]
    fn the_best_way_comes_first_and_only_what_can_be() {
        let (four, six) = ("tcp:192.0.2.1:1", "tcp:[2001:db8::1]:2");
        let tcp = |text: &str| Way::Tcp(tcp::peer_of(text).unwrap());
        let shm = Way::Shm("/x".into());
        let auto = Preference::Auto;
        let both = [shm.clone(), tcp(four), tcp(six)];
        assert_eq!(ways(auto, &[four, "shm:/x", six]), both);
        assert_eq!(ways(auto, &[four, "host:here", "shm:/x", six]), both);
        assert_eq!(ways(auto, &["shm:/x", "host:there", six]), [tcp(six)]);
        assert_eq!(ways(auto, &["shm:/x", "host:there"]), []);
        let only = |kind| ways(Preference::Only(kind), &[four, "shm:/x"]);
        assert_eq!(only(TransportKind::Tcp), [tcp(four)]);
        assert_eq!(only(TransportKind::Shm), [shm]);
        assert_eq!(only(TransportKind::Verbs), []);
        let verbs = ways(
            Preference::Only(TransportKind::Verbs),
            &["verbs:192.0.2.1:1", four],
        );
        assert_eq!(verbs, [Way::Verbs("192.0.2.1:1".parse().unwrap())]);
        let no_device = ways(auto, &["verbs:192.0.2.1:1", four]);
        assert_eq!(
            no_device,
            [tcp(four)],
            "no device has a route to a documentation address"
        );
    }
}
