//! What containerd is to mount for a snapshot.
//!
//! A mount's options go through mount(2), which takes a page of them. So the fast view of an image stands for
//! all of its layers where this host has it mounted, layers' directories have short names, and where that is
//! not enough every lower directory goes by a link of a few characters in the run directory. They all lie in
//! one directory then, so that where even that is too long containerd, which names lower directories from the
//! one that they share, has still less to say.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use harbour_image::digest::Digest;

use super::{
    known::Known,
    proto::types::Mount,
    store::Store,
    table::{Kind, Record},
};
use crate::{config, node::views::is_mounted};

/// What mount(2) takes of options: a page less the terminating zero (mount(2), `data`).
const OPTIONS_MAX: usize = 4095;

/// Layers that one overlay can have (Linux, `OVL_MAX_STACK`).
const LAYERS_MAX: usize = 500;

/// Hex digits of a link's name.
const LINK_LEN: usize = 8;

/// Where layers and views are on this host.
#[derive(Clone, Debug)]
pub struct Places {
    mount: PathBuf,
    views: PathBuf,
    links: PathBuf,
    /// The kernel knows the option `index`, which is for upper directories that no other host has, and
    /// is switched off as containerd does, so that an upper directory can be used again after a restart.
    index_off: bool,
}

/// A directory below a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lower {
    /// The directory.
    pub dir: PathBuf,
    /// The layer that it is, when it is the mount's.
    pub layer: Option<Digest>,
}

