//! What can be wrong with a layer.

use std::{error::Error, fmt, io};

use crate::digest::Digest;

/// A layer could not be decoded. Names the layer, the entry where one is to blame, and what is
/// wrong; [`DecodeError::remedy`] says what to do.
#[derive(Debug)]
pub struct DecodeError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    label: String,
    entry: Option<String>,
    kind: DecodeErrorKind,
}

/// What the caller can do about a [`DecodeError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Reading the blob failed: try again.
    Retry,
    /// The bytes are not what was published, or are damaged: fetch them again, from elsewhere.
    Refetch,
    /// The layer itself is bad and no other copy will be better: rebuild the image.
    Rebuild,
    /// The layer is larger than the limits allow: raise the limit if the layer is trusted.
    RaiseLimit,
    /// The place that takes content failed; its error is the source.
    Sink,
}

/// A bound of [`crate::decode::DecodeLimits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `entries_max`
    Entries,
    /// `tar_bytes_max`
    TarBytes,
    /// `file_bytes_max`
    FileBytes,
    /// `logical_bytes_max`
    LogicalBytes,
    /// `extension_bytes_max`
    ExtensionBytes,
    /// `tree_bytes_max`
    TreeBytes,
    /// `sparse_segments_max`
    SparseSegments,
}

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The reader of the blob failed.
    #[error("reading the blob failed")]
    Read(#[source] io::Error),
    /// The thread that decompresses could not be started, or is gone.
    #[error("the decompression thread failed")]
    Thread(#[source] io::Error),
    /// The compressed stream is damaged.
    #[error("bad {format} stream after {at} bytes: {reason}")]
    Compressed {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// Bytes of the blob read so far; the fault lies at or a little before this.
        at: u64,
        /// What is wrong.
        reason: String,
    },
    /// The tar stream ends inside a header or inside an entry's data.
    #[error("the tar stream ends after {at} bytes, in the middle of {inside}")]
    Truncated {
        /// Length of the tar stream in bytes.
        at: u64,
        /// What was being read.
        inside: &'static str,
    },
    /// The tar stream is not the one that the image's configuration names.
    #[error("diff ID is {got}, the image's configuration says {want}")]
    DiffId {
        /// Promised.
        want: Digest,
        /// Found.
        got: Digest,
    },
    /// A header block is not one.
    #[error("no tar header at byte {at}: {reason}")]
    Header {
        /// Offset in the tar stream in bytes.
        at: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A number that is not one or is out of range.
    #[error("{field} is \"{text}\", not a number that fits")]
    Number {
        /// The header field or PAX keyword.
        field: &'static str,
        /// What stands there, cut.
        text: String,
    },
    /// A PAX extended header that breaks the format.
    #[error("bad PAX header: {0}")]
    Pax(&'static str),
    /// An entry type that layers do not have.
    #[error("entry type {:?} is not supported", char::from(*.0))]
    EntryType(u8),
    /// The name of the entry, or of its hard link target, cannot be used.
    #[error("bad {what}: {reason}")]
    Name {
        /// `name` or `hard link target`.
        what: &'static str,
        /// What is wrong.
        reason: NameFault,
    },
    /// The root of the layer is not a directory.
    #[error("the root of a layer must be a directory")]
    RootNotDirectory,
    /// Something that is not a directory stands where one is needed.
    #[error("\"{parent}\" is not a directory, so nothing can be below it")]
    ParentNotDirectory {
        /// Path of what stands there.
        parent: String,
    },
    /// The path goes through a symbolic link that leads out of the layer.
    #[error(
        "the path goes through the symbolic link \"{link}\", whose target \"{target}\" leaves the layer"
    )]
    SymlinkEscapes {
        /// Path of the link.
        link: String,
        /// Its target.
        target: String,
    },
    /// The path goes through too many symbolic links, or through a circle of them.
    #[error("the path goes through too many symbolic links, the last is \"{link}\"")]
    SymlinkLoop {
        /// Path of the last link.
        link: String,
    },
    /// Following symbolic links leads deeper than a path can name.
    #[error("the directory lies deeper than {max} levels")]
    TooDeep {
        /// The bound.
        max: usize,
    },
    /// A symbolic link's target that no link can have.
    #[error("bad symbolic link target: {0}")]
    SymlinkTarget(&'static str),
    /// A hard link to a name that the layer does not have.
    #[error("hard link to \"{target}\", which is not in this layer")]
    HardLinkMissing {
        /// The name it links to.
        target: String,
    },
    /// Hard links that name each other and no file.
    #[error("hard link to \"{target}\", which leads back to the link itself")]
    HardLinkCycle {
        /// The name it links to.
        target: String,
    },
    /// A hard link to a directory.
    #[error("hard link to \"{target}\", which is a directory")]
    HardLinkToDirectory {
        /// The name it links to.
        target: String,
    },
    /// An extended attribute that no file can have.
    #[error("bad extended attribute \"{name}\": {reason}")]
    Xattr {
        /// Its name, cut.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A sparse map that makes no sense.
    #[error("bad sparse map: {0}")]
    Sparse(&'static str),
    /// The layer is larger than allowed.
    #[error("{} (limit {max})", limit_text(*.limit))]
    Limit {
        /// Which bound.
        limit: Limit,
        /// Its value.
        max: u64,
    },
    /// The blob grows too much: a compression bomb, or a huge file of zeros.
    #[error(
        "{blob} bytes of blob became {unpacked} bytes, more than {max} for one: this looks like a compression bomb"
    )]
    Bomb {
        /// Bytes of blob read.
        blob: u64,
        /// Bytes that came of them.
        unpacked: u64,
        /// Allowed ratio.
        max: u64,
    },
    /// The sink did not take an object.
    #[error("the content could not be placed")]
    Sink(#[source] Box<dyn Error + Send + Sync>),
}

/// Why a name cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// No bytes at all.
    #[error("it is empty")]
    Empty,
    /// Begins with a slash.
    #[error("it is absolute; names in a layer are relative to its root")]
    Absolute,
    /// Has a component `..`.
    #[error("it has a component \"..\"")]
    Parent,
    /// Has a NUL byte.
    #[error("it has a NUL byte")]
    Nul,
    /// A component of more than 255 bytes.
    #[error("a component is {0} bytes long, 255 is the most that Linux can have")]
    ComponentLength(usize),
    /// More than 4096 bytes.
    #[error("it is {0} bytes long, 4096 is the most that Linux can have")]
    PathLength(usize),
    /// `.wh.` with nothing, `.` or `..` behind it.
    #[error("it is a whiteout of nothing that could be there")]
    Whiteout,
    /// A directory whose name begins with `.wh.`, which is kept for whiteouts.
    #[error("a directory's name begins with \".wh.\", which marks a deleted name")]
    Reserved,
}

impl DecodeError {
    pub(crate) fn new(label: &str, entry: Option<String>, kind: DecodeErrorKind) -> Self {
        Self(Box::new(Inner {
            label: label.to_owned(),
            entry,
            kind,
        }))
    }

    /// The layer, as the caller called it.
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// The entry to blame, with bytes that are not text written as `\xNN`; long names are cut.
    pub fn entry(&self) -> Option<&str> {
        self.0.entry.as_deref()
    }

    /// What is wrong.
    pub fn kind(&self) -> &DecodeErrorKind {
        &self.0.kind
    }

    /// What to do.
    pub fn remedy(&self) -> Remedy {
        use DecodeErrorKind as K;
        match self.kind() {
            K::Read(_) | K::Thread(_) => Remedy::Retry,
            K::Compressed { .. } | K::Truncated { .. } | K::DiffId { .. } | K::Header { .. } => {
                Remedy::Refetch
            }
            K::Limit { .. } | K::Bomb { .. } => Remedy::RaiseLimit,
            K::Sink(_) => Remedy::Sink,
            _ => Remedy::Rebuild,
        }
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}", self.label())?;
        if let Some(entry) = self.entry() {
            write!(f, ", entry \"{entry}\"")?;
        }
        write!(f, ": {}", self.kind())?;
        f.write_str(match self.remedy() {
            Remedy::Retry => "; try again",
            Remedy::Refetch => {
                "; fetch the layer again, from another source if this one repeats it"
            }
            Remedy::Rebuild => "; rebuild the image with a correct layer",
            Remedy::RaiseLimit => "; if the layer is to be trusted, raise the limit",
            Remedy::Sink => "",
        })
    }
}

impl Error for DecodeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        // The kind's text is already in ours.
        self.kind().source()
    }
}

