//! What extension headers (PAX, GNU long names) say about the entry that follows them.

use std::collections::BTreeMap;

use super::{
    error::DecodeErrorKind as Kind,
    pax::{Records, decimal, time},
    sparse::SparseKeys,
};
use crate::tree::Time;

/// Values that stand in for those of the header. An absent one means that the header counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    /// GNU long name; PAX counts before it.
    pub(super) long_name: Option<Vec<u8>>,
    /// GNU long link target; PAX counts before it.
    pub(super) long_link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Time>,
    pub(super) device_major: Option<u32>,
    pub(super) device_minor: Option<u32>,
    /// `SCHILY.xattr.NAME`, raw.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// `LIBARCHIVE.xattr.NAME`: name percent-encoded, value in base64.
    pub(super) xattrs_encoded: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) acl_access: Option<Vec<u8>>,
    pub(super) acl_default: Option<Vec<u8>>,
    pub(super) sparse: SparseKeys,
}

impl Extensions {
    /// Takes the records of one PAX header. One that applies to all later entries (`is_global`)
    /// must not name what only one of them can have.
    pub(super) fn apply(&mut self, records: &[u8], is_global: bool) -> Result<(), Kind> {
        for record in Records(records) {
            let (key, value) = record?;
            let is_own =
                matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(b"GNU.sparse.");
            if is_global && is_own {
                return Err(Kind::Pax("a global header gives name, size or sparse map"));
            }
            self.apply_record(key, value)?;
        }
        Ok(())
    }

    fn apply_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Kind> {
        // An empty value takes back what was said before, by a global header too.
        let given = (!value.is_empty()).then_some(value);
        let number = |field| {
            given
                .map(|text| decimal(text).ok_or_else(|| Kind::number(field, text)))
                .transpose()
        };
        let id = |field| {
            let number = number(field)?;
            number
                .map(u32::try_from)
                .transpose()
                .map_err(|_| Kind::number(field, value))
        };
        match key {
            b"path" => self.path = given.map(<[u8]>::to_vec),
            b"linkpath" => self.link = given.map(<[u8]>::to_vec),
            b"size" => self.size = number("size")?,
            b"uid" => self.uid = id("uid")?,
            b"gid" => self.gid = id("gid")?,
            b"mtime" => {
                let parse = |text| time(text).ok_or_else(|| Kind::number("mtime", text));
                self.mtime = given.map(parse).transpose()?;
            }
            b"SCHILY.devmajor" => self.device_major = id("SCHILY.devmajor")?,
            b"SCHILY.devminor" => self.device_minor = id("SCHILY.devminor")?,
            b"SCHILY.acl.access" => self.acl_access = given.map(<[u8]>::to_vec),
            b"SCHILY.acl.default" => self.acl_default = given.map(<[u8]>::to_vec),
            _ => {
                // An attribute may well be empty, so that takes nothing back.
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.xattrs_encoded.insert(name.to_vec(), value.to_vec());
                } else if let Some(rest) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.apply(rest, value)?;
                }
            }
        }
        Ok(())
    }
}
