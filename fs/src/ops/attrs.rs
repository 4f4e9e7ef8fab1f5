//! Attributes: GETATTR, STATFS, ACCESS, and every operation that would change something.

use std::time::Duration;

use harbour_image::index::{FileType, Nid};

use super::Fs;
use crate::{
    attr::{Attr, BLOCK},
    error::{Error, Result},
    inode::{Node, Place},
};

/// What `access(2)` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// To change it.
    pub write: bool,
}

/// What `statfs(2)` shows; blocks are of 4096 bytes, and none is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Blocks of the view, or of all views that are open.
    pub blocks: u64,
    /// Inodes, likewise.
    pub files: u64,
}

impl Fs {
    /// Attributes and how long they stay true.
    pub fn getattr(&self, node: Node) -> Result<(Attr, Duration)> {
        let ttl = self.config().content_ttl;
        match node.place() {
            Place::Control(number) => {
                let control = self.control();
                let ttl = if control.is_volatile(number) {
                    Duration::ZERO
                } else {
                    self.control_ttl()
                };
                Ok((self.control_attr(&control, number)?, ttl))
            }
            Place::Erofs(number, part) => {
                let (view, opened) = self.view(number, node)?;
                Ok((Attr::of_erofs(&view, part, &opened, self.started), ttl))
            }
            Place::View { number, nid } => {
                let (view, opened) = self.view(number, node)?;
                let inode = opened
                    .index(&self.outside)
                    .inode(Nid(nid))
                    .map_err(|error| view.error(error))?;
                Ok((Attr::of_inode(&view, &inode)?, ttl))
            }
        }
    }

    /// Size of the view that `node` is in; of all open ones for nodes above them.
    pub fn statfs(&self, node: Node) -> Result<Space> {
        let space = |len: u64, files: u64| Space {
            blocks: len.div_ceil(u64::from(BLOCK)),
            files,
        };
        match node.place() {
            Place::Control(_) => {
                let headers = self
                    .views
                    .all()
                    .into_iter()
                    .filter_map(|view| view.header_if_open());
                let sum = headers.fold((0u64, 0u64), |(len, files), header| {
                    (
                        len.saturating_add(header.erofs_len()),
                        files.saturating_add(header.inodes),
                    )
                });
                Ok(space(sum.0, sum.1))
            }
            Place::Erofs(number, _) | Place::View { number, .. } => {
                let (_, opened) = self.view(number, node)?;
                Ok(space(opened.header.erofs_len(), opened.header.inodes))
            }
        }
    }

    /// Whether `access` is possible at all; whether the caller may is the kernel's to decide, by
    /// the mode.
    pub fn access(&self, node: Node, access: Access) -> Result<()> {
        let (attr, _) = self.getattr(node)?;
        // Devices, pipes and sockets are written to, not changed.
        let changes = matches!(
            attr.kind,
            FileType::File | FileType::Dir | FileType::Symlink
        );
        if access.write && changes {
            Err(Error::ReadOnly)
        } else {
            Ok(())
        }
    }

    /// The answer to every operation that would change something.
    pub const fn refuse_change<T>(&self) -> Result<T> {
        Err(Error::ReadOnly)
    }
}
