//! Everything counted again, by full scans of one snapshot.
//!
//! No question here is one that operations ask: a mistake in those would otherwise be made twice.

use std::collections::{BTreeMap, HashSet};

use super::{CopyRow, Counter, DonorRow, ExtentRow, PullRow, QuarantineRow, Read, from_sql};
use crate::error::{Error, Hash};

/// What the store has, in one snapshot.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recount {
    pub(crate) generation: u64,
    pub(crate) donors: BTreeMap<u64, DonorRow>,
    pub(crate) extents: Vec<ExtentRow>,
    pub(crate) copies: Vec<CopyRow>,
    pub(crate) quarantine: Vec<QuarantineRow>,
    pub(crate) pulls: BTreeMap<u64, PullRow>,
    pub(crate) packs: BTreeMap<u64, PackCount>,
    /// Pull and pack.
    pub(crate) pins: HashSet<(u64, u64)>,
    /// Numbers of layers in sight that neither an image nor a pull refers to.
    pub(crate) loose: Vec<u32>,
    /// Rows of the tables that are only counted, by what they are.
    pub(crate) rows: Vec<(&'static str, u64)>,
    /// Rows that should not be, by what is wrong with them; none with a count of 0.
    pub(crate) astray: Vec<(String, u64)>,
}

/// A pack, what its row says, and what there is of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackCount {
    pub(crate) digest: Hash,
    pub(crate) len: u32,
    pub(crate) visible: bool,
    /// Objects as its row says.
    pub(crate) said: u64,
    /// Objects as there are.
    pub(crate) objects: u64,
    /// Where the last of them ends.
    pub(crate) end: u64,
    /// References by layers, by images, and by pulls.
    pub(crate) layers: u64,
    pub(crate) images: u64,
    pub(crate) pins: u64,
}

/// Tables that are only counted.
const ROWS: &[(&str, &str)] = &[
    ("names", "SELECT count(*) FROM names"),
    ("images", "SELECT count(*) FROM images"),
    ("layers", "SELECT count(*) FROM layers"),
    ("indexes", "SELECT count(*) FROM indexes"),
    ("documents", "SELECT count(*) FROM documents"),
    ("objects", "SELECT count(*) FROM objects"),
    (
        "references",
        "SELECT (SELECT count(*) FROM layer_packs) + (SELECT count(*) FROM image_packs)
             + (SELECT count(*) FROM image_layers)",
    ),
    (
        "pins",
        "SELECT (SELECT count(*) FROM pins) + (SELECT count(*) FROM layer_pins)
             + (SELECT count(*) FROM index_pins)",
    ),
];

/// What every transaction leaves none of.
const ASTRAY: &[(&str, &str)] = &[
    (
        "images in sight that no name points at",
        "SELECT count(*) FROM images WHERE state = 1 AND id NOT IN (SELECT image FROM names)",
    ),
    (
        "names of images out of sight",
        "SELECT count(*) FROM names JOIN images ON images.id = names.image WHERE images.state <> 1",
    ),
    (
        "staged layers of no pull",
        "SELECT count(*) FROM layers WHERE state = 0 AND pull IS NULL",
    ),
    (
        "documents that no image refers to",
        "SELECT count(*) FROM documents
             WHERE digest NOT IN (SELECT manifest FROM images UNION SELECT config FROM images)",
    ),
    (
        "indexes that nothing refers to",
        "SELECT count(*) FROM indexes WHERE digest NOT IN (SELECT index_digest FROM layers
             UNION SELECT index_digest FROM images UNION SELECT digest FROM index_pins)",
    ),
    (
        "layers and images with a number that was not given yet",
        "SELECT count(*) FROM (SELECT number FROM layers UNION ALL SELECT number FROM images)
             WHERE number > (SELECT coalesce(max(value), 0) FROM counters WHERE name = 'number')",
    ),
    (
        "regions above what their donor was seen with",
        "SELECT count(*) FROM regions JOIN donors ON donors.id = regions.donor
             WHERE regions.region >= donors.regions_seen",
    ),
];

