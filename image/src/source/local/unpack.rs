//! Compressed archives: unpacked once into a file without a name, so that blobs can be read by
//! offset and nothing is left behind however the process ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{open_regular, sniff};
use crate::{
    manifest::Compression,
    source::{error::SourceError, options::ArchiveOptions},
};

/// The archive at `path`; where it is compressed, a temporary copy that is not.
///
/// Blocks for as long as unpacking takes.
pub(crate) fn open_archive(path: &Path, options: &ArchiveOptions) -> Result<File, SourceError> {
    let file = open_regular(path)?;
    let compression = sniff(&file, 0, path)?;
    if compression == Compression::None {
        return Ok(file);
    }
    let mut out = nameless_file(&options.temp_dir)?;
    let mut input = decoder(&file, compression, path)?.take(options.unpacked_max.saturating_add(1));
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let len = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(SourceError::io(path, "unpack it", error)),
        };
        total += len as u64;
        if total > options.unpacked_max {
            let what = format!("{}, unpacked,", path.display());
            return Err(SourceError::TooLarge {
                what,
                limit: options.unpacked_max,
            });
        }
        let written = out.write_all(&buffer[..len]);
        written.map_err(|e| SourceError::io(&options.temp_dir, "unpack an archive here", e))?;
    }
    Ok(out)
}

/// The uncompressed stream of `file`, from its start.
pub(super) fn decoder<'a>(
    file: &'a File,
    compression: Compression,
    path: &Path,
) -> Result<Box<dyn Read + 'a>, SourceError> {
    let input = BufReader::with_capacity(256 << 10, file);
    Ok(match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(input);
            Box::new(decoder.map_err(|e| SourceError::io(path, "unpack it", e))?)
        }
    })
}

/// A new file in `dir` that only we can read, its name removed at once.
fn nameless_file(dir: &Path) -> Result<File, SourceError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut last = None;
    for _ in 0..16 {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".harbour-unpack-{}-{number}", std::process::id()));
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        match made {
            Ok(file) => {
                fs::remove_file(&path).map_err(|e| SourceError::io(&path, "remove it", e))?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = Some(error),
            Err(error) => return Err(SourceError::io(dir, "make a temporary file", error)),
        }
    }
    let error = last.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into());
    Err(SourceError::io(dir, "make a temporary file", error))
}
