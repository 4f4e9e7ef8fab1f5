//! Extended attributes inline behind an inode, as EROFS keeps them.

use std::collections::BTreeMap;

use super::layout::{XATTR_AREA_MAX, XATTR_ENTRY_LEN, XATTR_HEADER_LEN, array, get_u16};

/// The mark of an opaque directory, the one name below `trusted.overlay.` that is written.
pub(crate) const OPAQUE: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");

/// Namespaces that EROFS numbers. ACL names are whole: nothing may follow them.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Why attributes do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TooLong {
    Name,
    Value,
    All,
}

/// Number of the namespace of `name` and what follows its prefix; `None` for names that an index
/// does not hold: other namespaces, and overlayfs's own marks, which no layer may bring along.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return None;
    }
    split_any(name)
}

fn split_any(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, prefix) = PREFIXES
        .into_iter()
        .find(|(_, prefix)| name.starts_with(prefix))?;
    let rest = &name[prefix.len()..];
    let whole = matches!(index, 2 | 3);
    (whole == rest.is_empty() && !rest.contains(&0)).then_some((index, rest))
}

/// Attributes of one node that an index holds, with namespace number and rest of the name.
fn held(
    xattrs: &BTreeMap<Box<[u8]>, Box<[u8]>>,
    opaque: bool,
) -> impl Iterator<Item = (u8, &[u8], &[u8])> {
    let mark = opaque.then_some(OPAQUE).and_then(|(name, value)| {
        let (index, rest) = split_any(name)?;
        Some((index, rest, value))
    });
    let given = xattrs.iter().filter_map(|(name, value)| {
        let (index, rest) = split(name)?;
        Some((index, rest, &**value))
    });
    mark.into_iter().chain(given)
}

/// Length in bytes of the inline area for these attributes, 0 when there are none, and how many
/// were left out because an index does not hold their kind.
pub(crate) fn area_len(
    xattrs: &BTreeMap<Box<[u8]>, Box<[u8]>>,
    opaque: bool,
) -> Result<(u32, u32), TooLong> {
    if xattrs.is_empty() && !opaque {
        return Ok((0, 0));
    }
    let (mut len, mut count) = (XATTR_HEADER_LEN, 0);
    for (_, rest, value) in held(xattrs, opaque) {
        if rest.len() > usize::from(u8::MAX) {
            return Err(TooLong::Name);
        }
        if value.len() > usize::from(u16::MAX) {
            return Err(TooLong::Value);
        }
        len += entry_len(rest.len(), value.len());
        count += 1;
        if len > XATTR_AREA_MAX {
            return Err(TooLong::All);
        }
    }
    let dropped = (xattrs.len() + usize::from(opaque) - count) as u32;
    Ok(if count == 0 {
        (0, dropped)
    } else {
        (len as u32, dropped)
    })
}

/// Writes the area whose length [`area_len`] gave into `out`, which is zeroed.
pub(crate) fn encode(xattrs: &BTreeMap<Box<[u8]>, Box<[u8]>>, opaque: bool, out: &mut [u8]) {
    let mut at = XATTR_HEADER_LEN;
    for (index, rest, value) in held(xattrs, opaque) {
        out[at] = rest.len() as u8;
        out[at + 1] = index;
        out[at + 2..at + 4].copy_from_slice(&(value.len() as u16).to_le_bytes());
        let name_at = at + XATTR_ENTRY_LEN;
        let value_at = name_at + rest.len();
        out[name_at..value_at].copy_from_slice(rest);
        out[value_at..value_at + value.len()].copy_from_slice(value);
        at += entry_len(rest.len(), value.len());
    }
}

/// One attribute in an area: prefix and rest of its name, and its value.
pub(crate) type Entry<'a> = (&'static [u8], &'a [u8], &'a [u8]);

