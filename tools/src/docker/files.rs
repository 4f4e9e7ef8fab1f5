//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;

/// Where new files lie until they are whole: on the file system on which they are to be.
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// A directory of which nobody else knows. What earlier ones left there goes.
    pub(super) fn new(dir: PathBuf) -> anyhow::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.with_context(|| format!("cannot empty {}", dir.display()))?,
        }
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// A path at which nothing is.
    pub(super) fn fresh(&self) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.dir
            .join(NEXT.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// Puts `bytes` where whatever is at `path` was. Not on the disk yet: see [`sync`].
    pub(super) fn replace(&self, path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
        let new = self.fresh();
        write(&new, bytes, mode)?;
        self.rename(&new, path)
    }

    /// Puts a link to `target` where whatever is at `path` was.
    pub(super) fn link(&self, target: &Path, path: &Path) -> anyhow::Result<()> {
        let new = self.fresh();
        std::os::unix::fs::symlink(target, &new)
            .with_context(|| format!("cannot make the link {}", path.display()))?;
        self.rename(&new, path)
    }

    /// Moves something of ours to its place, whose directory is made.
    pub(super) fn rename(&self, new: &Path, path: &Path) -> anyhow::Result<()> {
        let why = || format!("cannot write {}", path.display());
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        fs::rename(new, path).with_context(why)
    }

    /// Takes away what is at `path`, which is out of sight in one step.
    pub(super) fn remove(&self, path: &Path) -> anyhow::Result<()> {
        let old = self.fresh();
        let why = || format!("cannot remove {}", path.display());
        match fs::rename(path, &old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.with_context(why)?,
        }
        match fs::symlink_metadata(&old).with_context(why)?.is_dir() {
            true => fs::remove_dir_all(&old).with_context(why),
            false => fs::remove_file(&old).with_context(why),
        }
    }
}

/// A new file. Not on the disk yet: see [`sync`].
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let write = || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        // Whatever the umask is.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A directory as Docker makes them: for root alone.
pub(super) fn make_dir(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// What is in a file of at most `most` bytes; `None` where there is none.
pub(super) fn read(path: &Path, most: u64) -> anyhow::Result<Option<Vec<u8>>> {
    let why = || format!("cannot read {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(why)?,
    };
    let mut bytes = Vec::new();
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .with_context(why)?;
    anyhow::ensure!(
        bytes.len() as u64 <= most,
        "{} has more than {most} bytes",
        path.display()
    );
    Ok(Some(bytes))
}

/// Names in a directory, in order; none where it is missing.
pub(super) fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    let why = || format!("cannot list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(why)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.with_context(why)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// Everything that was written to the file system of `dir` is on its disk when this returns: one call
/// where thousands of small files would need one each.
pub(super) fn sync(dir: &Path) -> anyhow::Result<()> {
    let sync = || rustix::fs::syncfs(File::open(dir)?).map_err(io::Error::from);
    sync().with_context(|| format!("cannot write {} out", dir.display()))
}
