//! The fast view: an EROFS file of the mount, mounted again by the kernel's own EROFS.
//!
//! Lookups, listings and attributes then never leave the kernel, and only reads of data come to
//! us, in large pieces. It takes Linux 6.12 for EROFS to mount a plain file; whether this kernel
//! can is found out by trying. All of this must be called from threads that do not serve the
//! kernel, as mounting reads the file.
//!
//! The file comes in two parts, as EROFS's own devices. The head, metadata and small files, is read
//! through its page cache: reading ahead there crosses from file to file, which EROFS itself cannot
//! (a tar of small files in 0.6 instead of 2.3 s), at the price of keeping them twice. The bulk,
//! files of more than one object, is read past it: once in memory, and at twice the speed.

use std::{
    collections::HashSet,
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount as mount_call, umount2},
};

/// Where the kernel tells how far it reads ahead.
const BDI: &str = "/sys/class/bdi";

/// Why there is no fast view.
#[derive(Debug, thiserror::Error)]
pub enum FastViewError {
    /// This kernel cannot: use the directories.
    #[error("no fast view on this kernel: {0}")]
    Unsupported(&'static str),
    /// Something about the place.
    #[error("cannot use {path} for a fast view")]
    Place {
        /// The place.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mount(2) refused.
    #[error("cannot mount {source_path} at {path} as EROFS")]
    Mount {
        /// The EROFS file.
        source_path: PathBuf,
        /// The mount point.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// umount(2) refused.
    #[error("cannot unmount the fast view at {path}")]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// Why; [`io::ErrorKind::ResourceBusy`] when somebody uses it.
        #[source]
        source: io::Error,
    },
}

/// One line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// Where it is mounted.
    pub target: PathBuf,
    /// Type of file system.
    pub kind: String,
    /// What is mounted.
    pub source: OsString,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `.devices/X.head` and `.devices/X.bulk` of a mount that hears of opens.
    Parts {
        /// Metadata and small files.
        head: PathBuf,
        /// Large files.
        bulk: PathBuf,
    },
    /// `erofs/X.erofs` of any mount, read past its cache (`directio`).
    Whole(PathBuf),
}

/// Mounts a view at `target`, which is made when it is missing; how far the kernel reads ahead
/// there is `read_ahead_kb`.
pub fn mount(source: &Source, target: &Path, read_ahead_kb: u32) -> Result<(), FastViewError> {
    let fail = |source| FastViewError::Place {
        path: target.to_owned(),
        source,
    };
    clear_stale(target).map_err(fail)?;
    std::fs::create_dir_all(target).map_err(fail)?;
    let before = bdi_names();
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    let (file, options) = match source {
        // An empty bulk leaves the head an EROFS file like any other.
        Source::Parts { head, bulk } if std::fs::metadata(bulk).map_err(fail)?.len() > 0 => {
            let mut options = OsString::from("device=");
            options.push(bulk);
            (head, Some(options))
        }
        Source::Parts { head, .. } => (head, None),
        Source::Whole(file) => (file, Some("directio".into())),
    };
    let mount_as = |options: Option<&OsString>| {
        let options = options.map(OsString::as_os_str);
        mount_call(Some(file), target, Some("erofs"), flags, options)
    };
    let mut result = mount_as(options.as_ref());
    if result == Err(Errno::EINVAL) && matches!(source, Source::Whole(_)) {
        // 6.12 mounts files but does not know the option.
        result = mount_as(None);
    }
    match result {
        Ok(()) => {
            for name in bdi_names().difference(&before) {
                let path = Path::new(BDI).join(name).join("read_ahead_kb");
                if let Err(error) = std::fs::write(&path, read_ahead_kb.to_string()) {
                    tracing::debug!(%error, path = %path.display(), "read-ahead not set");
                }
            }
            Ok(())
        }
        Err(errno) => {
            // Only the directory that was made for this; one that is used is not empty.
            let _ = std::fs::remove_dir(target);
            Err(match errno {
                Errno::ENODEV => FastViewError::Unsupported("it has no EROFS"),
                Errno::ENOTBLK => FastViewError::Unsupported(
                    "its EROFS mounts block devices only (files need Linux 6.12)",
                ),
                Errno::EPERM => FastViewError::Unsupported("mounting is not permitted here"),
                errno => FastViewError::Mount {
                    source_path: file.clone(),
                    path: target.to_owned(),
                    source: errno.into(),
                },
            })
        }
    }
}

/// Unmounts a fast view and removes its directory; with `lazy` also when somebody uses it.
pub fn unmount(target: &Path, lazy: bool) -> Result<(), FastViewError> {
    let flags = if lazy {
        MntFlags::MNT_DETACH
    } else {
        MntFlags::empty()
    };
    match umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW) {
        // Not mounted (any more) is what was wanted.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => {
            return Err(FastViewError::Unmount {
                path: target.to_owned(),
                source: errno.into(),
            });
        }
    }
    // What is not empty was never ours.
    let _ = std::fs::remove_dir(target);
    Ok(())
}

