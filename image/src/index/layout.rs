//! Numbers of the format: our header, and the parts of EROFS that we write.
//!
//! The table in `image/FORMAT.md` is this file in words. EROFS by the kernel's
//! `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`; all numbers little endian.

use super::{IndexError, Nid};

/// Size of an EROFS block in bytes: everything in the format is counted in these.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`] as a length in memory.
pub(crate) const BLOCK_LEN: usize = 4096;
/// `log2` of [`BLOCK`].
pub(crate) const BLOCK_BITS: u8 = 12;
/// Where EROFS begins; everything before it is our header.
pub(crate) const SUPER_AT: u64 = 1024;
/// Length of the superblock in bytes.
pub(crate) const SUPER_LEN: usize = 128;
/// Place of the first inode, the root: right behind the superblock.
pub(crate) const FIRST_INODE: u64 = SUPER_AT + SUPER_LEN as u64;
/// EROFS block addresses have 32 bits, and the top one is its mark for "no block".
pub(crate) const MAX_BLOCKS: u64 = u32::MAX as u64;
/// Inodes stand on multiples of this many bytes; a nid is the offset divided by it.
pub(crate) const SLOT: u64 = 32;
/// Length of an extended inode in bytes.
pub(crate) const INODE_LEN: usize = 64;
/// Length of one directory entry in bytes, its name not counted.
pub(crate) const DIRENT_LEN: usize = 12;
/// Length of what stands before inline extended attributes.
pub(crate) const XATTR_HEADER_LEN: usize = 12;
/// Length of one extended attribute in bytes, name and value not counted.
pub(crate) const XATTR_ENTRY_LEN: usize = 4;
/// Longest area of inline attributes: `i_xattr_icount` has 16 bits and counts in fours.
pub(crate) const XATTR_AREA_MAX: usize = XATTR_HEADER_LEN + 4 * (u16::MAX as usize - 1);
/// Longest symlink target in bytes (`PATH_MAX` without its NUL).
pub(crate) const SYMLINK_MAX: usize = 4095;

/// Length of our header in bytes.
pub(crate) const HEADER_LEN: usize = 1024;
/// First bytes of every index.
pub(crate) const MAGIC: [u8; 8] = *b"HARBRIDX";
/// The version that is written, and the only one that is read.
pub(crate) const VERSION: u32 = 2;

/// Length of one pack reference: digest and length.
pub(crate) const PACK_LEN: u64 = 36;
/// Length of one segment key: the segment's first block in the data region.
pub(crate) const KEY_LEN: u64 = 4;
/// Length of one segment record.
pub(crate) const SEGMENT_LEN: u64 = 48;
/// Length of one granule hash.
pub(crate) const HASH_LEN: u64 = 32;
/// Length of one entry of the granule table behind the index.
pub(crate) const GRANULE_TABLE_ENTRY: usize = 32;
/// Length of one entry in the list of implied directories: a nid.
pub(crate) const IMPLIED_LEN: u64 = 8;

/// What an index describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewKind {
    /// One layer, with whiteouts and opaque directories.
    Layer,
    /// A merged image.
    Image,
}

/// Place of one table of the object map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Section {
    /// Offset in the index in bytes.
    pub(crate) at: u64,
    /// Number of fixed-size entries.
    pub(crate) count: u64,
}

/// Our header: what opening an index reads, and all that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Layer or image.
    pub kind: ViewKind,
    /// Length of the index in bytes, without the granule table behind it.
    pub len: u64,
    /// Length of EROFS metadata with this header in bytes: where the data region begins in the
    /// EROFS file, and the object map in the index.
    pub meta_len: u64,
    /// Length of the virtual data region in bytes.
    pub data_len: u64,
    /// Where in the data region files of more than one object begin, in bytes: behind all others.
    pub bulk_at: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// Number of directories, the root included.
    pub dirs: u64,
    /// Number of names in directories, `.` and `..` not counted.
    pub names: u64,
    /// Bytes of file content that are not holes.
    pub content_len: u64,
    /// Number of the root's node.
    pub root: Nid,
    pub(crate) packs: Section,
    pub(crate) keys: Section,
    pub(crate) segments: Section,
    pub(crate) granules: Section,
    pub(crate) implied: Section,
}

impl Header {
    /// Length of the EROFS file in bytes: metadata and the virtual data region.
    pub const fn erofs_len(&self) -> u64 {
        self.meta_len + self.data_len
    }

