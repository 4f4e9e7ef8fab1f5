//! A full check of an index's structure: everything that [`super::write()`] promises.
//!
//! Reading needs none of this, as it checks what it touches. Tests, fuzzing and `doctor` do.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use super::{
    FileType, Index, IndexBytes, IndexError, Inode, Nid, ViewKind, What,
    emit::{COMPAT_MTIME, COMPAT_SB_CHKSUM, SUPER_MAGIC},
    layout::{
        BLOCK, BLOCK_BITS, BLOCK_LEN, FIRST_INODE, INODE_LEN, SUPER_AT, get_u16, get_u32, get_u64,
        put_u32,
    },
};
use crate::object::{OBJECT_MAX, root_of};

/// What an index was found to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Directories, the root included.
    pub dirs: u64,
    /// Regular files.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Whiteouts.
    pub whiteouts: u64,
    /// Devices, pipes and sockets.
    pub specials: u64,
    /// Opaque directories.
    pub opaque: u64,
    /// Directories that no entry named.
    pub implied: u64,
    /// Names, `.` and `..` not counted.
    pub names: u64,
    /// Objects placed in files.
    pub segments: u64,
    /// Bytes of content.
    pub content_len: u64,
}

/// Checks all of an index but the content of its packs, which is not in it.
///
/// Takes memory in proportion to the number of nodes, and ends for any bytes.
pub fn verify<B: IndexBytes>(index: &Index<B>) -> Result<Report, IndexError> {
    superblock(index)?;
    let mut check = Check {
        index,
        report: Report::default(),
        spans: Vec::new(),
        data: Vec::new(),
        left: index.header.meta_len,
        nodes: HashMap::new(),
    };
    check.tree()?;
    let Check {
        mut report,
        mut spans,
        mut data,
        nodes,
        ..
    } = check;
    for (nid, seen) in &nodes {
        if seen.links != seen.inode.nlink {
            return Err(corrupt(
                nid.0 * 32,
                "a link count that is not the number of names",
            ));
        }
    }
    disjoint(
        &mut spans,
        FIRST_INODE..index.header.meta_len,
        "metadata that overlaps",
    )?;
    disjoint(
        &mut data,
        index.header.meta_len..index.header.erofs_len(),
        "files whose content overlaps",
    )?;
    object_map(index, &data, &mut report)?;
    implied(index, &nodes, &mut report)?;
    let counted = (
        nodes.len() as u64,
        report.dirs,
        report.names,
        report.content_len,
    );
    let header = &index.header;
    if counted != (header.inodes, header.dirs, header.names, header.content_len) {
        return Err(IndexError::Header("counts that are not those of the tree"));
    }
    Ok(report)
}

const fn corrupt(at: u64, what: &'static str) -> IndexError {
    IndexError::Corrupt { at, what }
}

fn superblock<B: IndexBytes>(index: &Index<B>) -> Result<(), IndexError> {
    let mut block = [0; BLOCK_LEN];
    index.read_meta(0, &mut block)?;
    let rest = &mut block[SUPER_AT as usize..];
    let sum = get_u32(rest, 4);
    put_u32(rest, 4, 0);
    let header = &index.header;
    let fields = [
        (u64::from(get_u32(rest, 0)), u64::from(SUPER_MAGIC)),
        (u64::from(!crc32c::crc32c(rest)), u64::from(sum)),
        (
            u64::from(get_u32(rest, 8)),
            u64::from(COMPAT_SB_CHKSUM | COMPAT_MTIME),
        ),
        (u64::from(rest[12]), u64::from(BLOCK_BITS)),
        (u64::from(get_u16(rest, 14)), header.root.0),
        (get_u64(rest, 16), header.inodes),
        (u64::from(get_u32(rest, 36)), header.erofs_len() / BLOCK),
        (get_u64(rest, 40), 0),
        (u64::from(get_u32(rest, 80)), 0),
    ];
    match fields.iter().all(|(found, want)| found == want) {
        true => Ok(()),
        false => Err(corrupt(SUPER_AT, "a superblock that is not the header's")),
    }
}

/// One node that was reached.
struct Seen {
    inode: Inode,
    links: u32,
}

struct Check<'a, B> {
    index: &'a Index<B>,
    report: Report,
    /// What inodes, attributes, directories and symlinks take of the metadata.
    spans: Vec<Range<u64>>,
    /// What files take of the data region.
    data: Vec<Range<u64>>,
    /// Bytes of metadata that are left when all nodes met so far stand apart. Without this,
    /// overlapping ones would cost the square of the index's size.
    left: u64,
    nodes: HashMap<Nid, Seen>,
}

