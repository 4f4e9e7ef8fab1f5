//! Which of a donor's addresses is taken.

use std::{
    collections::BTreeMap,
    error::Error as _,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Dial, Endpoint};
use crate::{
    host,
    shm::{self, ShmTransport},
    tcp::{self, TcpTransport, Veil},
    token::Token,
    transport::{Access, Transport, TransportError, TransportKind, unreachable},
    verbs::{self, Devices, VerbsTransport},
};

/// Time that is kept for each way after the one that is tried: a connection over TCP is there after two
/// round trips. The first queue pair of a process takes longer, as the library and the device are opened
/// for it, and one that was not waited for means TCP for as long as the connection lasts.
const RESERVE: Duration = Duration::from_millis(200);

/// RDMA that failed is tried again after this, and then after twice as long each time.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
/// The longest between two tries.
const AGAIN_LAST: Duration = Duration::from_secs(60);

/// Donors whose remarks are kept; more than that and all are forgotten.
const MAX_REMARKS: usize = 1024;

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
#[derive(Debug)]
pub struct AddressDialer {
    access: Access,
    token: Token,
    preference: Preference,
    host: Option<String>,
    devices: Devices,
    veil: Option<Veil>,
    /// Bytes may not leave a host in the clear.
    veiled_only: bool,
    /// Why the last connection to a donor is TCP, where there is something to say.
    remarks: Mutex<BTreeMap<u64, Remark>>,
}

/// Why it is TCP.
#[derive(Debug)]
struct Remark {
    text: String,
    /// When RDMA is tried again, if it failed, and how long after the last time that is.
    again: Option<(Instant, Duration)>,
}

