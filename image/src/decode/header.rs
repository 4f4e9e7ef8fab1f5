//! One 512-byte tar header: v7, ustar, GNU and star, as they differ in a few fields.
//!
//! Sources: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".

use std::ops::Range;

use super::{error::DecodeErrorKind as Kind, sparse::Segments, stream::BLOCK};
use crate::tree::Time;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const VERSION: Range<usize> = 263..265;
const DEV_MAJOR: Range<usize> = 329..337;
const DEV_MINOR: Range<usize> = 337..345;
const PREFIX: Range<usize> = 345..500;
const STAR_PREFIX: Range<usize> = 345..476;
const STAR_TRAILER: Range<usize> = 508..512;
const GNU_ATIME: Range<usize> = 345..357;
const GNU_CTIME: Range<usize> = 357..369;
const GNU_SPARSE: Range<usize> = 386..482;
const GNU_EXTENDED: usize = 482;
const GNU_REAL_SIZE: Range<usize> = 483..495;
const GNU_MORE_SPARSE: Range<usize> = 0..504;
const GNU_MORE_EXTENDED: usize = 504;

/// Offset and length fields of one sparse segment.
const GNU_SEGMENT: usize = 24;

/// Which fields lie behind the device numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header whose checksum was right.
pub(super) struct Header {
    block: [u8; BLOCK],
    format: Format,
}

impl Header {
    /// Checks the block that began at byte `at` of the stream.
    pub(super) fn parse(block: [u8; BLOCK], at: u64) -> Result<Self, Kind> {
        let wrong = |reason| Kind::Header { at, reason };
        let want = octal(&block[CHECKSUM]).ok_or_else(|| wrong("the checksum is not a number"))?;
        // Old systems summed signed bytes; the field itself counts as spaces in both.
        let others = || block[..CHECKSUM.start].iter().chain(&block[CHECKSUM.end..]);
        let spaces = i64::from(b' ') * CHECKSUM.len() as i64;
        let unsigned = spaces + others().map(|byte| i64::from(*byte)).sum::<i64>();
        if want != unsigned {
            let signed = spaces + others().map(|byte| i64::from(*byte as i8)).sum::<i64>();
            if want != signed {
                return Err(wrong("the checksum does not fit"));
            }
        }
        let format = match &block[MAGIC] {
            b"ustar\0" if &block[STAR_TRAILER] == b"tar\0" => Format::Star,
            b"ustar\0" => Format::Ustar,
            b"ustar " if &block[VERSION] == b" \0" => Format::Gnu,
            _ => Format::V7,
        };
        Ok(Self { block, format })
    }

    /// The type flag as it stands there.
    pub(super) fn type_flag(&self) -> u8 {
        self.block[TYPE]
    }

