//! Text ACLs, as star and GNU tar keep them, in the binary form that `setxattr(2)` takes.
//!
//! Sources: `acl_to_text(3)` for the text; `linux/posix_acl_xattr.h` for the binary form: version
//! 2, then tag, permissions and id of each entry, little endian.

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// Tags in the order that the kernel demands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    UserObj = 0x01,
    User = 0x02,
    GroupObj = 0x04,
    Group = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

/// What a text ACL came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Acl {
    /// Value of `system.posix_acl_access` or `system.posix_acl_default`.
    Binary(Vec<u8>),
    /// It says no more than the permission bits do.
    Trivial,
    /// It names users or groups by name alone, which means nothing outside its machine, or is not
    /// an ACL.
    Unusable,
}

/// Reads a text ACL. An access ACL that only repeats the permission bits is [`Acl::Trivial`], as
/// the kernel drops it too; a default ACL has no bits that could stand for it.
pub(super) fn parse(text: &[u8], is_default: bool) -> Acl {
    let Ok(text) = str::from_utf8(text) else {
        return Acl::Unusable;
    };
    let mut entries = Vec::new();
    let lines = text
        .split([',', '\n'])
        .map(|line| line.split('#').next().unwrap_or_default().trim());
    for line in lines.filter(|line| !line.is_empty()) {
        match entry(line) {
            Some(entry) => entries.push(entry),
            None => return Acl::Unusable,
        }
    }
    if entries.is_empty() {
        return Acl::Trivial;
    }
    entries.sort_unstable();
    if !is_valid(&entries) {
        return Acl::Unusable;
    }
    if entries.len() == 3 && !is_default {
        return Acl::Trivial;
    }
    let mut binary = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        binary.extend((tag as u16).to_le_bytes());
        binary.extend(permissions.to_le_bytes());
        binary.extend(id.to_le_bytes());
    }
    Acl::Binary(binary)
}

type Entry = (Tag, u32, u16);

/// `user:1000:rw-`, `group::r-x`, `m::rwx`, `user:name:rw-:1000` (star).
fn entry(line: &str) -> Option<Entry> {
    let mut fields = line.split(':').map(str::trim);
    let (kind, who) = (fields.next()?, fields.next()?);
    let (permissions, id) = match (kind, fields.next()) {
        // The short form of two fields, without an empty one for the name.
        ("mask" | "m" | "other" | "o", None) => (who, None),
        (_, permissions) => (permissions?, fields.next()),
    };
    if fields.next().is_some() {
        return None;
    }
    let named = !who.is_empty();
    let tag = match kind {
        "user" | "u" if named => Tag::User,
        "user" | "u" => Tag::UserObj,
        "group" | "g" if named => Tag::Group,
        "group" | "g" => Tag::GroupObj,
        "mask" | "m" => Tag::Mask,
        "other" | "o" => Tag::Other,
        _ => return None,
    };
    let id = match tag {
        Tag::User | Tag::Group => match id.or(Some(who))? {
            // The one name that has the same number everywhere.
            "root" => 0,
            number => number.parse().ok().filter(|id| *id != NO_ID)?,
        },
        _ => NO_ID,
    };
    Some((tag, id, permission_bits(permissions)?))
}

fn permission_bits(text: &str) -> Option<u16> {
    text.bytes().try_fold(0, |bits, letter| match letter {
        b'r' => Some(bits | 4),
        b'w' => Some(bits | 2),
        b'x' => Some(bits | 1),
        b'-' => Some(bits),
        _ => None,
    })
}

/// One of each tag that stands alone, no id twice, a mask where there are named entries.
fn is_valid(sorted: &[Entry]) -> bool {
    let count = |tag| sorted.iter().filter(|entry| entry.0 == tag).count();
    let named = count(Tag::User) + count(Tag::Group) > 0;
    [Tag::UserObj, Tag::GroupObj, Tag::Other].map(count) == [1, 1, 1]
        && count(Tag::Mask) <= 1
        && (!named || count(Tag::Mask) == 1)
        && sorted
            .windows(2)
            .all(|pair| (pair[0].0, pair[0].1) != (pair[1].0, pair[1].1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_what_the_kernel_takes() {
        let binary = Acl::Binary(
            [
                &[2, 0, 0, 0][..],
                &[1, 0, 7, 0, 255, 255, 255, 255],
                &[2, 0, 6, 0, 0xe8, 3, 0, 0],
                &[4, 0, 5, 0, 255, 255, 255, 255],
                &[16, 0, 7, 0, 255, 255, 255, 255],
                &[32, 0, 4, 0, 255, 255, 255, 255],
            ]
            .concat(),
        );
        for text in [
            "user::rwx,user:1000:rw-,group::r-x,mask::rwx,other::r--",
            "user::rwx\ngroup::r-x\nmask::rwx\nuser:lisa:rw-:1000\nother::r--\n",
            "u::rwx, u:1000:rw, g::rx, m:rwx, o:r # comment",
            "user::rwx\nuser:1000:rw-\t#effective:rw-\ngroup::r-x\nmask::rwx\nother::r--",
        ] {
            assert_eq!(parse(text.as_bytes(), false), binary, "{text}");
        }
        assert_eq!(
            parse(b"user::rw-,group::r--,other::r--", false),
            Acl::Trivial
        );
        assert!(matches!(
            parse(b"user::rw-,group::r--,other::r--", true),
            Acl::Binary(_)
        ));
        assert_eq!(parse(b"", true), Acl::Trivial);
        for bad in [
            "user::rwx,user:lisa:rw-,group::r-x,mask::rwx,other::r--",
            "user::rwx,user:1000:rw-,group::r-x,other::r--",
            "user::rwx,user:1:r,user:1:w,group::r-x,mask::r,other::r--",
            "user::rwx,group::r-x",
            "user::rwz,group::r-x,other::r--",
            "nonsense",
            "user::rwx:1:2,group::r,other::r",
        ] {
            assert_eq!(parse(bad.as_bytes(), false), Acl::Unusable, "{bad}");
        }
    }
}
