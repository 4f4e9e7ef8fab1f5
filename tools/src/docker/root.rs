//! A data-root: where its parts are, and whether it is one that we can serve.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use harbour_image::digest::Digest;
use serde::Deserialize;

use super::{daemon, files};
use crate::{
    bounded,
    failure::{self, Code},
};

/// Docker's configuration file, where nobody names another.
pub const DAEMON_JSON: &str = "/etc/docker/daemon.json";

/// Where Docker keeps everything, when that file does not say otherwise.
const DEFAULT: &str = "/var/lib/docker";

/// Largest configuration file.
const CONFIG_MAX: u64 = 1 << 20;

/// Longest wait for another `harbour docker` on the same data-root.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// The only driver whose layers can lie elsewhere by a link.
const DRIVER: &str = "overlay2";

/// What `daemon.json` says about its store.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct DaemonJson {
    data_root: Option<PathBuf>,
    storage_driver: Option<String>,
    userns_remap: Option<String>,
    features: Features,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Features {
    containerd_snapshotter: bool,
}

/// A data-root with the overlay2 driver.
#[derive(Clone, Debug)]
pub struct DataRoot {
    path: PathBuf,
}

impl DataRoot {
    /// The data-root at `asked`, else the one that the configuration file names.
    ///
    /// # Errors
    /// None there, or one whose images are not overlay2's.
    pub fn find(asked: Option<&Path>, daemon_json: &Path) -> anyhow::Result<Self> {
        let config: DaemonJson = match files::read(daemon_json, CONFIG_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is not as dockerd wants it", daemon_json.display()))?,
            None => DaemonJson::default(),
        };
        let configured = config.data_root.as_deref().unwrap_or(Path::new(DEFAULT));
        let path = asked.unwrap_or(configured);
        let path = fs::canonicalize(path).map_err(|error| {
            let what = format!("there is no data-root of Docker at {}", path.display());
            match error.kind() {
                io::ErrorKind::NotFound => failure::failure(
                    Code::NotFound,
                    what,
                    "start Docker once, or name its data-root: --data-root DIR",
                ),
                _ => anyhow::Error::new(error).context(what),
            }
        })?;
        // What the file says of another data-root says nothing of this one.
        if fs::canonicalize(configured).is_ok_and(|configured| configured == path) {
            check_config(&config, daemon_json)?;
        }
        let root = Self { path };
        root.check_driver()?;
        Ok(root)
    }

    /// A data-root for a test.
    #[cfg(test)]
    pub(super) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is ours in it.
    pub(super) fn own(&self) -> PathBuf {
        self.path.join("harbour")
    }

    /// Directories of the driver, one for each layer.
    pub(super) fn driver(&self) -> PathBuf {
        self.path.join(DRIVER)
    }

    /// Images and layers of that driver.
    pub(super) fn images(&self) -> PathBuf {
        self.path.join("image").join(DRIVER)
    }

    /// An image's config, by its digest.
    pub(super) fn content(&self, id: &Digest) -> PathBuf {
        self.images().join("imagedb/content/sha256").join(id.hex())
    }

    /// What Docker notes about an image, and takes away with it.
    pub(super) fn metadata(&self, id: &Digest) -> PathBuf {
        self.images().join("imagedb/metadata/sha256").join(id.hex())
    }

    /// The file that says that an image is there because of us.
    pub(super) fn mark(&self, id: &Digest) -> PathBuf {
        self.metadata(id).join("harbour")
    }

    /// The layer database.
    pub(super) fn layers(&self) -> PathBuf {
        self.images().join("layerdb/sha256")
    }

    /// Keeps other `harbour docker` out until the file is dropped.
    ///
    /// # Errors
    /// One that does not end.
    pub fn lock(&self) -> anyhow::Result<File> {
        // On the directory itself, so that nothing has to be left in it.
        let file = File::open(&self.path)
            .with_context(|| format!("cannot open {}", self.path.display()))?;
        match bounded::poll(LOCK_LIMIT, || file.try_lock().ok()) {
            Some(()) => Ok(file),
            None => Err(failure::failure(
                Code::Unavailable,
                format!(
                    "another harbour docker has been at work on {} for {} s",
                    self.path.display(),
                    LOCK_LIMIT.as_secs()
                ),
                "see what it does: ps -C harbour",
            )),
        }
    }

