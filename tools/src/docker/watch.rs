//! A data-root that follows the catalogue.

use harbour_image::reference::ImageName;
use harbour_metad_client::{Snapshot, v1};

use super::{
    apply, name, plan,
    record::{Record, State},
    root::DataRoot,
};
use crate::{config::Places, container::image::Documents, failure::Failure};

/// The name of an image in a snapshot.
pub fn name_of(image: &v1::Image) -> ImageName {
    ImageName {
        registry: image.registry.clone(),
        repository: image.repository.clone(),
        tag: image.tag.clone(),
    }
}

/// What one look at the catalogue led to.
#[derive(Debug, Default)]
pub struct Look {
    /// Records that are new, or of a new image.
    pub wanted: Vec<Record>,
    /// Records of images that the catalogue has not any more.
    pub gone: Vec<Record>,
    /// Images that the mount does not show yet.
    pub later: usize,
}

/// Compares the catalogue with the records: of all images, or of those that match one of the patterns.
///
/// What somebody removed from Docker stays away as long as the name means the same image. What was attached
/// by hand stays when the catalogue has it not any more.
///
/// # Errors
/// What the file system says.
pub fn look(
    root: &DataRoot,
    places: &Places,
    snapshot: &Snapshot,
    patterns: &[String],
) -> anyhow::Result<Look> {
    let mut look = Look::default();
    let matching = |image: &ImageName| {
        patterns.is_empty() || patterns.iter().any(|pattern| name::matches(pattern, image))
    };
    for image in &snapshot.images {
        let name = name_of(image);
        if !matching(&name) {
            continue;
        }
        let manifest = format!("sha256:{}", hex::encode(&image.manifest));
        let before = Record::of(root, &name)?;
        let same = |record: &Record| record.manifest == manifest && record.state != State::Leaving;
        if before.as_ref().is_some_and(same) {
            continue;
        }
        let typed = name.to_string();
        let found = Documents::of(places, name, &typed)
            .and_then(|documents| plan::record(root, places, &documents));
        match found {
            Ok(mut record) if record.manifest == manifest => {
                record.watched = true;
                look.wanted.push(record);
            }
            Ok(_) => look.later += 1,
            Err(error) if error.is::<Failure>() => look.later += 1,
            Err(error) => {
                tracing::warn!(image = typed, error = format!("{error:#}"), "passed over")
            }
        }
    }
    let there = |record: &Record| {
        let name = record.image();
        snapshot.images.iter().any(|image| name_of(image) == name)
    };
    for record in Record::all(root)? {
        if record.watched && record.state != State::Leaving && !there(&record) {
            look.gone.push(record);
        }
    }
    Ok(look)
}

/// Notes what a look has found. To be called under [`DataRoot::lock`].
///
/// # Errors
/// What the file system says.
pub fn note(root: &DataRoot, look: &Look) -> anyhow::Result<()> {
    for record in &look.wanted {
        let mut record = record.clone();
        if let Some(before) = Record::of(root, &record.image())? {
            record.replace(&before);
        }
        if let Err(error) = apply::want(root, &record) {
            tracing::warn!(
                image = record.name(),
                error = format!("{error:#}"),
                "passed over"
            );
        }
    }
    Ok(())
}
