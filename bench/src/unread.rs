//! What a disk gives when nobody has its blocks.
//!
//! Dropping this machine's caches does not drop the hypervisor's: a file that was written or read a
//! while ago comes back from the memory of the host below, at several times the speed of its disk.
//! So the sequential workloads are also run over files that came with the system and that nobody
//! has read since it started: each can be read so once.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::sys::statvfs::{FsFlags, statvfs};
use walkdir::WalkDir;

use crate::command;

/// Files below this size are over before reading ahead has begun.
const SMALLEST_BYTES: u64 = 48 << 20;
/// Each run of fio reads at most this much.
const MOST_BYTES: u64 = 1 << 30;

/// A file that was neither read nor changed since the system started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unread {
    pub(crate) path: PathBuf,
    pub(crate) len: u64,
}

/// Such files on the file system of `root`, the largest first.
pub(crate) fn find(root: &Path) -> anyhow::Result<Vec<Unread>> {
    anyhow::ensure!(
        access_times_move(root),
        "{} is mounted without access times, so nothing tells which files were read",
        root.display()
    );
    let files = untouched_since(root, boot_time()?);
    let bytes: u64 = files.iter().map(|file| file.len).sum();
    command::note(&format!(
        "{} large files of the system were never read, {} MB",
        files.len(),
        bytes / 1_000_000
    ));
    Ok(files)
}

/// Access times tell: with `relatime` the first read in a day moves them.
fn untouched_since(root: &Path, started_unix_s: i64) -> Vec<Unread> {
    let mut files: Vec<Unread> = WalkDir::new(root)
        .same_file_system(true)
        .into_iter()
        .filter_map(|entry| {
            let entry = entry.ok().filter(|entry| entry.file_type().is_file())?;
            let data = entry.metadata().ok()?;
            let seen = data.atime().max(data.mtime()).max(data.ctime());
            // A sparse file is not on the disk.
            let whole = data.blocks() * 512 >= data.len();
            (data.len() >= SMALLEST_BYTES && whole && seen < started_unix_s).then(|| Unread {
                path: entry.into_path(),
                len: data.len().min(MOST_BYTES),
            })
        })
        .collect();
    files.sort_by(|a, b| b.len.cmp(&a.len).then_with(|| a.path.cmp(&b.path)));
    files
}

/// When this system started, in seconds since 1970.
fn boot_time() -> anyhow::Result<i64> {
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|number| number.trim().parse().ok())
        .context("/proc/stat does not tell when the system started")
}

/// Whether access times of `root`'s file system move when files are read.
fn access_times_move(root: &Path) -> bool {
    statvfs(root).is_ok_and(|fs| {
        !fs.flags()
            .intersects(FsFlags::ST_NOATIME | FsFlags::ST_RDONLY)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn what_was_just_written_or_is_small_is_not_unread() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("new"), vec![1; SMALLEST_BYTES as usize]).unwrap();
        fs::write(dir.path().join("small"), "small").unwrap();
        assert_eq!(untouched_since(dir.path(), boot_time().unwrap()), []);
        let later = untouched_since(dir.path(), i64::MAX);
        assert_eq!(later.len(), 1);
        assert!(later[0].path.ends_with("new") && later[0].len == SMALLEST_BYTES);
    }
}
