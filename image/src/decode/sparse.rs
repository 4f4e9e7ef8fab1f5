//! Maps of sparse files: where in a file the bytes that the tar holds belong.
//!
//! Source: GNU tar manual, appendix "Sparse Formats" (old GNU, PAX 0.0, 0.1 and 1.0).

use super::{
    DecodeLimits, Limit,
    error::DecodeErrorKind as Kind,
    header::{Header, more_sparse},
    pax::decimal,
    stream::{BLOCK, TarStream},
};

/// Longest number in a map of format 1.0, in digits.
const DIGITS_MAX: usize = 20;

/// Offset and length in bytes of pieces of a file that are data.
pub(super) type Segments = Vec<(u64, u64)>;

/// Data segments of a file, checked: not empty, in order, apart, inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SparseMap {
    pub(super) segments: Segments,
    /// Length of the file in bytes, holes counted.
    pub(super) real_size: u64,
}

impl SparseMap {
    /// Checks what the tar said; `stored` is the number of data bytes that follow.
    fn new(mut segments: Segments, real_size: u64, stored: u64) -> Result<Self, Kind> {
        let mut end = 0;
        let mut sum = 0;
        for &(offset, len) in &segments {
            if offset < end {
                return Err(Kind::Sparse("segments overlap or are out of order"));
            }
            end = offset
                .checked_add(len)
                .ok_or(Kind::Sparse("a segment ends beyond 2^64"))?;
            // Segments do not overlap, so the sum cannot be more than the last end.
            sum += len;
        }
        if end > real_size {
            return Err(Kind::Sparse("a segment ends behind the file's end"));
        }
        if sum != stored {
            return Err(Kind::Sparse(
                "the segments hold more or less than the entry's data",
            ));
        }
        segments.retain(|(_, len)| *len > 0);
        Ok(Self {
            segments,
            real_size,
        })
    }
}

/// Keywords `GNU.sparse.*` of a PAX header.
#[derive(Clone, Debug, Default)]
pub(super) struct SparseKeys {
    /// `GNU.sparse.name`
    pub(super) name: Option<Vec<u8>>,
    major: Option<u64>,
    minor: Option<u64>,
    /// `GNU.sparse.size` (0.x) or `GNU.sparse.realsize` (1.0).
    size: Option<u64>,
    blocks: Option<u64>,
    /// `GNU.sparse.map` (0.1), or pairs of `GNU.sparse.offset` and `GNU.sparse.numbytes` (0.0).
    map: Option<Segments>,
    /// An offset whose length has not come yet.
    offset: Option<u64>,
}

impl SparseKeys {
    /// Takes the record `GNU.sparse.KEY=VALUE`; keys that nobody knows are left alone.
    pub(super) fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), Kind> {
        let number = || decimal(value).ok_or(Kind::Sparse("a value is not a number"));
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"numblocks" => self.blocks = Some(number()?),
            b"offset" => {
                let open = self.offset.replace(number()?);
                open.map_or(Ok(()), |_| Err(Kind::Sparse("an offset has no length")))?;
            }
            b"numbytes" => {
                let offset = self
                    .offset
                    .take()
                    .ok_or(Kind::Sparse("a length has no offset"))?;
                self.map.get_or_insert_default().push((offset, number()?));
            }
            b"map" => self.map = Some(map_from_list(value)?),
            _ => {}
        }
        Ok(())
    }

    /// The map of an entry with `stored` bytes of data, and how many of these the map itself
    /// took; nothing when the entry is not sparse.
    pub(super) fn resolve(
        &self,
        tar: &mut TarStream<'_>,
        stored: u64,
        limits: &DecodeLimits,
    ) -> Result<Option<(SparseMap, u64)>, Kind> {
        let size = || {
            self.size
                .ok_or(Kind::Sparse("the file's real size is missing"))
        };
        match (self.major, self.minor, &self.map) {
            (Some(1), Some(0), _) => {
                let (segments, taken) = map_from_data(tar, stored, limits)?;
                Ok(Some((
                    SparseMap::new(segments, size()?, stored - taken)?,
                    taken,
                )))
            }
            (None | Some(0), _, Some(map)) => {
                if self.offset.is_some() || self.blocks.is_some_and(|n| n != map.len() as u64) {
                    return Err(Kind::Sparse(
                        "the map does not have as many segments as it says",
                    ));
                }
                check_count(map.len() as u64, limits)?;
                Ok(Some((SparseMap::new(map.clone(), size()?, stored)?, 0)))
            }
            // A file that is one hole has a count of no segments and no map in format 0.0.
            (None | Some(0), _, None) if self.blocks == Some(0) => {
                Ok(Some((SparseMap::new(Vec::new(), size()?, stored)?, 0)))
            }
            (None, None, None) => Ok(None),
            _ => Err(Kind::Sparse(
                "this version of the sparse format is not known",
            )),
        }
    }
}

