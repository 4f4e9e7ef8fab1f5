//! What is visible, as messages.

use std::collections::HashSet;

use harbour_metad_client::v1;
use rusqlite::{OptionalExtension, Row};

use super::{Read, from_sql, to_sql};
use crate::error::{Error, Hash};

/// One entry of a snapshot.
#[derive(Clone, Debug)]
pub(crate) enum CataloguePart {
    /// A named image.
    Image(v1::Image),
    /// A layer.
    Layer(v1::Layer),
}

const LAYER: &str =
    "SELECT l.id, l.diff_id, l.number, l.index_digest, x.len, l.index_packs, l.entries,
    l.unpacked, l.pool, l.fresh, l.committed_ms
    FROM layers l JOIN indexes x ON x.digest = l.index_digest WHERE l.state = 1";

fn digests(joined: &[u8]) -> Vec<Vec<u8>> {
    joined.chunks(32).map(<[u8]>::to_vec).collect()
}

/// A layer's message with no state and no blobs yet, and its row.
fn layer_row(row: &Row<'_>) -> rusqlite::Result<(u64, v1::Layer)> {
    let index = v1::IndexRef {
        digest: row.get(3)?,
        len_bytes: from_sql(row.get(4)?),
        packs: digests(&row.get::<_, Vec<u8>>(5)?),
    };
    let layer = v1::Layer {
        diff_id: row.get(1)?,
        number: row.get(2)?,
        index: Some(index),
        state: 0,
        blobs: Vec::new(),
        entries: from_sql(row.get(6)?),
        unpacked_bytes: from_sql(row.get(7)?),
        pool_bytes: from_sql(row.get(8)?),
        new_bytes: from_sql(row.get(9)?),
        committed_unix_ms: row.get(10)?,
    };
    Ok((from_sql(row.get(0)?), layer))
}

fn state(whole: bool) -> i32 {
    let state = if whole {
        v1::LayerState::Ready
    } else {
        v1::LayerState::Partial
    };
    state.into()
}

impl Read<'_> {
    /// A visible layer: its row and its message.
    pub(crate) fn layer_message(&self, diff_id: &Hash) -> Result<Option<(u64, v1::Layer)>, Error> {
        let mut ask = self
            .connection
            .prepare_cached(&format!("{LAYER} AND l.diff_id = ?1"))?;
        let Some((id, mut layer)) = ask.query_row([diff_id], layer_row).optional()? else {
            return Ok(None);
        };
        layer.state = state(self.layer_whole(id)?);
        layer.blobs = self.blobs(id)?;
        Ok(Some((id, layer)))
    }

    /// Every visible image and layer.
    pub(crate) fn for_each_visible(
        &self,
        mut take: impl FnMut(CataloguePart),
    ) -> Result<(), Error> {
        self.for_each_image(|image| take(CataloguePart::Image(image)))?;
        // One pass for all layers: the question for each alone would be asked thousands of times.
        let mut ask = self.connection.prepare_cached(
            "SELECT DISTINCT lp.layer FROM layer_packs lp
             WHERE NOT EXISTS (SELECT 1 FROM live_extents e WHERE e.pack = lp.pack)",
        )?;
        let partial: HashSet<u64> = ask
            .query_map([], |row| row.get(0).map(from_sql))?
            .collect::<Result<_, _>>()?;
        let mut ask = self
            .connection
            .prepare_cached(&format!("{LAYER} ORDER BY l.id"))?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            let (id, mut layer) = layer_row(row)?;
            layer.state = state(!partial.contains(&id));
            layer.blobs = self.blobs(id)?;
            take(CataloguePart::Layer(layer));
        }
        Ok(())
    }

    fn for_each_image(&self, mut take: impl FnMut(v1::Image)) -> Result<(), Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT i.id, n.registry, n.repository, n.tag, n.source, i.manifest, i.config, i.number,
                 i.index_digest, x.len, i.index_packs, i.unpacked, i.platform, i.committed_ms, i.replicas
             FROM names n JOIN images i ON i.id = n.image JOIN indexes x ON x.digest = i.index_digest
             ORDER BY n.registry, n.repository, n.tag",
        )?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            let index = v1::IndexRef {
                digest: row.get(8)?,
                len_bytes: from_sql(row.get(9)?),
                packs: digests(&row.get::<_, Vec<u8>>(10)?),
            };
            take(v1::Image {
                registry: row.get(1)?,
                repository: row.get(2)?,
                tag: row.get(3)?,
                source: row.get(4)?,
                manifest: row.get(5)?,
                config: row.get(6)?,
                number: row.get(7)?,
                index: Some(index),
                unpacked_bytes: from_sql(row.get(11)?),
                platform: row.get(12)?,
                committed_unix_ms: row.get(13)?,
                replicas: row.get(14)?,
                diff_ids: self.diff_ids(from_sql(row.get(0)?))?,
            });
        }
        Ok(())
    }

    fn diff_ids(&self, image: u64) -> Result<Vec<Vec<u8>>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT l.diff_id FROM image_layers il JOIN layers l ON l.id = il.layer
             WHERE il.image = ?1 ORDER BY il.seq",
        )?;
        let rows = ask.query_map([to_sql(image)], |row| row.get(0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn blobs(&self, layer: u64) -> Result<Vec<v1::Blob>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT digest, len, media_type FROM blobs WHERE layer = ?1 ORDER BY digest",
        )?;
        let rows = ask.query_map([to_sql(layer)], |row| {
            Ok(v1::Blob {
                digest: row.get(0)?,
                len_bytes: from_sql(row.get(1)?),
                media_type: row.get(2)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
