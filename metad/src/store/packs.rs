//! Packs, their objects, where they lie, and space that waits for readers.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, Row};

use super::{Read, Tx, from_sql, to_sql};
use crate::{
    error::{Error, Hash},
    space::Place,
};

/// A pack that is known, whether or not the pool has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackRow {
    pub(crate) id: u64,
    pub(crate) digest: Hash,
    pub(crate) len: u32,
    /// Some commit has made it known to readers.
    pub(crate) visible: bool,
}

/// A replica, or the space for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExtentRow {
    pub(crate) id: u64,
    pub(crate) pack: u64,
    /// The pull that has reserved it; `None` once committed.
    pub(crate) pull: Option<u64>,
    pub(crate) place: Place,
}

/// Freed space that is not to be written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuarantineRow {
    pub(crate) id: u64,
    /// Freeing generation that every reader has to acknowledge; 0 when no reader can know of it.
    pub(crate) generation: u64,
    pub(crate) place: Place,
}

/// An object and its place in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ObjectRow {
    pub(crate) digest: Hash,
    pub(crate) pack: u64,
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

const PACK: &str = "SELECT id, digest, len, visible FROM packs";
const EXTENT: &str = "SELECT id, pack, pull, donor, region, off, len FROM extents";

fn pack_row(row: &Row<'_>) -> rusqlite::Result<PackRow> {
    Ok(PackRow {
        id: from_sql(row.get(0)?),
        digest: row.get(1)?,
        len: row.get(2)?,
        visible: row.get(3)?,
    })
}

fn extent_row(row: &Row<'_>) -> rusqlite::Result<ExtentRow> {
    Ok(ExtentRow {
        id: from_sql(row.get(0)?),
        pack: from_sql(row.get(1)?),
        pull: row.get::<_, Option<i64>>(2)?.map(from_sql),
        place: place_row(row, 3)?,
    })
}

pub(super) fn place_row(row: &Row<'_>, first: usize) -> rusqlite::Result<Place> {
    Ok(Place {
        donor: from_sql(row.get(first)?),
        region: row.get(first + 1)?,
        offset: from_sql(row.get(first + 2)?),
        len: row.get(first + 3)?,
    })
}

impl Read<'_> {
    /// The pack of this name.
    pub(crate) fn pack(&self, digest: &Hash) -> Result<Option<PackRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{PACK} WHERE digest = ?1"))?;
        Ok(ask.query_row([digest], pack_row).optional()?)
    }

    /// The pack of this row.
    pub(crate) fn pack_of(&self, id: u64) -> Result<Option<PackRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{PACK} WHERE id = ?1"))?;
        Ok(ask.query_row([to_sql(id)], pack_row).optional()?)
    }

    /// Committed replicas of a pack on live donors.
    pub(crate) fn live_replicas(&self, pack: u64) -> Result<u32, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT count(*) FROM live_extents WHERE pack = ?1")?;
        Ok(ask.query_row([to_sql(pack)], |row| row.get(0))?)
    }

    /// Everything held for a pack, committed or reserved.
    pub(crate) fn extents_of_pack(&self, pack: u64) -> Result<Vec<ExtentRow>, Error> {
        self.extents("WHERE pack = ?1", pack)
    }

    /// Everything that a pull has reserved.
    pub(crate) fn extents_of_pull(&self, pull: u64) -> Result<Vec<ExtentRow>, Error> {
        self.extents("WHERE pull = ?1", pull)
    }

    /// Everything that lies in a donor's memory.
    pub(crate) fn extents_of_donor(&self, donor: u64) -> Result<Vec<ExtentRow>, Error> {
        self.extents("WHERE donor = ?1", donor)
    }

    fn extents(&self, condition: &str, key: u64) -> Result<Vec<ExtentRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{EXTENT} {condition}"))?;
        let rows = ask.query_map([to_sql(key)], extent_row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Every extent there is, the oldest pack's first.
    pub(crate) fn for_each_extent(
        &self,
        mut take: impl FnMut(ExtentRow) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut ask = self
            .connection
            .prepare(&format!("{EXTENT} ORDER BY pack"))?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            take(extent_row(row)?)?;
        }
        Ok(())
    }

    /// All space in quarantine.
    pub(crate) fn quarantine(&self) -> Result<Vec<QuarantineRow>, Error> {
        let mut ask = self.connection.prepare(
            "SELECT id, generation, donor, region, off, len FROM quarantine ORDER BY id",
        )?;
        let rows = ask.query_map([], |row| {
            Ok(QuarantineRow {
                id: from_sql(row.get(0)?),
                generation: from_sql(row.get(1)?),
                place: place_row(row, 2)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Whether a pull holds on to a pack.
    pub(crate) fn pinned(&self, pack: u64) -> Result<bool, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM pins WHERE pack = ?1)")?;
        Ok(ask.query_row([to_sql(pack)], |row| row.get(0))?)
    }

    /// Whether this pull holds on to a pack.
    pub(crate) fn pinned_by(&self, pull: u64, pack: u64) -> Result<bool, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM pins WHERE pull = ?1 AND pack = ?2)")?;
        Ok(ask.query_row([to_sql(pull), to_sql(pack)], |row| row.get(0))?)
    }

    /// Whether a layer, an image or a pull refers to a pack.
    pub(crate) fn pack_wanted(&self, pack: u64) -> Result<bool, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM layer_packs WHERE pack = ?1)
                 OR EXISTS (SELECT 1 FROM image_packs WHERE pack = ?1)
                 OR EXISTS (SELECT 1 FROM pins WHERE pack = ?1)",
        )?;
        Ok(ask.query_row([to_sql(pack)], |row| row.get(0))?)
    }
}

