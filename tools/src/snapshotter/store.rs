//! Snapshots with their directories: `DIR/journal`, and `DIR/snapshots/N/{fs,work}` of each that has files.
//!
//! A directory is made before its snapshot is noted and goes after it is noted as gone, so what a kill leaves
//! is at most a directory that no snapshot has, which the next start takes away.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use harbour_image::digest::Digest;

use super::{
    journal::Journal,
    table::{Kind, Labels, Record, Refused, Table, Usage},
    usage,
};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be done.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The disk failed.
    #[error("{what}: {source}")]
    Disk {
        /// What was being done.
        what: String,
        /// What the file system said.
        source: io::Error,
    },
}

/// All snapshots of this host.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    table: Table,
    journal: Journal,
}

/// A snapshot that is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// Its key.
    pub key: String,
    /// What it is to stand on; empty for nothing.
    pub parent: String,
    /// Labels.
    pub labels: Labels,
}

impl Store {
    /// Opens what `dir` has, and takes away what no snapshot has there.
    ///
    /// # Errors
    /// What the file system says, or a damaged journal.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let at = disk(|| format!("cannot open the snapshots in {}", dir.display()));
        fs::create_dir_all(dir.join("snapshots")).map_err(&at)?;
        // What containers write is nobody else's to read.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(&at)?;
        let (journal, records) = Journal::open(&dir.join("journal")).map_err(&at)?;
        let mut table = Table::default();
        records.into_iter().for_each(|record| table.put(record));
        let store = Self {
            dir: dir.to_owned(),
            inner: Mutex::new(Inner { table, journal }),
        };
        store.sweep()?;
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Directory of a snapshot: `fs` in it has its files, `work` is the kernel's.
    pub fn dir_of(&self, id: u64) -> PathBuf {
        self.dir.join("snapshots").join(id.to_string())
    }

    /// The snapshot of this name.
    ///
    /// # Errors
    /// One that is not there.
    pub fn get(&self, name: &str) -> Result<Record, StoreError> {
        Ok(self.lock().table.get(name)?.clone())
    }

    /// The snapshot, and what it stands on, the nearest first.
    ///
    /// # Errors
    /// One that is not there.
    pub fn with_below(&self, name: &str) -> Result<(Record, Vec<Record>), StoreError> {
        let inner = self.lock();
        let record = inner.table.get(name)?.clone();
        let below = inner.table.below(&record)?;
        Ok((record, below))
    }

    /// Those for which `wanted` holds, by number.
    pub fn list(&self, wanted: impl Fn(&Record) -> bool) -> Vec<Record> {
        let inner = self.lock();
        let all = inner.table.all().filter(|record| wanted(record));
        let mut records: Vec<Record> = all.cloned().collect();
        records.sort_unstable_by_key(|record| record.id);
        records
    }

