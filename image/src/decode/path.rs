//! Names of entries, checked once.

use super::error::NameFault;

/// Longest component in bytes, `NAME_MAX` of Linux.
const COMPONENT_MAX: usize = 255;

/// Longest path in bytes, `PATH_MAX` of Linux.
pub(super) const PATH_MAX: usize = 4096;

/// A path below the root of the layer: components joined by single slashes, none of them empty,
/// `.`, `..`, longer than 255 bytes or holding a NUL. The root itself is the empty path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct EntryPath {
    bytes: Vec<u8>,
    /// Where the last component begins.
    name_at: usize,
}

impl EntryPath {
    /// Checks `raw`. `./`, doubled and trailing slashes are dropped; a leading slash only when
    /// `strip_absolute` says so.
    pub(super) fn parse(raw: &[u8], strip_absolute: bool) -> Result<Self, NameFault> {
        if raw.is_empty() {
            return Err(NameFault::Empty);
        }
        if raw[0] == b'/' && !strip_absolute {
            return Err(NameFault::Absolute);
        }
        if raw.len() > PATH_MAX {
            return Err(NameFault::PathLength(raw.len()));
        }
        let mut path = Self {
            bytes: Vec::with_capacity(raw.len()),
            name_at: 0,
        };
        for component in raw.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err(NameFault::Parent),
                _ => check_component(component)?,
            }
            if !path.bytes.is_empty() {
                path.bytes.push(b'/');
            }
            path.name_at = path.bytes.len();
            path.bytes.extend_from_slice(component);
        }
        Ok(path)
    }

    pub(super) fn is_root(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The last component; empty for the root.
    pub(super) fn name(&self) -> &[u8] {
        &self.bytes[self.name_at..]
    }

    /// The path without its last component.
    pub(super) fn parent(&self) -> &[u8] {
        &self.bytes[..self.name_at.saturating_sub(1)]
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Whether a directory entry can have this name.
pub(super) fn check_component(component: &[u8]) -> Result<(), NameFault> {
    if component.len() > COMPONENT_MAX {
        return Err(NameFault::ComponentLength(component.len()));
    }
    if component.contains(&0) {
        return Err(NameFault::Nul);
    }
    Ok(())
}

/// What a name says about lower layers.
/// Source: OCI image specification, layer.md, "Whiteouts".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark<'a> {
    /// Nothing: an ordinary entry.
    None,
    /// `.wh.NAME`: lower layers' NAME is deleted.
    Whiteout(&'a [u8]),
    /// `.wh..wh..opq`: all that lower layers have in this directory is deleted.
    Opaque,
    /// Something of AUFS itself, which is no part of the image.
    Aufs,
}

/// Reads the mark in `path`'s name.
pub(super) fn mark(path: &EntryPath) -> Result<Mark<'_>, NameFault> {
    const WHITEOUT: &[u8] = b".wh.";
    const AUFS: &[u8] = b".wh..wh.";
    const OPAQUE: &[u8] = b".wh..wh..opq";
    for component in path.parent().split(|byte| *byte == b'/') {
        if component.starts_with(AUFS) {
            return Ok(Mark::Aufs);
        }
        if component.starts_with(WHITEOUT) {
            return Err(NameFault::Reserved);
        }
    }
    match path.name() {
        OPAQUE => Ok(Mark::Opaque),
        name if name.starts_with(AUFS) => Ok(Mark::Aufs),
        name => match name.strip_prefix(WHITEOUT) {
            None => Ok(Mark::None),
            Some(b"" | b"." | b"..") => Err(NameFault::Whiteout),
            Some(deleted) => Ok(Mark::Whiteout(deleted)),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths() {
        let parse = |raw: &[u8]| EntryPath::parse(raw, false);
        for (raw, parent, name) in [
            (&b"a"[..], &b""[..], &b"a"[..]),
            (b"./a", b"", b"a"),
            (b"a/", b"", b"a"),
            (b".//a/./b//", b"a", b"b"),
            (b"a/b/c", b"a/b", b"c"),
            (b"...", b"", b"..."),
            (b"\xff/\n", b"\xff", b"\n"),
            (b"./", b"", b""),
        ] {
            let path = parse(raw).unwrap();
            assert_eq!((path.parent(), path.name()), (parent, name), "{raw:?}");
        }
        assert!(parse(b".").unwrap().is_root());
        assert_eq!(EntryPath::parse(b"//a", true).unwrap().as_bytes(), b"a");
        assert_eq!(parse(&[b'a'; 255]).unwrap().name().len(), 255);
        for (raw, fault) in [
            (&b""[..], NameFault::Empty),
            (b"/a", NameFault::Absolute),
            (b"..", NameFault::Parent),
            (b"a/../b", NameFault::Parent),
            (b"a\0b", NameFault::Nul),
            (&[b'a'; 256], NameFault::ComponentLength(256)),
            (&[b'/'; 5000][..], NameFault::Absolute),
            (&b"a/".repeat(2049), NameFault::PathLength(4098)),
        ] {
            assert_eq!(parse(raw), Err(fault));
        }
    }

    #[test]
    fn marks() {
        for (raw, want) in [
            (&b"a"[..], Ok(Mark::None)),
            (b"a/.wh.b", Ok(Mark::Whiteout(b"b"))),
            (b".wh..wh..opq", Ok(Mark::Opaque)),
            (b"d/.wh..wh..opq", Ok(Mark::Opaque)),
            (b".wh..wh.plnk", Ok(Mark::Aufs)),
            (b".wh..wh.plnk/1.2", Ok(Mark::Aufs)),
            (b".wh...", Err(NameFault::Whiteout)),
            (b".wh....", Ok(Mark::Whiteout(b"..."))),
            (b".wh.", Err(NameFault::Whiteout)),
            (b".wh..", Err(NameFault::Whiteout)),
            (b".wh.a/b", Err(NameFault::Reserved)),
            (b".wha", Ok(Mark::None)),
        ] {
            let path = EntryPath::parse(raw, false).unwrap();
            assert_eq!(mark(&path), want, "{raw:?}");
        }
    }
}
