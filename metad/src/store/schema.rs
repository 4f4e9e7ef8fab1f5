//! Tables, as a list of migrations that only grows.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use crate::error::Error;

/// One entry for each version; never changed once released.
const MIGRATIONS: &[&str] = &[V1, V2, V3, V4, V5];

/// States of a layer or image row: 0 staged by a pull, 1 visible, 2 out of sight and held by a
/// reader. Extents with a pull are reserved, without one they are committed.
const V1: &str = "
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE donors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    addresses TEXT NOT NULL,
    live INTEGER NOT NULL
) STRICT;
CREATE TABLE regions (
    donor INTEGER NOT NULL REFERENCES donors (id) ON DELETE CASCADE,
    region INTEGER NOT NULL,
    len INTEGER NOT NULL CHECK (len > 0),
    huge INTEGER NOT NULL,
    PRIMARY KEY (donor, region)
) STRICT, WITHOUT ROWID;

CREATE TABLE pulls (
    id INTEGER PRIMARY KEY,
    token INTEGER NOT NULL,
    what TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL
) STRICT;
CREATE TABLE done (
    pull INTEGER PRIMARY KEY,
    token INTEGER NOT NULL,
    request BLOB NOT NULL,
    generation INTEGER NOT NULL
) STRICT;

CREATE TABLE packs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    len INTEGER NOT NULL CHECK (len > 0),
    visible INTEGER NOT NULL,
    objects INTEGER NOT NULL
) STRICT;
CREATE TABLE objects (
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    pack INTEGER NOT NULL REFERENCES packs (id) ON DELETE CASCADE,
    off INTEGER NOT NULL,
    len INTEGER NOT NULL,
    PRIMARY KEY (digest, pack)
) STRICT, WITHOUT ROWID;
CREATE INDEX objects_pack ON objects (pack);
CREATE TABLE pins (
    pull INTEGER NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    pack INTEGER NOT NULL REFERENCES packs (id),
    PRIMARY KEY (pull, pack)
) STRICT, WITHOUT ROWID;
CREATE INDEX pins_pack ON pins (pack);

CREATE TABLE extents (
    id INTEGER PRIMARY KEY,
    pack INTEGER NOT NULL REFERENCES packs (id),
    pull INTEGER REFERENCES pulls (id),
    donor INTEGER NOT NULL REFERENCES donors (id),
    region INTEGER NOT NULL,
    off INTEGER NOT NULL,
    len INTEGER NOT NULL,
    UNIQUE (donor, region, off)
) STRICT;
CREATE INDEX extents_pack ON extents (pack);
CREATE INDEX extents_pull ON extents (pull) WHERE pull IS NOT NULL;
CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL,
    donor INTEGER NOT NULL REFERENCES donors (id),
    region INTEGER NOT NULL,
    off INTEGER NOT NULL,
    len INTEGER NOT NULL,
    UNIQUE (donor, region, off)
) STRICT;

