//! An image as this host's mount shows it.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use harbour_fs::image_path;
use harbour_image::{
    digest::Digest,
    manifest::{CONFIG_MAX, ImageConfig, MANIFEST_MAX},
    reference::ImageName,
    source::SourceSpec,
};

use crate::{
    bounded,
    config::Places,
    failure::{self, Code},
    node::views::is_mounted,
};

/// Longest wait for the mount.
const LIMIT: Duration = Duration::from_secs(5);

/// An image that can be started.
#[derive(Debug)]
pub struct Image {
    /// Its name in the catalogue.
    pub name: ImageName,
    /// What it says about how it starts.
    pub config: ImageConfig,
    /// Directories for an overlay, the highest first: the fast view alone where there is one, as its
    /// layers are merged already.
    pub lower: Vec<PathBuf>,
}

impl Image {
    /// Finds the image that was named as for `harbour pull`.
    ///
    /// # Errors
    /// No name of an image, one that the mount does not show, or a mount that does not answer.
    pub fn find(places: &Places, image: &str) -> anyhow::Result<Self> {
        let Documents {
            name,
            manifest,
            config,
        } = Documents::find(places, image)?;
        let config = ImageConfig::parse(&config)
            .with_context(|| format!("the config of {name} is damaged"))?;
        let view = places.views().join(Digest::of(&manifest).short());
        let lower = match is_mounted(&view) {
            true => vec![view],
            false => layers(&places.mount, &config.diff_ids),
        };
        anyhow::ensure!(!lower.is_empty(), "{name} has no layers");
        Ok(Self {
            name,
            config,
            lower,
        })
    }
}

/// Manifest and config of an image, as they were published.
#[derive(Debug)]
pub struct Documents {
    /// Its name in the catalogue.
    pub name: ImageName,
    /// The manifest.
    pub manifest: Vec<u8>,
    /// The config.
    pub config: Vec<u8>,
}

impl Documents {
    /// Those of the image that was named as for `harbour pull`.
    ///
    /// # Errors
    /// As [`Image::find`].
    pub fn find(places: &Places, image: &str) -> anyhow::Result<Self> {
        let spec = SourceSpec::parse(image).map_err(|error| usage(error.to_string()))?;
        Self::of(places, spec.name(), image)
    }

    /// Those of the image of this name; `typed` is what somebody called it.
    ///
    /// # Errors
    /// As [`Image::find`].
    pub fn of(places: &Places, name: ImageName, typed: &str) -> anyhow::Result<Self> {
        let below = image_path(&name.registry, &name.repository, &name.tag)
            .ok_or_else(|| usage(format!("{typed} cannot be a directory")))?;
        let dir = places.mount.join(below);
        let documents = bounded::within(LIMIT, move || {
            let manifest = read(&dir.join("manifest.json"), MANIFEST_MAX)?;
            let config = read(&dir.join("config.json"), CONFIG_MAX)?;
            io::Result::Ok((manifest, config))
        });
        let mount = places.mount.display();
        let Some(documents) = documents else {
            return Err(failure::failure(
                Code::Unavailable,
                format!("the mount at {mount} does not answer"),
                "see: harbour doctor",
            ));
        };
        let (manifest, config) = documents.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if !places.mount.join("images").exists() => failure::failure(
                Code::Unavailable,
                format!("nothing is mounted at {mount}"),
                "start it: harbour up -d",
            ),
            io::ErrorKind::NotFound => failure::failure(
                Code::NotFound,
                format!("there is no image {name} below {mount}"),
                format!("fetch it with: harbour pull {typed}"),
            ),
            _ => anyhow::Error::new(error).context(format!("cannot read {name} below {mount}")),
        })?;
        Ok(Self {
            name,
            manifest,
            config,
        })
    }
}

fn usage(what: String) -> anyhow::Error {
    failure::failure(Code::Usage, what, "see the names with: harbour images")
}

/// Layers as an overlay takes them. One that an image has twice counts where it is highest: what it puts
/// there covers what it put lower down.
fn layers(mount: &Path, diff_ids: &[Digest]) -> Vec<PathBuf> {
    let mut lower = Vec::new();
    for diff_id in diff_ids.iter().rev() {
        let dir = mount.join("layers").join(diff_id.short());
        if !lower.contains(&dir) {
            lower.push(dir);
        }
    }
    lower
}

fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_layer_counts_where_it_is_highest() {
        let [a, b] = [b"a", b"b"].map(|text| Digest::of(text));
        let lower = layers(Path::new("/m"), &[a, b, a]);
        let dir = |digest: Digest| Path::new("/m/layers").join(digest.short());
        assert_eq!(lower, [dir(a), dir(b)]);
    }
}
