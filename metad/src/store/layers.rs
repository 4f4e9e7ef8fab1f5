//! Layers, staged and visible.

use rusqlite::{OptionalExtension, Row};

use super::{Read, Tx, from_sql, to_sql};
use crate::error::{Error, Hash};

/// A layer, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerRow {
    pub(crate) id: u64,
    pub(crate) number: u32,
    pub(crate) index: Hash,
    /// All its packs have been named (only staged layers may lack this).
    pub(crate) complete: bool,
}

/// What a pull tells of a layer.
#[derive(Clone, Debug)]
pub(crate) struct NewLayer {
    pub(crate) diff_id: Hash,
    pub(crate) number: u32,
    pub(crate) index: Hash,
    pub(crate) index_packs: Vec<Hash>,
    pub(crate) entries: u64,
    pub(crate) unpacked: u64,
    /// Digest, length, media type of each descriptor it was seen under.
    pub(crate) blobs: Vec<(Hash, u64, String)>,
}

const LAYER: &str = "SELECT id, number, index_digest, complete FROM layers";

fn layer_row(row: &Row<'_>) -> rusqlite::Result<LayerRow> {
    Ok(LayerRow {
        id: from_sql(row.get(0)?),
        number: row.get(1)?,
        index: row.get(2)?,
        complete: row.get(3)?,
    })
}

