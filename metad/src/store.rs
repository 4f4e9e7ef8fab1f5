//! The state directory: a SQLite database, index files, a lock file. All SQL is here and below.
//!
//! # Locking
//! One process owns a state directory, by an exclusive `flock` on `STATE/lock` that ends with it.
//! Inside, there is one [`Writer`], which the engine keeps behind its own lock, so write
//! transactions never meet and never see `SQLITE_BUSY`. Readers have a pool of read-only
//! connections: in WAL mode they work on the snapshot of their first statement and wait neither
//! for the writer nor it for them.
//!
//! Transactions are `BEGIN IMMEDIATE` with `synchronous=NORMAL`: a transaction that was answered
//! survives the death of the process at any point, but a power cut can take back the last ones
//! (never a part of one, never an earlier without the later). Those that a person relies upon,
//! [`Sync::Full`], are synced before they are answered: a commit, a removed name, a new boot
//! number. A lost reservation or lease costs a pull, which begins again; its old id and token
//! mean nothing after a restart by power cut, because both carry the boot number.
//!
//! # Compatibility
//! `user_version` counts the migrations that were applied. Migrations are only ever appended. A
//! database with more than this program knows is refused, untouched.
//!
//! # Collection
//! What nothing refers to goes in the transaction that takes the last reference away, or in one of
//! the engine's rounds when a reader still held it: images without names, layers without images,
//! packs without either and without a pull's pin, documents, index rows. Index *files* are deleted
//! after that transaction; a crash between the two leaves an orphan that [`Store::open`] sweeps.

mod catalogue;
mod checkpoint;
mod copies;
mod donors;
mod failure;
mod files;
mod images;
mod layers;
mod locks;
mod packs;
mod pulls;
mod reads;
mod recount;
mod references;
mod schema;

pub use failure::DatabaseError;
use std::{
    fs::File,
    ops::Deref,
    path::{Path, PathBuf},
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use rusqlite::{Connection, OpenFlags, OptionalExtension, config::DbConfig};

pub(crate) use catalogue::CataloguePart;
use checkpoint::Checkpoints;
pub(crate) use copies::{CopyRow, Standing};
pub(crate) use donors::{DonorRow, RegionRow};
pub(crate) use files::{IndexDraft, IndexFiles};
pub(crate) use images::{ImageRow, NameRow};
pub(crate) use layers::{LayerRow, NewLayer};
pub(crate) use packs::{ExtentRow, ObjectRow, PackRow, QuarantineRow};
pub(crate) use pulls::{DoneRow, PullRow};
#[cfg(test)]
pub(crate) use recount::Falsehood;
pub(crate) use recount::{PackCount, Recount};

use crate::error::Error;

/// Read-only connections.
const READERS: usize = 4;

/// Longest that a reader waits for a free connection.
const READER_WAIT: Duration = Duration::from_secs(5);

/// Bytes of the database that are mapped, so that a lookup costs no system call.
const MMAP_BYTES: i64 = 4 << 30;

/// Page cache of the writer in KiB: digests are random, so the objects of one layer touch many
/// pages, which should not be written before the transaction ends.
const WRITER_CACHE_KIB: i64 = 64 << 10;

/// Counters that are kept, each only ever growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counter {
    /// Generation of the catalogue and of where packs lie.
    Generation,
    /// Generation of freed space.
    Freed,
    /// Numbers of layers and images.
    Number,
    /// Starts of the daemon on this directory.
    Boot,
    /// Packs evicted, for the figures.
    Evictions,
}

impl Counter {
    fn name(self) -> &'static str {
        match self {
            Self::Generation => "generation",
            Self::Freed => "freed",
            Self::Number => "number",
            Self::Boot => "boot",
            Self::Evictions => "evictions",
        }
    }
}

/// How long a transaction is known to live once it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sync {
    /// Through any death of the process.
    Process,
    /// Through a power cut too.
    Full,
}

/// An opened state directory.
#[derive(Debug)]
pub(crate) struct Store {
    readers: Readers,
    files: IndexFiles,
    database: PathBuf,
    _checkpoints: Checkpoints,
    /// Last: who opens the directory next finds nobody at work in it.
    _lock: File,
}

impl Store {
    /// Opens or creates the state in `folder`, brings its database to this version, and sweeps
    /// index files that no row names.
    ///
    /// # Errors
    /// [`Error::Refused`] when another process has it, or a newer version wrote it.
    pub(crate) fn open(folder: &Path) -> Result<(Self, Writer), Error> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let lock = lock(folder)?;
        let database = folder.join("metad.db");
        let mut connection = Connection::open(&database)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
        connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB)?;
        tune(&connection)?;
        schema::migrate(&mut connection, &database)?;
        let checkpoints = Checkpoints::open(&database, &mut connection)?;
        let writer = Writer { connection };
        let files = IndexFiles::open(&folder.join("index"))?;
        let readers = Readers::open(&database)?;
        let store = Self {
            readers,
            files,
            database,
            _checkpoints: checkpoints,
            _lock: lock,
        };
        store.read(|r| store.files.sweep(|digest| r.index_known(digest)))?;
        Ok((store, writer))
    }

    /// Runs `work` on one snapshot of the database.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Exhausted`] when no connection came free in time.
    pub(crate) fn read<T>(
        &self,
        work: impl FnOnce(&Read<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let connection = self.readers.take()?;
        let transaction = connection.unchecked_transaction()?;
        work(&Read {
            connection: &transaction,
        })
    }

    /// The index files.
    pub(crate) fn files(&self) -> &IndexFiles {
        &self.files
    }

    /// Bytes of the database and its journal on disk.
    pub(crate) fn database_bytes(&self) -> u64 {
        let mut journal = self.database.clone().into_os_string();
        journal.push("-wal");
        [self.database.clone(), journal.into()]
            .iter()
            .filter_map(|path| std::fs::metadata(path).ok())
            .map(|meta| meta.len())
            .sum()
    }
}

