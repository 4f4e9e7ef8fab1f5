//! Looking names up in directories, and listing them.
//!
//! A directory is a run of blocks. Each block has its entries in front, 12 bytes each, and their
//! names behind; names ascend by bytes over all blocks, so a search halves first the blocks and
//! then the entries of one.

use std::{cmp::Ordering, ops::ControlFlow};

use super::{
    FileType, Index, IndexBytes, IndexError, Inode, Nid,
    layout::{BLOCK, BLOCK_LEN, DIRENT_LEN, get_u16, get_u64},
};

/// One name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name: 1 to 255 bytes.
    pub name: &'a [u8],
    /// The node it names.
    pub nid: Nid,
    /// Type of that node.
    pub file_type: FileType,
    /// Where [`Index::readdir`] goes on after this entry.
    pub next_cookie: u64,
}

impl<B: IndexBytes> Index<B> {
    /// The node that `name` names in `dir`, if it names one. `.` and `..` are names too; the
    /// root's `..` is the root.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<(Nid, FileType)>, IndexError> {
        self.check_dir(dir)?;
        let mut buffer = [0; BLOCK_LEN];
        let (mut low, mut high) = (0, dir.size.div_ceil(BLOCK));
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.dir_block(dir, middle, &mut buffer)?;
            if name < block.name(0)? {
                high = middle;
            } else if name > block.name(block.count - 1)? {
                low = middle + 1;
            } else {
                return block.search(name);
            }
        }
        Ok(None)
    }

    /// Calls `visit` for each name in `dir` but `.` and `..`, in the order of their bytes, from
    /// `cookie` on: 0 for the start, or the [`DirEntry::next_cookie`] of an entry.
    pub fn readdir(
        &self,
        dir: &Inode,
        cookie: u64,
        mut visit: impl FnMut(DirEntry<'_>) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        self.check_dir(dir)?;
        let mut buffer = [0; BLOCK_LEN];
        let mut first = (cookie % BLOCK) as usize / DIRENT_LEN;
        for number in cookie / BLOCK..dir.size.div_ceil(BLOCK) {
            let block = self.dir_block(dir, number, &mut buffer)?;
            for place in first..block.count {
                let entry = block.entry(place)?;
                let name = block.name(place)?;
                let next = if place + 1 < block.count {
                    number * BLOCK + ((place + 1) * DIRENT_LEN) as u64
                } else {
                    (number + 1) * BLOCK
                };
                if matches!(name, b"." | b"..") {
                    continue;
                }
                if name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                    return Err(block.corrupt("a name with a slash or NUL"));
                }
                let (nid, file_type) = entry;
                if visit(DirEntry {
                    name,
                    nid,
                    file_type,
                    next_cookie: next,
                })
                .is_break()
                {
                    return Ok(());
                }
            }
            first = 0;
        }
        Ok(())
    }

    fn check_dir(&self, dir: &Inode) -> Result<(), IndexError> {
        match dir.file_type {
            FileType::Dir => Ok(()),
            _ => Err(IndexError::NotADirectory { nid: dir.nid }),
        }
    }

    /// Reads block `number` of a directory, which it has, into `buffer`.
    pub(crate) fn dir_block<'a>(
        &self,
        dir: &Inode,
        number: u64,
        buffer: &'a mut [u8; BLOCK_LEN],
    ) -> Result<DirBlock<'a>, IndexError> {
        let len = (dir.size - number * BLOCK).min(BLOCK) as usize;
        let at = dir.block_at(number);
        self.read_meta(at, &mut buffer[..len])?;
        DirBlock::new(&buffer[..len], at)
    }
}

/// One block of a directory.
#[derive(Clone, Copy)]
pub(crate) struct DirBlock<'a> {
    bytes: &'a [u8],
    at: u64,
    /// Number of entries, at least 1.
    pub(crate) count: usize,
}

impl<'a> DirBlock<'a> {
    fn new(bytes: &'a [u8], at: u64) -> Result<Self, IndexError> {
        let corrupt = IndexError::Corrupt {
            at,
            what: "a directory block whose first name is misplaced",
        };
        if bytes.len() < DIRENT_LEN {
            return Err(corrupt);
        }
        // The first name stands behind the last entry.
        let names_at = usize::from(get_u16(bytes, 8));
        if names_at < DIRENT_LEN || !names_at.is_multiple_of(DIRENT_LEN) || names_at >= bytes.len()
        {
            return Err(corrupt);
        }
        Ok(Self {
            bytes,
            at,
            count: names_at / DIRENT_LEN,
        })
    }

    /// Name `place`, which is below `count`.
    pub(crate) fn name(&self, place: usize) -> Result<&'a [u8], IndexError> {
        let offset = |place: usize| usize::from(get_u16(self.bytes, place * DIRENT_LEN + 8));
        let start = offset(place);
        let name = if place + 1 < self.count {
            self.bytes.get(start..offset(place + 1))
        } else {
            // The last name of a block ends with the block or at a NUL.
            self.bytes
                .get(start..)
                .and_then(|rest| rest.split(|byte| *byte == 0).next())
        };
        match name {
            Some(name)
                if start >= self.count * DIRENT_LEN && !name.is_empty() && name.len() <= 255 =>
            {
                Ok(name)
            }
            _ => Err(self.corrupt("a directory entry without a possible name")),
        }
    }

    /// Node and type of entry `place`, which is below `count`.
    pub(crate) fn entry(&self, place: usize) -> Result<(Nid, FileType), IndexError> {
        let raw = &self.bytes[place * DIRENT_LEN..];
        let file_type = FileType::from_dirent(raw[10])
            .ok_or_else(|| self.corrupt("a directory entry of unknown type"))?;
        Ok((Nid(get_u64(raw, 0)), file_type))
    }

    fn search(&self, name: &[u8]) -> Result<Option<(Nid, FileType)>, IndexError> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.name(middle)?.cmp(name) {
                Ordering::Equal => return self.entry(middle).map(Some),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    pub(crate) const fn corrupt(&self, what: &'static str) -> IndexError {
        IndexError::Corrupt { at: self.at, what }
    }
}
