//! Entries of a tar stream: a header with its extensions resolved, positioned at its data.

use super::{
    DecodeLimits, DecodeStats, Limit,
    error::DecodeErrorKind as Kind,
    extend::Extensions,
    header::Header,
    layer::Fault,
    sparse::{self, SparseMap},
    stream::{BLOCK, TarStream},
    xattr,
};
use crate::tree::Meta;

/// What an entry asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum EntryKind {
    #[default]
    File,
    Dir,
    Symlink,
    HardLink,
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// One entry. Its data, [`Entry::stored`] bytes and [`Entry::padding`], is still in the stream.
#[derive(Default)]
pub(super) struct Entry {
    /// As written: not checked.
    pub(super) path: Vec<u8>,
    /// Target of a hard or symbolic link, not checked.
    pub(super) link: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) meta: Meta,
    pub(super) stored: u64,
    /// Bytes behind the data up to a whole block.
    pub(super) padding: u64,
    pub(super) sparse: Option<SparseMap>,
}

/// Reads entries and keeps what global headers said.
#[derive(Default)]
pub(super) struct EntryReader {
    global: Extensions,
    global_bytes: u64,
    /// Headers seen, of any type.
    headers: u64,
}

impl EntryReader {
    /// The next entry, or nothing at the end of the archive: two blocks of zeros, or the end of
    /// the stream between entries (which the diff ID tells from a cut one).
    pub(super) fn next(
        &mut self,
        tar: &mut TarStream<'_>,
        limits: &DecodeLimits,
        stats: &mut DecodeStats,
    ) -> Result<Option<Entry>, Fault> {
        let mut local: Option<Extensions> = None;
        let mut extension_bytes = 0;
        loop {
            let Some(header) = self.header(tar, limits)? else {
                if local.is_some() {
                    let at = tar.position();
                    let inside = "an entry: its extension header is there, it is not";
                    return Err(Kind::Truncated { at, inside }.into());
                }
                return Ok(None);
            };
            let flag = header.type_flag();
            if !matches!(flag, b'x' | b'X' | b'g' | b'L' | b'K' | b'V') {
                stats.entries += 1;
                let global = &self.global;
                let extensions = local.unwrap_or_else(|| global.clone());
                return entry(&header, extensions, tar, limits, stats).map(Some);
            }
            let at_name = |kind| Fault::at(&header.name(), kind);
            let size = header.size().map_err(at_name)?;
            if flag == b'V' {
                // A volume's label is no file.
                tar.skip(size.saturating_add(padding(size)), "a volume label")?;
                continue;
            }
            let total = if flag == b'g' {
                &mut self.global_bytes
            } else {
                &mut extension_bytes
            };
            *total = size.saturating_add(*total);
            if *total > limits.extension_bytes_max {
                let kind = Kind::limit(Limit::ExtensionBytes, limits.extension_bytes_max);
                return Err(at_name(kind));
            }
            // Small enough by now to hold.
            let mut data = vec![0; size as usize];
            tar.read_exact(&mut data, "an extension header")?;
            tar.skip(padding(size), "an extension header")?;
            if flag == b'g' {
                self.global.apply(&data, true).map_err(at_name)?;
                continue;
            }
            let global = &self.global;
            let extensions = local.get_or_insert_with(|| global.clone());
            match flag {
                b'L' => extensions.long_name = Some(until_nul(data)),
                b'K' => extensions.long_link = Some(until_nul(data)),
                _ => extensions.apply(&data, false).map_err(at_name)?,
            }
        }
    }

    fn header(
        &mut self,
        tar: &mut TarStream<'_>,
        limits: &DecodeLimits,
    ) -> Result<Option<Header>, Kind> {
        let at = tar.position();
        let Some(block) = tar.block()? else {
            return Ok(None);
        };
        if block == [0; BLOCK] {
            return match tar.block()? {
                None => Ok(None),
                Some(second) if second == block => Ok(None),
                Some(_) => {
                    let reason = "a single block of zeros stands between entries";
                    Err(Kind::Header { at, reason })
                }
            };
        }
        self.headers += 1;
        if self.headers > limits.entries_max {
            return Err(Kind::limit(Limit::Entries, limits.entries_max));
        }
        Header::parse(block, at).map(Some)
    }
}

