//! Large look-ups, and the figures of the status.

use std::collections::HashMap;

use rusqlite::OptionalExtension;

use super::{Read, from_sql, to_sql};
use crate::{
    error::{Error, Hash},
    space::Place,
};

/// Where an object lies in a pack that the pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ObjectPlace {
    pub(crate) pack_id: u64,
    pub(crate) pack: Hash,
    pub(crate) pack_len: u32,
    pub(crate) offset: u32,
}

/// Where a replica lies, with the donor's epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replica {
    pub(crate) place: Place,
    pub(crate) epoch: u64,
}

/// Sums over the catalogue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) images: u32,
    pub(crate) layers: u32,
    pub(crate) objects: u64,
    pub(crate) packs: u64,
    pub(crate) logical_bytes: u64,
    pub(crate) evictions: u64,
}

impl Read<'_> {
    /// For each digest, a visible pack that has the object and a live replica.
    pub(crate) fn find_objects(&self, digests: &[Hash]) -> Result<Vec<Option<ObjectPlace>>, Error> {
        // In order of digest, neighbours share pages of the tree.
        let mut order: Vec<usize> = (0..digests.len()).collect();
        order.sort_unstable_by_key(|at| digests[*at]);
        let mut found = vec![None; digests.len()];
        let mut packs: HashMap<u64, Option<(Hash, u32)>> = HashMap::new();
        let mut ask = self
            .connection
            .prepare_cached("SELECT pack, off FROM objects WHERE digest = ?1")?;
        for at in order {
            let mut rows = ask.query([digests[at]])?;
            while let Some(row) = rows.next()? {
                let (pack_id, offset) = (from_sql(row.get(0)?), row.get(1)?);
                let pack = match packs.get(&pack_id) {
                    Some(known) => *known,
                    None => {
                        let known = self.usable_pack(pack_id)?;
                        packs.insert(pack_id, known);
                        known
                    }
                };
                if let Some((pack, pack_len)) = pack {
                    found[at] = Some(ObjectPlace {
                        pack_id,
                        pack,
                        pack_len,
                        offset,
                    });
                    break;
                }
            }
        }
        Ok(found)
    }

    fn usable_pack(&self, pack: u64) -> Result<Option<(Hash, u32)>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT digest, len FROM packs p WHERE id = ?1 AND visible = 1
                 AND EXISTS (SELECT 1 FROM live_extents e WHERE e.pack = p.id)",
        )?;
        Ok(ask
            .query_row([to_sql(pack)], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?)
    }

    /// Live replicas of a pack that readers may know of.
    pub(crate) fn locate(&self, pack: &Hash) -> Result<Vec<Replica>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT e.donor, e.epoch, e.region, e.off, e.len
             FROM packs p JOIN live_extents e ON e.pack = p.id WHERE p.digest = ?1 AND p.visible = 1",
        )?;
        let rows = ask.query_map([pack], |row| {
            let place = Place {
                donor: from_sql(row.get(0)?),
                region: row.get(2)?,
                offset: from_sql(row.get(3)?),
                len: row.get(4)?,
            };
            Ok(Replica {
                place,
                epoch: from_sql(row.get(1)?),
            })
        })?;
        let mut replicas: Vec<Replica> = rows.collect::<Result<_, _>>()?;
        // Readers take the first: so that not all of them go to the same donor for all packs.
        let turn = usize::from(pack[0]).checked_rem(replicas.len());
        replicas.rotate_left(turn.unwrap_or(0));
        Ok(replicas)
    }

    /// Sums for the status.
    pub(crate) fn figures(&self) -> Result<Figures, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT (SELECT count(*) FROM names),
                 (SELECT count(*) FROM layers WHERE state = 1),
                 (SELECT coalesce(sum(unpacked), 0) FROM layers WHERE state = 1),
                 (SELECT count(*) FROM packs WHERE visible = 1),
                 (SELECT coalesce(sum(objects), 0) FROM packs WHERE visible = 1),
                 (SELECT coalesce(max(value), 0) FROM counters WHERE name = 'evictions')",
        )?;
        Ok(ask.query_row([], |row| {
            Ok(Figures {
                images: row.get(0)?,
                layers: row.get(1)?,
                logical_bytes: from_sql(row.get(2)?),
                packs: from_sql(row.get(3)?),
                objects: from_sql(row.get(4)?),
                evictions: from_sql(row.get(5)?),
            })
        })?)
    }
}
