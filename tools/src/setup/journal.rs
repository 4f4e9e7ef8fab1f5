//! What there was before engines were set up, so that it can be put back byte for byte.
//!
//! `STATE/setup/ENGINE/record.json` lists files; what they held lies beside it. Both are on the disk before
//! the first file changes. Where a process ended in the middle each file still is what the record says was
//! there before or what it says came after, and either way the record tells what to do.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{
    Engine,
    files::{self, Attributes, Found, Staged},
};
use crate::failure::{self, Code};

const RECORD: &str = "record.json";

/// One file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// What was there; `None` when nothing was.
    pub before: Option<Kept>,
    /// Digest of what we put there. The same as before where it had all that was needed.
    pub after: String,
    /// Directories that were made for it.
    pub made: Vec<PathBuf>,
    /// Whether somebody changed it between two of our own changes.
    #[serde(default)]
    pub changed_between: bool,
}

/// A file that is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Its digest, which is its name here too.
    pub digest: String,
    /// Mode and owner.
    #[serde(flatten)]
    pub attributes: Attributes,
}

/// What was done to one engine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// When, in seconds since 1970.
    pub made_unix: i64,
    /// Its files.
    pub files: Vec<Entry>,
}

/// The records of all engines, held alone while it lives.
pub struct Journal {
    dir: PathBuf,
    _lock: Flock<fs::File>,
}

/// What undoing means for one file.
#[derive(Debug, PartialEq, Eq)]
pub enum Undo {
    /// It is as it was.
    Nothing,
    /// The old one goes back.
    Restore,
    /// There was none.
    Remove,
    /// Somebody changed it since.
    Changed,
}