/// Why there is nothing to mount.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// A layer is not where it should be.
    #[error("layer {layer} is not at {dir}: {source}", dir = dir.display())]
    Missing {
        /// The layer.
        layer: Digest,
        /// Where it should be.
        dir: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
    /// More than the kernel takes.
    #[error("{0} layers are more than one overlay can have: at most {LAYERS_MAX}")]
    TooMany(usize),
    /// The links cannot be made.
    #[error("cannot make short names in {dir}: {source}", dir = dir.display())]
    Links {
        /// Where.
        dir: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
}

impl Places {
    /// Those of this host.
    ///
    /// # Errors
    /// A path with a character that ends a mount option.
    pub fn new(places: &config::Places) -> anyhow::Result<Self> {
        for dir in [&places.mount, &places.run, &places.state] {
            let text = dir.to_string_lossy();
            anyhow::ensure!(
                !text.contains([',', ':', '\\']),
                "{text:?} has a comma, colon or backslash, which containerd cannot mount"
            );
        }
        Ok(Self {
            mount: places.mount.clone(),
            views: places.views(),
            links: places.run.join("l"),
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
        })
    }

    /// Directory of a layer.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.mount.join("layers").join(diff_id.short())
    }

    /// Whether the mount shows a layer. Blocks as long as the mount does.
    ///
    /// # Errors
    /// What the file system says.
    pub fn check(&self, diff_id: &Digest) -> io::Result<()> {
        fs::metadata(self.layer(diff_id)).map(drop)
    }

    /// The directories that a snapshot with `below` it stands on, the highest first.
    ///
    /// # Errors
    /// [`MountsError::Missing`].
    pub fn lower(
        &self,
        store: &Store,
        below: &[Record],
        known: &Known,
    ) -> Result<Vec<Lower>, MountsError> {
        let view = self.view(below, known);
        let mut lower: Vec<Lower> = Vec::new();
        for (at, record) in below.iter().enumerate() {
            if let Some((from, dir)) = &view
                && *from == at
            {
                lower.push(Lower {
                    dir: dir.clone(),
                    layer: None,
                });
                break;
            }
            let dir = match &record.layer {
                Some(layer) => self.layer(layer),
                None => store.dir_of(record.id).join("fs"),
            };
            // A layer that an image has twice counts where it is highest.
            if lower.iter().any(|above| above.dir == dir) {
                continue;
            }
            if let Some(layer) = record.layer {
                self.check(&layer).map_err(|source| {
                    let dir = dir.clone();
                    MountsError::Missing { layer, dir, source }
                })?;
            }
            lower.push(Lower {
                dir,
                layer: record.layer,
            });
        }
        Ok(lower)
    }

    /// The fast view that stands for most of the layers, and the first record that it stands for.
    fn view(&self, below: &[Record], known: &Known) -> Option<(usize, PathBuf)> {
        let mut found = None;
        let mut chain = None;
        for (at, record) in below.iter().enumerate().rev() {
            let top = record.layer?.chained(chain);
            let dirs = known.images(&top).iter();
            let mut dirs = dirs.map(|manifest| self.views.join(manifest.short()));
            if let Some(dir) = dirs.find(|dir| is_mounted(dir)) {
                found = Some((at, dir));
            }
            if at == 0 {
                return found;
            }
            // What stands higher and has files of its own ends the chain, and not the search.
            if below[at - 1].layer.is_none() {
                return found;
            }
            chain = Some(top);
        }
        found
    }

    /// What to mount for `record` on `lower`; `dir` is its own directory.
    ///
    /// # Errors
    /// More layers than fit, or no room for links.
    pub fn mounts(
        &self,
        record: &Record,
        lower: &[Lower],
        dir: &Path,
    ) -> Result<Vec<Mount>, MountsError> {
        let writable = record.kind == Kind::Active;
        let one = match lower {
            [] => Some((dir.join("fs"), writable)),
            [only] if !writable => Some((only.dir.clone(), false)),
            _ => None,
        };
        if let Some((source, writable)) = one {
            let mode = if writable { "rw" } else { "ro" };
            return Ok(vec![mount(
                "bind",
                &source,
                vec![mode.to_owned(), "rbind".to_owned()],
            )]);
        }
        if lower.len() > LAYERS_MAX {
            return Err(MountsError::TooMany(lower.len()));
        }
        let upper = writable.then_some(dir);
        let dirs: Vec<PathBuf> = lower.iter().map(|lower| lower.dir.clone()).collect();
        let mut options = self.options(upper, &dirs);
        if length(&options) > OPTIONS_MAX {
            options = self.options(upper, &self.short(lower)?);
        }
        Ok(vec![mount("overlay", Path::new("overlay"), options)])
    }

    fn options(&self, upper: Option<&Path>, lower: &[PathBuf]) -> Vec<String> {
        let mut options = Vec::new();
        if self.index_off {
            options.push("index=off".to_owned());
        }
        if let Some(dir) = upper {
            options.push(format!("workdir={}", dir.join("work").display()));
            options.push(format!("upperdir={}", dir.join("fs").display()));
        }
        let lower: Vec<String> = lower.iter().map(|dir| dir.display().to_string()).collect();
        options.push(format!("lowerdir={}", lower.join(":")));
        options
    }

    /// Links with short names in place of directories.
    fn short(&self, lower: &[Lower]) -> Result<Vec<PathBuf>, MountsError> {
        let failed = |source| MountsError::Links {
            dir: self.links.clone(),
            source,
        };
        fs::create_dir_all(&self.links).map_err(failed)?;
        let links = lower.iter().map(|lower| self.link(&lower.dir));
        links.collect::<io::Result<_>>().map_err(failed)
    }

    /// Takes away links of snapshots that are gone. One that is wanted again is made again.
    pub fn sweep(&self) {
        for entry in fs::read_dir(&self.links).into_iter().flatten().flatten() {
            let link = entry.path();
            let dir = fs::read_link(&link).unwrap_or_default();
            // The mount may not answer, and has no more layers than there are.
            if !dir.starts_with(&self.mount) && fs::metadata(&dir).is_err() {
                drop(fs::remove_file(link));
            }
        }
    }

    /// A link to `dir`, named by the beginning of its hash: as much of it as nothing else is named by.
    fn link(&self, dir: &Path) -> io::Result<PathBuf> {
        let name = Digest::of(dir.as_os_str().as_encoded_bytes()).hex();
        for len in (LINK_LEN..=name.len()).step_by(4) {
            let link = self.links.join(&name[..len]);
            // Whoever else makes it at the same time makes the same one.
            match symlink(dir, &link) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done.map(|()| link),
            }
            if fs::read_link(&link)? == dir {
                return Ok(link);
            }
        }
        Err(io::Error::other("all names are taken"))
    }
}

fn mount(kind: &str, source: &Path, options: Vec<String>) -> Mount {
    Mount {
        r#type: kind.to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options,
    }
}