/// Puts header and extensions together.
fn entry(
    header: &Header,
    mut extensions: Extensions,
    tar: &mut TarStream<'_>,
    limits: &DecodeLimits,
    stats: &mut DecodeStats,
) -> Result<Entry, Fault> {
    let names = [
        extensions.sparse.name.take(),
        extensions.path.take(),
        extensions.long_name.take(),
    ];
    let path = names
        .into_iter()
        .flatten()
        .next()
        .unwrap_or_else(|| header.name());
    let mut entry = Entry {
        path,
        ..Entry::default()
    };
    match entry.fill(header, extensions, tar, limits, stats) {
        Ok(()) => Ok(entry),
        Err(kind) => Err(Fault::at(&entry.path, kind)),
    }
}

impl Entry {
    /// All but the path.
    fn fill(
        &mut self,
        header: &Header,
        extensions: Extensions,
        tar: &mut TarStream<'_>,
        limits: &DecodeLimits,
        stats: &mut DecodeStats,
    ) -> Result<(), Kind> {
        let (kind, has_data) = kind(header, &extensions, &self.path)?;
        let size = match extensions.size {
            _ if !has_data => 0,
            Some(size) => size,
            None => header.size()?,
        };
        if size > limits.tar_bytes_max {
            return Err(Kind::limit(Limit::TarBytes, limits.tar_bytes_max));
        }
        self.kind = kind;
        self.meta = meta(header, &extensions, stats)?;
        self.stored = size;
        self.padding = padding(size);
        if header.type_flag() == b'S' {
            self.sparse = Some(sparse::old_gnu(header, tar, size, limits)?);
        } else if kind == EntryKind::File
            && let Some((map, taken)) = extensions.sparse.resolve(tar, size, limits)?
        {
            self.sparse = Some(map);
            self.stored -= taken;
        }
        self.link = extensions
            .link
            .or(extensions.long_link)
            .unwrap_or_else(|| header.link().to_vec());
        Ok(())
    }
}

/// What the type flag means, and whether data follows: a size in the header of a link, a
/// directory or a device is noise that some writers leave there.
fn kind(header: &Header, extensions: &Extensions, path: &[u8]) -> Result<(EntryKind, bool), Kind> {
    let device = || -> Result<(u32, u32), Kind> {
        let numbers = header.device();
        match (extensions.device_major, extensions.device_minor) {
            (Some(major), Some(minor)) => Ok((major, minor)),
            (major, minor) => {
                let (header_major, header_minor) = numbers?;
                Ok((major.unwrap_or(header_major), minor.unwrap_or(header_minor)))
            }
        }
    };
    Ok(match header.type_flag() {
        // Before POSIX a directory was a file with a slash at its end.
        0 if path.ends_with(b"/") => (EntryKind::Dir, false),
        0 | b'0' | b'7' | b'S' => (EntryKind::File, true),
        b'1' => (EntryKind::HardLink, false),
        b'2' => (EntryKind::Symlink, false),
        b'3' => device().map(|(major, minor)| (EntryKind::Char(major, minor), false))?,
        b'4' => device().map(|(major, minor)| (EntryKind::Block(major, minor), false))?,
        b'5' => (EntryKind::Dir, false),
        b'6' => (EntryKind::Fifo, false),
        // GNU's incremental dump of a directory: its data is a list of names.
        b'D' => (EntryKind::Dir, true),
        flag => return Err(Kind::EntryType(flag)),
    })
}

fn meta(header: &Header, extensions: &Extensions, stats: &mut DecodeStats) -> Result<Meta, Kind> {
    Ok(Meta {
        mode: header.mode()?,
        uid: extensions.uid.map_or_else(|| header.uid(), Ok)?,
        gid: extensions.gid.map_or_else(|| header.gid(), Ok)?,
        mtime: extensions.mtime.map_or_else(|| header.mtime(), Ok)?,
        xattrs: xattr::collect(extensions, stats)?,
    })
}

/// Bytes from the end of `size` bytes of data to the next whole block.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    let end = data
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(data.len());
    data.truncate(end);
    data
}
