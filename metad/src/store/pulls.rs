//! Pulls, what they pin, and how those that ended were answered.

use rusqlite::OptionalExtension;

use super::{Read, Tx, from_sql, to_sql};
use crate::error::{Error, Hash};

/// Answers that are kept for clients that lost them.
const DONE_KEPT: i64 = 1024;

/// A pull under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PullRow {
    pub(crate) id: u64,
    pub(crate) token: u64,
    pub(crate) what: String,
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Wanted of each pack that it writes; 0 for the default.
    pub(crate) replicas: u32,
}

/// A pull that was committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DoneRow {
    pub(crate) token: u64,
    /// Digest of what was asked.
    pub(crate) request: Hash,
    pub(crate) generation: u64,
}

impl Read<'_> {
    /// All pulls under way.
    pub(crate) fn pulls(&self) -> Result<Vec<PullRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT id, token, what, host, pid, replicas FROM pulls ORDER BY id")?;
        let rows = ask.query_map([], |row| {
            Ok(PullRow {
                id: from_sql(row.get(0)?),
                token: from_sql(row.get(1)?),
                what: row.get(2)?,
                host: row.get(3)?,
                pid: row.get(4)?,
                replicas: row.get(5)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// How a pull was answered.
    pub(crate) fn done(&self, pull: u64) -> Result<Option<DoneRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT token, request, generation FROM done WHERE pull = ?1")?;
        let row = ask.query_row([to_sql(pull)], |row| {
            Ok(DoneRow {
                token: from_sql(row.get(0)?),
                request: row.get(1)?,
                generation: from_sql(row.get(2)?),
            })
        });
        Ok(row.optional()?)
    }

    /// Packs that a pull holds on to.
    pub(crate) fn pins_of(&self, pull: u64) -> Result<Vec<u64>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT pack FROM pins WHERE pull = ?1")?;
        let rows = ask.query_map([to_sql(pull)], |row| row.get(0).map(from_sql))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Whether a pull holds on to a layer.
    pub(crate) fn layer_pinned_by(&self, pull: u64, layer: u64) -> Result<bool, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM layer_pins WHERE pull = ?1 AND layer = ?2)",
        )?;
        Ok(ask.query_row([to_sql(pull), to_sql(layer)], |row| row.get(0))?)
    }

    /// Bytes that a pull has reserved, as they count in the pool.
    pub(crate) fn reserved_bytes(&self, pull: u64) -> Result<u64, Error> {
        let extents = self.extents_of_pull(pull)?;
        Ok(extents.iter().map(|extent| extent.place.held_bytes()).sum())
    }
}

impl Tx<'_> {
    /// A new pull.
    pub(crate) fn add_pull(&self, pull: &PullRow) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO pulls (id, token, what, host, pid, replicas) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        add.execute((
            to_sql(pull.id),
            to_sql(pull.token),
            &pull.what,
            &pull.host,
            pull.pid,
            pull.replicas,
        ))?;
        Ok(())
    }

    /// Ends a pull: its pins go with it. Its extents and staged layers must be gone.
    pub(crate) fn delete_pull(&self, pull: u64) -> Result<(), Error> {
        self.connection
            .prepare_cached("DELETE FROM pulls WHERE id = ?1")?
            .execute([to_sql(pull)])?;
        Ok(())
    }

    /// Remembers an answer, and forgets the oldest.
    pub(crate) fn add_done(&self, pull: u64, done: &DoneRow) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO done (pull, token, request, generation) VALUES (?1, ?2, ?3, ?4)",
        )?;
        add.execute((
            to_sql(pull),
            to_sql(done.token),
            done.request,
            to_sql(done.generation),
        ))?;
        let mut prune = self.connection.prepare_cached(
            "DELETE FROM done WHERE pull <= (SELECT pull FROM done ORDER BY pull DESC LIMIT 1 OFFSET ?1)",
        )?;
        prune.execute([DONE_KEPT])?;
        Ok(())
    }

    /// Makes a pull hold on to a layer.
    pub(crate) fn pin_layer(&self, pull: u64, layer: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO layer_pins (pull, layer) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(pull), to_sql(layer)])?;
        Ok(())
    }

    /// Makes a pull hold on to all packs of a layer.
    pub(crate) fn pin_packs_of_layer(&self, pull: u64, layer: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO pins (pull, pack) SELECT ?1, pack FROM layer_packs WHERE layer = ?2
             ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(pull), to_sql(layer)])?;
        Ok(())
    }

    /// Writes down that an index is on disk, and that a pull needs it.
    pub(crate) fn add_index(&self, pull: u64, digest: &Hash, len: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO indexes (digest, len) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        add.execute((digest, to_sql(len)))?;
        let mut pin = self.connection.prepare_cached(
            "INSERT INTO index_pins (pull, digest) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        pin.execute((to_sql(pull), digest))?;
        Ok(())
    }
}
