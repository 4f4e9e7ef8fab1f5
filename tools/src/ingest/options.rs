//! From configuration to what a pull needs.

use crate::failpoint::Failpoints;
use anyhow::Context as _;
use harbour_image::{
    decode::DecodeLimits,
    manifest::Platform,
    source::{RegistryOptions, SourceOptions},
};

use super::pull::PullOptions;
use crate::config::{File, PullKeys};

/// Options of a pull from flags and file; `insecure` is the flag that holds for every registry.
pub fn options(flags: &PullKeys, file: &File, insecure: bool) -> anyhow::Result<PullOptions> {
    let keys = flags.clone().over(file.pull.clone());
    let platform = match &keys.platform {
        Some(text) => {
            let platform: Platform = text
                .parse()
                .with_context(|| format!("{text:?} is not a platform, like linux/arm64"))?;
            Some(platform)
        }
        None => None,
    };
    let mut limits = DecodeLimits::default();
    if let Some(entries) = keys.max_entries {
        limits.entries_max = entries;
    }
    if let Some(size) = keys.max_unpacked {
        limits.tar_bytes_max = size.0;
    }
    let mut source = SourceOptions {
        insecure,
        ..SourceOptions::from_env()
    };
    if let Some(path) = &keys.ca_file {
        source.ca_files.push(path.clone());
    }
    for (host, registry) in &file.registry {
        source.registries.insert(
            host.clone(),
            RegistryOptions {
                mirrors: registry.mirrors.clone(),
                insecure: registry.insecure,
                ..RegistryOptions::default()
            },
        );
    }
    Ok(PullOptions {
        platform,
        jobs: keys.jobs.unwrap_or(2).clamp(1, 64),
        limits,
        replicas: keys.replicas.unwrap_or(0),
        source,
        failpoints: Failpoints::from_env(),
    })
}
