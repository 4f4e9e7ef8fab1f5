//! Where a daemon listens.

use std::{fmt, path::PathBuf, str::FromStr};

/// Address of a metadata daemon: `unix:/run/harbour/metad.sock`, `https://host:port`, or
/// `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket at an absolute path.
    Unix(PathBuf),
    /// TCP, not encrypted: for this host's loopback.
    Tcp {
        /// Name or address; an IPv6 address without its brackets.
        host: String,
        /// Port, never 0.
        port: u16,
    },
    /// TCP under mutual TLS.
    Tls {
        /// As in [`Endpoint::Tcp`]; what metad's certificate must be for.
        host: String,
        /// Port, never 0.
        port: u16,
    },
}

/// Why a string is no [`Endpoint`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is not an address of metad: want unix:/absolute/path, https://host:port or http://host:port"
)]
pub struct EndpointError {
    /// What was given, cut to 200 characters.
    pub text: String,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let error = || EndpointError {
            text: text.chars().take(200).collect(),
        };
        if let Some(rest) = text.strip_prefix("unix:") {
            // `unix:///path` is the URL form of the same.
            let path = if rest.starts_with("///") {
                &rest[2..]
            } else {
                rest
            };
            let usable = path.len() > 1 && path.starts_with('/') && !path.starts_with("//");
            return if usable && !path.contains('\0') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(error())
            };
        }
        let (tls, rest) = match text.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix("http://").ok_or_else(error)?),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(error)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inside) => inside
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| error())?
                .to_string(),
            None => host.to_owned(),
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':');
        let colon = host.contains(':') && !rest.starts_with('[');
        if host.is_empty() || colon || !host.bytes().all(plain) {
            return Err(error());
        }
        Ok(if tls {
            Self::Tls { host, port }
        } else {
            Self::Tcp { host, port }
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Unix(path) => return write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } => ("http", host, port),
            Self::Tls { host, port } => ("https", host, port),
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in [
            "unix:/run/harbour/metad.sock",
            "unix:/a b",
            "http://host:7000",
            "http://[::1]:7000",
            "http://127.0.0.1:1",
            "https://metad.example:7480",
            "https://[fd00::1]:7480",
        ] {
            assert_eq!(
                text.parse::<Endpoint>().map(|e| e.to_string()).as_deref(),
                Ok(text)
            );
        }
        assert_eq!("unix:///x".parse(), Ok(Endpoint::Unix("/x".into())));
        assert_eq!(
            "http://h:1/".parse(),
            Ok(Endpoint::Tcp {
                host: "h".into(),
                port: 1
            })
        );
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "unix:",
            "unix:relative",
            "unix:/",
            "unix://host/x",
            "http://",
            "http://host",
            "http://host:0",
            "http://host:70000",
            "http://:1",
            "http://::1:80",
            "http://[::1:80",
            "http://[nonsense]:80",
            "http://u@h:80",
            "http://h:80/path",
            "https://h",
            "https://h:80/path",
            "ftp://h:80",
            "h:80",
            "unix:/a\0b",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?}");
        }
    }
}
