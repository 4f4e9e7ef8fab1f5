//! A tar stream taken apart: content of files, and all that is around it.
//!
//! Who has the files can put the very same stream together again from what is around them. It is what
//! engines keep of a layer (Docker's `tar-split`) to be able to give it away as they got it.

use std::{error::Error, io::Read};

use super::{
    DecodeError, DecodeOptions, DecodeStats,
    entry::{EntryKind, EntryReader},
    error::DecodeErrorKind as Kind,
    layer::Fault,
    stream::{TarStream, with_tar_stream},
};
use crate::{digest::Digest, tree::Tree};

/// Most bytes of one [`Piece`], but for the headers of one entry: those may be as many as the limits
/// allow.
const PIECE_MAX: usize = 256 << 10;

/// A part of a tar stream. All of them in order, names left out, are the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Headers, padding, the end of the archive, and data that is no file's content as it stands (that of
    /// sparse files).
    Around(&'a [u8]),
    /// An entry begins, whose header has been. It holds no bytes of the stream itself.
    Entry {
        /// Its path, as written: not checked.
        name: &'a [u8],
        /// Bytes of content that follow: 0 for all but ordinary files.
        len: u64,
    },
    /// Content of the entry that began last.
    Content(&'a [u8]),
}

/// What takes pieces; an error of its own ends the reading.
pub type SplitError = Box<dyn Error + Send + Sync>;

/// Reads the layer in `blob` to its end and shows `see` every piece of its tar stream. Gives the diff ID.
///
/// # Errors
/// As [`super::decode_layer`]; what `see` failed with is the source of the error. What `see` was given
/// before is then to be discarded.
pub fn split_layer<R: Read + Send>(
    blob: R,
    options: &DecodeOptions,
    see: &mut dyn FnMut(Piece<'_>) -> Result<(), SplitError>,
) -> Result<Digest, DecodeError> {
    let decoded = with_tar_stream(blob, options, |tar| {
        let mut stats = DecodeStats::default();
        split(tar, options, &mut stats, see)?;
        Ok((Tree::new(), stats))
    })?;
    Ok(decoded.diff_id)
}

fn split(
    tar: &mut TarStream<'_>,
    options: &DecodeOptions,
    stats: &mut DecodeStats,
    see: &mut dyn FnMut(Piece<'_>) -> Result<(), SplitError>,
) -> Result<(), Fault> {
    let mut reader = EntryReader::default();
    loop {
        tar.record();
        let entry = reader.next(tar, &options.limits, stats)?;
        let around = tar.recorded();
        see(Piece::Around(&around)).map_err(Kind::Sink)?;
        let Some(entry) = entry else { break };
        let mut left = entry.stored;
        let content = entry.kind == EntryKind::File && entry.sparse.is_none() && left > 0;
        let (name, len) = (&entry.path[..], if content { left } else { 0 });
        see(Piece::Entry { name, len }).map_err(Kind::Sink)?;
        while left > 0 {
            let most = usize::try_from(left).map_or(PIECE_MAX, |left| left.min(PIECE_MAX));
            let bytes = tar.piece(most, "an entry's data")?;
            left -= bytes.len() as u64;
            let piece = match content {
                true => Piece::Content(bytes),
                false => Piece::Around(bytes),
            };
            see(piece).map_err(Kind::Sink)?;
        }
        tar.record();
        tar.skip(entry.padding, "an entry's data")?;
        see(Piece::Around(&tar.recorded())).map_err(Kind::Sink)?;
    }
    // Archives may go on behind their end.
    while let Some(bytes) = tar.rest()? {
        see(Piece::Around(bytes)).map_err(Kind::Sink)?;
    }
    Ok(())
}
