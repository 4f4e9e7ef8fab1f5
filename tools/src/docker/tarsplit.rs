//! A layer's way back to its tar stream: what `docker save` and `docker push` need beside its files.
//!
//! The format is that of the Go package tar-split, version 1: gzip over lines of JSON, each a segment of
//! the stream in base64, or a file whose content stands there, with its CRC-64 (ISO 3309) to be checked
//! when it is read. Content that is not what the file has in the end, as of a path that a layer has twice,
//! becomes a segment.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    path::Path,
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use flate2::{Compression, write::GzEncoder};
use harbour_image::{
    decode::{
        DecodeOptions,
        split::{Piece, split_layer},
    },
    digest::Digest,
};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use serde::Serialize;

use super::{files, root::DataRoot};

/// Bytes of the stream that are gathered for one segment.
const SEGMENT: usize = 512 << 10;

/// Kinds of lines.
const FILE: u8 = 1;
const AROUND: u8 = 2;

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_raw: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    payload: Option<String>,
    position: u64,
}

fn is_zero(size: &u64) -> bool {
    *size == 0
}

impl DataRoot {
    /// Whether the way to a layer's stream is known already.
    pub fn keeps_tar_split(&self, diff_id: &Digest) -> bool {
        self.tar_split(diff_id).exists()
    }

    /// Reads a layer's blob, as often as `blob` has to be asked for it, and keeps the way to its stream.
    ///
    /// # Errors
    /// A blob that cannot be read or is not that layer, or what the file system says.
    pub fn keep_tar_split<R: Read + Send>(
        &self,
        options: &DecodeOptions,
        diff_id: &Digest,
        mut blob: impl FnMut() -> R,
    ) -> anyhow::Result<()> {
        let path = self.tar_split(diff_id);
        let dir = path.parent().unwrap_or(self.path());
        files::make_dir(dir)?;
        let mut twice = HashSet::new();
        loop {
            // Without a name until it is whole: whatever ends this leaves nothing.
            let why = || format!("cannot write {}", path.display());
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(CWD, dir, flags, Mode::from_raw_mode(0o644));
            let file = std::fs::File::from(file.with_context(why)?);
            let known = twice.len();
            write(blob(), options, &file, &mut twice)
                .with_context(|| format!("cannot read layer {diff_id} through"))?;
            if twice.len() > known {
                continue;
            }
            file.sync_all().with_context(why)?;
            return name(&file, &path).with_context(why);
        }
    }
}

/// Gives a file without one a name; another that has it is as good.
fn name(file: &std::fs::File, path: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, from, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(rustix::io::Errno::EXIST) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Writes the way to the stream of `blob`. Paths that it has twice are added to `twice`; when there are
/// new ones among them, what was written is wrong and has to be written again.
fn write<R: Read + Send>(
    blob: R,
    options: &DecodeOptions,
    to: impl Write,
    twice: &mut HashSet<Vec<u8>>,
) -> anyhow::Result<()> {
    let mut lines = Lines {
        to: GzEncoder::new(io::BufWriter::new(to), Compression::default()),
        position: 0,
        segment: Vec::new(),
        file: None,
        seen: HashSet::new(),
        twice,
    };
    split_layer(blob, options, &mut |piece| Ok(lines.take(piece)?))?;
    lines.end_segment()?;
    lines.to.finish()?.flush()?;
    Ok(())
}

struct Lines<'a, W: Write> {
    to: GzEncoder<W>,
    position: u64,
    /// Bytes of the stream that are not written yet.
    segment: Vec<u8>,
    /// The file whose content passes: name, length, what is still to come, and the sum so far.
    file: Option<(Vec<u8>, u64, u64, Crc64)>,
    seen: HashSet<Vec<u8>>,
    twice: &'a mut HashSet<Vec<u8>>,
}

