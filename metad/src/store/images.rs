//! Images, their names and their documents.

use rusqlite::{OptionalExtension, Row};

use super::{Read, Tx, from_sql, to_sql};
use crate::error::{Error, Hash};

/// An image to be written down.
#[derive(Clone, Debug)]
pub(crate) struct ImageRow {
    pub(crate) number: u32,
    pub(crate) manifest: Hash,
    pub(crate) config: Hash,
    pub(crate) index: Hash,
    pub(crate) index_packs: Vec<Hash>,
    pub(crate) unpacked: u64,
    pub(crate) platform: String,
    pub(crate) committed_ms: i64,
    /// Wanted of each of its packs; 0 for the default.
    pub(crate) replicas: u32,
}

/// A name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NameRow {
    pub(crate) registry: String,
    pub(crate) repository: String,
    pub(crate) tag: String,
}

impl Read<'_> {
    /// The visible image of a manifest: its row and its index.
    pub(crate) fn image(&self, manifest: &Hash) -> Result<Option<(u64, Hash)>, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT id, index_digest FROM images WHERE state = 1 AND manifest = ?1",
        )?;
        let row = |row: &Row<'_>| Ok((from_sql(row.get(0)?), row.get(1)?));
        Ok(ask.query_row([manifest], row).optional()?)
    }

    /// Replicas that are wanted of each pack of an image; 0 for the default.
    pub(crate) fn image_replicas(&self, image: u64) -> Result<u32, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT replicas FROM images WHERE id = ?1")?;
        Ok(ask.query_row([to_sql(image)], |row| row.get(0))?)
    }

    /// Whether every pack of an image has a live replica.
    pub(crate) fn image_whole(&self, image: u64) -> Result<bool, Error> {
        let mut ask = self.connection.prepare_cached(
            "SELECT NOT EXISTS (SELECT 1 FROM image_packs ip WHERE ip.image = ?1
                 AND NOT EXISTS (SELECT 1 FROM live_extents e WHERE e.pack = ip.pack))",
        )?;
        Ok(ask.query_row([to_sql(image)], |row| row.get(0))?)
    }

    /// A manifest or config that an image refers to: content and media type.
    pub(crate) fn document(&self, digest: &Hash) -> Result<Option<(Vec<u8>, String)>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT content, media_type FROM documents WHERE digest = ?1")?;
        Ok(ask
            .query_row([digest], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?)
    }
}

impl Tx<'_> {
    /// Writes a manifest or config down; a known one stays as it is.
    pub(crate) fn add_document(
        &self,
        digest: &Hash,
        content: &[u8],
        media_type: &str,
    ) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO documents (digest, content, media_type) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
        )?;
        add.execute((digest, content, media_type))?;
        Ok(())
    }

    /// A new visible image with its layers from the bottom up. Gives its row.
    pub(crate) fn add_image(&self, image: &ImageRow, layers: &[u64]) -> Result<u64, Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO images (number, state, manifest, config, index_digest, index_packs, unpacked,
                 platform, committed_ms, replicas)
             VALUES (?1, 1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) RETURNING id",
        )?;
        let id: i64 = add.query_row(
            (
                image.number,
                image.manifest,
                image.config,
                image.index,
                image.index_packs.concat(),
                to_sql(image.unpacked),
                &image.platform,
                image.committed_ms,
                image.replicas,
            ),
            |row| row.get(0),
        )?;
        let mut add = self
            .connection
            .prepare_cached("INSERT INTO image_layers (image, seq, layer) VALUES (?1, ?2, ?3)")?;
        for (seq, layer) in layers.iter().enumerate() {
            add.execute((id, to_sql(seq as u64), to_sql(*layer)))?;
        }
        Ok(from_sql(id))
    }

    /// Replicas that are wanted of each pack of an image from now on.
    pub(crate) fn set_image_replicas(&self, image: u64, replicas: u32) -> Result<(), Error> {
        self.connection
            .prepare_cached("UPDATE images SET replicas = ?2 WHERE id = ?1")?
            .execute((to_sql(image), replicas))?;
        Ok(())
    }

    /// A pack that an image refers to.
    pub(crate) fn add_image_pack(&self, image: u64, pack: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO image_packs (image, pack) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(image), to_sql(pack)])?;
        Ok(())
    }

    /// Makes an image refer to all packs that a layer refers to.
    pub(crate) fn add_packs_of_layer(&self, image: u64, layer: u64) -> Result<(), Error> {
        let mut add = self.connection.prepare_cached(
            "INSERT INTO image_packs (image, pack) SELECT ?1, pack FROM layer_packs WHERE layer = ?2
             ON CONFLICT DO NOTHING",
        )?;
        add.execute([to_sql(image), to_sql(layer)])?;
        Ok(())
    }

    /// Takes an image out of sight: its layers are no longer held by it, its packs are.
    pub(crate) fn retire_image(&self, image: u64) -> Result<(), Error> {
        for sql in [
            "UPDATE images SET state = 2 WHERE id = ?1",
            "DELETE FROM image_layers WHERE image = ?1",
        ] {
            self.connection
                .prepare_cached(sql)?
                .execute([to_sql(image)])?;
        }
        Ok(())
    }

    /// Takes an image and its references away.
    pub(crate) fn delete_image(&self, image: u64) -> Result<(), Error> {
        self.connection
            .prepare_cached("DELETE FROM images WHERE id = ?1")?
            .execute([to_sql(image)])?;
        Ok(())
    }

    /// Points a name at an image.
    pub(crate) fn put_name(&self, name: &NameRow, image: u64, source: &str) -> Result<(), Error> {
        let mut put = self.connection.prepare_cached(
            "INSERT INTO names (registry, repository, tag, image, source) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (registry, repository, tag) DO UPDATE SET image = ?4, source = ?5",
        )?;
        put.execute((
            &name.registry,
            &name.repository,
            &name.tag,
            to_sql(image),
            source,
        ))?;
        Ok(())
    }

    /// Points all names of one image at another.
    pub(crate) fn move_names(&self, from: u64, to: u64) -> Result<(), Error> {
        let mut set = self
            .connection
            .prepare_cached("UPDATE names SET image = ?2 WHERE image = ?1")?;
        set.execute([to_sql(from), to_sql(to)])?;
        Ok(())
    }

    /// Takes a name away; `false` when there is none.
    pub(crate) fn delete_name(&self, name: &NameRow) -> Result<bool, Error> {
        let mut delete = self.connection.prepare_cached(
            "DELETE FROM names WHERE registry = ?1 AND repository = ?2 AND tag = ?3",
        )?;
        Ok(delete.execute((&name.registry, &name.repository, &name.tag))? > 0)
    }
}