/// Fast views that are mounted below `dir` now.
pub fn list(dir: &Path) -> io::Result<Vec<MountLine>> {
    let dir = match dir.canonicalize() {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let below = |mount: &MountLine| mount.kind == "erofs" && mount.target.parent() == Some(&dir);
    Ok(mounts()?.into_iter().filter(below).collect())
}

/// Takes away whatever an earlier process left below `dir`. Views that somebody uses go lazily:
/// the file below them is dead.
pub fn clean(dir: &Path) -> io::Result<usize> {
    let stale = list(dir)?;
    // The last one mounted is on top.
    for mount in stale.iter().rev() {
        if let Err(error) = unmount(&mount.target, true) {
            tracing::warn!(
                error = crate::errno::chain(&error),
                "a fast view of an earlier run stays"
            );
        }
    }
    Ok(stale.len())
}

/// All mounts that this process sees, in the order they were made.
pub fn mounts() -> io::Result<Vec<MountLine>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse_mount)
        .collect())
}

/// One line of mountinfo, see proc_pid_mountinfo(5): fields by spaces, the fifth is the mount
/// point, then optional fields up to a dash, then type and source.
fn parse_mount(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let target = unescape(fields.nth(4)?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = OsString::from_vec(unescape(rest.next()?));
    Some(MountLine {
        target: PathBuf::from(OsString::from_vec(target)),
        kind,
        source,
    })
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match octal {
            Some(digits) if byte == b'\\' => {
                out.push(digits.iter().fold(0u8, |value, digit| {
                    value.wrapping_mul(8).wrapping_add(digit - b'0')
                }));
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// Detaches a mount whose file has gone.
fn clear_stale(target: &Path) -> io::Result<()> {
    let Ok(path) = target.canonicalize() else {
        return Ok(());
    };
    if mounts()?
        .iter()
        .any(|mount| mount.target == path && mount.kind == "erofs")
    {
        umount2(&path, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// Names under which EROFS mounts that have no device of their own tell their read-ahead.
fn bdi_names() -> HashSet<OsString> {
    let entries = std::fs::read_dir(BDI).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().starts_with("erofs"))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read_with_escapes_and_optional_fields() {
        let line = b"36 35 98:0 / /mnt/a\\040b\\134 rw,noatime shared:1 master:2 - fuse.harbour har\\040bour rw";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount.target, Path::new("/mnt/a b\\"));
        assert_eq!(
            (mount.kind.as_str(), mount.source.to_str()),
            ("fuse.harbour", Some("har bour"))
        );
        let plain = parse_mount(b"1 0 0:1 / /proc rw - proc proc rw").unwrap();
        assert_eq!(
            (plain.target.to_str(), plain.kind.as_str()),
            (Some("/proc"), "proc")
        );
        for bad in [&b""[..], b"1 2 3", b"1 0 0:1 / /proc rw shared:1"] {
            assert_eq!(parse_mount(bad), None);
        }
        assert!(
            mounts()
                .unwrap()
                .iter()
                .any(|mount| mount.target == Path::new("/proc"))
        );
    }
}