/// One way to a donor.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Shm(PathBuf),
    Verbs(SocketAddr),
    /// With TLS, or without.
    Tcp(SocketAddr, bool),
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
            devices: Devices::Any,
            veil: None,
            veiled_only: false,
            remarks: Mutex::default(),
        }
    }

    /// The same over these RDMA devices.
    pub fn with_devices(self, devices: Devices) -> Self {
        Self { devices, ..self }
    }

    /// The same with TLS for donors that want it. With `only`, bytes come by no way on which they
    /// could be listened to: neither by RDMA nor by TCP without TLS.
    pub fn with_veil(self, veil: Option<Veil>, only: bool) -> Self {
        Self {
            veil,
            veiled_only: only,
            ..self
        }
    }

    /// The ways to a donor with these addresses, best first.
    fn ways(&self, addresses: &[String]) -> Vec<Way> {
        let mut ways = Vec::new();
        // The same path may be another donor's on another host.
        if self.allows(TransportKind::Shm) && host::may_be(self.host.as_deref(), addresses) {
            let paths = addresses.iter().filter_map(|address| shm::path_of(address));
            ways.extend(paths.map(Way::Shm));
        }
        if self.allows(TransportKind::Verbs) && self.devices != Devices::Off && !self.veiled_only {
            let peers = addresses
                .iter()
                .filter_map(|address| verbs::peer_of(address));
            // Where this host has no device there is nothing to try, unless nothing else may be.
            let tried = |peer: &SocketAddr| {
                self.preference != Preference::Auto
                    || verbs::obstacle(*peer, &self.devices).is_none()
            };
            ways.extend(peers.filter(tried).map(Way::Verbs));
        }
        if self.allows(TransportKind::Tcp) {
            let peers = addresses.iter().filter_map(|address| tcp::peer_of(address));
            let may = |veiled: bool| match veiled {
                true => self.veil.is_some(),
                false => !self.veiled_only,
            };
            let peers = peers.filter(|(_, veiled)| may(*veiled));
            ways.extend(peers.map(|(peer, veiled)| Way::Tcp(peer, veiled)));
        }
        ways
    }

    /// How bytes would travel that come from a donor with these addresses, if all goes well.
    pub fn first_choice(&self, addresses: &[String]) -> Option<TransportKind> {
        self.ways(addresses).first().map(|way| match way {
            Way::Shm(_) => TransportKind::Shm,
            Way::Verbs(_) => TransportKind::Verbs,
            Way::Tcp(..) => TransportKind::Tcp,
        })
    }

    /// Why bytes from a donor with these addresses travel by TCP where RDMA might carry them; `None`
    /// when neither end has a device, or nothing stands against it. Looks at this host's devices.
    pub fn why_tcp(&self, addresses: &[String]) -> Option<String> {
        let peers: Vec<_> = addresses
            .iter()
            .filter_map(|address| verbs::peer_of(address))
            .collect();
        if peers.is_empty() && !verbs::any_device() {
            return None;
        }
        if let Preference::Only(kind) = self.preference {
            return Some(format!(
                "{kind} is the one transport that may be used (--transport)"
            ));
        }
        if self.veiled_only {
            return Some("bytes are to travel under TLS (--tls-data)".to_owned());
        }
        if self.devices == Devices::Off {
            return Some("RDMA is turned off here (--rdma-device none)".to_owned());
        }
        if peers.is_empty() {
            return Some(
                "the donor offers no RDMA: no device of its host has an address that it listens on, \
                 or it was told to use none"
                    .to_owned(),
            );
        }
        let mut obstacles = peers
            .iter()
            .map(|peer| verbs::obstacle(*peer, &self.devices));
        match obstacles.next() {
            Some(Some(first)) if obstacles.all(|other| other.is_some()) => Some(first),
            _ => None,
        }
    }

    /// What [`AddressDialer::why_tcp`] said, or what failed, when the last connection to `donor` was
    /// made; `None` when that is not TCP.
    pub fn remark(&self, donor: u64) -> Option<String> {
        let remarks = self.remarks.lock();
        remarks.get(&donor).map(|remark| remark.text.clone())
    }

    /// Notes why a connection to a donor is what it is.
    fn note(&self, endpoint: &Endpoint, way: &Way, failed: Option<String>) {
        let mut remark = match (way, failed) {
            (Way::Shm(_) | Way::Verbs(_), _) => None,
            (Way::Tcp(..), Some(error)) => Some(Remark {
                text: format!("RDMA was tried and failed: {error}"),
                again: Some((Instant::now() + AGAIN_FIRST, AGAIN_FIRST)),
            }),
            (Way::Tcp(..), None) => self
                .why_tcp(&endpoint.addresses)
                .map(|text| Remark { text, again: None }),
        };
        let mut remarks = self.remarks.lock();
        let before = remarks.remove(&endpoint.donor);
        if let (
            Some(Remark { again, .. }),
            Some(Remark {
                again: Some((_, pause)),
                ..
            }),
        ) = (&mut remark, before)
            && again.is_some()
        {
            let pause = (2 * pause).min(AGAIN_LAST);
            *again = Some((Instant::now() + pause, pause));
        }
        if let Some(remark) = remark {
            if remarks.len() >= MAX_REMARKS {
                remarks.clear();
            }
            remarks.insert(endpoint.donor, remark);
        }
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
                self.devices.name(),
                epoch,
                access,
                &endpoint.keys,
                deadline,
            )?),
            Way::Tcp(peer, veiled) => Arc::new(TcpTransport::connect(
                *peer,
                self.veil.as_ref().filter(|_| *veiled),
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
        let mut rdma: Option<String> = None;
        for (index, way) in ways.iter().enumerate() {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            match self.go(way, endpoint, now + share(left, ways.len() - index)) {
                Ok(transport) => {
                    self.note(endpoint, way, rdma);
                    return Ok(transport);
                }
                Err(error) => {
                    tracing::debug!(donor = endpoint.donor, ?way, %error, "one way to a donor is closed");
                    let epoch = matches!(error, TransportError::WrongEpoch { .. });
                    if matches!(way, Way::Verbs(_)) {
                        rdma.get_or_insert_with(|| chain(&error));
                    }
                    if first.is_none() || epoch {
                        first = Some(error);
                    }
                }
            }
        }
        Err(first.unwrap_or_else(|| self.nowhere(endpoint)))
    }

    fn again(&self, donor: u64) -> bool {
        let mut remarks = self.remarks.lock();
        let again = remarks
            .get_mut(&donor)
            .and_then(|remark| remark.again.as_mut());
        let now = Instant::now();
        match again {
            Some((due, pause)) if now >= *due => {
                // Until it is known what became of it.
                *due = now + *pause;
                true
            }
            _ => false,
        }
    }
}

