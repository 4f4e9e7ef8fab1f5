//! Copies under way, and what replicas there are and should be.

use std::collections::HashSet;

use rusqlite::Row;

use super::{Read, Tx, from_sql, packs::place_row, to_sql};
use crate::{
    error::{Error, Hash},
    space::Place,
    store::ObjectRow,
};

/// Space that a donor is to fill with a copy of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRow {
    pub(crate) id: u64,
    pub(crate) pack: u64,
    pub(crate) place: Place,
}

/// What is there of a pack of some image, and what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) pack: u64,
    /// The most that one of its images wants.
    pub(crate) want: u32,
    /// Replicas that can be read.
    pub(crate) live: u32,
    /// Those on donors that do not want to leave.
    pub(crate) staying: u32,
}

const COPY: &str = "SELECT id, pack, donor, region, off, len FROM copies";

fn copy_row(row: &Row<'_>) -> rusqlite::Result<CopyRow> {
    Ok(CopyRow {
        id: from_sql(row.get(0)?),
        pack: from_sql(row.get(1)?),
        place: place_row(row, 2)?,
    })
}

impl Read<'_> {
    /// All copies under way.
    pub(crate) fn copies(&self) -> Result<Vec<CopyRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{COPY} ORDER BY id"))?;
        let rows = ask.query_map([], copy_row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Copies of one pack that are under way.
    pub(crate) fn copies_of_pack(&self, pack: u64) -> Result<Vec<CopyRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{COPY} WHERE pack = ?1"))?;
        let rows = ask.query_map([to_sql(pack)], copy_row)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Every pack that a visible image refers to. `default` is for images that say nothing.
    pub(crate) fn for_each_standing(
        &self,
        default: u32,
        mut take: impl FnMut(Standing),
    ) -> Result<(), Error> {
        let mut ask = self.connection.prepare_cached(
            "WITH wanted AS (
                 SELECT ip.pack, max(CASE WHEN i.replicas > 0 THEN i.replicas ELSE ?1 END) AS want
                 FROM image_packs ip JOIN images i ON i.id = ip.image WHERE i.state = 1 GROUP BY ip.pack)
             SELECT w.pack, w.want, count(d.id), coalesce(sum(1 - d.draining), 0)
             FROM wanted w LEFT JOIN extents e ON e.pack = w.pack AND e.pull IS NULL
                 LEFT JOIN donors d ON d.id = e.donor AND d.live = 1
             GROUP BY w.pack",
        )?;
        let mut rows = ask.query([default])?;
        while let Some(row) = rows.next()? {
            take(Standing {
                pack: from_sql(row.get(0)?),
                want: row.get(1)?,
                live: row.get(2)?,
                staying: row.get(3)?,
            });
        }
        Ok(())
    }

    /// The most replicas that a visible image wants of a pack; 0 when none refers to it.
    pub(crate) fn wanted_replicas(&self, pack: u64, default: u32) -> Result<u32, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT coalesce(max(CASE WHEN i.replicas > 0 THEN i.replicas ELSE ?2 END), 0)
             FROM image_packs ip JOIN images i ON i.id = ip.image WHERE ip.pack = ?1 AND i.state = 1",
        )?;
        Ok(ask.query_row((to_sql(pack), default), |row| row.get(0))?)
    }

    /// Whether a pack has a live replica on a donor that is not one of these.
    pub(crate) fn live_elsewhere(&self, pack: u64, donors: &HashSet<u64>) -> Result<bool, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT donor FROM live_extents WHERE pack = ?1")?;
        let mut rows = ask.query([to_sql(pack)])?;
        while let Some(row) = rows.next()? {
            if !donors.contains(&from_sql(row.get(0)?)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Replicas on `from` whose packs have none on `to` and no copy under way, by place, at most
    /// `most`: what could be moved.
    pub(crate) fn movable(&self, from: u64, to: u64, most: u32) -> Result<Vec<(u64, u64)>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT e.id, e.pack FROM extents e WHERE e.donor = ?1 AND e.pull IS NULL
                 AND NOT EXISTS (SELECT 1 FROM extents o WHERE o.pack = e.pack AND o.donor = ?2)
                 AND NOT EXISTS (SELECT 1 FROM copies c WHERE c.pack = e.pack)
                 AND EXISTS (SELECT 1 FROM image_packs i WHERE i.pack = e.pack)
             ORDER BY e.region, e.off LIMIT ?3",
        )?;
        let rows = ask.query_map((to_sql(from), to_sql(to), most), |row| {
            Ok((from_sql(row.get(0)?), from_sql(row.get(1)?)))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Places on a donor whose packs an image wants and nobody else that stays has.
    pub(crate) fn only_on(&self, donor: u64) -> Result<Vec<Place>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT e.donor, e.region, e.off, e.len FROM extents e WHERE e.donor = ?1 AND e.pull IS NULL
                 AND EXISTS (SELECT 1 FROM image_packs ip JOIN images i ON i.id = ip.image
                     WHERE ip.pack = e.pack AND i.state = 1)
                 AND NOT EXISTS (SELECT 1 FROM staying_extents s WHERE s.pack = e.pack AND s.donor <> ?1)",
        )?;
        let rows = ask.query_map([to_sql(donor)], |row| place_row(row, 0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Objects of a pack by offset, from the number `from` on.
    pub(crate) fn objects_of_pack(
        &self,
        pack: u64,
        from: u32,
        most: u32,
    ) -> Result<Vec<ObjectRow>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT digest, off, len FROM objects WHERE pack = ?1 ORDER BY off LIMIT ?3 OFFSET ?2",
        )?;
        let rows = ask.query_map((to_sql(pack), from, most), |row| {
            let digest: Hash = row.get(0)?;
            Ok(ObjectRow {
                digest,
                pack,
                offset: row.get(1)?,
                len: row.get(2)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// How many objects a pack has.
    pub(crate) fn object_count(&self, pack: u64) -> Result<u32, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT objects FROM packs WHERE id = ?1")?;
        Ok(ask.query_row([to_sql(pack)], |row| row.get(0))?)
    }
}

impl Tx<'_> {
    /// Space for a copy.
    pub(crate) fn add_copy(&self, copy: &CopyRow) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO copies (id, pack, donor, region, off, len) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        add.execute((
            to_sql(copy.id),
            to_sql(copy.pack),
            to_sql(copy.place.donor),
            copy.place.region,
            to_sql(copy.place.offset),
            copy.place.len,
        ))?;
        Ok(())
    }

    /// Ends a copy, however it went; `false` when there is no such copy.
    pub(crate) fn delete_copy(&self, id: u64) -> Result<bool, Error> {
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM copies WHERE id = ?1")?;
        Ok(delete.execute([to_sql(id)])? > 0)
    }

    /// A replica where a copy was made.
    pub(crate) fn add_replica(&self, pack: u64, place: &Place) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO extents (pack, pull, donor, region, off, len) VALUES (?1, NULL, ?2, ?3, ?4, ?5)",
        )?;
        add.execute((
            to_sql(pack),
            to_sql(place.donor),
            place.region,
            to_sql(place.offset),
            place.len,
        ))?;
        Ok(())
    }

    /// Puts the space of all copies into quarantine: those who were told to make them, by a daemon
    /// that has ended since, may still be writing.
    pub(crate) fn quarantine_copies(&self) -> Result<(), Error> {
        for sql in [
            "INSERT INTO quarantine (generation, donor, region, off, len)
             SELECT 0, donor, region, off, len FROM copies",
            "DELETE FROM copies",
        ] {
            self.connection.prepare_cached(sql)?.execute([])?;
        }
        Ok(())
    }
}
