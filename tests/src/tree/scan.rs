//! Walking a tree through directory descriptors, so that no path is ever too long.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, Stat, lgetxattr, llistxattr, major, minor, openat,
        readlinkat, statat,
    },
    io::Errno,
};

use super::{Difference, Entry, GHOST, Name, S_IFDIR, Tree};

pub(super) fn scan(root: &Path) -> Result<Tree> {
    let top: OwnedFd = File::open(root)
        .with_context(|| format!("opening {}", root.display()))?
        .into();
    let mut walk = Walk {
        tree: Tree {
            root: root.to_owned(),
            entries: BTreeMap::new(),
            faults: Vec::new(),
        },
        inodes: HashMap::new(),
    };
    let stat = statat(&top, ".", AtFlags::empty())
        .with_context(|| format!("stat of {}", root.display()))?;
    let xattrs =
        xattrs(top.as_fd(), b".").with_context(|| format!("xattrs of {}", root.display()))?;
    walk.tree
        .entries
        .insert(Vec::new(), entry(&stat, xattrs, None));
    walk.directory(&top, &[])?;
    walk.group();
    Ok(walk.tree)
}

struct Walk {
    tree: Tree,
    /// Names of every inode that is no directory, by device and inode number.
    inodes: HashMap<(u64, u64), Vec<Name>>,
}

impl Walk {
    fn directory(&mut self, fd: &OwnedFd, above: &[u8]) -> Result<()> {
        let shown = || format!("{}/{}", self.tree.root.display(), above.escape_ascii());
        let mut listed = Vec::new();
        for found in Dir::read_from(fd).with_context(|| format!("listing {}", shown()))? {
            let found = found.with_context(|| format!("listing {}", shown()))?;
            if !matches!(found.file_name().to_bytes(), b"." | b"..") {
                listed.push((found.file_name().to_bytes().to_vec(), found.file_type()));
            }
        }
        for (last, told) in listed {
            let mut name = above.to_vec();
            if !name.is_empty() {
                name.push(b'/');
            }
            name.extend(&last);
            self.one(fd, name, &last, told)?;
        }
        Ok(())
    }

    fn one(&mut self, dir: &OwnedFd, name: Name, last: &[u8], told: FileType) -> Result<()> {
        let shown = || format!("/{}", name.escape_ascii());
        let stat = match statat(dir, last, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                self.tree.faults.push(Difference {
                    name,
                    what: GHOST.into(),
                });
                return Ok(());
            }
            Err(e) => return Err(e).with_context(|| format!("lstat of {}", shown())),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if told != kind {
            let what = format!("d_type says {told:?}, lstat {kind:?}");
            self.tree.faults.push(Difference {
                name: name.clone(),
                what,
            });
        }
        let target = match kind {
            FileType::Symlink => {
                let target = readlinkat(dir, last, Vec::new())
                    .with_context(|| format!("readlink of {}", shown()))?;
                Some(target.into_bytes())
            }
            _ => None,
        };
        let xattrs = xattrs(dir.as_fd(), last).with_context(|| format!("xattrs of {}", shown()))?;
        let made = entry(&stat, xattrs, target);
        if self.tree.entries.insert(name.clone(), made).is_some() {
            self.tree.faults.push(Difference {
                name: name.clone(),
                what: "listed twice".into(),
            });
            return Ok(());
        }
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = openat(dir, last, flags, Mode::empty())
                .with_context(|| format!("opening {}", shown()))?;
            return self.directory(&below, &name);
        }
        self.inodes
            .entry((stat.st_dev, stat.st_ino))
            .or_default()
            .push(name);
        Ok(())
    }

    fn group(&mut self) {
        for names in self.inodes.values_mut().filter(|n| n.len() > 1) {
            names.sort();
            for name in names.iter() {
                if let Some(entry) = self.tree.entries.get_mut(name) {
                    entry.names = names.len() as u64;
                    entry.group = Some(names[0].clone());
                }
            }
        }
    }
}

fn entry(stat: &Stat, xattrs: BTreeMap<Vec<u8>, Vec<u8>>, target: Option<Vec<u8>>) -> Entry {
    let is_device = matches!(
        FileType::from_raw_mode(stat.st_mode),
        FileType::CharacterDevice | FileType::BlockDevice
    );
    Entry {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (
            stat.st_mtime,
            u32::try_from(stat.st_mtime_nsec).unwrap_or(u32::MAX),
        ),
        size: if stat.st_mode & super::S_IFMT == S_IFDIR {
            0
        } else {
            stat.st_size.unsigned_abs()
        },
        nlink: stat.st_nlink,
        names: 1,
        group: None,
        device: if is_device {
            (major(stat.st_rdev), minor(stat.st_rdev))
        } else {
            (0, 0)
        },
        target,
        xattrs,
    }
}

/// All attributes of `name` in `dir`. There is no `getxattrat` everywhere yet; the descriptor's
/// name under /proc does the same without following the last component.
fn xattrs(dir: BorrowedFd<'_>, name: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend(name);
    let mut list = vec![0_u8; 65_536];
    let length = match llistxattr(&path[..], &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(e) => return Err(e).context("llistxattr"),
    };
    let mut found = BTreeMap::new();
    for key in list[..length].split(|b| *b == 0).filter(|k| !k.is_empty()) {
        let mut value = vec![0_u8; 65_536];
        let length = lgetxattr(&path[..], key, &mut value[..])
            .with_context(|| format!("lgetxattr of {}", key.escape_ascii()))?;
        value.truncate(length);
        found.insert(key.to_vec(), value);
    }
    Ok(found)
}
