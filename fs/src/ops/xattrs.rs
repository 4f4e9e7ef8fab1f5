//! Extended attributes: GETXATTR, LISTXATTR.
//!
//! An index holds what the image brought and, for overlayfs, `trusted.overlay.opaque`. Two names
//! are answered beside those and never listed: `user.overlay.opaque`, for overlays mounted without
//! privilege (`userxattr`), and `user.harbour.why`, which tells where the bytes of a file come
//! from.

use harbour_image::index::Nid;

use super::Fs;
use crate::{
    error::{Error, Result},
    inode::{Node, Place},
};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const OPAQUE_FOR_USERS: &[u8] = b"user.overlay.opaque";
/// Where the bytes of a file come from, as JSON.
pub(crate) const WHY: &[u8] = b"user.harbour.why";

/// An attribute's value or a list of names, or how long it is when that was the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// Length in bytes.
    Size(u32),
    /// The bytes.
    Value(Vec<u8>),
}

impl Fs {
    /// The value of attribute `name`, or its length when `size`, the room that the caller has, is 0.
    pub fn getxattr(&self, node: Node, name: &[u8], size: u32) -> Result<XattrReply> {
        if name == WHY && !matches!(node.place(), Place::Control(_)) {
            return reply(self.why(node)?.to_json(), size);
        }
        let Place::View { number, nid } = node.place() else {
            return Err(Error::NoAttribute);
        };
        let (view, opened) = self.view(number, node)?;
        let name = match name {
            OPAQUE_FOR_USERS if view.is_layer() => OPAQUE,
            other => other,
        };
        let index = opened.index(&self.outside);
        let inode = index.inode(Nid(nid)).map_err(|error| view.error(error))?;
        let value = index
            .xattr(&inode, name)
            .map_err(|error| view.error(error))?;
        reply(value.ok_or(Error::NoAttribute)?, size)
    }

    /// Names of all attributes, each with a NUL behind it, or the length of that list.
    pub fn listxattr(&self, node: Node, size: u32) -> Result<XattrReply> {
        let Place::View { number, nid } = node.place() else {
            return reply(Vec::new(), size);
        };
        let (view, opened) = self.view(number, node)?;
        let index = opened.index(&self.outside);
        let inode = index.inode(Nid(nid)).map_err(|error| view.error(error))?;
        let mut list = Vec::new();
        for xattr in index.xattrs(&inode).map_err(|error| view.error(error))? {
            list.extend_from_slice(&xattr.name);
            list.push(0);
        }
        reply(list, size)
    }
}

fn reply(value: Vec<u8>, size: u32) -> Result<XattrReply> {
    let len = u32::try_from(value.len()).map_err(|_| Error::SmallBuffer(value.len()))?;
    match size {
        0 => Ok(XattrReply::Size(len)),
        size if len > size => Err(Error::SmallBuffer(value.len())),
        _ => Ok(XattrReply::Value(value)),
    }
}