/// The one connection that writes.
#[derive(Debug)]
pub(crate) struct Writer {
    connection: Connection,
}

impl Writer {
    /// Runs `work` in one transaction: all of it, or, when it fails, nothing.
    pub(crate) fn transaction<T>(
        &mut self,
        sync: Sync,
        work: impl FnOnce(&Tx<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if sync == Sync::Full {
            self.connection.pragma_update(None, "synchronous", "full")?;
        }
        let done = (|| {
            let inner = self
                .connection
                .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let value = work(&Tx {
                read: Read { connection: &inner },
            })?;
            inner.commit()?;
            Ok(value)
        })();
        if sync == Sync::Full {
            self.connection
                .pragma_update(None, "synchronous", "normal")?;
        }
        done
    }

    /// Looks without writing, at what the last transaction left.
    pub(crate) fn read(&self) -> Read<'_> {
        Read {
            connection: &self.connection,
        }
    }
}

/// Questions; the methods are in the modules below.
#[derive(Debug)]
pub(crate) struct Read<'c> {
    connection: &'c Connection,
}

/// Questions and changes, inside a write transaction.
#[derive(Debug)]
pub(crate) struct Tx<'c> {
    read: Read<'c>,
}

impl<'c> Deref for Tx<'c> {
    type Target = Read<'c>;

    fn deref(&self) -> &Read<'c> {
        &self.read
    }
}

impl Read<'_> {
    /// A counter's value; 0 before its first use.
    pub(crate) fn counter(&self, counter: Counter) -> Result<u64, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT value FROM counters WHERE name = ?1")?;
        let value: Option<i64> = ask
            .query_row([counter.name()], |row| row.get(0))
            .optional()?;
        Ok(value.map_or(0, from_sql))
    }
}

impl Tx<'_> {
    /// Takes a counter on by `by` and gives its new value.
    pub(crate) fn bump(&self, counter: Counter, by: u64) -> Result<u64, Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO counters (name, value) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET value = value + ?2 RETURNING value",
        )?;
        Ok(from_sql(
            add.query_row((counter.name(), to_sql(by)), |row| row.get(0))?,
        ))
    }
}

/// SQLite's integers are signed; epochs use all 64 bits and come back as they went.
fn to_sql(value: u64) -> i64 {
    value as i64
}

fn from_sql(value: i64) -> u64 {
    value as u64
}

/// The connections of [`Store::read`].
#[derive(Debug)]
struct Readers {
    idle: Mutex<Vec<Connection>>,
    returned: Condvar,
}

/// A connection that goes back when dropped.
struct Taken<'r> {
    readers: &'r Readers,
    connection: Option<Connection>,
}

impl Readers {
    fn open(database: &Path) -> Result<Self, Error> {
        let open = || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(database, flags)?;
            connection.busy_timeout(READER_WAIT)?;
            tune(&connection)?;
            Ok(connection)
        };
        let idle = (0..READERS)
            .map(|_| open())
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Self {
            idle: Mutex::new(idle),
            returned: Condvar::new(),
        })
    }

    fn take(&self) -> Result<Taken<'_>, Error> {
        let mut idle = self.idle.lock();
        loop {
            if let Some(connection) = idle.pop() {
                return Ok(Taken {
                    readers: self,
                    connection: Some(connection),
                });
            }
            if self.returned.wait_for(&mut idle, READER_WAIT).timed_out() && idle.is_empty() {
                return Err(Error::Exhausted(format!(
                    "all {READERS} readers of the database are busy"
                )));
            }
        }
    }
}

impl Deref for Taken<'_> {
    type Target = Connection;

    #[allow(clippy::expect_used, reason = "only drop takes it out")]
    fn deref(&self) -> &Connection {
        self.connection.as_ref().expect("held until drop")
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.readers.idle.lock().push(connection);
            self.readers.returned.notify_one();
        }
    }
}

fn tune(connection: &Connection) -> Result<(), Error> {
    // A statement whose plan might depend on what is bound to it is compiled again with each binding,
    // which took most of a lookup's time. Ours name the conditions of partial indexes themselves.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.pragma_update(None, "mmap_size", MMAP_BYTES)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.set_prepared_statement_cache_capacity(128);
    Ok(())
}

fn lock(folder: &Path) -> Result<File, Error> {
    let path = folder.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::Refused(format!(
            "{} is in use by another metad: stop it, or choose another state directory",
            folder.display()
        ))),
        Err(std::fs::TryLockError::Error(source)) => Err(Error::Io { path, source }),
    }
}

#[cfg(test)]
mod tests;
