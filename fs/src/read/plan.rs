//! From segments of a view's data region to stretches of packs on granule borders.

use std::ops::Range;

use harbour_image::{
    index::{Index, IndexBytes, ObjectPart, Segment, What},
    object::{GRANULE, GranuleHash, OBJECT_MAX, ObjectId, PackId},
};

use super::{Outside, Want};
use crate::{
    error::{Error, Result},
    view::View,
};

/// A range begins inside one granule and ends inside another at most: everything between is whole
/// objects.
const EDGES_MAX: usize = 2;
/// Memory that a reply needs behind its own bytes.
pub(crate) const EDGE_ROOM: usize = EDGES_MAX * GRANULE;

/// What one want must be.
pub(crate) struct Check {
    pub(crate) id: ObjectId,
    pub(crate) object_len: u32,
    /// Number in the object of its first granule.
    pub(crate) first: usize,
    /// Number in the object of the first granule in [`Check::hashes`].
    pub(crate) first_hash: usize,
    /// Hashes of all granules that the read touches, in [`Plan::hashes`].
    pub(crate) hashes: Range<usize>,
}

/// Granule hashes of an object in [`Plan::hashes`]: which one is the first, and where they are.
#[derive(Clone, Default)]
struct Hashes {
    first: usize,
    range: Range<usize>,
}

/// A granule of which a part is wanted.
pub(crate) struct Edge {
    pub(crate) id: ObjectId,
    /// Number in its object.
    pub(crate) number: usize,
    /// Where the granule is brought, in the buffer.
    pub(crate) slot: usize,
    pub(crate) granule_len: usize,
    /// Where the part begins in the granule.
    pub(crate) from: usize,
    /// Where the part goes, in the buffer.
    pub(crate) to: usize,
    pub(crate) len: usize,
}

/// What a read needs.
pub(crate) struct Plan<'a> {
    outside: &'a Outside,
    pub(crate) packs: Vec<PackId>,
    /// Whole granules by place in the buffer, then the edges.
    pub(crate) wants: Vec<Want>,
    /// One for each of `wants`.
    pub(crate) checks: Vec<Check>,
    pub(crate) hashes: Vec<GranuleHash>,
    pub(crate) edges: Vec<Edge>,
    /// Granules in `wants`.
    pub(crate) granules: u64,
    /// Length of the reply: where the edges' slots begin.
    len: usize,
}

impl<'a> Plan<'a> {
    /// A plan for a reply of `len` bytes at the start of a buffer of `len + EDGE_ROOM`.
    pub(crate) const fn new(outside: &'a Outside, len: usize) -> Self {
        Self {
            outside,
            packs: Vec::new(),
            wants: Vec::new(),
            checks: Vec::new(),
            hashes: Vec::new(),
            edges: Vec::new(),
            granules: 0,
            len,
        }
    }