    /// How many there are, and how many of them are layers of the mount.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.lock();
        let layers = inner.table.all().filter(|record| record.layer.is_some());
        (inner.table.all().count(), layers.count())
    }

    /// Makes a snapshot with a directory of its own. `root` gives owner and mode of its root directory:
    /// those of what it stands on, as that is what the overlay shows.
    ///
    /// # Errors
    /// [`Refused`], or what the file system says.
    pub fn create(
        &self,
        wanted: Wanted,
        root: Option<&fs::Metadata>,
    ) -> Result<Record, StoreError> {
        let mut inner = self.lock();
        let Wanted {
            kind,
            key,
            parent,
            labels,
        } = wanted;
        let record = inner
            .table
            .new_snapshot(kind, &key, &parent, labels, now_ns())?;
        let dir = self.dir_of(record.id);
        let made = make(&dir, kind, root);
        let noted = made.and_then(|()| inner.journal.put(&record));
        if let Err(source) = noted {
            drop(fs::remove_dir_all(&dir));
            let what = format!("cannot make snapshot {key:?} in {}", dir.display());
            return Err(StoreError::Disk { what, source });
        }
        inner.table.put(record.clone());
        Ok(record)
    }

    /// Notes a layer of the mount as a committed snapshot, under `name`, or under another name when that one
    /// is taken by a snapshot that stands on something else.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn adopt(
        &self,
        name: &str,
        parent: &str,
        labels: Labels,
        layer: Digest,
    ) -> Result<Record, StoreError> {
        let mut inner = self.lock();
        let mut name = name.to_owned();
        while inner.table.get(&name).is_ok() {
            name.push('+');
        }
        let record = inner
            .table
            .new_snapshot(Kind::Committed, &name, parent, labels, now_ns())?;
        let record = Record {
            layer: Some(layer),
            ..record
        };
        let what = || format!("cannot note snapshot {name:?}");
        inner.journal.put(&record).map_err(disk(what))?;
        inner.table.put(record.clone());
        Ok(record)
    }

    /// Commits an active snapshot.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn commit(
        &self,
        name: &str,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Record, StoreError> {
        let id = self
            .lock()
            .table
            .committed(name, key, parent, labels.clone(), 0)?
            .id;
        // Counting takes its time, and nobody writes any more.
        let usage = self.count(id)?;
        let mut inner = self.lock();
        let record = inner.table.committed(name, key, parent, labels, now_ns())?;
        let record = Record { usage, ..record };
        let what = || format!("cannot commit snapshot {key:?}");
        inner.journal.put(&record).map_err(disk(what))?;
        inner.table.replace(key, record.clone());
        Ok(record)
    }

    /// Changes labels.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn relabel(
        &self,
        name: &str,
        labels: &Labels,
        paths: &[String],
    ) -> Result<Record, StoreError> {
        let mut inner = self.lock();
        let record = inner.table.relabelled(name, labels, paths, now_ns())?;
        let what = || format!("cannot change snapshot {name:?}");
        inner.journal.put(&record).map_err(disk(what))?;
        inner.table.replace(name, record.clone());
        Ok(record)
    }

    /// Takes a snapshot away, then its files.
    ///
    /// # Errors
    /// As [`Store::create`]. When only the files cannot be removed the snapshot is gone all the same.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let record = {
            let mut inner = self.lock();
            let id = inner.table.removable(name)?.id;
            let what = || format!("cannot remove snapshot {name:?}");
            inner.journal.gone(id).map_err(disk(what))?;
            let record = inner.table.take(name);
            let Inner { table, journal } = &mut *inner;
            if journal.is_long(table.all().count()) {
                journal.rewrite(table.all()).map_err(disk(what))?;
            }
            record
        };
        if let Some(record) = record.filter(|record| record.layer.is_none()) {
            let dir = self.dir_of(record.id);
            // The next sweep tries again: what is in use by a mount that is going away, say.
            if let Err(error) = fs::remove_dir_all(&dir) {
                tracing::warn!(dir = %dir.display(), %error, "files of a removed snapshot stay for now");
            }
        }
        Ok(())
    }

    /// What a snapshot takes of this host's disk.
    ///
    /// # Errors
    /// One that is not there, or what the file system says.
    pub fn usage(&self, name: &str) -> Result<Usage, StoreError> {
        let record = self.get(name)?;
        match record.kind {
            Kind::Committed => Ok(record.usage),
            Kind::Active | Kind::View => self.count(record.id),
        }
    }

    fn count(&self, id: u64) -> Result<Usage, StoreError> {
        let dir = self.dir_of(id).join("fs");
        let what = || format!("cannot count what {} takes", dir.display());
        usage::of(&dir).map_err(disk(what))
    }

    /// Takes away directories that no snapshot has; tells how many.
    ///
    /// # Errors
    /// What the file system says of the list of them.
    pub fn sweep(&self) -> Result<usize, StoreError> {
        let all = self.dir.join("snapshots");
        let what = || format!("cannot list {}", all.display());
        // A snapshot that is being made has its directory first, under the lock.
        let inner = self.lock();
        let alive: HashSet<u64> = inner.table.all().map(|record| record.id).collect();
        let entries = fs::read_dir(&all).map_err(disk(what))?.flatten();
        let dead: Vec<PathBuf> = entries
            .filter(|entry| {
                let id = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok());
                id.is_none_or(|id: u64| !alive.contains(&id))
            })
            .map(|entry| entry.path())
            .collect();
        drop(inner);
        for dir in &dead {
            if let Err(error) = fs::remove_dir_all(dir) {
                tracing::warn!(dir = %dir.display(), %error, "cannot take away what a removed snapshot left");
            }
        }
        Ok(dead.len())
    }
}

