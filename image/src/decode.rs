//! Layer decode: a layer's blob becomes a [`Tree`], and its file content goes, object by object,
//! to an [`ObjectSink`].
//!
//! The path of one blob: the `stream` module decompresses it on a thread of its own and hands tar bytes in
//! chunks to the caller's thread, where they are hashed for the diff ID; `entry` puts headers and
//! their extensions (PAX, GNU, sparse maps) together; `content` cuts file data into objects;
//! `build` applies entries to the tree as an extraction would. Memory is bounded by
//! [`DecodeLimits`] and a handful of buffers, whatever the layer holds.
//!
//! Sources: POSIX.1-2017 `pax` (ustar and pax interchange formats), the GNU tar manual (GNU and
//! sparse formats), the OCI image specification (layer media types, whiteouts), RFC 1952 (gzip),
//! RFC 8878 (Zstandard).

mod acl;
mod build;
pub mod check;
mod content;
mod entry;
mod error;
mod extend;
mod gzip;
mod header;
mod layer;
pub mod memory;
mod path;
mod pax;
mod sparse;
pub mod split;
mod stream;
mod walk;
mod xattr;

use std::io::Read;

pub use error::{DecodeError, DecodeErrorKind, Limit, NameFault, Remedy};
pub use memory::MemorySink;

use crate::{
    digest::Digest,
    tree::{ObjectSink, Tree},
};

/// How a layer's blob is compressed. Given by its media type, not guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar stream.
    #[default]
    None,
    /// Gzip, one or many members (RFC 1952).
    Gzip,
    /// Zstandard, one or many frames, skippable ones too (RFC 8878).
    Zstd,
}

impl Compression {
    /// What the first bytes of a blob say (six are enough): for sources that have no media type,
    /// such as the layers of a `docker save` archive.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Bounds on what one layer may hold. Each has a default that real images stay far below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most tar headers (extension headers too), and most nodes. Default 2,000,000.
    pub entries_max: u64,
    /// Most bytes of uncompressed tar stream. Default 1 TiB.
    pub tar_bytes_max: u64,
    /// Largest length of one file, holes counted. Default 8 TiB.
    pub file_bytes_max: u64,
    /// Most bytes of all files together, holes counted. Default 15 TiB: an EROFS image has 2^32
    /// blocks of 4 KiB.
    pub logical_bytes_max: u64,
    /// Most bytes of tar stream, or of content, per byte of blob. Default 1000: deflate reaches
    /// 1032 on zeros alone.
    pub ratio_max: u64,
    /// The ratio is not looked at before this many bytes came out. Default 64 MiB.
    pub ratio_free_bytes: u64,
    /// Most bytes of extension headers (PAX, GNU long names) of one entry, and of all global PAX
    /// headers together. Default 1 MiB.
    pub extension_bytes_max: u64,
    /// Most bytes of memory, roughly, that tree and names may take. Default 1 GiB.
    pub tree_bytes_max: u64,
    /// Most data segments in the map of one sparse file. Default 2^20.
    pub sparse_segments_max: u32,
    /// Largest Zstandard window, as a power of two of bytes. Default 27 (128 MiB), what
    /// `zstd --long` and `--ultra` use; decoding takes this much memory when a frame asks for it.
    pub zstd_window_log_max: u32,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self {
            entries_max: 2_000_000,
            tar_bytes_max: 1 << 40,
            file_bytes_max: 8 << 40,
            logical_bytes_max: 15 << 40,
            ratio_max: 1000,
            ratio_free_bytes: 64 << 20,
            extension_bytes_max: 1 << 20,
            tree_bytes_max: 1 << 30,
            sparse_segments_max: 1 << 20,
            zstd_window_log_max: 27,
        }
    }
}

/// What to decode and how to call it in errors.
#[derive(Clone, Debug, Default)]
pub struct DecodeOptions {
    /// What errors call the layer: its digest, or a file name.
    pub label: String,
    /// How the blob is compressed.
    pub compression: Compression,
    /// The diff ID that the image's configuration promises; another one is an error.
    pub diff_id: Option<Digest>,
    /// Bounds.
    pub limits: DecodeLimits,
    /// Take entry and hard link names that begin with a slash as relative to the root of the
    /// layer. Off by default: such names are refused.
    pub strip_absolute: bool,
}

/// Counts of one decode, for progress, logs and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecodeStats {
    /// Bytes of the blob.
    pub blob_bytes: u64,
    /// Bytes of the tar stream, trailing padding too.
    pub tar_bytes: u64,
    /// Entries, extension headers not counted.
    pub entries: u64,
    /// Bytes of all files together, holes counted.
    pub logical_bytes: u64,
    /// Objects given to the sink.
    pub objects: u64,
    /// Bytes given to the sink.
    pub object_bytes: u64,
    /// Bytes of tar content that were all zero and became holes.
    pub zero_bytes: u64,
    /// `trusted.overlay.*` and `user.overlay.*` attributes left out: they would speak to the
    /// overlay file system above, not to the container.
    pub overlay_xattrs_dropped: u64,
    /// Attributes in a name space that Linux does not have for files (`com.apple.…`), left out.
    pub foreign_xattrs_dropped: u64,
    /// Text ACLs (`SCHILY.acl.*`) left out because they name users by name alone.
    pub acls_ignored: u64,
    /// Entries of AUFS's own (`.wh..wh.plnk` and such), left out.
    pub aufs_skipped: u64,
}

/// What a layer's blob held.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Names and nodes. Keys of objects are the sink's.
    pub tree: Tree,
    /// SHA-256 of the tar stream, from its first byte to its last.
    pub diff_id: Digest,
    /// Counts.
    pub stats: DecodeStats,
}

/// Decodes the layer in `blob`, giving all file content to `sink` in the order of the stream.
///
/// On success `blob` was read to its end, so a digest taken on the way has seen every byte. On
/// failure reading stops soon, and what the sink was given is the caller's to discard.
///
/// `blob` is read on a thread of its own that ends before this returns; a deadline for a stalled
/// source is the reader's to keep.
pub fn decode_layer<R, S>(
    blob: R,
    options: &DecodeOptions,
    sink: &mut S,
) -> Result<Decoded, DecodeError>
where
    R: Read + Send,
    S: ObjectSink,
{
    stream::with_tar_stream(blob, options, |tar| layer::decode_tar(tar, options, sink))
}
