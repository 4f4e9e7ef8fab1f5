//! Overlay mounts of many layers.
//!
//! mount(2) takes one page of options, which some forty long paths fill. Since Linux 6.5 layers can be added
//! one by one with fsconfig(2) (`lowerdir+`), up to the kernel's 500; each path may have 255 bytes.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::rootless;

/// What mount(2) takes of options: a page less the terminating zero (mount(2), `data`).
const OPTIONS_MAX: usize = 4095;

/// What shows in the mount table as the source.
const SOURCE: &str = "harbour";

/// Where an overlay keeps what is written.
#[derive(Clone, Debug)]
pub struct Upper {
    /// What was written.
    pub upper: PathBuf,
    /// An empty directory on the same file system, for the kernel.
    pub work: PathBuf,
}

/// Mounts an overlay of `lower`, the highest first, on `target`; read-only without an `upper`.
///
/// # Errors
/// What the kernel says, and whether it is too old for so many layers.
pub fn mount(lower: &[PathBuf], upper: Option<&Upper>, target: &Path) -> anyhow::Result<()> {
    let why = || format!("cannot mount an overlay on {}", target.display());
    if let ([lower], None) = (lower, upper) {
        return bind(lower, target).with_context(why);
    }
    let Err(one_by_one) = mount_one_by_one(lower, upper, target) else {
        return Ok(());
    };
    let mut options = options(lower, upper);
    if rootless::inside() {
        options += ",userxattr";
    }
    if options.len() > OPTIONS_MAX {
        let count = lower.len();
        return Err(one_by_one).with_context(why).context(format!(
            "{count} layers need a kernel from 6.5 on, and paths of at most 255 bytes"
        ));
    }
    let flags = match upper {
        Some(_) => MsFlags::empty(),
        None => MsFlags::MS_RDONLY,
    };
    nix::mount::mount(
        Some(SOURCE),
        target,
        Some("overlay"),
        flags,
        Some(options.as_str()),
    )
    .with_context(why)
}

/// One directory alone, read-only: an overlay of less than two is none to the kernel.
fn bind(dir: &Path, target: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    nix::mount::mount(Some(dir), target, none, MsFlags::MS_BIND, none)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    nix::mount::mount(none, target, none, flags, none)
}

fn mount_one_by_one(lower: &[PathBuf], upper: Option<&Upper>, target: &Path) -> io::Result<()> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", SOURCE)?;
    for dir in lower {
        fsconfig_set_string(&fs, "lowerdir+", dir)?;
    }
    if let Some(Upper { upper, work }) = upper {
        fsconfig_set_string(&fs, "upperdir", upper)?;
        fsconfig_set_string(&fs, "workdir", work)?;
    }
    if rootless::inside() {
        fsconfig_set_flag(&fs, "userxattr")?;
    }
    fsconfig_create(&fs)?;
    let attributes = match upper {
        Some(_) => MountAttrFlags::empty(),
        None => MountAttrFlags::MOUNT_ATTR_RDONLY,
    };
    let made = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&made, "", rustix::fs::CWD, target, flags)?)
}

/// The same for mount(2), where commas end an option and colons a directory.
fn options(lower: &[PathBuf], upper: Option<&Upper>) -> String {
    let text = |path: &Path, special: &[char]| {
        let mut text = String::new();
        for c in path.to_string_lossy().chars() {
            if special.contains(&c) {
                text.push('\\');
            }
            text.push(c);
        }
        text
    };
    let dirs: Vec<String> = lower
        .iter()
        .map(|dir| text(dir, &[':', ',', '\\']))
        .collect();
    let mut options = format!("lowerdir={}", dirs.join(":"));
    if let Some(Upper { upper, work }) = upper {
        for (name, dir) in [("upperdir", upper), ("workdir", work)] {
            options += &format!(",{name}={}", text(dir, &[',', '\\']));
        }
    }
    options
}

/// Takes an overlay away; `lazily` also when something still uses it.
///
/// # Errors
/// What the kernel says: busy, or nothing mounted there.
pub fn unmount(target: &Path, lazily: bool) -> io::Result<()> {
    let flags = match lazily {
        true => MntFlags::MNT_DETACH,
        false => MntFlags::empty(),
    };
    Ok(nix::mount::umount2(target, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_keep_their_commas_and_colons() {
        let upper = Upper {
            upper: "/u,p:p".into(),
            work: "/w\\k".into(),
        };
        let lower = ["/a:b".into(), "/c,d".into()];
        assert_eq!(
            options(&lower, Some(&upper)),
            "lowerdir=/a\\:b:/c\\,d,upperdir=/u\\,p:p,workdir=/w\\\\k"
        );
        assert_eq!(options(&lower[..1], None), "lowerdir=/a\\:b");
    }
}