impl DecodeErrorKind {
    pub(crate) fn number(field: &'static str, text: &[u8]) -> Self {
        Self::Number {
            field,
            text: printable(text),
        }
    }

    pub(crate) fn limit(limit: Limit, max: u64) -> Self {
        Self::Limit { limit, max }
    }
}

fn limit_text(limit: Limit) -> &'static str {
    match limit {
        Limit::Entries => "too many entries",
        Limit::TarBytes => "too many bytes of tar",
        Limit::FileBytes => "a file is too long",
        Limit::LogicalBytes => "all files together are too long",
        Limit::ExtensionBytes => "extension headers are too long",
        Limit::TreeBytes => "names, attributes and extents take too much memory",
        Limit::SparseSegments => "too many segments in a sparse map",
    }
}

/// Bytes as text for a person: UTF-8 where it is, `\xNN` where not, control characters escaped,
/// at most 256 characters or so.
pub(crate) fn printable(bytes: &[u8]) -> String {
    const SHOWN_MAX: usize = 256;
    let mut text = String::new();
    for chunk in bytes[..bytes.len().min(SHOWN_MAX)].utf8_chunks() {
        text.extend(chunk.valid().chars().flat_map(char::escape_debug));
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if bytes.len() > SHOWN_MAX {
        text.push('…');
    }
    text
}
