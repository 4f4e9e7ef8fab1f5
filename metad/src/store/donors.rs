//! Donors and their regions.

use rusqlite::OptionalExtension;

use super::{Read, Tx, from_sql, to_sql};
use crate::error::Error;

/// A donor as it registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DonorRow {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) epoch: u64,
    pub(crate) addresses: Vec<String>,
    pub(crate) live: bool,
    pub(crate) regions: Vec<RegionRow>,
}

/// A region of a donor.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct RegionRow {
    pub(crate) id: u32,
    pub(crate) len: u64,
    pub(crate) huge: bool,
    /// 32 bytes, or none for a donor that readers on its own host alone can reach.
    pub(crate) read_token: Vec<u8>,
    /// The same for writing.
    pub(crate) write_token: Vec<u8>,
}

/// Without the tokens.
impl std::fmt::Debug for RegionRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} bytes, huge {}", self.id, self.len, self.huge)
    }
}

impl Read<'_> {
    /// All donors by id.
    pub(crate) fn donors(&self) -> Result<Vec<DonorRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT id FROM donors ORDER BY id")?;
        let ids: Vec<i64> = ask
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let mut donors = Vec::with_capacity(ids.len());
        for id in ids {
            donors.extend(self.donor(from_sql(id))?);
        }
        Ok(donors)
    }

    /// One donor.
    pub(crate) fn donor(&self, id: u64) -> Result<Option<DonorRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT name, epoch, addresses, live FROM donors WHERE id = ?1")?;
        let donor = ask
            .query_row([to_sql(id)], |row| {
                let addresses: String = row.get(2)?;
                Ok(DonorRow {
                    id,
                    name: row.get(0)?,
                    epoch: from_sql(row.get(1)?),
                    addresses: addresses.lines().map(str::to_owned).collect(),
                    live: row.get(3)?,
                    regions: Vec::new(),
                })
            })
            .optional()?;
        let Some(mut donor) = donor else {
            return Ok(None);
        };
        let mut ask = self.connection.prepare_cached(
            "SELECT region, len, huge, read_token, write_token FROM regions WHERE donor = ?1 ORDER BY region",
        )?;
        let rows = ask.query_map([to_sql(id)], |row| {
            Ok(RegionRow {
                id: row.get(0)?,
                len: from_sql(row.get(1)?),
                huge: row.get(2)?,
                read_token: row.get(3)?,
                write_token: row.get(4)?,
            })
        })?;
        donor.regions = rows.collect::<Result<_, _>>()?;
        Ok(Some(donor))
    }

    /// The donor of this name.
    pub(crate) fn donor_named(&self, name: &str) -> Result<Option<DonorRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT id FROM donors WHERE name = ?1")?;
        let id: Option<i64> = ask.query_row([name], |row| row.get(0)).optional()?;
        match id {
            Some(id) => self.donor(from_sql(id)),
            None => Ok(None),
        }
    }
}

impl Tx<'_> {
    /// Writes a donor down: a new one when `donor.id` is 0, else over the one with that id. Gives
    /// its id.
    pub(crate) fn put_donor(&self, donor: &DonorRow) -> Result<u64, Error> {
        let addresses = donor.addresses.join("\n");
        let id = if donor.id == 0 {
            let mut add = self.connection.prepare_cached(
                "INSERT INTO donors (name, epoch, addresses, live) VALUES (?1, ?2, ?3, ?4) RETURNING id",
            )?;
            let values = (&donor.name, to_sql(donor.epoch), &addresses, donor.live);
            from_sql(add.query_row(values, |row| row.get(0))?)
        } else {
            let mut set = self.connection.prepare_cached(
                "UPDATE donors SET epoch = ?2, addresses = ?3, live = ?4 WHERE id = ?1",
            )?;
            set.execute((
                to_sql(donor.id),
                to_sql(donor.epoch),
                &addresses,
                donor.live,
            ))?;
            donor.id
        };
        self.delete_regions(id)?;
        let mut add = self.connection.prepare_cached(
            "INSERT INTO regions (donor, region, len, huge, read_token, write_token)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?;
        for region in &donor.regions {
            add.execute((
                to_sql(id),
                region.id,
                to_sql(region.len),
                region.huge,
                &region.read_token,
                &region.write_token,
            ))?;
        }
        Ok(id)
    }

    /// Whether readers are told of what a donor holds.
    pub(crate) fn set_donor_live(&self, id: u64, live: bool) -> Result<(), Error> {
        let mut set = self
            .connection
            .prepare_cached("UPDATE donors SET live = ?2 WHERE id = ?1")?;
        set.execute((to_sql(id), live))?;
        Ok(())
    }

    /// Takes away everything that lay in a donor's memory, quarantine included.
    pub(crate) fn empty_donor(&self, id: u64) -> Result<(), Error> {
        for sql in [
            "DELETE FROM extents WHERE donor = ?1",
            "DELETE FROM quarantine WHERE donor = ?1",
        ] {
            self.connection.prepare_cached(sql)?.execute([to_sql(id)])?;
        }
        Ok(())
    }

    /// Forgets an emptied donor.
    pub(crate) fn delete_donor(&self, id: u64) -> Result<(), Error> {
        self.delete_regions(id)?;
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM donors WHERE id = ?1")?;
        delete.execute([to_sql(id)])?;
        Ok(())
    }

    fn delete_regions(&self, id: u64) -> Result<(), Error> {
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM regions WHERE donor = ?1")?;
        delete.execute([to_sql(id)])?;
        Ok(())
    }
}