impl<W: Write> Lines<'_, W> {
    fn take(&mut self, piece: Piece<'_>) -> io::Result<()> {
        match piece {
            Piece::Around(bytes) => self.around(bytes),
            Piece::Entry { name, len } => self.entry(name, len),
            Piece::Content(bytes) => {
                let Some((_, _, left, sum)) = &mut self.file else {
                    return self.around(bytes);
                };
                sum.update(bytes);
                *left = left.saturating_sub(bytes.len() as u64);
                if *left > 0 {
                    return Ok(());
                }
                match self.file.take() {
                    Some((name, len, _, sum)) => self.file_line(&name, len, Some(sum)),
                    None => Ok(()),
                }
            }
        }
    }

    fn entry(&mut self, name: &[u8], len: u64) -> io::Result<()> {
        let path = clean(name);
        if !self.seen.insert(path.clone()) {
            self.twice.insert(path.clone());
        }
        if self.twice.contains(&path) {
            return Ok(());
        }
        self.end_segment()?;
        if len > 0 {
            self.file = Some((name.to_owned(), len, len, Crc64::new()));
            return Ok(());
        }
        self.file_line(name, 0, None)
    }

    fn around(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.segment.extend_from_slice(bytes);
        match self.segment.len() >= SEGMENT {
            true => self.end_segment(),
            false => Ok(()),
        }
    }

    fn end_segment(&mut self) -> io::Result<()> {
        if self.segment.is_empty() {
            return Ok(());
        }
        let payload = Some(STANDARD.encode(&self.segment));
        self.segment.clear();
        self.line(AROUND, None, 0, payload)
    }

    fn file_line(&mut self, name: &[u8], size: u64, sum: Option<Crc64>) -> io::Result<()> {
        let payload = sum.map(|sum| STANDARD.encode(sum.finish().to_be_bytes()));
        self.line(FILE, Some(name), size, payload)
    }

    fn line(
        &mut self,
        kind: u8,
        name: Option<&[u8]>,
        size: u64,
        payload: Option<String>,
    ) -> io::Result<()> {
        let text = name.and_then(|name| std::str::from_utf8(name).ok());
        let raw = name.filter(|_| text.is_none());
        let line = Line {
            kind,
            name: text,
            name_raw: raw.map(|name| STANDARD.encode(name)),
            size,
            payload,
            position: self.position,
        };
        self.position += 1;
        serde_json::to_writer(&mut self.to, &line)?;
        self.to.write_all(b"\n")
    }
}

/// A path without what does not matter in it.
fn clean(name: &[u8]) -> Vec<u8> {
    let parts = name.split(|byte| *byte == b'/');
    let parts: Vec<&[u8]> = parts
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    parts.join(&b'/')
}

/// CRC-64 of ISO 3309, as Go has it: reflected, all ones before and after.
struct Crc64(u64);

impl Crc64 {
    fn new() -> Self {
        Self(!0)
    }

    fn update(&mut self, bytes: &[u8]) {
        let mut crc = self.0;
        let (parts, rest) = bytes.as_chunks::<8>();
        for part in parts {
            let word = crc ^ u64::from_le_bytes(*part);
            crc = (0..8).fold(0, |sum, at| {
                sum ^ TABLES[7 - at][usize::from(word.to_le_bytes()[at])]
            });
        }
        for byte in rest {
            crc = TABLES[0][usize::from((crc as u8) ^ byte)] ^ (crc >> 8);
        }
        self.0 = crc;
    }

    fn finish(&self) -> u64 {
        !self.0
    }
}

/// What each byte of a word of eight does to the sum, the last byte first.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    const POLYNOMIAL: u64 = 0xd800_0000_0000_0000;
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let below = tables[table - 1][byte];
            tables[table][byte] = tables[0][(below & 0xff) as usize] ^ (below >> 8);
            byte += 1;
        }
        table += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sums_are_those_of_iso_3309() {
        let sum = |bytes: &[u8]| {
            let mut crc = Crc64::new();
            crc.update(bytes);
            crc.finish()
        };
        // From the catalogue of parametrised CRC algorithms: CRC-64/GO-ISO.
        assert_eq!(sum(b"123456789"), 0xb909_56c7_75a4_1001);
        assert_eq!(sum(b""), 0);
        let bytes: Vec<u8> = (0..1000_u32).map(|n| (n * 7 % 251) as u8).collect();
        let mut pieces = Crc64::new();
        bytes.chunks(13).for_each(|piece| pieces.update(piece));
        assert_eq!(pieces.finish(), sum(&bytes));
    }

    #[test]
    fn paths_are_compared_without_what_does_not_matter() {
        for path in ["a/b", "./a/b", "a//b/", "/a/./b"] {
            assert_eq!(clean(path.as_bytes()), b"a/b");
        }
    }
}
