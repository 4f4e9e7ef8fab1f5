//! Values of keys that are neither numbers nor texts.

use std::{fmt, str::FromStr};

use harbour_pool::{connector::Preference, transport::TransportKind, verbs::Devices};
use serde::Deserialize;

use crate::size::Size;

/// The longest name that the kernel gives a device.
const DEVICE_NAME_MAX: usize = 63;

/// How much a donor lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lend {
    /// So much, or as much of it as the host can spare.
    Size(Size),
    /// What the host can spare.
    Auto,
}

impl FromStr for Lend {
    type Err = crate::size::SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            size => size.parse().map(Self::Size),
        }
    }
}

impl fmt::Display for Lend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size) => size.0.fmt(f),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Lend {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Bytes(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Bytes(bytes) => Ok(Self::Size(Size(bytes))),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// What a donor does with what it holds when it is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnStop {
    /// Waits until others have it, up to a deadline.
    Move,
    /// Ends at once.
    Drop,
}

/// When donor memory is backed with huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// When enough are free.
    Auto,
    /// Never.
    Never,
    /// Fail when there are not enough.
    Require,
}

/// Which transports may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum TransportChoice {
    /// The best that both ends share.
    Auto,
    /// Shared memory alone.
    Shm,
    /// RDMA alone.
    Verbs,
    /// TCP alone.
    Tcp,
}

impl TransportChoice {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Shm => "shm",
            Self::Verbs => "verbs",
            Self::Tcp => "tcp",
        }
    }

    /// The same for the pool.
    pub fn preference(self) -> Preference {
        match self {
            Self::Auto => Preference::Auto,
            Self::Shm => Preference::Only(TransportKind::Shm),
            Self::Verbs => Preference::Only(TransportKind::Verbs),
            Self::Tcp => Preference::Only(TransportKind::Tcp),
        }
    }
}

/// Whether images are mounted with the kernel's EROFS too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FastView {
    /// On kernels that can.
    Auto,
    /// Never.
    Off,
}

/// Which RDMA devices of this host may be used: `auto`, `none`, or a name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct RdmaDevice(pub Devices);

/// Why a text names no RDMA device.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} names no RDMA device: write auto, none, or a name that rdma link shows, like mlx5_0"
)]
pub struct RdmaDeviceError(String);

impl FromStr for RdmaDevice {
    type Err = RdmaDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let in_name = |c: char| c.is_ascii_graphic() && c != '/';
        Ok(Self(match text.trim() {
            "auto" => Devices::Any,
            "none" | "off" => Devices::Off,
            name if !name.is_empty()
                && name.len() <= DEVICE_NAME_MAX
                && !name.starts_with(['.', '-'])
                && name.chars().all(in_name) =>
            {
                Devices::Named(name.to_owned())
            }
            _ => return Err(RdmaDeviceError(text.chars().take(60).collect())),
        }))
    }
}

impl TryFrom<String> for RdmaDevice {
    type Error = RdmaDeviceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for RdmaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Devices::Any => "auto",
            Devices::Off => "none",
            Devices::Named(name) => name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for text in ["auto", "none", "mlx5_0", "rxe0", "rocep1s0f0"] {
            let device: RdmaDevice = text.parse().expect(text);
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("off".parse::<RdmaDevice>().expect("off").0, Devices::Off);
        let long = "x".repeat(DEVICE_NAME_MAX + 1);
        for text in ["", " ", "..", "a/b", "a b", "-x", "r\u{e9}", &long] {
            assert!(text.parse::<RdmaDevice>().is_err(), "{text}");
        }
    }
}
