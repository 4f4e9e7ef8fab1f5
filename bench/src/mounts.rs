//! Mounts that go away with the value that holds them, and the kernel's caches.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::command;

/// Most memory that is written to before a measurement, in bytes.
const BACKED_MAX: u64 = 6 << 30;

/// A mount, taken away on drop.
#[derive(Debug)]
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// Mounts `source` on `target`, which is created. No loop device is put in between.
    pub(crate) fn new(
        source: &Path,
        target: &Path,
        kind: &str,
        flags: MsFlags,
        data: &str,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(target)
            .with_context(|| format!("cannot create {}", target.display()))?;
        mount(Some(source), target, Some(kind), flags, Some(data)).with_context(|| {
            format!(
                "cannot mount {} ({kind}) on {}",
                source.display(),
                target.display()
            )
        })?;
        Ok(Self(target.to_owned()))
    }

    /// Mounts a tmpfs.
    pub(crate) fn tmpfs(target: &Path) -> anyhow::Result<Self> {
        Self::new(
            Path::new("tmpfs"),
            target,
            "tmpfs",
            MsFlags::empty(),
            "mode=0755",
        )
    }

    /// Mounts an overlay of `lower` with a writable layer below `scratch`, as a container has it.
    pub(crate) fn overlay(lower: &Path, scratch: &Path, target: &Path) -> anyhow::Result<Self> {
        let (upper, work) = (scratch.join("upper"), scratch.join("work"));
        for dir in [&upper, &work] {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let data = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        Self::new(
            Path::new("overlay"),
            target,
            "overlay",
            MsFlags::empty(),
            &data,
        )
    }

    /// Mounts an EROFS file with the kernel, read-only and straight from the file.
    pub(crate) fn erofs(image: &Path, target: &Path) -> anyhow::Result<Self> {
        Self::new(image, target, "erofs", MsFlags::MS_RDONLY, "")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Whether something is mounted on `dir`: it is on another device than its parent.
pub(crate) fn is_mount_point(dir: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|meta| meta.dev());
    match (device(dir), dir.parent().map(device)) {
        (Ok(own), Some(Ok(parent))) => own != parent,
        _ => false,
    }
}

/// Takes away every mount at or below `dir`, the last one first.
pub(crate) fn unmount_below(dir: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Field 5 is the mount point (proc_pid_mountinfo(5)); our own paths hold nothing to unescape.
    let points: Vec<&Path> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(Path::new)
        .collect();
    for point in points
        .into_iter()
        .rev()
        .filter(|point| point.starts_with(dir))
    {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}

/// Writes dirty pages back, so that the next measurement does not pay for the last one.
pub(crate) fn sync() {
    nix::unistd::sync();
}

/// Makes the kernel forget clean pages, dentries and inodes; then sees to it that `bytes` of free
/// memory are there (see [`back_memory`]).
pub(crate) fn drop_caches(bytes: u64) -> anyhow::Result<()> {
    sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the kernel's caches")?;
    back_memory(bytes)
}

/// Writes to `bytes` of memory and gives them back.
///
/// A guest tells its hypervisor which pages are free, and the first write to such a page costs a
/// fault outside of the guest, up to ten times the price of filling it. Who comes after a pause
/// would pay that, and who comes after someone else would not. Page caches of several file systems
/// take large pages, which the kernel keeps apart from small ones, so it has to be huge pages that
/// are written to: a process of its own is asked to, as an allocator learns that from its
/// environment.
pub(crate) fn back_memory(bytes: u64) -> anyhow::Result<()> {
    let mut touch = Command::new(std::env::current_exe()?);
    touch.arg("touch").arg(bytes.min(BACKED_MAX).to_string());
    touch.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
    command::run(&mut touch).map(drop)
}

/// What [`back_memory`]'s process does. With `hold` it says that it has the memory, and keeps it until
/// standard input ends.
pub(crate) fn touch(bytes: usize, hold: bool) -> std::io::Result<()> {
    let held = std::hint::black_box(vec![1u8; bytes]);
    if hold {
        crate::command::say("held\n")?;
        std::io::stdin().read_line(&mut String::new())?;
    }
    drop(held);
    Ok(())
}