/// The attributes in `area`, or `Err` at the first thing that cannot be.
pub(crate) fn entries(area: &[u8]) -> impl Iterator<Item = Result<Entry<'_>, &'static str>> {
    let mut at = XATTR_HEADER_LEN;
    // Shared attributes are a table that this format does not have.
    let shared = area.get(4).is_some_and(|count| *count != 0);
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || area.len() <= at {
            return None;
        }
        let entry = if shared {
            Err("shared attributes")
        } else {
            entry(area, &mut at)
        };
        failed = entry.is_err();
        Some(entry)
    })
}

fn entry<'a>(area: &'a [u8], at: &mut usize) -> Result<Entry<'a>, &'static str> {
    let left = &area[*at..];
    if left.len() < XATTR_ENTRY_LEN {
        return Err("an attribute cut short");
    }
    let [name_len, index] = array(left, 0);
    let (name_len, value_len) = (usize::from(name_len), usize::from(get_u16(left, 2)));
    let len = entry_len(name_len, value_len);
    let value_at = XATTR_ENTRY_LEN + name_len;
    if left.len() < len {
        return Err("an attribute longer than its area");
    }
    let (_, prefix) = PREFIXES
        .into_iter()
        .find(|(known, _)| *known == index)
        .ok_or("an unknown attribute namespace")?;
    *at += len;
    Ok((
        prefix,
        &left[XATTR_ENTRY_LEN..value_at],
        &left[value_at..value_at + value_len],
    ))
}

const fn entry_len(name_len: usize, value_len: usize) -> usize {
    (XATTR_ENTRY_LEN + name_len + value_len).next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn reads_what_it_writes_and_leaves_out_what_it_must() {
        let given: BTreeMap<Box<[u8]>, Box<[u8]>> = [
            (&b"user.a"[..], &b""[..]),
            (b"user.", b"no name"),
            (b"user.n\0l", b"nul"),
            (b"security.capability", b"\x01\0\0\x02rest"),
            (b"system.posix_acl_access", b"acl"),
            (b"system.posix_acl_access2", b"not an acl"),
            (b"system.nfs4_acl", b"x"),
            (b"btrfs.compression", b"zstd"),
            (b"trusted.overlay.redirect", b"/etc"),
            (b"user.overlay.opaque", b"y"),
            (b"trusted.overlaid", b"fine"),
        ]
        .into_iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
        let (len, dropped) = area_len(&given, true).unwrap();
        assert_eq!(dropped, 7);
        let mut area = vec![0; len as usize];
        encode(&given, true, &mut area);
        let read: Vec<_> = entries(&area)
            .map(|entry| {
                entry
                    .map(|(prefix, rest, value)| ([prefix, rest].concat(), value.to_vec()))
                    .unwrap()
            })
            .collect();
        let names: Vec<_> = read
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name))
            .collect();
        assert_eq!(
            names,
            [
                "trusted.overlay.opaque",
                "security.capability",
                "system.posix_acl_access",
                "trusted.overlaid",
                "user.a"
            ]
        );
        for cut in 1..area.len() - XATTR_HEADER_LEN {
            let last = entries(&area[..area.len() - cut]).last();
            assert!(
                last.is_none_or(|entry| entry.is_err()) || cut % 4 == 0,
                "cut {cut}"
            );
        }
    }

    #[test]
    fn limits_are_errors() {
        let one = |name: Vec<u8>, value: usize| {
            area_len(
                &BTreeMap::from([(name.into_boxed_slice(), vec![7; value].into_boxed_slice())]),
                false,
            )
        };
        let name = |len: usize| [b"user.".to_vec(), vec![b'n'; len]].concat();
        assert!(one(name(255), 65535).is_ok());
        assert_eq!(one(name(256), 1), Err(TooLong::Name));
        assert_eq!(one(name(1), 65536), Err(TooLong::Value));
        let many = (0..5u8).map(|i| {
            (
                [b"user.".to_vec(), vec![b'a' + i]].concat().into(),
                vec![0; 65000].into(),
            )
        });
        assert_eq!(area_len(&many.collect(), false), Err(TooLong::All));
    }
}