/// The map of an old GNU sparse entry, whose blocks stand between header and data.
pub(super) fn old_gnu(
    header: &Header,
    tar: &mut TarStream<'_>,
    stored: u64,
    limits: &DecodeLimits,
) -> Result<SparseMap, Kind> {
    let (mut segments, real_size, mut more) = header.sparse()?;
    while more {
        let mut block = [0; BLOCK];
        tar.read_exact(&mut block, "a sparse map")?;
        let (part, again) = more_sparse(&block)?;
        if part.is_empty() && again {
            return Err(Kind::Sparse("a block of the map is empty"));
        }
        segments.extend(part);
        check_count(segments.len() as u64, limits)?;
        more = again;
    }
    SparseMap::new(segments, real_size, stored)
}

/// `offset,length,offset,length`
fn map_from_list(list: &[u8]) -> Result<Segments, Kind> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let wrong = Kind::Sparse("the map is not a list of pairs of numbers");
    let mut numbers = list.split(|byte| *byte == b',').map(decimal);
    let mut map = Vec::new();
    while let Some(offset) = numbers.next() {
        match (offset, numbers.next().flatten()) {
            (Some(offset), Some(len)) => map.push((offset, len)),
            _ => return Err(wrong),
        }
    }
    Ok(map)
}

/// The map of format 1.0: lines of numbers at the front of the data, filled up to whole blocks.
/// Gives the bytes that it took, too.
fn map_from_data(
    tar: &mut TarStream<'_>,
    stored: u64,
    limits: &DecodeLimits,
) -> Result<(Segments, u64), Kind> {
    let mut lines = Lines {
        tar,
        left: stored,
        taken: 0,
        block: [0; BLOCK],
        at: BLOCK,
    };
    let count = lines.number()?;
    check_count(count, limits)?;
    let mut segments = Vec::new();
    for _ in 0..count {
        segments.push((lines.number()?, lines.number()?));
    }
    Ok((segments, lines.taken))
}

struct Lines<'a, 'b> {
    tar: &'a mut TarStream<'b>,
    /// Data bytes that were not read.
    left: u64,
    taken: u64,
    block: [u8; BLOCK],
    at: usize,
}

impl Lines<'_, '_> {
    fn number(&mut self) -> Result<u64, Kind> {
        let mut digits = [0; DIGITS_MAX];
        let mut len = 0;
        loop {
            let byte = self.byte()?;
            if byte == b'\n' {
                break;
            }
            *digits
                .get_mut(len)
                .ok_or(Kind::Sparse("a number in the map is too long"))? = byte;
            len += 1;
        }
        decimal(&digits[..len]).ok_or(Kind::Sparse("a line of the map is not a number"))
    }

    fn byte(&mut self) -> Result<u8, Kind> {
        if self.at == BLOCK {
            self.left = (self.left.checked_sub(BLOCK as u64))
                .ok_or(Kind::Sparse("the map is longer than the entry's data"))?;
            self.tar.read_exact(&mut self.block, "a sparse map")?;
            self.taken += BLOCK as u64;
            self.at = 0;
        }
        self.at += 1;
        Ok(self.block[self.at - 1])
    }
}

fn check_count(count: u64, limits: &DecodeLimits) -> Result<(), Kind> {
    let max = u64::from(limits.sparse_segments_max);
    if count > max {
        return Err(Kind::limit(Limit::SparseSegments, max));
    }
    Ok(())
}
