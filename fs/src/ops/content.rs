//! Content: READ, READLINK, LSEEK.

use harbour_image::index::{BLOCK, FileType, Nid, What, split};

use super::Fs;
use crate::{
    error::{Error, Result},
    inode::{Node, Part, Place},
    read::{self, Data},
};

/// What to seek for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next byte that is in a hole; the end of the file is one.
    Hole,
}

/// How much of a file is looked at in one go when seeking, in bytes.
const SEEK_STEP: u64 = 64 << 20;

impl Fs {
    /// Up to `len` bytes at `offset`; fewer only at the end of the file.
    pub fn read(&self, node: Node, offset: u64, len: usize) -> Result<Data> {
        match node.place() {
            Place::Control(number) => {
                let content = self.control_content(number)?;
                let start = usize::try_from(offset)
                    .unwrap_or(usize::MAX)
                    .min(content.len());
                let part = &content[start..content.len().min(start.saturating_add(len))];
                let mut buffer = self.outside.buffers.take(part.len());
                buffer[..part.len()].copy_from_slice(part);
                Ok(Data {
                    buffer,
                    range: 0..part.len(),
                })
            }
            Place::Erofs(number, part) => self.read_erofs(node, number, part, offset, len),
            Place::View { number, nid } => self.read_file(node, number, Nid(nid), offset, len),
        }
    }

    fn read_erofs(
        &self,
        node: Node,
        number: u32,
        part: Part,
        offset: u64,
        len: usize,
    ) -> Result<Data> {
        let (view, opened) = self.view(number, node)?;
        let header = &opened.header;
        let (start, part_len) = part.span(header);
        let len = clamp(part_len, offset, len);
        let what = || {
            let suffix = part.suffix();
            format!("{}.{suffix}, {len} bytes at {offset}", view.shows)
        };
        let mut data = read::read(&self.outside, &view, &opened, start + offset, len, &what)?;
        if part == Part::Head && offset < BLOCK && len > 0 {
            let mut block = [0; BLOCK as usize];
            let index = opened.index(&self.outside);
            index
                .read_meta(0, &mut block)
                .map_err(|error| view.error(error))?;
            split(header, &mut block);
            let old = &block[offset as usize..];
            let both = old.len().min(len);
            data.buffer[..both].copy_from_slice(&old[..both]);
        }
        Ok(data)
    }

    fn read_file(
        &self,
        node: Node,
        number: u32,
        nid: Nid,
        offset: u64,
        len: usize,
    ) -> Result<Data> {
        let (view, opened) = self.view(number, node)?;
        let inode = opened
            .index(&self.outside)
            .inode(nid)
            .map_err(|error| view.error(error))?;
        match inode.file_type {
            FileType::File => {}
            FileType::Dir => return Err(Error::IsDir(node)),
            _ => return Err(Error::WrongType(node)),
        }
        let len = clamp(inode.size, offset, len);
        let Some(start) = inode.data_offset.filter(|_| len > 0) else {
            return Ok(Data {
                buffer: self.outside.buffers.take(0),
                range: 0..0,
            });
        };
        let what = || {
            format!(
                "{}: file with nid {nid}, {len} bytes at {offset}",
                view.shows
            )
        };
        // Inside the EROFS file, as the inode was checked and the range is inside the file.
        read::read(&self.outside, &view, &opened, start + offset, len, &what)
    }

    /// Where a symbolic link leads.
    pub fn readlink(&self, node: Node) -> Result<Vec<u8>> {
        match node.place() {
            Place::Control(number) => self.control_link(number),
            Place::Erofs(..) => Err(Error::WrongType(node)),
            Place::View { number, nid } => {
                let (view, opened) = self.view(number, node)?;
                let index = opened.index(&self.outside);
                let inode = index.inode(Nid(nid)).map_err(|error| view.error(error))?;
                if inode.file_type != FileType::Symlink {
                    return Err(Error::WrongType(node));
                }
                index.readlink(&inode).map_err(|error| view.error(error))
            }
        }
    }

    /// The next place of the kind from `offset` on.
    pub fn lseek(&self, node: Node, offset: u64, seek: Seek) -> Result<u64> {
        let (attr, _) = self.getattr(node)?;
        if attr.kind != FileType::File {
            return Err(Error::WrongType(node));
        }
        if offset >= attr.size {
            return Err(Error::NoData);
        }
        let whole = match seek {
            Seek::Data => offset,
            Seek::Hole => attr.size,
        };
        let Place::View { number, nid } = node.place() else {
            return Ok(whole);
        };
        let (view, opened) = self.view(number, node)?;
        let index = opened.index(&self.outside);
        let inode = index.inode(Nid(nid)).map_err(|error| view.error(error))?;
        let Some(start) = inode.data_offset else {
            return Ok(whole);
        };
        let mut at = offset;
        while at < inode.size {
            let len = SEEK_STEP.min(inode.size - at);
            for segment in index
                .segments(start + at, len)
                .map_err(|error| view.error(error))?
            {
                let found = match seek {
                    Seek::Data => segment.what != What::Hole,
                    Seek::Hole => segment.what == What::Hole,
                };
                if found {
                    return Ok(segment.offset - start);
                }
            }
            at += len;
        }
        match seek {
            Seek::Data => Err(Error::NoData),
            Seek::Hole => Ok(inode.size),
        }
    }

    /// Whether the node can be opened so.
    pub fn open(&self, write: bool) -> Result<()> {
        if write { Err(Error::ReadOnly) } else { Ok(()) }
    }
}

/// How much of `len` bytes at `offset` there is in a file of `size` bytes.
fn clamp(size: u64, offset: u64, len: usize) -> usize {
    usize::try_from(size.saturating_sub(offset))
        .unwrap_or(usize::MAX)
        .min(len)
}