/// As mount(2) gets them: those that are flags are counted too, which is a little more than it is.
fn length(options: &[String]) -> usize {
    options.iter().map(|option| option.len() + 1).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::{
            store::Wanted,
            table::{Labels, Usage},
        },
        *,
    };

    fn places(dir: &Path) -> Places {
        Places {
            mount: dir.join("mount"),
            views: dir.join("view"),
            links: dir.join("l"),
            index_off: false,
        }
    }

    fn record(id: u64, kind: Kind) -> Record {
        Record {
            id,
            name: id.to_string(),
            parent: String::new(),
            kind,
            labels: Labels::new(),
            created_ns: 0,
            updated_ns: 0,
            layer: None,
            usage: Usage::default(),
        }
    }

    #[test]
    fn what_is_mounted_fits_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let lower = |count: u64, name: &str| -> Vec<Lower> {
            let lower = |id| Lower {
                dir: dir.path().join(format!("{name}-{id}")),
                layer: None,
            };
            (0..count).map(lower).collect()
        };
        let own = dir.path().join("own");
        let [bind] = &places.mounts(&record(1, Kind::Active), &[], &own).unwrap()[..] else {
            panic!("one mount");
        };
        assert_eq!(
            (bind.r#type.as_str(), &bind.options[..]),
            ("bind", &["rw".into(), "rbind".into()][..])
        );
        let [bind] = &places
            .mounts(&record(1, Kind::View), &lower(1, "a"), &own)
            .unwrap()[..]
        else {
            panic!("one mount");
        };
        assert_eq!(
            (bind.r#type.as_str(), bind.options[0].as_str()),
            ("bind", "ro")
        );
        let few = places
            .mounts(&record(1, Kind::Active), &lower(3, "a"), &own)
            .unwrap();
        assert!(
            few[0]
                .options
                .iter()
                .any(|o| o.ends_with("a-2") && o.starts_with("lowerdir=/"))
        );
        let long = "x".repeat(50);
        let many = places
            .mounts(&record(1, Kind::Active), &lower(100, &long), &own)
            .unwrap();
        assert!(length(&many[0].options) <= OPTIONS_MAX, "{many:?}");
        assert_eq!(fs::read_dir(dir.path().join("l")).unwrap().count(), 100);
        // The same again are the same, and a name that something else has is passed over.
        let [first, other] = ["a", "b"].map(Path::new);
        let link = places.link(first).unwrap();
        assert_eq!(places.link(first).unwrap(), link);
        fs::remove_file(&link).unwrap();
        symlink(other, &link).unwrap();
        let longer = places.link(first).unwrap();
        assert!(longer != link && fs::read_link(&longer).unwrap() == first);
        let kept = places.link(dir.path()).unwrap();
        places.sweep();
        assert!(fs::symlink_metadata(&longer).is_err() && kept.exists());
        let most = places.mounts(&record(1, Kind::Active), &lower(501, &long), &own);
        assert!(matches!(most, Err(MountsError::TooMany(501))));
    }

    #[test]
    fn a_layer_that_is_away_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let store = Store::open(&dir.path().join("state")).unwrap();
        let [a, b] = [b"a", b"b"].map(|text| Digest::of(text));
        fs::create_dir_all(places.layer(&a)).unwrap();
        let one = store.adopt("one", "", Labels::new(), a).unwrap();
        let two = store.adopt("two", "one", Labels::new(), b).unwrap();
        let wanted = Wanted {
            kind: Kind::Active,
            key: "key".to_owned(),
            parent: "two".to_owned(),
            labels: Labels::new(),
        };
        store.create(wanted, None).unwrap();
        let (_, below) = store.with_below("key").unwrap();
        assert_eq!(below, [two, one]);
        let away = places.lower(&store, &below, &Known::default());
        assert!(matches!(away, Err(MountsError::Missing { layer, .. }) if layer == b));
        fs::create_dir_all(places.layer(&b)).unwrap();
        let lower = places.lower(&store, &below, &Known::default()).unwrap();
        let dirs: Vec<_> = lower.into_iter().map(|lower| lower.dir).collect();
        assert_eq!(dirs, [places.layer(&b), places.layer(&a)]);
    }
}