    /// The name with its prefix, if the format has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.block[NAME]);
        let prefix = match self.format {
            Format::Ustar => text(&self.block[PREFIX]),
            Format::Star => text(&self.block[STAR_PREFIX]),
            Format::Gnu if self.has_prefix_in_gnu() => text(&self.block[PREFIX]),
            _ => &[],
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// Go before 1.8 wrote a ustar prefix under the GNU magic, and images of that time exist: it
    /// shows where access and change time are not numbers.
    fn has_prefix_in_gnu(&self) -> bool {
        let no_number = |range| {
            let field: &[u8] = &self.block[range];
            field[0] != 0 && number(field).is_none()
        };
        no_number(GNU_ATIME) || no_number(GNU_CTIME)
    }

    /// Target of a link.
    pub(super) fn link(&self) -> &[u8] {
        text(&self.block[LINK])
    }

    /// Permission bits; bits of the file type, which some writers add, are dropped.
    pub(super) fn mode(&self) -> Result<u16, Kind> {
        Ok((self.number("mode", MODE)? & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<u32, Kind> {
        self.unsigned("uid", UID)
    }

    pub(super) fn gid(&self) -> Result<u32, Kind> {
        self.unsigned("gid", GID)
    }

    pub(super) fn mtime(&self) -> Result<Time, Kind> {
        Ok(Time {
            secs: self.number("mtime", MTIME)?,
            nanos: 0,
        })
    }

    /// Bytes of data that follow.
    pub(super) fn size(&self) -> Result<u64, Kind> {
        let size = self.number("size", SIZE)?;
        u64::try_from(size).map_err(|_| Kind::number("size", &self.block[SIZE]))
    }

    pub(super) fn device(&self) -> Result<(u32, u32), Kind> {
        Ok((
            self.unsigned("devmajor", DEV_MAJOR)?,
            self.unsigned("devminor", DEV_MINOR)?,
        ))
    }

    /// The part of an old GNU sparse map that stands in the header, the file's real length, and
    /// whether blocks with more of the map follow.
    pub(super) fn sparse(&self) -> Result<(Segments, u64, bool), Kind> {
        if self.format != Format::Gnu {
            return Err(Kind::Sparse("the header is not in GNU format"));
        }
        let segments = sparse_fields(&self.block[GNU_SPARSE])?;
        let real_size = number(&self.block[GNU_REAL_SIZE])
            .and_then(|size| u64::try_from(size).ok())
            .ok_or_else(|| Kind::number("realsize", &self.block[GNU_REAL_SIZE]))?;
        Ok((segments, real_size, self.block[GNU_EXTENDED] != 0))
    }

    fn number(&self, field: &'static str, range: Range<usize>) -> Result<i64, Kind> {
        let bytes = &self.block[range];
        number(bytes).ok_or_else(|| Kind::number(field, bytes))
    }

    fn unsigned(&self, field: &'static str, range: Range<usize>) -> Result<u32, Kind> {
        let number = self.number(field, range.clone())?;
        u32::try_from(number).map_err(|_| Kind::number(field, &self.block[range]))
    }
}

/// A block with more of an old GNU sparse map, and whether another follows.
pub(super) fn more_sparse(block: &[u8; BLOCK]) -> Result<(Segments, bool), Kind> {
    Ok((
        sparse_fields(&block[GNU_MORE_SPARSE])?,
        block[GNU_MORE_EXTENDED] != 0,
    ))
}

fn sparse_fields(fields: &[u8]) -> Result<Segments, Kind> {
    let mut segments = Segments::new();
    for field in fields.chunks_exact(GNU_SEGMENT) {
        if field[0] == 0 {
            break;
        }
        let part = |bytes| number(bytes).and_then(|number| u64::try_from(number).ok());
        let (offset, len) = field.split_at(GNU_SEGMENT / 2);
        match (part(offset), part(len)) {
            (Some(offset), Some(len)) => segments.push((offset, len)),
            _ => return Err(Kind::Sparse("an offset or a length is not a number")),
        }
    }
    Ok(segments)
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..end]
}

/// Octal digits, or base 256 where the first bit is set (GNU; two's complement). Blank is 0.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // The second bit is the sign; the first one only marks the encoding.
    let fill: u8 = if first & 0x40 != 0 { 0xff } else { 0 };
    let mut bytes = [fill; 16];
    let start = bytes.len().checked_sub(field.len())?;
    bytes[start..].copy_from_slice(field);
    bytes[start] = if fill == 0 { first & 0x7f } else { first };
    i64::try_from(i128::from_be_bytes(bytes)).ok()
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    // Twelve digits of three bits fit easily.
    digits[..end]
        .iter()
        .try_fold(0, |value: i64, digit| match digit {
            b'0'..=b'7' => Some(value * 8 + i64::from(digit - b'0')),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let long = [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1];
        let minus_two = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe];
        let huge = [0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let cases: [(&[u8], Option<i64>); 11] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"77777777", Some(0o77777777)),
            (b"\0\0\0\0", Some(0)),
            (b"    ", Some(0)),
            (b"12 34\0", Some(0o12)),
            (b"08\0", None),
            (b"-1\0", None),
            (&long, Some((2 << 32) + 1)),
            (&minus_two, Some(-2)),
            (&huge, None),
        ];
        for (field, want) in cases {
            assert_eq!(number(field), want, "{field:?}");
        }
    }
}
