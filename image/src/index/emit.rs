//! The EROFS half of an index as bytes: superblock, inodes, directories.

use super::{
    Header,
    layout::{
        BLOCK, BLOCK_BITS, BLOCK_LEN, DIRENT_LEN, DataLayout, FileType, INODE_LEN, SUPER_AT,
        SUPER_LEN, encode_rdev, put_u16, put_u32, put_u64,
    },
    plan::{Place, Plan, dir_entries},
    xattr,
};
use crate::tree::{Dir, Kind, NodeId};

pub(crate) const SUPER_MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock has a checksum.
pub(crate) const COMPAT_SB_CHKSUM: u32 = 1;
/// Inodes hold modification times (older ones held times of change).
pub(crate) const COMPAT_MTIME: u32 = 2;

/// Writes the superblock with its checksum, which covers the rest of the first block: everything
/// else in there must stand already.
pub(crate) fn superblock(header: &Header, uuid: [u8; 16], index: &mut [u8]) {
    let block = &mut index[SUPER_AT as usize..BLOCK_LEN];
    let sb = &mut block[..SUPER_LEN];
    sb.fill(0);
    put_u32(sb, 0, SUPER_MAGIC);
    put_u32(sb, 8, COMPAT_SB_CHKSUM | COMPAT_MTIME);
    sb[12] = BLOCK_BITS;
    // The root is the first inode: its number is below 256, and this field is enough for it.
    put_u16(sb, 14, header.root.0 as u16);
    put_u64(sb, 16, header.inodes);
    put_u32(sb, 36, (header.erofs_len() / BLOCK) as u32);
    sb[48..64].copy_from_slice(&uuid);
    // EROFS takes CRC-32C without the final inversion.
    let sum = !crc32c::crc32c(block);
    put_u32(block, 4, sum);
}

/// The file system in two files has a device table.
const INCOMPAT_DEVICE_TABLE: u32 = 8;
/// Length of an entry of the device table; its place is counted in these.
const DEVICE_LEN: usize = 128;
/// Place of the one entry: in the part of the first block that is our header's and zero.
const DEVICE_SLOT: usize = 6;

/// Makes of the first block of an EROFS file that of the file's head alone, with the large files
/// in a second device (`device=` of the kernel's mount options) behind it.
///
/// The block is not that of an index any more: our header's checksum is not its own. Without
/// large files it stays as it is.
pub fn split(header: &Header, block: &mut [u8; BLOCK_LEN]) {
    let bulk = (header.data_len - header.bulk_at) / BLOCK;
    if bulk == 0 {
        return;
    }
    let head = (header.head_len() / BLOCK) as u32;
    let slot = &mut block[DEVICE_SLOT * DEVICE_LEN..][..DEVICE_LEN];
    put_u32(slot, 64, bulk as u32);
    put_u32(slot, 68, head);
    let rest = &mut block[SUPER_AT as usize..];
    put_u32(rest, 36, head);
    put_u32(rest, 80, INCOMPAT_DEVICE_TABLE);
    put_u16(rest, 86, 1);
    put_u16(rest, 88, DEVICE_SLOT as u16);
    put_u32(rest, 4, 0);
    let sum = !crc32c::crc32c(rest);
    put_u32(rest, 4, sum);
}

/// Writes all inodes and what belongs to them into `index`, which is zeroed.
pub(crate) fn metadata(plan: &Plan<'_>, index: &mut [u8]) {
    for (number, id) in plan.order.iter().enumerate() {
        let node = &plan.tree.nodes[*id as usize];
        let place = plan.places[*id as usize];
        inode(plan, *id, number as u32 + 1, index);
        if place.xattr_len > 0 {
            let at = place.inode_at as usize + INODE_LEN;
            let opaque = matches!(&node.kind, Kind::Dir(dir) if dir.opaque);
            xattr::encode(
                &node.meta.xattrs,
                opaque,
                &mut index[at..at + place.xattr_len as usize],
            );
        }
        match &node.kind {
            Kind::Dir(dir) => directory(plan, *id, dir, data_of(&place, index)),
            Kind::Symlink(target) => data_of(&place, index).copy_from_slice(target),
            _ => {}
        }
    }
}

