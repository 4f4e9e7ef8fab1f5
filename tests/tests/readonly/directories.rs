//! Directories read in pieces, inode numbers, and extended attributes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    mem::MaybeUninit,
    os::unix::fs::MetadataExt,
    path::Path,
};

use anyhow::{Result, ensure};
use rustix::{
    fs::{RawDir, SeekFrom, seek},
    io::Errno,
};

use crate::{plant::DIR_ENTRIES, semantics::expect};

const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

/// Names with the cookie that continues after each, from where `file` stands.
fn list(file: &File) -> Result<Vec<(Vec<u8>, u64, u64)>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    let mut dir = RawDir::new(file, &mut buffer);
    let mut found = Vec::new();
    while let Some(entry) = dir.next() {
        let entry = entry?;
        found.push((
            entry.file_name().to_bytes().to_vec(),
            entry.next_entry_cookie(),
            entry.ino(),
        ));
    }
    Ok(found)
}

pub fn pieces(top: &Path) -> Result<()> {
    let dir = File::open(top.join("dir"))?;
    let all = list(&dir)?;
    let names: BTreeMap<_, _> = all
        .iter()
        .map(|(name, _, ino)| (name.clone(), *ino))
        .collect();
    ensure!(names.len() == all.len(), "a name came twice");
    ensure!(
        all.len() == DIR_ENTRIES + 2,
        "{} entries instead of {}",
        all.len(),
        DIR_ENTRIES + 2
    );
    ensure!(
        names.contains_key(&b"."[..]) && names.contains_key(&b".."[..]),
        "no dots"
    );
    for at in [0, 1, 2, 3, 100, 333, all.len() - 2, all.len() - 1] {
        seek(&dir, SeekFrom::Start(all[at].1))?;
        let rest: Vec<_> = list(&dir)?.into_iter().map(|e| e.0).collect();
        let wanted: Vec<_> = all[at + 1..].iter().map(|e| e.0.clone()).collect();
        ensure!(
            rest == wanted,
            "from cookie {at} on {} names came instead of {}",
            rest.len(),
            wanted.len()
        );
    }
    seek(&dir, SeekFrom::Start(0))?;
    ensure!(list(&dir)? == all, "another list after rewinding");
    ensure!(list(&dir)?.is_empty(), "entries after the end");
    Ok(())
}

pub fn inodes(top: &Path) -> Result<()> {
    // Overlayfs over another file system gives directories numbers of its own, in lstat alone.
    let is_overlay = rustix::fs::statfs(top)?.f_type == OVERLAYFS_MAGIC;
    let mut seen = BTreeMap::new();
    for place in ["", "dir", "closed"] {
        for (name, _, ino) in list(&File::open(top.join(place))?)? {
            let name = String::from_utf8(name)?;
            if name == "." || name == ".." {
                continue;
            }
            let path = top.join(place).join(&name);
            let meta = fs::symlink_metadata(&path)?;
            ensure!(
                meta.ino() == ino || (is_overlay && meta.is_dir()),
                "{name}: getdents says inode {ino}, lstat {}",
                meta.ino()
            );
            ensure!(meta.ino() != 0, "{name} has inode 0");
            let again = fs::symlink_metadata(&path)?;
            ensure!(
                again.ino() == meta.ino() && again.dev() == meta.dev(),
                "{name} changed its inode"
            );
            if name != "second" {
                let other = seen.insert(meta.ino(), name.clone());
                ensure!(other.is_none(), "{name} and {other:?} share an inode");
            }
        }
    }
    let (a, b) = (
        fs::metadata(top.join("file"))?,
        fs::metadata(top.join("second"))?,
    );
    ensure!(
        a.ino() == b.ino() && a.nlink() == 2,
        "hard links: inodes {} and {}, nlink {}",
        a.ino(),
        b.ino(),
        a.nlink()
    );
    Ok(())
}

pub fn attributes(top: &Path) -> Result<()> {
    use rustix::fs::{getxattr, getxattr_query, listxattr, listxattr_query};
    let mut buffer = [0_u8; 64];
    ensure!(
        getxattr(top.join("marked"), "user.mark", &mut buffer[..])? == 5,
        "length of user.mark"
    );
    ensure!(&buffer[..5] == b"value", "value of user.mark");
    ensure!(
        getxattr_query(top.join("marked"), "user.mark")? == 5,
        "asked length of user.mark"
    );
    expect(
        "too small a buffer",
        getxattr(top.join("marked"), "user.mark", &mut buffer[..2]),
        Errno::RANGE,
    )?;
    expect(
        "no such attribute",
        getxattr(top.join("marked"), "user.none", &mut buffer[..]),
        Errno::NODATA,
    )?;
    expect(
        "no such attribute",
        getxattr(top.join("file"), "user.mark", &mut buffer[..]),
        Errno::NODATA,
    )?;
    ensure!(
        listxattr_query(top.join("marked"))? == 10,
        "asked length of the list"
    );
    expect(
        "too small a list",
        listxattr(top.join("marked"), &mut buffer[..3]),
        Errno::RANGE,
    )?;
    ensure!(
        listxattr(top.join("file"), &mut buffer[..])? == 0,
        "attributes on a plain file"
    );
    Ok(())
}
