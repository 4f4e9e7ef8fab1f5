//! The config of an image: its layers' diff IDs and how a container of it starts.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{CONFIG_MAX, ManifestError, Platform, check_size, cut};
use crate::digest::Digest;

/// What we use of a config.
///
/// Source: OCI image specification, "config"; Docker's configs have the same fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageConfig {
    /// What the image runs on.
    pub platform: Platform,
    /// Digests of the uncompressed layers, the lowest first.
    pub diff_ids: Vec<Digest>,
    /// When it was made, as written (RFC 3339).
    pub created: Option<String>,
    /// How a container of it starts.
    pub run: RunConfig,
}

/// How a container starts. Lists and texts that a config leaves out are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunConfig {
    /// `NAME=value`.
    pub env: Vec<String>,
    /// First words of the command.
    pub entrypoint: Vec<String>,
    /// The words after them, or the whole command when there is no entrypoint.
    pub cmd: Vec<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    pub user: String,
    /// Where the command starts.
    pub working_dir: String,
    /// Signal that ends it, `SIGTERM` by default.
    pub stop_signal: Option<String>,
    /// Free text.
    pub labels: BTreeMap<String, String>,
}

impl ImageConfig {
    /// Parses `bytes`.
    ///
    /// # Errors
    /// [`ManifestError`]: too large, not JSON, no rootfs, or diff IDs that are no digests.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        check_size(bytes, CONFIG_MAX)?;
        let raw: RawConfig = serde_json::from_slice(bytes)?;
        let rootfs = raw.rootfs.ok_or(ManifestError::NoRootfs)?;
        if !matches!(rootfs.kind.as_str(), "" | "layers") {
            return Err(ManifestError::RootfsType {
                kind: cut(&rootfs.kind),
            });
        }
        let diff_ids = rootfs
            .diff_ids
            .ok_or(ManifestError::NoRootfs)?
            .into_iter()
            .enumerate();
        let diff_ids = diff_ids
            .map(|(number, text)| {
                let named = |source| ManifestError::Digest {
                    what: format!("diff ID {number}"),
                    source,
                };
                text.parse().map_err(named)
            })
            .collect::<Result<_, _>>()?;
        let platform = Platform {
            os: raw
                .os
                .filter(|os| !os.is_empty())
                .unwrap_or_else(|| "linux".to_owned()),
            architecture: raw.architecture.unwrap_or_default(),
            variant: raw.variant,
        };
        let run = raw.config.unwrap_or_default().into_run();
        Ok(Self {
            platform: platform.normalised(),
            diff_ids,
            created: raw.created,
            run,
        })
    }
}

#[derive(Deserialize)]
struct RawConfig {
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
    created: Option<String>,
    rootfs: Option<RawRootfs>,
    config: Option<RawRun>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(rename = "type", default)]
    kind: String,
    diff_ids: Option<Vec<String>>,
}

// Go writes `null` for every empty list and map, hence the options.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRun {
    env: Option<Vec<String>>,
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

/// A command: a list, or in configs from before 2014 one string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Words {
    fn into_list(self) -> Vec<String> {
        match self {
            Self::One(word) => vec![word],
            Self::Many(words) => words,
        }
    }
}

impl RawRun {
    fn into_run(self) -> RunConfig {
        RunConfig {
            env: self.env.unwrap_or_default(),
            entrypoint: self.entrypoint.map(Words::into_list).unwrap_or_default(),
            cmd: self.cmd.map(Words::into_list).unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            working_dir: self.working_dir.unwrap_or_default(),
            stop_signal: self.stop_signal.filter(|signal| !signal.is_empty()),
            labels: self.labels.unwrap_or_default(),
        }
    }
}
