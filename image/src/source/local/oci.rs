//! OCI layouts: `oci-layout`, `index.json` and `blobs/sha256/…`, in a directory or a tar.
//!
//! Source: OCI image specification, "image-layout".

use serde::Deserialize;

use super::{Slice, Store};
use crate::{
    digest::Digest,
    manifest::{Descriptor, Index, MANIFEST_MAX, Manifest, media},
    source::error::SourceError,
};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
// What containerd, Docker and BuildKit write beside it: the whole reference.
const FULL_NAME: &str = "io.containerd.image.name";

/// An open OCI layout.
#[derive(Debug)]
pub(crate) struct OciLayout {
    store: Store,
    index: Index,
}

/// What a layout's index leads to.
pub(crate) enum Root {
    /// One manifest or list.
    One(Descriptor),
    /// Manifests for several platforms and no list over them: the index itself is the list.
    ByPlatform(Index),
}

impl OciLayout {
    /// Reads the layout's own files.
    pub(crate) fn open(store: Store) -> Result<Self, SourceError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let path = store.path();
        let not_layout = |e| match e {
            SourceError::NotFound { .. } => {
                let mut reason = "this is no OCI layout: it has no file oci-layout".to_owned();
                if store.open("manifest.json").is_ok() {
                    reason.push_str("; it looks like docker-archive:");
                }
                SourceError::archive(path, reason)
            }
            other => other,
        };
        let marker = store
            .open("oci-layout")
            .map_err(not_layout)?
            .read_all(64 << 10)?;
        let marker: Marker = serde_json::from_slice(&marker).map_err(|e| {
            SourceError::archive(path, format!("oci-layout is not what it should be: {e}"))
        })?;
        if !marker.image_layout_version.starts_with("1.") {
            let reason = format!(
                "layout version {:?} is not known",
                marker.image_layout_version
            );
            return Err(SourceError::archive(path, reason));
        }
        let bytes = store.open("index.json")?.read_all(MANIFEST_MAX)?;
        let error = |source| SourceError::Manifest {
            what: format!("{}/index.json", path.display()),
            source,
        };
        match Manifest::parse(&bytes, Some(media::OCI_INDEX)).map_err(error)? {
            Manifest::Index(index) => Ok(Self { store, index }),
            Manifest::Image(_) => Err(SourceError::archive(
                path,
                "index.json is not a list of images",
            )),
        }
    }

    /// The image called `tag`, or the only one, and what it is called.
    pub(crate) fn root(&self, tag: Option<&str>) -> Result<(Root, Option<String>), SourceError> {
        let all = &self.index.manifests;
        let not_found = |what: &str| SourceError::NotFound {
            what: format!("{what}; there is: {}", self.names()),
            at: self.store.path().display().to_string(),
        };
        let chosen: Vec<&Descriptor> = match tag {
            Some(tag) => all.iter().filter(|entry| is_called(entry, tag)).collect(),
            None => all.iter().collect(),
        };
        let name = |entry: &Descriptor| entry_name(entry).map(str::to_owned);
        match chosen[..] {
            [] if all.is_empty() => Err(SourceError::archive(
                self.store.path(),
                "the layout holds no image",
            )),
            [] => Err(not_found(&format!("image {:?}", tag.unwrap_or_default()))),
            [one] => Ok((
                Root::One(one.clone()),
                name(one).or_else(|| tag.map(str::to_owned)),
            )),
            [first, ..] => {
                let same = chosen
                    .iter()
                    .all(|entry| entry_name(entry) == entry_name(first));
                if same && chosen.iter().all(|entry| entry.digest == first.digest) {
                    return Ok((Root::One(first.clone()), name(first)));
                }
                if !same || chosen.iter().any(|entry| entry.platform.is_none()) {
                    return Err(not_found("single image: give its name after a colon"));
                }
                let manifests = chosen.into_iter().cloned().collect();
                let media_type = self.index.media_type.clone();
                let name = name(first);
                Ok((
                    Root::ByPlatform(Index {
                        media_type,
                        manifests,
                        unusable: Vec::new(),
                    }),
                    name,
                ))
            }
        }
    }

    /// The blob called `digest`.
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Slice, SourceError> {
        self.store.open(&format!("blobs/sha256/{}", digest.hex()))
    }

    /// The archive or directory, for messages.
    pub(crate) fn path(&self) -> &std::path::Path {
        self.store.path()
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self
            .index
            .manifests
            .iter()
            .filter_map(entry_name)
            .take(40)
            .collect();
        if names.is_empty() {
            "only images without names".to_owned()
        } else {
            names.join(", ")
        }
    }
}

/// The fullest name of an entry.
fn entry_name(entry: &Descriptor) -> Option<&str> {
    [FULL_NAME, REF_NAME]
        .into_iter()
        .find_map(|key| entry.annotations.get(key))
        .map(String::as_str)
        .filter(|name| !name.is_empty() && name.len() <= 512)
}

fn is_called(entry: &Descriptor, tag: &str) -> bool {
    [REF_NAME, FULL_NAME]
        .into_iter()
        .filter_map(|key| entry.annotations.get(key))
        .any(|name| {
            name == tag
                || name
                    .rsplit_once(':')
                    .is_some_and(|(_, last)| last == tag && !last.contains('/'))
        })
}