impl Journal {
    /// Opens what is kept below a state directory.
    ///
    /// # Errors
    /// A directory that cannot be written to, or another process that is at it.
    pub fn open(state: &Path) -> anyhow::Result<Self> {
        let dir = state.join("setup");
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&dir);
        let cannot = |error: io::Error| {
            let denied = error.kind() == io::ErrorKind::PermissionDenied;
            let next = if denied {
                "run it with sudo"
            } else {
                "give another --state-dir"
            };
            let what = format!(
                "cannot keep what was there before in {}: {error}",
                dir.display()
            );
            failure::failure(Code::Failed, what, next)
        };
        made.map_err(cannot)?;
        let mut options = fs::OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(dir.join("lock")).map_err(cannot)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            failure::failure(
                Code::Failed,
                "another harbour setup is under way",
                "wait for it to end",
            )
        })?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where what belongs to an engine is kept.
    pub fn home(&self, engine: Engine) -> PathBuf {
        self.dir.join(engine.name())
    }

    /// The record of an engine, if it was set up.
    ///
    /// # Errors
    /// A record that is damaged.
    pub fn record(&self, engine: Engine) -> anyhow::Result<Option<Record>> {
        read(&self.home(engine))
    }

    /// Notes that files are about to become something else, over what was noted before.
    ///
    /// # Errors
    /// A full disk.
    pub fn note(&self, engine: Engine, changes: &[(&Found, &str)]) -> anyhow::Result<()> {
        let mut record = self.record(engine)?.unwrap_or_default();
        record.made_unix = crate::output::now_unix();
        let home = self.home(engine);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&home)
            .with_context(|| format!("cannot create {}", home.display()))?;
        for (found, after) in changes {
            let after = files::digest(after);
            let mut made = found.missing_dirs();
            let known = record.files.iter_mut().find(|e| e.path == found.path);
            if let Some(known) = known {
                // Where it was put back by hand, it begins anew below.
                if found.digest() != known.before.as_ref().map(|kept| kept.digest.clone()) {
                    known.changed_between |= found.digest().as_ref() != Some(&known.after);
                    known.after = after;
                    continue;
                }
                // Made by a process that was killed before it came to the file.
                made = known.made.drain(..).chain(made).collect();
            }
            let before = match &found.text {
                None => None,
                Some(text) => {
                    let digest = files::digest(text);
                    store(&home.join(&digest), text.as_bytes())?;
                    let attributes = found.attributes;
                    Some(Kept { digest, attributes })
                }
            };
            record.files.retain(|entry| entry.path != found.path);
            record.files.push(Entry {
                path: found.path.clone(),
                before,
                after,
                made,
                changed_between: false,
            });
        }
        store(&home.join(RECORD), &serde_json::to_vec_pretty(&record)?)
    }

    /// Takes back what was just noted, as nothing came of it.
    ///
    /// # Errors
    /// A full disk.
    pub fn reset(&self, engine: Engine, earlier: Option<&Record>) -> anyhow::Result<()> {
        match earlier {
            None => self.forget(engine),
            Some(earlier) => {
                let record = serde_json::to_vec_pretty(earlier)?;
                store(&self.home(engine).join(RECORD), &record)
            }
        }
    }

    /// Other engines that were set up later and need a file of this one's record as it is.
    ///
    /// # Errors
    /// A record that is damaged.
    pub fn needed_by(&self, engine: Engine, entry: &Entry) -> anyhow::Result<Option<Engine>> {
        for other in Engine::ALL.into_iter().filter(|other| *other != engine) {
            let Some(record) = self.record(other)? else {
                continue;
            };
            let stands_on = |theirs: &Entry| {
                theirs.path == entry.path
                    && theirs
                        .before
                        .as_ref()
                        .is_some_and(|kept| kept.digest == entry.after)
            };
            if record.files.iter().any(stands_on) {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    /// What undoing means for a file as it is now.
    pub fn undo(entry: &Entry, now: &Found) -> Undo {
        let now = now.digest();
        let before = entry.before.as_ref().map(|kept| kept.digest.clone());
        // One that had all that was needed was never changed.
        if now == before || before.as_ref() == Some(&entry.after) {
            Undo::Nothing
        } else if now.as_ref() != Some(&entry.after) || entry.changed_between {
            Undo::Changed
        } else if entry.before.is_some() {
            Undo::Restore
        } else {
            Undo::Remove
        }
    }

    /// The text that was there before.
    ///
    /// # Errors
    /// What was kept is gone or damaged.
    pub fn before(&self, engine: Engine, kept: &Kept) -> anyhow::Result<String> {
        let path = self.home(engine).join(&kept.digest);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("cannot read what was kept, {}", path.display()))?;
        anyhow::ensure!(
            files::digest(&text) == kept.digest,
            "what was kept in {} is damaged",
            path.display()
        );
        Ok(text)
    }

    /// Puts one file back, whatever it is now.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn put_back(&self, engine: Engine, entry: &Entry, now: &Found) -> anyhow::Result<()> {
        match &entry.before {
            Some(kept) => {
                let text = self.before(engine, kept)?;
                Staged::new(now, &text, kept.attributes)?.commit()
            }
            None => files::remove(&entry.path, &entry.made),
        }
    }

    /// Keeps a file that is about to be lost; gives where.
    ///
    /// # Errors
    /// A full disk.
    pub fn save(&self, now: &Found) -> anyhow::Result<Option<PathBuf>> {
        let Some(text) = &now.text else {
            return Ok(None);
        };
        let name = now.path.file_name().unwrap_or_default().to_string_lossy();
        let path = self
            .dir
            .join(format!("{name}.{}", &files::digest(text)[..12]));
        store(&path, text.as_bytes())?;
        Ok(Some(path))
    }

    /// Forgets an engine whose files are as they were.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn forget(&self, engine: Engine) -> anyhow::Result<()> {
        let home = self.home(engine);
        // The record first: without it what is left means nothing.
        for path in [home.join(RECORD), home.clone()] {
            let gone = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => files::sync_dir(&self.dir),
            }
        }
        Ok(())
    }
}

/// Whether an engine was set up, for who only looks.
pub fn is_noted(state: &Path, engine: Engine) -> bool {
    state
        .join("setup")
        .join(engine.name())
        .join(RECORD)
        .exists()
}

fn read(home: &Path) -> anyhow::Result<Option<Record>> {
    let path = home.join(RECORD);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let record = serde_json::from_slice(&text).map_err(|error| {
        failure::failure(
            Code::Failed,
            format!("{} is damaged: {error}", path.display()),
            format!(
                "what was kept is in {}: put it back by hand",
                home.display()
            ),
        )
    })?;
    Ok(Some(record))
}

/// Writes a file of ours, whole or not at all, down to the disk.
fn store(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let write = || {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    files::sync_dir(path.parent().unwrap_or(Path::new("/")));
    Ok(())
}