fn data_of<'a>(place: &Place, index: &'a mut [u8]) -> &'a mut [u8] {
    let at = if place.inline {
        place.tail_at()
    } else {
        u64::from(place.first_block) * BLOCK
    };
    &mut index[at as usize..(at + place.size) as usize]
}

fn inode(plan: &Plan<'_>, id: u32, ino: u32, index: &mut [u8]) {
    let node = &plan.tree.nodes[id as usize];
    let place = &plan.places[id as usize];
    let layout = if place.inline {
        DataLayout::Inline
    } else {
        DataLayout::Plain
    };
    let meta_block = if place.inline { 0 } else { place.first_block };
    let (size, union) = match &node.kind {
        Kind::Dir(_) | Kind::Symlink(_) => (place.size, meta_block),
        Kind::File(content) if content.size > 0 => (
            content.size,
            (plan.meta_len / BLOCK) as u32 + place.first_block,
        ),
        // The plan has refused numbers that do not fit.
        Kind::Char(major, minor) | Kind::Block(major, minor) => {
            (0, encode_rdev(*major, *minor).unwrap_or(0))
        }
        Kind::File(_) | Kind::Fifo | Kind::Socket | Kind::Whiteout => (0, 0),
    };
    let at = place.inode_at as usize;
    let out = &mut index[at..at + INODE_LEN];
    put_u16(out, 0, layout.format());
    put_u16(out, 2, xattr_count(place.xattr_len));
    put_u16(out, 4, file_type(&node.kind).mode_bits() | node.meta.mode);
    put_u64(out, 8, size);
    put_u32(out, 16, union);
    put_u32(out, 20, ino);
    put_u32(out, 24, node.meta.uid);
    put_u32(out, 28, node.meta.gid);
    // Seconds before 1970 are stored as they are: the kernel takes the number as signed.
    put_u64(out, 32, node.meta.mtime.secs as u64);
    put_u32(out, 40, node.meta.mtime.nanos);
    put_u32(out, 44, place.links);
}

/// `i_xattr_icount`: fours of bytes, where the 12 bytes in front count as one.
fn xattr_count(area_len: u32) -> u16 {
    match area_len {
        0 => 0,
        len => ((len as usize - xattr_header()) / 4 + 1) as u16,
    }
}

const fn xattr_header() -> usize {
    super::layout::XATTR_HEADER_LEN
}

/// Writes a directory's blocks: in each, entries from the front, and all names behind them.
fn directory(plan: &Plan<'_>, id: u32, dir: &Dir, out: &mut [u8]) {
    let parent = plan.places[id as usize].parent;
    let mut entries = dir_entries(dir, NodeId(id), NodeId(parent)).peekable();
    let mut group = Vec::new();
    for block in out.chunks_mut(BLOCK_LEN) {
        let mut used = 0;
        while let Some(entry) =
            entries.next_if(|(name, _)| used + DIRENT_LEN + name.len() <= BLOCK_LEN)
        {
            used += DIRENT_LEN + entry.0.len();
            group.push(entry);
        }
        let mut name_at = group.len() * DIRENT_LEN;
        for (number, (name, child)) in group.drain(..).enumerate() {
            let entry = &mut block[number * DIRENT_LEN..];
            put_u64(entry, 0, plan.places[child.0 as usize].nid());
            put_u16(entry, 8, name_at as u16);
            entry[10] = file_type(&plan.tree.nodes[child.0 as usize].kind).dirent();
            block[name_at..name_at + name.len()].copy_from_slice(name);
            name_at += name.len();
        }
    }
}

fn file_type(kind: &Kind) -> FileType {
    match kind {
        Kind::Dir(_) => FileType::Dir,
        Kind::File(_) => FileType::File,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::Char(..) | Kind::Whiteout => FileType::Char,
        Kind::Block(..) => FileType::Block,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
    }
}