impl Read<'_> {
    /// Counts everything. The time is that of reading every row once.
    pub(crate) fn recount(&self) -> Result<Recount, Error> {
        let mut count = Recount {
            generation: self.counter(Counter::Generation)?,
            copies: self.copies()?,
            quarantine: self.quarantine()?,
            ..Recount::default()
        };
        let donors = self.donors()?.into_iter();
        count.donors = donors.map(|donor| (donor.id, donor)).collect();
        let pulls = self.pulls()?.into_iter();
        count.pulls = pulls.map(|pull| (pull.id, pull)).collect();
        self.for_each_extent(|extent| {
            count.extents.push(extent);
            Ok(())
        })?;
        self.count_packs(&mut count)?;
        let mut ask = self.connection.prepare_cached(
            "SELECT number FROM layers WHERE state = 1
                 AND id NOT IN (SELECT layer FROM image_layers UNION SELECT layer FROM layer_pins)",
        )?;
        let numbers = ask.query_map([], |row| row.get(0))?;
        count.loose = numbers.collect::<Result<_, _>>()?;
        for (what, sql) in ROWS {
            count.rows.push((*what, self.count(sql)?));
        }
        for (what, sql) in ASTRAY {
            let found = self.count(sql)?;
            if found > 0 {
                count.astray.push(((*what).to_owned(), found));
            }
        }
        self.check_keys(&mut count)?;
        Ok(count)
    }

    fn count(&self, sql: &str) -> Result<u64, Error> {
        let mut ask = self.connection.prepare(sql)?;
        Ok(from_sql(ask.query_row([], |row| row.get(0))?))
    }

    fn count_packs(&self, count: &mut Recount) -> Result<(), Error> {
        let mut ask = self
            .connection
            .prepare("SELECT id, digest, len, visible, objects FROM packs")?;
        let rows = ask.query_map([], |row| {
            let pack = PackCount {
                digest: row.get(1)?,
                len: row.get(2)?,
                visible: row.get(3)?,
                said: from_sql(row.get(4)?),
                objects: 0,
                end: 0,
                layers: 0,
                images: 0,
                pins: 0,
            };
            Ok((from_sql(row.get(0)?), pack))
        })?;
        count.packs = rows.collect::<Result<_, _>>()?;
        // In the order of the table: by pack, each row would be looked up by itself.
        let mut lost = 0;
        self.pairs(
            "SELECT pack, off + len FROM objects",
            |pack, end| match count.packs.get_mut(&pack) {
                Some(pack) => {
                    pack.objects += 1;
                    pack.end = pack.end.max(end);
                }
                None => lost += 1,
            },
        )?;
        let packs = &mut count.packs;
        let mut refer = |sql, of: fn(&mut PackCount) -> &mut u64| {
            self.pairs(sql, |pack, times| match packs.get_mut(&pack) {
                Some(pack) => *of(pack) += times,
                None => lost += times,
            })
        };
        refer(
            "SELECT pack, count(*) FROM layer_packs GROUP BY pack",
            |pack| &mut pack.layers,
        )?;
        refer(
            "SELECT pack, count(*) FROM image_packs GROUP BY pack",
            |pack| &mut pack.images,
        )?;
        refer("SELECT pack, count(*) FROM pins GROUP BY pack", |pack| {
            &mut pack.pins
        })?;
        let pins = &mut count.pins;
        self.pairs("SELECT pull, pack FROM pins", |pull, pack| {
            pins.insert((pull, pack));
        })?;
        if lost > 0 {
            let what = "objects, references and pins of packs that are not there";
            count.astray.push((what.to_owned(), lost));
        }
        Ok(())
    }

    fn pairs(&self, sql: &str, mut take: impl FnMut(u64, u64)) -> Result<(), Error> {
        let mut ask = self.connection.prepare(sql)?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            take(from_sql(row.get(0)?), from_sql(row.get(1)?));
        }
        Ok(())
    }

    /// SQLite's own look at what refers to what.
    fn check_keys(&self, count: &mut Recount) -> Result<(), Error> {
        let mut broken: BTreeMap<String, u64> = BTreeMap::new();
        let mut ask = self.connection.prepare("PRAGMA foreign_key_check")?;
        let mut rows = ask.query([])?;
        while let Some(row) = rows.next()? {
            let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
            let what = format!("rows of {table} that refer to {parent} that are not there");
            *broken.entry(what).or_default() += 1;
        }
        count.astray.extend(broken);
        Ok(())
    }
}

/// Ways to make the store say what is not so, for tests of those who should notice.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Falsehood {
    ExtentGone,
    ExtentShorter,
    ExtentMoved,
    ExtentTwice,
    QuarantineGone,
    CopyGone,
    PullGone,
    PinsGone,
    ReferencesGone,
    ObjectGone,
    ObjectBeyond,
    PackHidden,
    DonorGone,
    DonorSilent,
    DonorDrains,
    DonorElsewhere,
    RegionLonger,
    NameGone,
    CounterBack,
}

#[cfg(test)]
impl super::Writer {
    /// Tells it, past all checks.
    pub(crate) fn falsify(&self, how: Falsehood) {
        let sql = match how {
            Falsehood::ExtentGone => "DELETE FROM extents WHERE id = (SELECT max(id) FROM extents)",
            Falsehood::ExtentShorter => {
                "UPDATE extents SET len = len - 1 WHERE id = (SELECT max(id) FROM extents)"
            }
            Falsehood::ExtentMoved => {
                "UPDATE extents SET off = off + 1048576 WHERE id = (SELECT max(id) FROM extents)"
            }
            Falsehood::ExtentTwice => {
                "INSERT INTO extents (pack, pull, donor, region, off, len)
                 SELECT pack, pull, donor, region, 4096 * 60, len FROM extents LIMIT 1"
            }
            Falsehood::QuarantineGone => "DELETE FROM quarantine",
            Falsehood::CopyGone => "DELETE FROM copies",
            Falsehood::PullGone => "UPDATE pulls SET token = token + 1",
            Falsehood::PinsGone => "DELETE FROM pins",
            Falsehood::ReferencesGone => "DELETE FROM layer_packs; DELETE FROM image_packs",
            Falsehood::ObjectGone => {
                "DELETE FROM objects WHERE digest = (SELECT max(digest) FROM objects)"
            }
            Falsehood::ObjectBeyond => "UPDATE objects SET off = 8388608",
            Falsehood::PackHidden => "UPDATE packs SET visible = 0",
            Falsehood::DonorGone => "DELETE FROM donors WHERE id = 1",
            Falsehood::DonorSilent => "UPDATE donors SET live = 0",
            Falsehood::DonorDrains => "UPDATE donors SET draining = 1",
            Falsehood::DonorElsewhere => "UPDATE donors SET domain = 'elsewhere'",
            Falsehood::RegionLonger => "UPDATE regions SET len = len + 4096",
            Falsehood::NameGone => "DELETE FROM names",
            Falsehood::CounterBack => "UPDATE counters SET value = 0 WHERE name = 'number'",
        };
        let told = ["PRAGMA foreign_keys = OFF", sql, "PRAGMA foreign_keys = ON"];
        let told = told
            .iter()
            .try_for_each(|sql| self.connection.execute_batch(sql));
        assert!(told.is_ok(), "{how:?}: {told:?}");
    }
}