impl AddressDialer {
    fn nowhere(&self, endpoint: &Endpoint) -> TransportError {
        let mut tcp = endpoint.addresses.iter();
        let tcp = tcp.find_map(|address| tcp::peer_of(address));
        let reason = match (self.preference, tcp) {
            (_, Some((_, true))) if self.allows(TransportKind::Tcp) => {
                "the donor wants TLS, and this host has no certificate (harbour certs issue, --tls-dir)"
                    .to_owned()
            }
            (_, Some((_, false))) if self.allows(TransportKind::Tcp) => {
                "the donor offers no TLS, and this host takes nothing else (--tls-data)".to_owned()
            }
            (Preference::Auto, _) => {
                "no address that this process can use: a donor for other hosts listens (--listen)"
                    .to_owned()
            }
            (Preference::Only(kind), _) => {
                format!("no address of {kind}, the one transport that may be used (--transport)")
            }
        };
        let source = io::Error::new(io::ErrorKind::Unsupported, reason);
        unreachable(format!("[{}]", endpoint.addresses.join(", ")), source)
    }
}

/// How much of the time that is `left` the next of so many ways may take: all but what those after it
/// need, who are simpler.
fn share(left: Duration, ways: usize) -> Duration {
    let ways = u32::try_from(ways).unwrap_or(u32::MAX).max(1);
    let kept = RESERVE.saturating_mul(ways - 1);
    left.saturating_sub(kept).max(left / ways)
}

/// An error with its causes.
fn chain(error: &TransportError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
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
        let tcp = |text: &str| Way::Tcp(tcp::peer_of(text).unwrap().0, false);
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
        let both = ["verbs:192.0.2.1:1", four].map(str::to_owned);
        let only = AddressDialer::new(
            Access::Read,
            Token::NONE,
            Preference::Only(TransportKind::Verbs),
        );
        let verbs = Way::Verbs("192.0.2.1:1".parse().unwrap());
        assert_eq!(only.ways(&both), [verbs]);
        assert_eq!(only.with_devices(Devices::Off).ways(&both), []);
        let no_device = ways(auto, &["verbs:192.0.2.1:1", four]);
        assert_eq!(
            no_device,
            [tcp(four)],
            "no device has a route to a documentation address"
        );
    }

    #[test]
    fn what_failed_is_tried_again_now_and_then() {
        let dialer = AddressDialer::new(Access::Read, Token::NONE, Preference::Auto);
        let endpoint = Endpoint {
            donor: 7,
            epoch: 1,
            addresses: Vec::new(),
            keys: Vec::new(),
        };
        let peer = "192.0.2.1:1".parse().unwrap();
        assert!(!dialer.again(7));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            dialer.note(
                &endpoint,
                &Way::Tcp(peer, false),
                Some("no answer".to_owned()),
            );
            assert!(!dialer.again(7), "not at once");
            let mut remarks = dialer.remarks.lock();
            let again = remarks.get_mut(&7).unwrap().again.as_mut().unwrap();
            pauses.push(again.1.as_secs());
            again.0 = Instant::now();
            drop(remarks);
            assert!(dialer.again(7));
            assert!(!dialer.again(7), "once for each time");
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(dialer.remark(7).unwrap().contains("no answer"));
        dialer.note(&endpoint, &Way::Verbs(peer), None);
        assert!(!dialer.again(7) && dialer.remark(7).is_none());
    }

    #[test]
    fn the_last_way_has_time_too() {
        let ms = Duration::from_millis;
        assert_eq!(share(ms(1000), 1), ms(1000));
        assert_eq!(share(ms(1000), 2), ms(800));
        assert_eq!(share(ms(1000), 3), ms(600));
        assert_eq!(share(ms(300), 2), ms(150), "half of what is little");
        assert_eq!(share(ms(0), 2), ms(0));
    }

    #[test]
    fn why_it_is_tcp_is_said_where_rdma_might_be() {
        let offered = ["verbs:192.0.2.1:1", "tcp:192.0.2.1:1"].map(str::to_owned);
        let new = |preference| AddressDialer::new(Access::Read, Token::NONE, preference);
        let says = |dialer: &AddressDialer, words: &str| {
            let said = dialer.why_tcp(&offered).unwrap();
            assert!(said.contains(words), "{said}");
        };
        let forced = new(Preference::Only(TransportKind::Tcp));
        says(&forced, "--transport");
        let off = new(Preference::Auto).with_devices(Devices::Off);
        says(&off, "--rdma-device none");
        // No host has one of this name, and few have any.
        let named = new(Preference::Auto).with_devices(Devices::Named("nosuchdev".to_owned()));
        says(&named, "no RDMA device");
        if !verbs::any_device() {
            assert_eq!(off.why_tcp(&["tcp:192.0.2.1:1".to_owned()]), None);
        }
    }
}