fn disk(what: impl Fn() -> String) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Disk {
        what: what(),
        source,
    }
}

fn make(dir: &Path, kind: Kind, root: Option<&fs::Metadata>) -> io::Result<()> {
    match fs::create_dir(dir) {
        // Left by one that was killed before it was noted.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_dir_all(dir)?;
            fs::create_dir(dir)?;
        }
        other => other?,
    }
    let files = dir.join("fs");
    fs::DirBuilder::new().mode(0o755).create(&files)?;
    if kind == Kind::Active {
        fs::DirBuilder::new().mode(0o711).create(dir.join("work"))?;
    }
    // Whatever the umask says.
    let mode = root.map_or(0o755, |root| root.mode() & 0o7777);
    fs::set_permissions(&files, fs::Permissions::from_mode(mode))?;
    if let Some(root) = root {
        chown(&files, Some(root.uid()), Some(root.gid()))?;
        // Owners take the bits for set-user-ID along.
        fs::set_permissions(&files, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn wanted(key: &str, parent: &str) -> Wanted {
        Wanted {
            kind: Kind::Active,
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: Labels::new(),
        }
    }

    #[test]
    fn snapshots_outlive_the_process_and_leave_nothing_when_they_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = store.create(wanted("a", ""), None).unwrap();
        fs::write(store.dir_of(a.id).join("fs/file"), [1; 10_000]).unwrap();
        fs::hard_link(
            store.dir_of(a.id).join("fs/file"),
            store.dir_of(a.id).join("fs/link"),
        )
        .unwrap();
        assert_eq!(store.usage("a").unwrap().inodes, 1);
        let one = store.commit("one", "a", None, Labels::new()).unwrap();
        assert!(
            one.usage.bytes >= 10_000 && one.usage.inodes == 1,
            "{one:?}"
        );
        let layer = Digest::of(b"layer");
        let remote = store.adopt("remote", "", Labels::new(), layer).unwrap();
        assert_eq!(store.usage("remote").unwrap(), Usage::default());
        // The name is taken by one that stands on something else.
        let other = store.adopt("remote", "one", Labels::new(), layer).unwrap();
        assert_ne!(other.name, remote.name);
        let root = fs::metadata("/tmp").unwrap();
        let b = store.create(wanted("b", "remote"), Some(&root)).unwrap();
        let made = fs::metadata(store.dir_of(b.id).join("fs")).unwrap();
        assert_eq!(made.mode() & 0o7777, root.mode() & 0o7777);
        drop(store);
        // As a kill leaves it: a directory that was not noted.
        fs::create_dir_all(dir.path().join("snapshots/77/fs")).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(!dir.path().join("snapshots/77").exists());
        let names: Vec<_> = store.list(|_| true).into_iter().map(|r| r.name).collect();
        assert_eq!(names, ["one", "remote", "remote+", "b"]);
        assert_eq!(store.get("one").unwrap(), one);
        assert!(store.remove("remote").is_err());
        for name in ["b", "remote", "remote+", "one"] {
            store.remove(name).unwrap();
        }
        assert_eq!(
            fs::read_dir(dir.path().join("snapshots")).unwrap().count(),
            0
        );
        assert_eq!(Store::open(dir.path()).unwrap().list(|_| true), []);
    }
}
