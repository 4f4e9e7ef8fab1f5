//! File data on its way from the tar stream to the sink, cut into objects.
//!
//! Cuts lie at multiples of [`OBJECT_MAX`] in the file, so that equal files give equal objects
//! wherever they stand. An object of zeros becomes a hole, whether the tar knew it or not.

use super::{DecodeStats, error::DecodeErrorKind as Kind, stream::TarStream};
use crate::{
    object::OBJECT_MAX,
    tree::{Content, ObjectSink, Run},
};

/// Offsets of objects are multiples of this: a page, and an EROFS block.
const ALIGN: u64 = 4096;

/// A hole up to this long between two segments is filled with zeros rather than making an object
/// of its own out of each side.
const GAP_MAX: u64 = 16 << 10;

const FILE_DATA: &str = "a file's data";

/// Cuts the data of one file after another; the buffer is kept between files.
#[derive(Default)]
pub(super) struct Cutter {
    /// The object being put together.
    object: Vec<u8>,
    /// Where it begins in the file.
    start: u64,
    runs: Vec<Run>,
}

impl Cutter {
    /// A file that is `size` bytes of data with no map.
    pub(super) fn whole<S: ObjectSink>(
        &mut self,
        size: u64,
        tar: &mut TarStream<'_>,
        sink: &mut S,
        stats: &mut DecodeStats,
    ) -> Result<Content, Kind> {
        let mut offset = 0;
        while offset < size {
            let len = (size - offset).min(OBJECT_MAX as u64) as usize;
            // Most files are small and lie in one chunk: no copy for these.
            if let Some(bytes) = tar.contiguous(len)? {
                self.runs.extend(put(offset, bytes, sink, stats)?);
            } else {
                self.object.resize(len, 0);
                tar.read_exact(&mut self.object, FILE_DATA)?;
                self.start = offset;
                self.flush(tar, sink, stats)?;
            }
            tar.check_ratio(stats.object_bytes)?;
            offset += len as u64;
        }
        Ok(Content {
            size,
            runs: std::mem::take(&mut self.runs),
        })
    }

    /// A file of `size` bytes whose data is `segments`, in order.
    pub(super) fn sparse<S: ObjectSink>(
        &mut self,
        size: u64,
        segments: &[(u64, u64)],
        tar: &mut TarStream<'_>,
        sink: &mut S,
        stats: &mut DecodeStats,
    ) -> Result<Content, Kind> {
        for &(offset, len) in segments {
            self.segment(offset, len, tar, sink, stats)?;
        }
        self.flush(tar, sink, stats)?;
        Ok(Content {
            size,
            runs: std::mem::take(&mut self.runs),
        })
    }

    fn segment<S: ObjectSink>(
        &mut self,
        mut offset: u64,
        mut len: u64,
        tar: &mut TarStream<'_>,
        sink: &mut S,
        stats: &mut DecodeStats,
    ) -> Result<(), Kind> {
        while len > 0 {
            let end = self.start + self.object.len() as u64;
            // A gap within GAP_MAX may be of the same page, where two objects cannot both begin.
            if !self.object.is_empty() && (offset >= self.cell_end() || offset - end > GAP_MAX) {
                self.flush(tar, sink, stats)?;
            }
            if self.object.is_empty() {
                self.start = offset - offset % ALIGN;
            }
            let from = (offset - self.start) as usize;
            let take = len.min(self.cell_end() - offset);
            self.object.resize(from + take as usize, 0);
            tar.read_exact(&mut self.object[from..], FILE_DATA)?;
            offset += take;
            len -= take;
        }
        Ok(())
    }

    /// Where the object that begins at `start` must end.
    fn cell_end(&self) -> u64 {
        let object_max = OBJECT_MAX as u64;
        (self.start / object_max + 1).saturating_mul(object_max)
    }

    fn flush<S: ObjectSink>(
        &mut self,
        tar: &TarStream<'_>,
        sink: &mut S,
        stats: &mut DecodeStats,
    ) -> Result<(), Kind> {
        if !self.object.is_empty() {
            self.runs
                .extend(put(self.start, &self.object, sink, stats)?);
            self.object.clear();
            tar.check_ratio(stats.object_bytes)?;
        }
        Ok(())
    }
}

/// Gives `bytes` to the sink, unless they are all zero.
fn put<S: ObjectSink>(
    offset: u64,
    bytes: &[u8],
    sink: &mut S,
    stats: &mut DecodeStats,
) -> Result<Option<Run>, Kind> {
    if is_zero(bytes) {
        stats.zero_bytes += bytes.len() as u64;
        return Ok(None);
    }
    let object = sink
        .put(bytes)
        .map_err(|error| Kind::Sink(Box::new(error)))?;
    stats.objects += 1;
    stats.object_bytes += bytes.len() as u64;
    Ok(Some(Run {
        offset,
        object,
        len: bytes.len() as u32,
    }))
}

fn is_zero(bytes: &[u8]) -> bool {
    // In pieces, so that each is compared without branches and data ends the search early.
    bytes
        .chunks(64)
        .all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
