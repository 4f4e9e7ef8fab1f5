//! Extended attributes of an entry: which are kept, under what name, and how large they may be.

use std::collections::BTreeMap;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{
    DecodeStats,
    acl::{self, Acl},
    error::{DecodeErrorKind as Kind, printable},
    extend::Extensions,
};

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// Longest name in bytes, `XATTR_NAME_MAX` of Linux.
const NAME_MAX: usize = 255;

/// Longest value in bytes: EROFS keeps the length in 16 bits, one less than Linux allows.
const VALUE_MAX: usize = u16::MAX as usize;

/// Most bytes of all names and values of one entry: below what EROFS can count, 2^16 words.
const TOTAL_MAX: usize = 192 << 10;

/// libarchive writes base64 without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Attributes by full name, as [`crate::tree::Meta`] has them.
type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Puts together what the PAX headers said. Where several say the same attribute, the raw form
/// (`SCHILY.xattr`) counts before `LIBARCHIVE.xattr`, and both before a text ACL.
pub(super) fn collect(extensions: &Extensions, stats: &mut DecodeStats) -> Result<Xattrs, Kind> {
    let mut kept = Xattrs::new();
    for (text, name) in [
        (&extensions.acl_access, ACL_ACCESS),
        (&extensions.acl_default, ACL_DEFAULT),
    ] {
        match text
            .as_ref()
            .map(|text| acl::parse(text, name == ACL_DEFAULT))
        {
            Some(Acl::Binary(value)) => {
                kept.insert(name.into(), value.into());
            }
            Some(Acl::Unusable) => stats.acls_ignored += 1,
            Some(Acl::Trivial) | None => {}
        }
    }
    for (name, value) in &extensions.xattrs_encoded {
        let name = percent_decoded(name);
        let value = BASE64
            .decode(value)
            .map_err(|_| fault(&name, "the value is not base64"))?;
        keep(&mut kept, &name, &value, stats)?;
    }
    for (name, value) in &extensions.xattrs {
        keep(&mut kept, name, value, stats)?;
    }
    let total: usize = kept
        .iter()
        .map(|(name, value)| name.len() + value.len() + 8)
        .sum();
    if total > TOTAL_MAX {
        return Err(fault(
            b"",
            "all attributes together are longer than 192 KiB",
        ));
    }
    Ok(kept)
}

fn keep(kept: &mut Xattrs, name: &[u8], value: &[u8], stats: &mut DecodeStats) -> Result<(), Kind> {
    if name.len() > NAME_MAX {
        return Err(fault(name, "the name is longer than 255 bytes"));
    }
    if name.contains(&0) {
        return Err(fault(name, "the name has a NUL byte"));
    }
    if value.len() > VALUE_MAX {
        return Err(fault(name, "the value is longer than 65535 bytes"));
    }
    let starts = |prefix: &str| name.starts_with(prefix.as_bytes());
    if starts("trusted.overlay.") || starts("user.overlay.") {
        stats.overlay_xattrs_dropped += 1;
    } else if is_linux_name(name) {
        kept.insert(name.into(), value.into());
    } else {
        stats.foreign_xattrs_dropped += 1;
    }
    Ok(())
}

/// Name spaces that files have on Linux, with something behind them.
fn is_linux_name(name: &[u8]) -> bool {
    name == ACL_ACCESS
        || name == ACL_DEFAULT
        || [&b"user."[..], b"trusted.", b"security."]
            .iter()
            .any(|space| {
                name.strip_prefix(*space)
                    .is_some_and(|rest| !rest.is_empty())
            })
}

fn fault(name: &[u8], reason: &'static str) -> Kind {
    Kind::Xattr {
        name: printable(name),
        reason,
    }
}

/// `%NN` as the byte it stands for; anything else as it is.
fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..2).filter(|_| byte == b'%').and_then(|digits| {
            let mut code = [0];
            hex::decode_to_slice(digits, &mut code)
                .ok()
                .map(|()| code[0])
        });
        decoded.push(code.unwrap_or(byte));
        rest = if code.is_some() { &tail[2..] } else { tail };
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent() {
        assert_eq!(percent_decoded(b"user.a%3Db%25%zz%4"), b"user.a=b%%zz%4");
    }
}
