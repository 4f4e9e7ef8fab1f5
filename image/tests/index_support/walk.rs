//! What must hold for any bytes at all that are given as an index. The fuzz target and the replay
//! of its corpus share this.
//!
//! Nothing panics or hangs, and no reading takes more bytes than a fixed multiple of the length:
//! an index that leads in circles is an error, not work. An index that passes `verify` also loads,
//! finds every name that it lists, and survives being written again.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::{cell::Cell, ops::ControlFlow};

use harbour_image::index::{
    Index, IndexBytes, IndexError, ReadError, ViewKind, WriteError, load, merge, verify, write,
};

/// A reading of an index of `n` bytes reads at most `READS * n + READS_FREE` bytes of it.
pub const READS: u64 = 64;
pub const READS_FREE: u64 = 1 << 16;

/// Bytes that count what is read of them.
struct Counted<'a> {
    bytes: &'a [u8],
    read: Cell<u64>,
}

impl IndexBytes for Counted<'_> {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        self.read.set(self.read.get() + into.len() as u64);
        self.bytes.read_at(offset, into)
    }
}

impl Counted<'_> {
    fn check(&self, what: &str) {
        let most = READS * self.bytes.len() as u64 + READS_FREE;
        let read = self.read.take();
        assert!(
            read <= most,
            "{what} read {read} bytes of {}",
            self.bytes.len()
        );
    }
}

/// Makes the header's checksum right, so that what comes after it is reached.
pub fn mend(bytes: &mut [u8]) {
    if let Some((header, _)) = bytes.split_first_chunk_mut::<1024>() {
        let mut sum = u32::MAX;
        for byte in &header[..1020] {
            sum ^= u32::from(*byte);
            for _ in 0..8 {
                sum = if sum & 1 == 1 {
                    (sum >> 1) ^ 0x82f6_3b78
                } else {
                    sum >> 1
                };
            }
        }
        header[1020..].copy_from_slice(&(!sum).to_le_bytes());
    }
}

/// Reads `bytes` in every way there is. Gives whether `verify` found nothing wrong.
pub fn walk(bytes: &[u8]) -> bool {
    let counted = Counted {
        bytes,
        read: Cell::new(0),
    };
    let Ok(index) = Index::open(&counted) else {
        return false;
    };
    counted.check("opening");
    let verified = verify(&index);
    counted.check("verify");
    let loaded = load(&index);
    counted.check("load");
    let merged = merge(&[Index::open(bytes).unwrap(), Index::open(bytes).unwrap()]);
    if let Err(error) = names(&index) {
        assert!(verified.is_err(), "verify passed over: {error}");
    }
    if verified.is_err() {
        return false;
    }

    let (tree, placement) = loaded.expect("a verified index loads");
    match write(&tree, &placement, index.header().kind) {
        Ok(again) => assert!(verify(&Index::open(&again.bytes).unwrap()).is_ok()),
        // Written anew it may need a block more than there are.
        Err(WriteError::TooLarge) => {}
        Err(error) => panic!("{error}"),
    }
    let (tree, placement) = merged.expect("a verified index merges");
    match write(&tree, &placement, ViewKind::Image) {
        Ok(_) | Err(WriteError::TooLarge) => {}
        Err(error) => panic!("{error}"),
    }
    true
}

/// Looks names up as a kernel would, in some directories, and reads what they lead to.
fn names<B: IndexBytes>(index: &Index<B>) -> Result<(), IndexError> {
    let mut open = vec![index.root()?];
    for _ in 0..16 {
        let Some(dir) = open.pop() else { break };
        let mut found = Vec::new();
        index.readdir(&dir, 0, |entry| {
            found.push((entry.name.to_vec(), entry.nid, entry.file_type));
            if found.len() < 64 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        for (name, nid, file_type) in found {
            let looked_up = index.lookup(&dir, &name)?;
            let inode = index.inode(nid)?;
            if looked_up != Some((nid, file_type)) || inode.file_type != file_type {
                return Err(IndexError::OutOfRange {
                    what: "name",
                    number: nid.0,
                });
            }
            index.xattrs(&inode)?;
            index.xattr(&inode, b"user.absent")?;
            match inode.file_type {
                harbour_image::index::FileType::Dir => open.push(inode),
                harbour_image::index::FileType::Symlink => drop(index.readlink(&inode)?),
                _ => {}
            }
            if let Some(offset) = inode.data_offset {
                index.segments(offset, inode.size.min(1 << 20))?;
            }
        }
    }
    Ok(())
}