    /// Length of the part of the EROFS file that comes before the large files, in bytes.
    pub const fn head_len(&self) -> u64 {
        self.meta_len + self.bulk_at
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..8].copy_from_slice(&MAGIC);
        put_u32(&mut out, 8, VERSION);
        put_u32(
            &mut out,
            12,
            match self.kind {
                ViewKind::Layer => 1,
                ViewKind::Image => 2,
            },
        );
        let words = [
            self.len,
            self.meta_len,
            self.data_len,
            self.inodes,
            self.dirs,
            self.names,
            self.content_len,
            self.root.0,
            self.packs.at,
            self.packs.count,
            self.keys.at,
            self.keys.count,
            self.segments.at,
            self.segments.count,
            self.granules.at,
            self.granules.count,
            self.implied.at,
            self.implied.count,
            self.bulk_at,
        ];
        for (number, word) in words.into_iter().enumerate() {
            put_u64(&mut out, 16 + 8 * number, word);
        }
        let sum = crc32c::crc32c(&out[..HEADER_LEN - 4]);
        put_u32(&mut out, HEADER_LEN - 4, sum);
        out
    }

    /// Reads and checks a header. After this, `meta_len + data_len` and every section's end are
    /// known not to overflow, and sections to lie inside `len`.
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, IndexError> {
        if bytes[..8] != MAGIC {
            return Err(IndexError::NotAnIndex);
        }
        let version = get_u32(bytes, 8);
        if version != VERSION {
            return Err(IndexError::Version { found: version });
        }
        if crc32c::crc32c(&bytes[..HEADER_LEN - 4]) != get_u32(bytes, HEADER_LEN - 4) {
            return Err(IndexError::Header("checksum"));
        }
        let kind = match get_u32(bytes, 12) {
            1 => ViewKind::Layer,
            2 => ViewKind::Image,
            _ => return Err(IndexError::Header("kind")),
        };
        let word = |number: usize| get_u64(bytes, 16 + 8 * number);
        let section = |number: usize| Section {
            at: word(number),
            count: word(number + 1),
        };
        let header = Self {
            kind,
            len: word(0),
            meta_len: word(1),
            data_len: word(2),
            inodes: word(3),
            dirs: word(4),
            names: word(5),
            content_len: word(6),
            root: Nid(word(7)),
            packs: section(8),
            keys: section(10),
            segments: section(12),
            granules: section(14),
            implied: section(16),
            bulk_at: word(18),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), IndexError> {
        let fail = |what| Err(IndexError::Header(what));
        let blocks = (self.meta_len / BLOCK).checked_add(self.data_len / BLOCK);
        if !self.meta_len.is_multiple_of(BLOCK)
            || !self.data_len.is_multiple_of(BLOCK)
            || self.meta_len == 0
        {
            return fail("a region that is not whole blocks");
        }
        if !self.bulk_at.is_multiple_of(BLOCK) || self.bulk_at > self.data_len {
            return fail("large files that begin outside of the data region");
        }
        if blocks.is_none_or(|blocks| blocks > MAX_BLOCKS) {
            return fail("more blocks than EROFS can address");
        }
        if self.meta_len > self.len {
            return fail("metadata longer than the index");
        }
        let sections = [
            (self.packs, PACK_LEN),
            (self.keys, KEY_LEN),
            (self.segments, SEGMENT_LEN),
            (self.granules, HASH_LEN),
            (self.implied, IMPLIED_LEN),
        ];
        for (section, entry_len) in sections {
            let end = section
                .count
                .checked_mul(entry_len)
                .and_then(|len| section.at.checked_add(len));
            if section.at < self.meta_len || end.is_none_or(|end| end > self.len) {
                return fail("a table outside the index");
            }
        }
        if self.keys.count != self.segments.count {
            return fail("as many segment keys as segments wanted");
        }
        // Numbers in records have 32 bits.
        if self.packs.count > u64::from(u32::MAX) || self.granules.count > u64::from(u32::MAX) {
            return fail("a table longer than its numbers reach");
        }
        Ok(())
    }
}

/// Data layouts of EROFS inodes that we write and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// All data in whole blocks at a block address.
    Plain,
    /// Whole blocks at a block address, the rest right behind inode and attributes.
    Inline,
}

impl DataLayout {
    /// `i_format` of an extended inode with this layout.
    pub(crate) const fn format(self) -> u16 {
        match self {
            Self::Plain => 1,
            Self::Inline => 1 | 2 << 1,
        }
    }

    pub(crate) const fn from_format(format: u16) -> Option<Self> {
        match format {
            1 => Some(Self::Plain),
            5 => Some(Self::Inline),
            _ => None,
        }
    }
}

/// Type of a node, as in `S_IFMT` and in EROFS directory entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A character device. With number 0:0 in a layer: a whiteout.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl FileType {
    const ALL: [(Self, u16, u8); 7] = [
        (Self::File, 0o100_000, 1),
        (Self::Dir, 0o040_000, 2),
        (Self::Char, 0o020_000, 3),
        (Self::Block, 0o060_000, 4),
        (Self::Fifo, 0o010_000, 5),
        (Self::Socket, 0o140_000, 6),
        (Self::Symlink, 0o120_000, 7),
    ];

    /// The type's bits of `st_mode`.
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::File => 0o100_000,
            Self::Dir => 0o040_000,
            Self::Symlink => 0o120_000,
            Self::Char => 0o020_000,
            Self::Block => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Socket => 0o140_000,
        }
    }

    pub(crate) fn from_mode(mode: u16) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(_, bits, _)| *bits == mode & 0o170_000)
            .map(|(kind, ..)| *kind)
    }

    /// The byte that EROFS directory entries hold.
    pub(crate) fn dirent(self) -> u8 {
        Self::ALL
            .iter()
            .find(|(kind, ..)| *kind == self)
            .map_or(0, |(.., byte)| *byte)
    }

    pub(crate) fn from_dirent(byte: u8) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(.., known)| *known == byte)
            .map(|(kind, ..)| *kind)
    }
}

/// Device number as EROFS and `statx` know it: 12 bits major, 20 bits minor. `None` beyond that.
pub(crate) fn encode_rdev(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

pub(crate) const fn decode_rdev(rdev: u32) -> (u32, u32) {
    (
        (rdev >> 8) & 0xfff,
        (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00),
    )
}

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// `N` bytes at `at`, which the caller knows to be inside `bytes`.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn put_u16(out: &mut [u8], at: usize, value: u16) {
    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