    /// Adds a segment whose bytes go to `at` of `buffer`. Segments come in the order of `at`.
    pub(crate) fn add<B: IndexBytes>(
        &mut self,
        view: &View,
        index: &Index<B>,
        segment: &Segment,
        at: usize,
        buffer: &mut [u8],
    ) -> Result<()> {
        let misplaced = |reason| Error::Misplaced {
            what: format!("{} at {} of its EROFS file", view.shows, segment.offset),
            reason,
        };
        let len = usize::try_from(segment.len).map_err(|_| misplaced("segment is too long"))?;
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(misplaced("segment is outside of what was asked for"));
        }
        let part = match &segment.what {
            What::Hole => {
                buffer[at..at + len].fill(0);
                return Ok(());
            }
            What::Object(part) => part,
        };
        let object_len = part.object_len as usize;
        let skip = part.skip as usize;
        if object_len > OBJECT_MAX || skip.checked_add(len).is_none_or(|end| end > object_len) {
            return Err(misplaced("segment is longer than its object"));
        }
        if u64::from(part.pack_offset) + u64::from(part.object_len) > u64::from(part.pack.len) {
            return Err(misplaced("object is outside of its pack"));
        }
        let hashes = if self.outside.config.verify && part.granule_count() > 0 && len > 0 {
            let first = skip / GRANULE;
            let count = (skip + len).div_ceil(GRANULE) - first;
            let hashes = index
                .granule_hashes(part.granules.saturating_add(first as u32), count as u32)
                .map_err(|error| view.error(error))?;
            let start = self.hashes.len();
            self.hashes.extend_from_slice(&hashes);
            Hashes {
                first,
                range: start..self.hashes.len(),
            }
        } else {
            Hashes::default()
        };
        self.object(part, skip..skip + len, at, hashes, buffer)
            .map_err(misplaced)
    }

    /// Plans bytes `range` of an object for `at` of the buffer: a part of a granule, whole
    /// granules, a part of a granule, each of which may be missing.
    fn object(
        &mut self,
        part: &ObjectPart,
        range: Range<usize>,
        at: usize,
        hashes: Hashes,
        buffer: &mut [u8],
    ) -> std::result::Result<(), &'static str> {
        let object_len = part.object_len as usize;
        // To the end of the object counts as to the end of its last granule.
        let whole_end = if range.end == object_len {
            object_len
        } else {
            range.end - range.end % GRANULE
        };
        let whole_start = range.start.next_multiple_of(GRANULE).min(object_len);
        let to = |position: usize| at + position - range.start;
        if range.start < whole_start {
            let end = range.end.min(whole_start);
            self.edge(part, range.start..end, at, &hashes, buffer)?;
        }
        let piece = (self.outside.config.piece_bytes / GRANULE).max(1) * GRANULE;
        let mut position = whole_start;
        while position < whole_end {
            let end = (position + piece).min(whole_end);
            self.want(part, position..end, to(position), &hashes);
            position = end;
        }
        if range.end > whole_end && whole_end >= whole_start {
            self.edge(part, whole_end..range.end, to(whole_end), &hashes, buffer)?;
        }
        Ok(())
    }

    /// Plans a part of one granule, unless it is in memory.
    fn edge(
        &mut self,
        part: &ObjectPart,
        range: Range<usize>,
        to: usize,
        hashes: &Hashes,
        buffer: &mut [u8],
    ) -> std::result::Result<(), &'static str> {
        let number = range.start / GRANULE;
        let start = number * GRANULE;
        let from = range.start - start;
        if self
            .outside
            .edges
            .copy(&part.id, number, from, &mut buffer[to..to + range.len()])
        {
            self.outside.stats.edge_hits.add(1);
            return Ok(());
        }
        if self.edges.len() >= EDGES_MAX {
            return Err("more broken objects than a range can have");
        }
        let granule_len = (part.object_len as usize - start).min(GRANULE);
        let slot = self.len + self.edges.len() * GRANULE;
        self.edges.push(Edge {
            id: part.id,
            number,
            slot,
            granule_len,
            from,
            to,
            len: range.len(),
        });
        self.want(part, start..start + granule_len, slot, hashes);
        Ok(())
    }

    fn want(&mut self, part: &ObjectPart, range: Range<usize>, at: usize, hashes: &Hashes) {
        let pack = match self.packs.iter().rposition(|pack| *pack == part.pack.id) {
            Some(known) => known,
            None => {
                self.packs.push(part.pack.id);
                self.packs.len() - 1
            }
        };
        self.granules += range.len().div_ceil(GRANULE) as u64;
        let want = Want {
            pack,
            offset: part.pack_offset + range.start as u32,
            at,
            len: range.len(),
        };
        let check = Check {
            id: part.id,
            object_len: part.object_len,
            first: range.start / GRANULE,
            first_hash: hashes.first,
            hashes: hashes.range.clone(),
        };
        // An edge at the start of the range is planned before whole granules, but its place in the
        // buffer is behind them.
        let place = self
            .wants
            .iter()
            .rposition(|earlier| earlier.at < at)
            .map_or(0, |last| last + 1);
        self.wants.insert(place, want);
        self.checks.insert(place, check);
    }
}