    /// What a daemon that runs on it says of its store has to be overlay2 too.
    ///
    /// # Errors
    /// Another driver.
    pub fn check_daemon(&self, info: &daemon::Info) -> anyhow::Result<()> {
        if info.is_containerd() {
            return Err(in_containerd("the running daemon"));
        }
        match info.driver.as_str() {
            DRIVER => Ok(()),
            other => Err(other_driver(other, "the running daemon")),
        }
    }

    fn check_driver(&self) -> anyhow::Result<()> {
        if self.path.join("image").join(DRIVER).exists() {
            return Ok(());
        }
        // Where a daemon has been, and has left no images of its own.
        let used = self.path.join("containers").exists() && !self.path.join("image").exists();
        if used || self.path.join("rootfs/overlayfs").exists() {
            return Err(in_containerd(&self.path.display().to_string()));
        }
        match files::names(&self.path.join("image"))?.first() {
            Some(other) => Err(other_driver(other, &self.path.display().to_string())),
            // One that has never been used becomes overlay2's.
            None => Ok(()),
        }
    }
}

fn check_config(config: &DaemonJson, file: &Path) -> anyhow::Result<()> {
    let file = file.display().to_string();
    if config.features.containerd_snapshotter {
        return Err(in_containerd(&file));
    }
    if let Some(other) = config.storage_driver.as_deref()
        && other != DRIVER
    {
        return Err(other_driver(other, &file));
    }
    if config
        .userns_remap
        .as_deref()
        .is_some_and(|to| !to.is_empty())
    {
        return Err(failure::failure(
            Code::Failed,
            format!(
                "{file} has userns-remap: that Docker's layers belong to other users than the image says"
            ),
            "the mount's directories cannot serve it; pull with docker there",
        ));
    }
    Ok(())
}

fn in_containerd(who: &str) -> anyhow::Error {
    failure::failure(
        Code::Failed,
        format!("{who} keeps images in containerd's store, not in the data-root"),
        "such a Docker takes images from the pool by harbour snapshotter: just docker pull",
    )
}

fn other_driver(driver: &str, who: &str) -> anyhow::Error {
    failure::failure(
        Code::Failed,
        format!(
            "{who} has the storage driver {driver}: only {DRIVER} can have layers in the mount"
        ),
        "set \"storage-driver\": \"overlay2\" in daemon.json, which begins an empty store beside it",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_overlay2_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (json, root) = (dir.path().join("daemon.json"), dir.path().join("root"));
        let find = |text: &str, asked: Option<&Path>| {
            fs::write(&json, text).unwrap();
            DataRoot::find(asked, &json).map_err(|error| error.to_string())
        };
        let text = |more: &str| format!("{{\"data-root\":{root:?}{more}}}");
        assert!(find(&text(""), None).unwrap_err().contains("no data-root"));
        fs::create_dir(&root).unwrap();
        assert_eq!(find(&text(""), None).unwrap().path(), root);
        let snapshotter = text(",\"features\":{\"containerd-snapshotter\":true}");
        assert!(find(&snapshotter, None).unwrap_err().contains("containerd"));
        let vfs = text(",\"storage-driver\":\"vfs\"");
        assert!(find(&vfs, None).unwrap_err().contains("vfs"));
        let remap = text(",\"userns-remap\":\"default\"");
        assert!(find(&remap, None).unwrap_err().contains("userns-remap"));
        assert!(find("{", None).is_err());
        // The file is about another data-root than the one that was asked for.
        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        assert!(find(&vfs, Some(&other)).is_ok());
        fs::create_dir(other.join("containers")).unwrap();
        let said = find("{}", Some(&other)).unwrap_err();
        assert!(said.contains("containerd"), "{said}");
        fs::create_dir_all(other.join("image/btrfs")).unwrap();
        assert!(find("{}", Some(&other)).unwrap_err().contains("btrfs"));
        fs::create_dir_all(other.join("image/overlay2")).unwrap();
        assert!(find("{}", Some(&other)).is_ok());
    }
}