CREATE TABLE indexes (
    digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
    len INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE index_pins (
    pull INTEGER NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    digest BLOB NOT NULL REFERENCES indexes (digest),
    PRIMARY KEY (pull, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX index_pins_digest ON index_pins (digest);

CREATE TABLE layers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    number INTEGER NOT NULL CHECK (number BETWEEN 1 AND 16777215),
    diff_id BLOB NOT NULL CHECK (length(diff_id) = 32),
    state INTEGER NOT NULL,
    pull INTEGER REFERENCES pulls (id),
    complete INTEGER NOT NULL,
    index_digest BLOB NOT NULL REFERENCES indexes (digest),
    index_packs BLOB NOT NULL,
    entries INTEGER NOT NULL,
    unpacked INTEGER NOT NULL,
    pool INTEGER NOT NULL,
    fresh INTEGER NOT NULL,
    committed_ms INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX layers_visible ON layers (diff_id) WHERE state = 1;
CREATE UNIQUE INDEX layers_number ON layers (number) WHERE state > 0;
CREATE UNIQUE INDEX layers_staged ON layers (pull, diff_id) WHERE state = 0;
CREATE INDEX layers_index ON layers (index_digest);
CREATE TABLE layer_packs (
    layer INTEGER NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
    pack INTEGER NOT NULL REFERENCES packs (id),
    PRIMARY KEY (layer, pack)
) STRICT, WITHOUT ROWID;
CREATE INDEX layer_packs_pack ON layer_packs (pack);
CREATE TABLE blobs (
    layer INTEGER NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
    digest BLOB NOT NULL CHECK (length(digest) = 32),
    len INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    PRIMARY KEY (layer, digest)
) STRICT, WITHOUT ROWID;
CREATE TABLE layer_pins (
    pull INTEGER NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    layer INTEGER NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
    PRIMARY KEY (pull, layer)
) STRICT, WITHOUT ROWID;
CREATE INDEX layer_pins_layer ON layer_pins (layer);

CREATE TABLE documents (
    digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
    content BLOB NOT NULL,
    media_type TEXT NOT NULL
) STRICT;
CREATE TABLE images (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    number INTEGER NOT NULL UNIQUE CHECK (number BETWEEN 1 AND 16777215),
    state INTEGER NOT NULL,
    manifest BLOB NOT NULL REFERENCES documents (digest),
    config BLOB NOT NULL REFERENCES documents (digest),
    index_digest BLOB NOT NULL REFERENCES indexes (digest),
    index_packs BLOB NOT NULL,
    unpacked INTEGER NOT NULL,
    platform TEXT NOT NULL,
    committed_ms INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX images_visible ON images (manifest) WHERE state = 1;
CREATE INDEX images_manifest ON images (manifest);
CREATE INDEX images_config ON images (config);
CREATE INDEX images_index ON images (index_digest);
CREATE TABLE image_layers (
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    layer INTEGER NOT NULL REFERENCES layers (id),
    PRIMARY KEY (image, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX image_layers_layer ON image_layers (layer);
CREATE TABLE image_packs (
    image INTEGER NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    pack INTEGER NOT NULL REFERENCES packs (id),
    PRIMARY KEY (image, pack)
) STRICT, WITHOUT ROWID;
CREATE INDEX image_packs_pack ON image_packs (pack);
CREATE TABLE names (
    registry TEXT NOT NULL,
    repository TEXT NOT NULL,
    tag TEXT NOT NULL,
    image INTEGER NOT NULL REFERENCES images (id),
    source TEXT NOT NULL,
    PRIMARY KEY (registry, repository, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX names_image ON names (image);

CREATE VIEW live_extents AS
    SELECT e.id, e.pack, e.donor, d.epoch, e.region, e.off, e.len
    FROM extents e JOIN donors d ON d.id = e.donor
    WHERE e.pull IS NULL AND d.live = 1;
";

/// Tokens of regions, which readers on other hosts show.
const V2: &str = "
ALTER TABLE regions ADD COLUMN read_token BLOB NOT NULL DEFAULT x'';
ALTER TABLE regions ADD COLUMN write_token BLOB NOT NULL DEFAULT x'';
";

/// Several donors: who fails together, who wants to leave, how many replicas are wanted, and copies
/// under way. `regions_seen` is one more than the largest region that a donor had in its epoch.
const V3: &str = "
ALTER TABLE donors ADD COLUMN domain TEXT NOT NULL DEFAULT '';
ALTER TABLE donors ADD COLUMN draining INTEGER NOT NULL DEFAULT 0;
ALTER TABLE donors ADD COLUMN regions_seen INTEGER NOT NULL DEFAULT 0;
UPDATE donors SET regions_seen = coalesce((SELECT max(region) + 1 FROM regions WHERE donor = donors.id), 0);
ALTER TABLE pulls ADD COLUMN replicas INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN replicas INTEGER NOT NULL DEFAULT 0;
CREATE TABLE copies (
    id INTEGER PRIMARY KEY,
    pack INTEGER NOT NULL REFERENCES packs (id),
    donor INTEGER NOT NULL REFERENCES donors (id),
    region INTEGER NOT NULL,
    off INTEGER NOT NULL,
    len INTEGER NOT NULL,
    UNIQUE (donor, region, off)
) STRICT;
CREATE INDEX copies_pack ON copies (pack);
CREATE VIEW staying_extents AS
    SELECT e.id, e.pack, e.donor
    FROM extents e JOIN donors d ON d.id = e.donor
    WHERE e.pull IS NULL AND d.live = 1 AND d.draining = 0;
";

/// Claims of pulls on keys. Without a fencing token one waits; a lower ticket is served earlier.
const V4: &str = "
CREATE TABLE claims (
    key TEXT NOT NULL,
    pull INTEGER NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    exclusive INTEGER NOT NULL,
    ticket INTEGER NOT NULL,
    fence INTEGER,
    PRIMARY KEY (key, pull)
) STRICT, WITHOUT ROWID;
CREATE INDEX claims_pull ON claims (pull);
";

/// Claims in the order of their tickets: those of now lie side by side, and a commit writes few pages.
const V5: &str = "
CREATE TABLE claims_by_ticket (
    ticket INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    pull INTEGER NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    exclusive INTEGER NOT NULL,
    fence INTEGER
) STRICT;
INSERT INTO claims_by_ticket (ticket, key, pull, exclusive, fence)
    SELECT ticket, key, pull, exclusive, fence FROM claims;
DROP TABLE claims;
ALTER TABLE claims_by_ticket RENAME TO claims;
";

/// Brings the database at `path` to this program's version, one transaction a step.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), Error> {
    let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = version as usize;
    if version > MIGRATIONS.len() {
        return Err(Error::Refused(format!(
            "{} has schema version {version}, this metad knows up to {}: use the newer metad that wrote it",
            path.display(),
            MIGRATIONS.len()
        )));
    }
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", (step + 1) as i64)?;
        transaction.commit()?;
    }
    Ok(())
}
