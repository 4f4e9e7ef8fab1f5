//! A kernel overlay of layer directories: read-only, as a judge, or writable, as a container has it.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// A mounted overlay; unmounted when dropped.
#[derive(Debug)]
pub struct Overlay {
    dir: TempDir,
}

impl Overlay {
    /// Lays `lowers`, topmost first, over each other.
    pub fn read_only(lowers: &[PathBuf]) -> Result<Self> {
        Self::mount(lowers, "", MsFlags::MS_RDONLY)
    }

    /// As [`Self::read_only`], reading marks from `user.overlay.*` as unprivileged mounts do.
    pub fn with_user_attributes(lowers: &[PathBuf]) -> Result<Self> {
        Self::mount(lowers, ",userxattr", MsFlags::MS_RDONLY)
    }

    /// As [`Self::read_only`], with a directory on top that takes what is written.
    pub fn writable(lowers: &[PathBuf]) -> Result<Self> {
        Self::mount(
            lowers,
            ",upperdir={}/upper,workdir={}/work",
            MsFlags::empty(),
        )
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("merged")
    }

    /// What was written: the upper directory of a writable overlay.
    pub fn upper(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    fn mount(lowers: &[PathBuf], more: &str, flags: MsFlags) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("h-ovl.").tempdir()?;
        let top = dir.path();
        for name in ["merged", "empty", "upper", "work"] {
            std::fs::create_dir(top.join(name))?;
        }
        // mount(2) takes 4 KiB of options, and 64 long paths are more: so short links to them.
        // An overlay of one directory needs a second below it; an empty one changes nothing.
        let empty = top.join("empty");
        let mut names = Vec::new();
        for (n, lower) in lowers
            .iter()
            .map(PathBuf::as_path)
            .chain([empty.as_path()])
            .enumerate()
        {
            symlink(lower, top.join(n.to_string()))?;
            names.push(format!("{}/{n}", top.display()));
        }
        let more = more.replace("{}", &top.display().to_string());
        let options = format!("lowerdir={}{more}", names.join(":"));
        let overlay = Self { dir };
        mount(
            Some("overlay"),
            &overlay.path(),
            Some("overlay"),
            flags,
            Some(options.as_str()),
        )
        .with_context(|| format!("mounting an overlay of {} layers: {options}", lowers.len()))?;
        Ok(overlay)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

/// A directory made a mount that is gone at the end: for mounts made by others below it.
#[derive(Debug)]
pub struct Sweep<'a>(pub &'a Path);

impl Drop for Sweep<'_> {
    fn drop(&mut self) {
        if let Err(error) = crate::mounts::detach_below(self.0) {
            eprintln!("leftover mounts below {}: {error:#}", self.0.display());
        }
    }
}
