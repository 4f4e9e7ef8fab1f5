//! Who refers to what: the questions of collection and eviction.

use std::collections::HashSet;

use super::{Read, Tx, from_sql, to_sql};
use crate::error::{Error, Hash};

impl Read<'_> {
    /// Visible images that no name points at.
    pub(crate) fn nameless_images(&self) -> Result<Vec<u64>, Error> {
        self.ids("SELECT id FROM images i WHERE state = 1 AND NOT EXISTS (SELECT 1 FROM names WHERE image = i.id)")
    }

    /// Visible layers that neither an image nor a pull refers to: row and number.
    pub(crate) fn loose_layers(&self) -> Result<Vec<(u64, u32)>, Error> {
        self.numbered(
            "SELECT id, number FROM layers l WHERE state = 1
                 AND NOT EXISTS (SELECT 1 FROM image_layers WHERE layer = l.id)
                 AND NOT EXISTS (SELECT 1 FROM layer_pins WHERE layer = l.id)",
        )
    }

    fn ids(&self, sql: &str) -> Result<Vec<u64>, Error> {
        let mut ask = self.connection.prepare_cached(sql)?;
        let rows = ask.query_map([], |row| row.get(0).map(from_sql))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Images out of sight: row and number.
    pub(crate) fn retired_images(&self) -> Result<Vec<(u64, u32)>, Error> {
        self.numbered("SELECT id, number FROM images WHERE state = 2")
    }

    /// Layers out of sight: row and number.
    pub(crate) fn retired_layers(&self) -> Result<Vec<(u64, u32)>, Error> {
        self.numbered("SELECT id, number FROM layers WHERE state = 2")
    }

    fn numbered(&self, sql: &str) -> Result<Vec<(u64, u32)>, Error> {
        let mut ask = self.connection.prepare_cached(sql)?;
        let rows = ask.query_map([], |row| Ok((from_sql(row.get(0)?), row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Packs that an image refers to.
    pub(crate) fn packs_of_image(&self, image: u64) -> Result<Vec<u64>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT pack FROM image_packs WHERE image = ?1")?;
        let rows = ask.query_map([to_sql(image)], |row| row.get(0).map(from_sql))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// All packs of the layers and images with these numbers.
    pub(crate) fn packs_of_numbers(&self, numbers: &HashSet<u32>) -> Result<HashSet<u64>, Error> {
        let mut packs = HashSet::new();
        let mut ask = self.connection.prepare_cached(
            "SELECT pack FROM layer_packs WHERE layer IN (SELECT id FROM layers WHERE state > 0 AND number = ?1)
             UNION SELECT pack FROM image_packs WHERE image IN (SELECT id FROM images WHERE number = ?1)",
        )?;
        for number in numbers {
            for pack in ask.query_map([number], |row| row.get(0).map(from_sql))? {
                packs.insert(pack?);
            }
        }
        Ok(packs)
    }

    /// Whether an index is written down.
    pub(crate) fn index_known(&self, digest: &Hash) -> Result<bool, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM indexes WHERE digest = ?1)")?;
        Ok(ask.query_row([digest], |row| row.get(0))?)
    }

    /// Length of an index without its table, when it is on disk.
    pub(crate) fn index_len(&self, digest: &Hash) -> Result<Option<u64>, Error> {
        use rusqlite::OptionalExtension;
        let mut ask = self
            .connection
            .prepare_cached("SELECT len FROM indexes WHERE digest = ?1")?;
        Ok(ask
            .query_row([digest], |row| row.get(0).map(from_sql))
            .optional()?)
    }
}

impl Tx<'_> {
    /// Forgets documents that no image refers to.
    pub(crate) fn prune_documents(&self) -> Result<(), Error> {
        let mut delete = self.connection.prepare_cached(
            "DELETE FROM documents WHERE NOT EXISTS (SELECT 1 FROM images WHERE manifest = documents.digest)
                 AND NOT EXISTS (SELECT 1 FROM images WHERE config = documents.digest)",
        )?;
        delete.execute([])?;
        Ok(())
    }

    /// Forgets indexes that no layer, image or pull refers to, and gives their digests: the files
    /// are to be deleted once this transaction has committed.
    pub(crate) fn prune_indexes(&self) -> Result<Vec<Hash>, Error> {
        let mut delete = self.connection.prepare_cached(
            "DELETE FROM indexes WHERE NOT EXISTS (SELECT 1 FROM layers WHERE index_digest = indexes.digest)
                 AND NOT EXISTS (SELECT 1 FROM images WHERE index_digest = indexes.digest)
                 AND NOT EXISTS (SELECT 1 FROM index_pins WHERE digest = indexes.digest)
             RETURNING digest",
        )?;
        let rows = delete.query_map([], |row| row.get(0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