impl<B: IndexBytes> Check<'_, B> {
    fn tree(&mut self) -> Result<(), IndexError> {
        let root = self.index.root()?;
        self.node(root)?;
        let mut open = vec![(root, root.nid)];
        while let Some((dir, parent)) = open.pop() {
            let below = self.dir(&dir, parent)?;
            let links = below.len() as u32 + 2;
            open.extend(below.into_iter().map(|child| (child, dir.nid)));
            if let Some(seen) = self.nodes.get_mut(&dir.nid) {
                seen.links = links;
            }
        }
        Ok(())
    }

    /// Checks one directory's blocks and gives the directories in it.
    fn dir(&mut self, dir: &Inode, parent: Nid) -> Result<Vec<Inode>, IndexError> {
        let mut buffer = [0; BLOCK_LEN];
        let mut last: Box<[u8]> = Box::default();
        let (mut below, mut dots) = (Vec::new(), 0);
        for number in 0..dir.size.div_ceil(BLOCK) {
            let block = self.index.dir_block(dir, number, &mut buffer)?;
            for place in 0..block.count {
                let (name, (nid, file_type)) = (block.name(place)?, block.entry(place)?);
                if *name <= *last {
                    return Err(block.corrupt("names that do not ascend"));
                }
                last = name.into();
                let target = match name {
                    b"." => Some(dir.nid),
                    b".." => Some(parent),
                    _ => None,
                };
                if let Some(target) = target {
                    dots += 1;
                    if (nid, file_type) != (target, FileType::Dir) {
                        return Err(block.corrupt("`.` or `..` that leads elsewhere"));
                    }
                    continue;
                }
                if name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                    return Err(block.corrupt("a name with a slash or NUL"));
                }
                self.report.names += 1;
                if let Some(child) = self.child(nid, file_type)? {
                    below.push(child);
                }
            }
        }
        if dots != 2 {
            return Err(corrupt(dir.at(), "a directory without `.` or `..`"));
        }
        Ok(below)
    }

    /// Checks what an entry names, and gives it when it is a directory.
    fn child(&mut self, nid: Nid, file_type: FileType) -> Result<Option<Inode>, IndexError> {
        if let Some(seen) = self.nodes.get_mut(&nid) {
            if seen.inode.file_type != file_type || file_type == FileType::Dir {
                return Err(corrupt(
                    nid.0.saturating_mul(32),
                    "a node with names of two types, or a directory with two",
                ));
            }
            seen.links = seen.links.saturating_add(1);
            return Ok(None);
        }
        let inode = self.index.inode(nid)?;
        if inode.file_type != file_type {
            return Err(corrupt(
                inode.at(),
                "a node of another type than its directory entry",
            ));
        }
        self.node(inode)?;
        Ok((file_type == FileType::Dir).then_some(inode))
    }

    /// Counts a node that is seen first, and notes what it takes.
    fn node(&mut self, inode: Inode) -> Result<(), IndexError> {
        let own = match inode.file_type {
            FileType::Dir | FileType::Symlink => inode.size,
            _ => 0,
        };
        let bytes = INODE_LEN as u64 + u64::from(inode.xattr_len) + own;
        self.left = self
            .left
            .checked_sub(bytes)
            .ok_or(corrupt(inode.at(), "metadata that overlaps"))?;
        self.nodes.insert(inode.nid, Seen { inode, links: 1 });
        let mut end = inode.tail_at();
        let report = &mut self.report;
        match inode.file_type {
            FileType::Dir => report.dirs += 1,
            FileType::File => report.files += 1,
            FileType::Symlink => report.symlinks += 1,
            FileType::Char if inode.is_whiteout() => report.whiteouts += 1,
            _ => report.specials += 1,
        }
        let opaque = self.index.is_opaque(&inode)?;
        report.opaque += u64::from(opaque);
        if self.index.header.kind == ViewKind::Image && (opaque || inode.is_whiteout()) {
            return Err(corrupt(
                inode.at(),
                "a whiteout or opaque directory in an image",
            ));
        }
        self.index.each_xattr(&inode, |_| true)?;
        match inode.file_type {
            FileType::File => {
                if let Some(offset) = inode.data_offset {
                    let bulk = inode.size > OBJECT_MAX as u64;
                    if bulk != (offset >= self.index.header.head_len()) {
                        return Err(corrupt(
                            inode.at(),
                            "a file in the other's part of the data",
                        ));
                    }
                    self.data.push(offset..offset + inode.size);
                }
            }
            FileType::Dir | FileType::Symlink => {
                let blocks = inode.size.div_ceil(BLOCK);
                let inline = blocks > 0 && inode.block_at(blocks - 1) == inode.tail_at();
                let whole = blocks - u64::from(inline);
                if inline {
                    end += inode.size - whole * BLOCK;
                    if inode.tail_at() / BLOCK != (end - 1) / BLOCK {
                        return Err(corrupt(inode.at(), "inline data that crosses a block"));
                    }
                }
                if whole > 0 {
                    let start = inode.block_at(0);
                    self.spans.push(start..start + whole * BLOCK);
                }
                if inode.file_type == FileType::Symlink && self.index.readlink(&inode)?.contains(&0)
                {
                    return Err(corrupt(inode.at(), "a symlink with NUL"));
                }
            }
            _ if inode.size > 0 => return Err(corrupt(inode.at(), "a special file with a size")),
            _ => {}
        }
        self.spans.push(inode.at()..end);
        Ok(())
    }
}

