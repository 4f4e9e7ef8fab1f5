//! Writing layers and merged trees of the model to disk.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::{
        ffi::OsStringExt,
        fs::{lchown, symlink},
    },
    path::{Path as Place, PathBuf},
};

use anyhow::{Context, Result};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, chmodat, lsetxattr, makedev,
    mkfifoat, mknodat, utimensat,
};

use crate::model::{Layer, Meta, Node, Path, content};

/// A layer in the form of an overlay's lower directory.
pub fn layer(layer: &Layer, top: &Place) -> Result<()> {
    nodes(&layer.nodes, top)
}

/// A merged tree.
pub fn merged(tree: &BTreeMap<Path, Node>, top: &Place) -> Result<()> {
    nodes(tree, top)
}

fn nodes(nodes: &BTreeMap<Path, Node>, top: &Place) -> Result<()> {
    fs::create_dir(top)?;
    let mut inodes: BTreeMap<usize, PathBuf> = BTreeMap::new();
    let mut dirs = vec![(top.to_owned(), Meta::implied())];
    for (path, node) in nodes {
        let place = path.iter().fold(top.to_owned(), |p, name| {
            p.join(OsString::from_vec(name.clone()))
        });
        one(&place, node, &mut inodes, &mut dirs)
            .with_context(|| format!("planting {}", place.display()))?;
    }
    // Times of directories change with what is made in them: so last, from the bottom up.
    for (place, meta) in dirs.iter().rev() {
        dress(place, meta, true)?;
    }
    Ok(())
}

fn one(
    place: &Place,
    node: &Node,
    inodes: &mut BTreeMap<usize, PathBuf>,
    dirs: &mut Vec<(PathBuf, Meta)>,
) -> Result<()> {
    match node {
        Node::Dir { meta, opaque } => {
            fs::create_dir(place)?;
            if *opaque {
                lsetxattr(place, "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
            }
            dirs.push((place.to_owned(), meta.clone().unwrap_or_else(Meta::implied)));
        }
        Node::File {
            meta,
            len,
            seed,
            inode,
        } => {
            if let Some(first) = inodes.get(inode) {
                fs::hard_link(first, place)?;
                return Ok(());
            }
            inodes.insert(*inode, place.to_owned());
            fs::write(place, content(*len, *seed))?;
            dress(place, meta, true)?;
        }
        Node::Symlink { meta, target } => {
            symlink(OsString::from_vec(target.clone()), place)?;
            dress(place, meta, false)?;
        }
        Node::Fifo { meta } => {
            mkfifoat(CWD, place, Mode::empty())?;
            dress(place, meta, true)?;
        }
        Node::Device { meta, numbers } => {
            let device = makedev(numbers.0, numbers.1);
            mknodat(CWD, place, FileType::CharacterDevice, Mode::empty(), device)?;
            dress(place, meta, true)?;
        }
        Node::Whiteout => {
            mknodat(CWD, place, FileType::CharacterDevice, Mode::empty(), 0)?;
            dress(
                place,
                &Meta {
                    mode: 0,
                    ..Meta::implied()
                },
                true,
            )?;
        }
    }
    Ok(())
}

fn dress(place: &Place, meta: &Meta, has_mode: bool) -> Result<()> {
    lchown(place, Some(meta.uid), Some(meta.gid))?;
    if has_mode {
        chmodat(CWD, place, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
    }
    for (key, value) in &meta.xattrs {
        lsetxattr(place, key, value, XattrFlags::empty())?;
    }
    let time = Timespec {
        tv_sec: meta.mtime.0,
        tv_nsec: meta.mtime.1.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, place, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}