impl Read<'_> {
    /// The visible layer with this diff ID.
    pub(crate) fn layer(&self, diff_id: &Hash) -> Result<Option<LayerRow>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{LAYER} WHERE state = 1 AND diff_id = ?1"))?;
        Ok(ask.query_row([diff_id], layer_row).optional()?)
    }

    /// The layer with this diff ID that a pull has staged.
    pub(crate) fn staged_layer(
        &self,
        pull: u64,
        diff_id: &Hash,
    ) -> Result<Option<LayerRow>, Error> {
        let mut ask = self.connection.prepare_cached(&format!(
            "{LAYER} WHERE state = 0 AND pull = ?1 AND diff_id = ?2"
        ))?;
        Ok(ask
            .query_row((to_sql(pull), diff_id), layer_row)
            .optional()?)
    }

    /// Rows of all layers that a pull has staged.
    pub(crate) fn staged_layers(&self, pull: u64) -> Result<Vec<u64>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT id FROM layers WHERE state = 0 AND pull = ?1")?;
        let rows = ask.query_map([to_sql(pull)], |row| row.get(0).map(from_sql))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Whether every pack of a layer has a live replica.
    pub(crate) fn layer_whole(&self, layer: u64) -> Result<bool, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT NOT EXISTS (SELECT 1 FROM layer_packs lp WHERE lp.layer = ?1
                 AND NOT EXISTS (SELECT 1 FROM live_extents e WHERE e.pack = lp.pack))",
        )?;
        Ok(ask.query_row([to_sql(layer)], |row| row.get(0))?)
    }

    /// Whether a layer that is visible, or held by a reader, has this number.
    pub(crate) fn number_in_use(&self, number: u32) -> Result<bool, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM layers WHERE state > 0 AND number = ?1)",
        )?;
        Ok(ask.query_row([number], |row| row.get(0))?)
    }

    /// Packs that a layer refers to.
    pub(crate) fn packs_of_layer(&self, layer: u64) -> Result<Vec<u64>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT pack FROM layer_packs WHERE layer = ?1")?;
        let rows = ask.query_map([to_sql(layer)], |row| row.get(0).map(from_sql))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl Tx<'_> {
    /// Begins a staged layer; one of the same diff ID by the same pull goes. Gives its row.
    pub(crate) fn stage_layer(&self, pull: u64, layer: &NewLayer) -> Result<u64, Error> {
        if let Some(earlier) = self.staged_layer(pull, &layer.diff_id)? {
            self.delete_layer(earlier.id)?;
        }
        let mut add = self.connection.prepare_cached(
            "INSERT INTO layers (number, diff_id, state, pull, complete, index_digest, index_packs, entries,
                 unpacked, pool, fresh, committed_ms)
             VALUES (?1, ?2, 0, ?3, 0, ?4, ?5, ?6, ?7, 0, 0, 0) RETURNING id",
        )?;
        let id: i64 = add.query_row(
            (
                layer.number,
                layer.diff_id,
                to_sql(pull),
                layer.index,
                layer.index_packs.concat(),
                to_sql(layer.entries),
                to_sql(layer.unpacked),
            ),
            |row| row.get(0),
        )?;
        for (digest, len, media_type) in &layer.blobs {
            self.add_blob(from_sql(id), digest, *len, media_type)?;
        }
        Ok(from_sql(id))
    }

    fn add_blob(&self, layer: u64, digest: &Hash, len: u64, media_type: &str) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO blobs (layer, digest, len, media_type) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
        )?;
        add.execute((to_sql(layer), digest, to_sql(len), media_type))?;
        Ok(())
    }

    /// A pack that a staged layer refers to.
    pub(crate) fn add_layer_pack(&self, layer: u64, pack: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO layer_packs (layer, pack) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(layer), to_sql(pack)])?;
        Ok(())
    }

    /// All packs of a staged layer have been named: adds up its bytes.
    pub(crate) fn complete_layer(&self, pull: u64, layer: u64) -> Result<(), Error> {
        let mut set = self.connection.prepare_cached(
            "UPDATE layers SET complete = 1,
                 pool = (SELECT coalesce(sum(p.len), 0) FROM layer_packs lp JOIN packs p ON p.id = lp.pack
                     WHERE lp.layer = ?1),
                 fresh = (SELECT coalesce(sum(p.len), 0) FROM layer_packs lp JOIN packs p ON p.id = lp.pack
                     WHERE lp.layer = ?1 AND EXISTS (SELECT 1 FROM extents e WHERE e.pack = p.id AND e.pull = ?2))
             WHERE id = ?1",
        )?;
        set.execute([to_sql(layer), to_sql(pull)])?;
        Ok(())
    }

    /// Makes a staged layer visible.
    pub(crate) fn show_layer(
        &self,
        layer: u64,
        number: u32,
        committed_ms: i64,
    ) -> Result<(), Error> {
        let mut set = self.connection.prepare_cached(
            "UPDATE layers SET state = 1, pull = NULL, number = ?2, committed_ms = ?3 WHERE id = ?1",
        )?;
        set.execute((to_sql(layer), number, committed_ms))?;
        Ok(())
    }

    /// Takes a visible layer out of sight.
    pub(crate) fn retire_layer(&self, layer: u64) -> Result<(), Error> {
        self.connection
            .prepare_cached("UPDATE layers SET state = 2 WHERE id = ?1")?
            .execute([to_sql(layer)])?;
        Ok(())
    }

    /// Gives the descriptors and images of one layer to another that stands for the same diff ID.
    pub(crate) fn move_layer_uses(
        &self,
        from: u64,
        to: u64,
        images_too: bool,
    ) -> Result<(), Error> {
        let mut blobs = self.connection.prepare_cached(
            "INSERT INTO blobs (layer, digest, len, media_type)
             SELECT ?2, digest, len, media_type FROM blobs WHERE layer = ?1 ON CONFLICT DO NOTHING",
        )?;
        blobs.execute([to_sql(from), to_sql(to)])?;
        if images_too {
            for sql in [
                "UPDATE image_layers SET layer = ?2 WHERE layer = ?1",
                "UPDATE layer_pins SET layer = ?2 WHERE layer = ?1",
            ] {
                self.connection
                    .prepare_cached(sql)?
                    .execute([to_sql(from), to_sql(to)])?;
            }
        }
        Ok(())
    }

    /// Takes a layer and its references away.
    pub(crate) fn delete_layer(&self, layer: u64) -> Result<(), Error> {
        self.connection
            .prepare_cached("DELETE FROM layers WHERE id = ?1")?
            .execute([to_sql(layer)])?;
        Ok(())
    }
}
