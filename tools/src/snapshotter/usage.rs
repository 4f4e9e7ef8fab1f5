//! What a directory takes of the disk.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::table::Usage;

/// Bytes that stat(2) counts blocks in.
const BLOCK: u64 = 512;

/// Counts everything below `dir`, each inode once, `dir` itself not. What goes away meanwhile does not count.
///
/// # Errors
/// What the file system says.
pub fn of(dir: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut left: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && usage.inodes > 0 => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let meta = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                meta => meta?,
            };
            if meta.nlink() > 1 && !meta.is_dir() && !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += i64::try_from(meta.blocks() * BLOCK).unwrap_or(i64::MAX);
            if meta.is_dir() {
                left.push(entry.path());
            }
        }
    }
    Ok(usage)
}