impl Tx<'_> {
    /// A new pack, not visible yet.
    pub(crate) fn add_pack(&self, digest: &Hash, len: u32) -> Result<u64, Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO packs (digest, len, visible, objects) VALUES (?1, ?2, 0, 0) RETURNING id",
        )?;
        Ok(from_sql(add.query_row((digest, len), |row| row.get(0))?))
    }

    /// Makes a pack known to readers.
    pub(crate) fn show_pack(&self, pack: u64) -> Result<(), Error> {
        let mut set = self
            .connection
            .prepare_cached("UPDATE packs SET visible = 1 WHERE id = ?1")?;
        set.execute([to_sql(pack)])?;
        Ok(())
    }

    /// Takes a pack and its objects away; its extents must be gone.
    pub(crate) fn delete_pack(&self, pack: u64) -> Result<(), Error> {
        let mut objects = self
            .connection
            .prepare_cached("DELETE FROM objects WHERE pack = ?1")?;
        objects.execute([to_sql(pack)])?;
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM packs WHERE id = ?1")?;
        delete.execute([to_sql(pack)])?;
        Ok(())
    }

    /// Writes down objects, in order of digest; known ones stay as they are.
    pub(crate) fn add_objects(&self, objects: &mut [ObjectRow]) -> Result<(), Error> {
        // Neighbours share pages of the tree.
        objects.sort_unstable_by_key(|object| object.digest);
        let mut add = self.connection.prepare_cached(
            "INSERT INTO objects (digest, pack, off, len) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (digest, pack) DO NOTHING",
        )?;
        let mut added: HashMap<u64, i64> = HashMap::new();
        for ObjectRow {
            digest,
            pack,
            offset,
            len,
        } in objects.iter()
        {
            *added.entry(*pack).or_default() +=
                add.execute((digest, to_sql(*pack), offset, len))? as i64;
        }
        let mut count = self
            .connection
            .prepare_cached("UPDATE packs SET objects = objects + ?2 WHERE id = ?1")?;
        for (pack, added) in added {
            count.execute((to_sql(pack), added))?;
        }
        Ok(())
    }

    /// Makes a pull hold on to a pack.
    pub(crate) fn pin(&self, pull: u64, pack: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO pins (pull, pack) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(pull), to_sql(pack)])?;
        Ok(())
    }

    /// Space of a pull for a pack.
    pub(crate) fn reserve_extent(&self, pull: u64, pack: u64, place: &Place) -> Result<u64, Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO extents (pack, pull, donor, region, off, len) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             RETURNING id",
        )?;
        let values = (
            to_sql(pack),
            to_sql(pull),
            to_sql(place.donor),
            place.region,
            to_sql(place.offset),
            place.len,
        );
        Ok(from_sql(add.query_row(values, |row| row.get(0))?))
    }

    /// Turns reserved space into a replica.
    pub(crate) fn commit_extent(&self, id: u64) -> Result<(), Error> {
        let mut set = self
            .connection
            .prepare_cached("UPDATE extents SET pull = NULL WHERE id = ?1")?;
        set.execute([to_sql(id)])?;
        Ok(())
    }

    /// Takes an extent away, reserved or committed.
    pub(crate) fn delete_extent(&self, id: u64) -> Result<(), Error> {
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM extents WHERE id = ?1")?;
        delete.execute([to_sql(id)])?;
        Ok(())
    }

    /// Puts space into quarantine.
    pub(crate) fn add_quarantine(
        &self,
        generation: u64,
        place: &Place,
    ) -> Result<QuarantineRow, Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO quarantine (generation, donor, region, off, len) VALUES (?1, ?2, ?3, ?4, ?5)
             RETURNING id",
        )?;
        let values = (
            to_sql(generation),
            to_sql(place.donor),
            place.region,
            to_sql(place.offset),
            place.len,
        );
        let id = from_sql(add.query_row(values, |row| row.get(0))?);
        Ok(QuarantineRow {
            id,
            generation,
            place: *place,
        })
    }

    /// Lets space out of quarantine.
    pub(crate) fn delete_quarantine(&self, id: u64) -> Result<(), Error> {
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM quarantine WHERE id = ?1")?;
        delete.execute([to_sql(id)])?;
        Ok(())
    }
}
