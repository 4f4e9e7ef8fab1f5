//! Where other hosts find a donor.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, UdpSocket},
    str::FromStr,
};

use harbour_metad_client::Endpoint;
use serde::Deserialize;

use crate::failure::{self, Code};

/// An IP address, with a port when it is another than the donor listens on. Numbers and no names:
/// readers look nothing up, which could take any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Advertised {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

/// Why a text is not an address to advertise.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not where a donor can be found: write 192.0.2.1, 192.0.2.1:7481, 2001:db8::1 or [2001:db8::1]:7481"
)]
pub struct AdvertisedError(String);

impl FromStr for Advertised {
    type Err = AdvertisedError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let whole = text
            .parse::<SocketAddr>()
            .map(|at| (at.ip(), Some(at.port())));
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        let parsed = whole.or_else(|_| bare.parse::<IpAddr>().map(|ip| (ip, None)));
        match parsed {
            Ok((ip, port)) if !ip.is_unspecified() && port != Some(0) => Ok(Self { ip, port }),
            _ => Err(AdvertisedError(text.chars().take(60).collect())),
        }
    }
}

impl TryFrom<String> for Advertised {
    type Error = AdvertisedError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for Advertised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.ip, port).fmt(f),
            None => self.ip.fmt(f),
        }
    }
}

/// Where a donor that listens on `listening` is found: where it was told to say, else where it
/// listens, and for all addresses of a host the one that it reaches metad from.
pub fn sockets(
    listening: &[SocketAddr],
    advertise: &[Advertised],
    metad: &Endpoint,
) -> anyhow::Result<Vec<SocketAddr>> {
    let mut sockets = Vec::new();
    let mut add = |socket: SocketAddr| {
        if !sockets.contains(&socket) {
            sockets.push(socket);
        }
    };
    let Some(first) = listening.first() else {
        anyhow::ensure!(
            advertise.is_empty(),
            failure::failure(
                Code::Usage,
                "this donor advertises an address and listens on none",
                "give --listen too, like --listen 0.0.0.0:7481",
            )
        );
        return Ok(Vec::new());
    };
    for told in advertise {
        add(SocketAddr::new(told.ip, told.port.unwrap_or(first.port())));
    }
    if !advertise.is_empty() {
        return Ok(sockets);
    }
    for at in listening {
        let ip = if at.ip().is_unspecified() {
            way_to(metad, at.is_ipv4()).ok_or_else(|| {
                failure::failure(
                    Code::Usage,
                    format!("the donor listens on {at}, and where other hosts find it cannot be known from that"),
                    format!("say where: --advertise IP, or listen on one address: --listen IP:{}", at.port()),
                )
            })?
        } else {
            at.ip()
        };
        add(SocketAddr::new(ip, at.port()));
    }
    Ok(sockets)
}

/// The address of this host that packets to metad would leave from; none for a metad on this host,
/// which is no sign of where others are.
fn way_to(metad: &Endpoint, v4: bool) -> Option<IpAddr> {
    let Endpoint::Tcp { host, port } = metad else {
        return None;
    };
    let any: IpAddr = if v4 { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    // Sends nothing: it only asks the kernel for a route.
    socket.connect((host.as_str(), *port)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn texts() {
        for text in [
            "192.0.2.1",
            "192.0.2.1:7481",
            "2001:db8::1",
            "[2001:db8::1]:7481",
        ] {
            let parsed: Advertised = text.parse().expect(text);
            assert_eq!(parsed.to_string(), text);
        }
        for text in [
            "",
            "host",
            "host:1",
            "0.0.0.0",
            "[::]:1",
            "192.0.2.1:0",
            "1.2.3",
        ] {
            assert!(text.parse::<Advertised>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_advertised() {
        let here: Endpoint = "unix:/run/metad.sock".parse().expect("valid");
        let loopback: Endpoint = "http://127.0.0.1:7480".parse().expect("valid");
        let told = |text: &str| text.parse::<Advertised>().expect("valid");
        let one = [at("192.0.2.1:5")];
        let both = [at("192.0.2.1:5"), at("[2001:db8::1]:6")];
        assert_eq!(sockets(&[], &[], &here).expect("none"), []);
        assert_eq!(sockets(&both, &[], &here).expect("both"), both);
        let elsewhere = sockets(
            &one,
            &[told("198.51.100.7"), told("[2001:db8::2]:9")],
            &here,
        );
        assert_eq!(
            elsewhere.expect("told"),
            [at("198.51.100.7:5"), at("[2001:db8::2]:9")]
        );
        for (listening, advertise, metad) in [
            (&[][..], &[told("192.0.2.1")][..], &here),
            (&[at("0.0.0.0:5")], &[], &here),
            (&[at("0.0.0.0:5")], &[], &loopback),
        ] {
            let error = sockets(listening, advertise, metad).expect_err("refused");
            assert!(!error.to_string().is_empty());
        }
        let told = sockets(&[at("[::]:5")], &[told("192.0.2.1")], &here);
        assert_eq!(told.expect("told"), [at("192.0.2.1:5")]);
    }
}
