//! The mount table, and taking mounts down whatever state they are in.

use std::{
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};

/// One line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub target: PathBuf,
    /// File system type, like `fuse` or `erofs`.
    pub kind: String,
}

/// Mounts at or below `dir`, in the order they were made.
pub fn below(dir: &Path) -> Result<Vec<Mount>> {
    let table = std::fs::read("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    Ok(table
        .split(|b| *b == b'\n')
        .filter_map(parse)
        .filter(|m| m.target.starts_with(dir))
        .collect())
}

/// Detaches every mount at or below `dir`, the newest first. Ends with none left or an error.
pub fn detach_below(dir: &Path) -> Result<()> {
    for mount in below(dir)?.iter().rev() {
        umount2(&mount.target, MntFlags::MNT_DETACH)
            .with_context(|| format!("detaching {}", mount.target.display()))?;
    }
    Ok(())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let target = fields.nth(4)?;
    let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
    let target = PathBuf::from(std::ffi::OsString::from_vec(unescape(target)));
    Some(Mount {
        target,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                out.push(code);
                rest = &after[3..];
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line =
            b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - fuse.harbour harbour ro,user_id=0";
        let wanted = Mount {
            target: "/mnt 2".into(),
            kind: "fuse.harbour".into(),
        };
        assert_eq!(parse(line), Some(wanted));
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(b"a\\134b\\"), b"a\\b\\");
    }
}
