//! An image of this host's mount, as Docker is to have it.

use std::{io, path::Path, time::Duration};

use anyhow::Context as _;
use harbour_image::{
    digest::Digest,
    manifest::{ImageConfig, Manifest},
};

use super::{
    layers,
    record::{Layer, Record, chains},
    root::DataRoot,
};
use crate::{
    bounded,
    config::Places,
    container::image::Documents,
    failure::{self, Code},
};

/// Longest time to count the files of one layer.
const COUNT_LIMIT: Duration = Duration::from_secs(120);

/// What a record of this image says.
///
/// # Errors
/// Documents that are damaged, or a mount that does not answer.
pub fn record(root: &DataRoot, places: &Places, image: &Documents) -> anyhow::Result<Record> {
    let name = &image.name;
    let damaged = || format!("the documents of {name} are damaged");
    let config = ImageConfig::parse(&image.config).with_context(damaged)?;
    let Manifest::Image(manifest) = Manifest::parse(&image.manifest, None).with_context(damaged)?
    else {
        anyhow::bail!("the manifest of {name} is a list");
    };
    let descriptors = manifest.layers(&config).with_context(damaged)?;
    let text = String::from_utf8(image.config.clone()).with_context(damaged)?;
    let digest = Digest::of(&image.manifest);
    let mut record = Record::new(name, &digest, text, places.mount.clone());
    for (layer, chain) in descriptors.iter().zip(chains(&config.diff_ids)) {
        let known = root.size_of(&chain)?;
        let size_bytes = match known {
            Some(size) => size,
            None => count(&places.mount.join("layers").join(layer.diff_id.short()))?,
        };
        record.layers.push(Layer {
            diff_id: layer.diff_id.to_string(),
            blob: layer.digest.to_string(),
            size_bytes,
        });
    }
    Ok(record)
}

fn count(dir: &Path) -> anyhow::Result<u64> {
    let path = dir.to_owned();
    let size = bounded::within(COUNT_LIMIT, move || layers::size_of(&path));
    let silent = || io::Error::from(io::ErrorKind::TimedOut);
    size.unwrap_or_else(|| Err(silent())).map_err(|error| {
        failure::failure(
            Code::Unavailable,
            format!("cannot count the files of {}: {error}", dir.display()),
            "see: harbour doctor",
        )
    })
}