/// Sorts `spans` and checks that they lie apart and inside `all`.
fn disjoint(
    spans: &mut [Range<u64>],
    all: Range<u64>,
    what: &'static str,
) -> Result<(), IndexError> {
    spans.sort_unstable_by_key(|span| span.start);
    let mut free = all.start;
    for span in spans {
        if span.start < free {
            return Err(corrupt(span.start, what));
        }
        free = span.end;
    }
    if free > all.end {
        Err(corrupt(free, what))
    } else {
        Ok(())
    }
}

/// Checks packs, keys, records and granule hashes; `data` is the extents of files, sorted.
fn object_map<B: IndexBytes>(
    index: &Index<B>,
    data: &[Range<u64>],
    report: &mut Report,
) -> Result<(), IndexError> {
    let mut packs = HashMap::new();
    for number in 0..index.pack_count() {
        if packs.insert(index.pack(number)?.id, number).is_some() {
            return Err(corrupt(
                index.header.packs.at,
                "a pack that is listed twice",
            ));
        }
    }
    let mut used = vec![false; packs.len()];
    let (mut checked, mut lens) = (HashSet::new(), HashMap::new());
    for extent in data {
        for segment in index.segments(extent.start, extent.end - extent.start)? {
            let What::Object(part) = segment.what else {
                continue;
            };
            if let Some(slot) = used.get_mut(part.pack_number as usize) {
                *slot = true;
            }
            report.segments += 1;
            report.content_len += u64::from(part.object_len);
            if part.skip != 0 || segment.len != u64::from(part.object_len) {
                return Err(corrupt(
                    segment.offset,
                    "an object that is not wholly in its file",
                ));
            }
            if *lens.entry(part.id).or_insert(part.object_len) != part.object_len {
                return Err(corrupt(segment.offset, "one object with two lengths"));
            }
            let count = part.granule_count();
            if count > 0 && checked.insert((part.id, part.granules)) {
                let hashes = index.granule_hashes(part.granules, count)?;
                if root_of(&hashes) != part.id {
                    return Err(corrupt(
                        segment.offset,
                        "granule hashes that are not the object's",
                    ));
                }
            }
        }
    }
    // Every record was met in a file, each once: none lies outside of files, none is out of order.
    if report.segments != index.header.segments.count {
        return Err(corrupt(
            index.header.keys.at,
            "segments outside of files or out of order",
        ));
    }
    if used.contains(&false) {
        return Err(corrupt(index.header.packs.at, "a pack that nothing needs"));
    }
    Ok(())
}

fn implied<B: IndexBytes>(
    index: &Index<B>,
    nodes: &HashMap<Nid, Seen>,
    report: &mut Report,
) -> Result<(), IndexError> {
    let table = index.header.implied;
    let mut last = None;
    for number in 0..table.count {
        let nid = u64::from_le_bytes(index.entry(table, number)?);
        let is_dir = nodes
            .get(&Nid(nid))
            .is_some_and(|seen| seen.inode.file_type == FileType::Dir);
        if last >= Some(nid) || !is_dir {
            return Err(corrupt(
                table.at,
                "a list of implied directories that is not one",
            ));
        }
        last = Some(nid);
        report.implied += 1;
    }
    Ok(())
}
