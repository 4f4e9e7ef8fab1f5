//! Writing an index from a tree and the places of its objects.

use super::{
    Header, Nid, Placement, ViewKind, WriteError, emit,
    layout::{
        GRANULE_TABLE_ENTRY, HASH_LEN, IMPLIED_LEN, KEY_LEN, PACK_LEN, SEGMENT_LEN, SUPER_AT,
        Section,
    },
    map::ObjectMap,
    plan::Plan,
    seal,
};
use crate::{object::GRANULE, tree::Tree};

/// A finished index.
#[derive(Debug)]
pub struct Written {
    /// The index and, behind it, its granule table.
    pub bytes: Vec<u8>,
    /// Length of the index without the table, in bytes.
    pub len: u64,
    /// Name of the index: see [`super::seal`].
    pub digest: [u8; 32],
    /// What is in it.
    pub stats: Stats,
}

/// What an index holds and what was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Number of inodes.
    pub inodes: u64,
    /// Number of directories.
    pub dirs: u64,
    /// Number of names.
    pub names: u64,
    /// Bytes of file content that are not holes.
    pub content_len: u64,
    /// Number of packs that the tree needs.
    pub packs: u64,
    /// Number of segments: objects placed in files.
    pub segments: u64,
    /// Number of granule hashes.
    pub granules: u64,
    /// Extended attributes left out, because EROFS has no number for their namespace, or because
    /// they are marks of overlayfs.
    pub dropped_xattrs: u64,
}

/// Writes the index of `tree`, whose content lies as `placement` says.
///
/// The same tree and placement give the same bytes. Nodes that nothing names, and packs and
/// objects that no named file needs, leave no trace.
pub fn write(tree: &Tree, placement: &Placement, kind: ViewKind) -> Result<Written, WriteError> {
    let plan = Plan::new(tree, kind)?;
    let map = ObjectMap::new(&plan, placement)?;
    let implied = plan.implied();
    let header = header(&plan, &map, implied.len(), kind).ok_or(WriteError::TooLarge)?;
    let table_len = seal::table_len(header.len);
    let whole = usize::try_from(header.len + table_len).map_err(|_| WriteError::TooLarge)?;
    let len = whole - table_len as usize;

    let mut bytes = vec![0; whole];
    let (index, table) = bytes.split_at_mut(len);
    emit::metadata(&plan, index);
    map.emit(placement, &header, index);
    for (nid, out) in implied
        .iter()
        .zip(index[header.implied.at as usize..].chunks_exact_mut(8))
    {
        out.copy_from_slice(&nid.to_le_bytes());
    }
    index[..SUPER_AT as usize].copy_from_slice(&header.encode());
    finish(&header, index, table);
    let stats = Stats {
        inodes: header.inodes,
        dirs: header.dirs,
        names: header.names,
        content_len: header.content_len,
        packs: header.packs.count,
        segments: header.segments.count,
        granules: header.granules.count,
        dropped_xattrs: plan.dropped_xattrs,
    };
    let digest = seal::index_digest(header.len, table);
    Ok(Written {
        len: header.len,
        digest,
        stats,
        bytes,
    })
}

/// Lays the tables of the object map one behind the other, each at a multiple of 8. `None` when
/// lengths overflow.
fn header(plan: &Plan<'_>, map: &ObjectMap, implied: usize, kind: ViewKind) -> Option<Header> {
    let mut at = plan.meta_len;
    let mut section = |count: usize, entry_len: u64| {
        let section = Section {
            at,
            count: count as u64,
        };
        at = section
            .count
            .checked_mul(entry_len)?
            .checked_add(at)?
            .checked_next_multiple_of(8)?;
        Some(section)
    };
    // What every read needs comes first, so that a cold reader finds it in few granules.
    let packs = section(map.packs.len(), PACK_LEN)?;
    let keys = section(map.segments.len(), KEY_LEN)?;
    let implied = section(implied, IMPLIED_LEN)?;
    let segments = section(map.segments.len(), SEGMENT_LEN)?;
    let granules = section(map.granule_count as usize, HASH_LEN)?;
    Some(Header {
        kind,
        len: at,
        meta_len: plan.meta_len,
        data_len: plan.data_len,
        bulk_at: plan.bulk_at,
        inodes: plan.order.len() as u64,
        dirs: plan.dirs,
        names: plan.names,
        content_len: map.content_len,
        root: Nid(plan.places.first()?.nid()),
        packs,
        keys,
        segments,
        granules,
        implied,
    })
}

/// Derives the file system's uuid from all content, then checksum and granule table.
fn finish(header: &Header, index: &mut [u8], table: &mut [u8]) {
    emit::superblock(header, [0; 16], index);
    let hash = |granule: &[u8]| *blake3::hash(granule).as_bytes();
    for (granule, out) in index
        .chunks(GRANULE)
        .zip(table.chunks_exact_mut(GRANULE_TABLE_ENTRY))
    {
        out.copy_from_slice(&hash(granule));
    }
    // The table now names everything but the uuid, which stands in the first granule.
    let mut uuid: [u8; 16] = super::layout::array(blake3::hash(table).as_bytes(), 0);
    // Version 8, variant 1 of RFC 9562: a value of our own making.
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    emit::superblock(header, uuid, index);
    let first = index.len().min(GRANULE);
    table[..GRANULE_TABLE_ENTRY].copy_from_slice(&hash(&index[..first]));
}
