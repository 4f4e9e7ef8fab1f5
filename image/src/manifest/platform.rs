//! Platforms: `linux/amd64`, `linux/arm/v7`, and which image of a list runs on which.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What an image runs on, in Go's words for systems and processors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, `riscv64`, …
    pub architecture: String,
    /// `v7` for 32-bit ARM, `v3` for x86-64; absent for the plainest one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a platform: write it as linux/amd64 or linux/arm/v7")]
pub struct PlatformError {
    /// What was given, cut to 100 characters.
    pub text: String,
}

impl Platform {
    /// The platform of this host, with no variant: the plainest image that runs everywhere.
    pub fn host() -> Self {
        let architecture = std::env::consts::ARCH.to_owned();
        Self {
            os: std::env::consts::OS.to_owned(),
            architecture,
            variant: None,
        }
        .normalised()
    }

    /// The same platform in the words that image tools agree on: `x86_64` becomes `amd64`,
    /// `aarch64` `arm64`, and the variants that mean "the plain one" are left out.
    pub fn normalised(self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let given = self
            .variant
            .map(|v| v.to_ascii_lowercase())
            .filter(|v| !v.is_empty());
        let given = given.map(|v| {
            if v.starts_with('v') {
                v
            } else {
                format!("v{v}")
            }
        });
        let (architecture, variant) = match self.architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" | "amd64" => ("amd64", given.filter(|v| v != "v1")),
            "aarch64" | "arm64" => ("arm64", given.filter(|v| v != "v8")),
            "armhf" => ("arm", Some("v7".to_owned())),
            "armel" => ("arm", Some("v6".to_owned())),
            "arm" => ("arm", Some(given.unwrap_or_else(|| "v7".to_owned()))),
            "i386" | "i486" | "i586" | "i686" | "x86" | "386" => ("386", None),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", given),
            other => {
                return Self {
                    os,
                    architecture: other.to_owned(),
                    variant: given,
                };
            }
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant,
        }
    }

    /// How well an image for `offer` serves a request for `self`: lower is better, `None` is not
    /// at all. The exact variant first, then lower and lower ones, which run on higher hardware.
    pub fn rank(&self, offer: &Self) -> Option<u32> {
        if self.os != offer.os || self.architecture != offer.architecture {
            return None;
        }
        if self.variant == offer.variant {
            return Some(0);
        }
        let wanted = self.level()?;
        let offered = offer.level()?;
        wanted.checked_sub(offered)
    }

    /// Number of the variant; the plain one of each architecture has the number it stands for.
    fn level(&self) -> Option<u32> {
        match &self.variant {
            // A minor version (`v8.1`) is worth less than the next major one.
            Some(variant) => {
                let (major, minor) = variant.strip_prefix('v')?.split_once('.').map_or_else(
                    || (variant.strip_prefix('v').unwrap_or_default(), "0"),
                    |(major, minor)| (major, minor),
                );
                let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
                major.checked_mul(100)?.checked_add(minor.min(99))
            }
            None => Some(match self.architecture.as_str() {
                "arm64" => 800,
                "amd64" => 100,
                _ => 0,
            }),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let error = || PlatformError {
            text: text.chars().take(100).collect(),
        };
        let good = |part: &&str| {
            (1..=32).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        };
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(good) {
            return Err(error());
        }
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => return Err(error()),
        };
        let platform = Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant,
        };
        Ok(platform.normalised())
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}
