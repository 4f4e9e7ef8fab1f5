//! Operations on the directories above the views.

use std::{sync::Arc, time::Duration};

use harbour_image::{digest::Digest, index::FileType, tree::Time};

use super::{Fs, names::Emit, names::emit_dots};
use crate::{
    attr::Attr,
    control::{Child, Control, Kind, Target},
    error::{Error, Result},
    inode::Node,
    ops::names::{Entry, Found},
};

impl Fs {
    pub(super) fn control_lookup(&self, number: u64, name: &[u8]) -> Result<Found> {
        let control = self.control();
        let parent = Node::control(number);
        let node = control.node(number).ok_or(Error::Stale(parent))?;
        if node.children().is_none() {
            return Err(Error::NotDir(parent));
        }
        if matches!(name, b"." | b"..") {
            let number = if name == b"." { number } else { node.parent };
            let (entry_ttl, attr_ttl) = (self.control_ttl(), self.control_ttl());
            return Ok(Found {
                attr: Some(self.control_attr(&control, number)?),
                entry_ttl,
                attr_ttl,
            });
        }
        let child = node.child(name).ok_or(Error::NotFound)?;
        let (attr, attr_ttl) = self.child_attr(&control, node.mtime, child)?;
        Ok(Found {
            attr: Some(attr),
            entry_ttl: self.control_ttl(),
            attr_ttl,
        })
    }

    pub(super) fn control_readdir(
        &self,
        number: u64,
        from: u64,
        plus: bool,
        emit: &mut Emit<'_>,
    ) -> Result<()> {
        let control = self.control();
        let this = Node::control(number);
        let node = control.node(number).ok_or(Error::Stale(this))?;
        let children = node.children().ok_or(Error::NotDir(this))?;
        let ttl = self.control_ttl();
        if from < 2 {
            let own = self.control_attr(&control, number)?;
            let parent = self.control_attr(&control, node.parent)?;
            if !emit_dots(own, parent, ttl, from, plus, emit) {
                return Ok(());
            }
        }
        let start = children.partition_point(|child| child.cookie <= from);
        for child in &children[start..] {
            let attr = match plus || matches!(child.target, Target::Root(_)) {
                true => self.listed_attr(&control, node.mtime, child)?,
                false => None,
            };
            let (child_node, kind) = match (&attr, child.target.node()) {
                (Some((attr, _)), _) => (attr.node, attr.kind),
                (None, Some(node)) => (node, kind_of(&control, child)),
                // A view whose index cannot be read has no node to show, but has its name.
                (None, None) => (this, FileType::Dir),
            };
            let name = child.name.as_bytes();
            let attr = attr.filter(|_| plus);
            if !emit(&Entry {
                name,
                node: child_node,
                kind,
                next: child.cookie,
                attr,
            }) {
                break;
            }
        }
        Ok(())
    }

    /// Attributes for a listing, which one broken child must not break.
    fn listed_attr(
        &self,
        control: &Control,
        mtime: Time,
        child: &Child,
    ) -> Result<Option<(Attr, Duration)>> {
        match self.child_attr(control, mtime, child) {
            Ok((attr, ttl)) => Ok(Some((attr, ttl.min(self.control_ttl())))),
            Err(Error::Later) => Err(Error::Later),
            Err(error) => {
                let node = child.target.node().unwrap_or(Node::ROOT);
                self.report("readdir", node, &error);
                Ok(None)
            }
        }
    }

    fn child_attr(
        &self,
        control: &Control,
        mtime: Time,
        child: &Child,
    ) -> Result<(Attr, Duration)> {
        match child.target {
            Target::Control(number) => {
                let ttl = match control.is_volatile(number) {
                    true => Duration::ZERO,
                    false => self.control_ttl(),
                };
                Ok((self.control_attr(control, number)?, ttl))
            }
            Target::Erofs(number, part) => {
                let (view, opened) = self.view(number, Node::erofs(number, part))?;
                Ok((
                    Attr::of_erofs(&view, part, &opened, mtime),
                    self.config().content_ttl,
                ))
            }
            Target::Root(number) => {
                let (view, opened) = self.view(number, Node::ROOT)?;
                let root = opened
                    .index(&self.outside)
                    .root()
                    .map_err(|error| view.error(error))?;
                Ok((Attr::of_inode(&view, &root)?, self.config().content_ttl))
            }
        }
    }

    /// Attributes of a node that is ours.
    pub(super) fn control_attr(&self, control: &Control, number: u64) -> Result<Attr> {
        let this = Node::control(number);
        let Some(node) = control.node(number) else {
            let (page, made) = self.list_as_seen(number).ok_or(Error::Stale(this))?;
            let len = page.len() as u64;
            return Ok(Attr::ours(this, FileType::File, 0o444, len, made));
        };
        Ok(match &node.kind {
            Kind::Dir(children) => {
                let dirs = children
                    .iter()
                    .filter(|child| kind_of(control, child) == FileType::Dir)
                    .count();
                let nlink = u32::try_from(dirs).unwrap_or(u32::MAX - 2) + 2;
                Attr {
                    nlink,
                    ..Attr::ours(this, FileType::Dir, 0o555, 0, node.mtime)
                }
            }
            Kind::Symlink(target) => Attr::ours(
                this,
                FileType::Symlink,
                0o777,
                target.len() as u64,
                node.mtime,
            ),
            Kind::Document(digest) => {
                let document = self.document(digest)?;
                Attr::ours(
                    this,
                    FileType::File,
                    0o444,
                    document.len() as u64,
                    node.mtime,
                )
            }
            Kind::Status(page) => {
                let (page, made) = self.page(*page);
                Attr::ours(this, FileType::File, 0o444, page.len() as u64, made)
            }
            Kind::Bytes(bytes) => {
                Attr::ours(this, FileType::File, 0o444, bytes.len() as u64, node.mtime)
            }
            Kind::Page(page) => {
                let (page, made) = self.list(control, number, *page, node.mtime)?;
                Attr::ours(this, FileType::File, 0o444, page.len() as u64, made)
            }
        })
    }

    /// The content of a control file.
    pub(super) fn control_content(&self, number: u64) -> Result<Arc<[u8]>> {
        let control = self.control();
        let this = Node::control(number);
        let Some(node) = control.node(number) else {
            let seen = self.list_as_seen(number).ok_or(Error::Stale(this))?;
            return Ok(seen.0);
        };
        match &node.kind {
            Kind::Document(digest) => self.document(digest),
            Kind::Status(page) => Ok(self.page_as_seen(*page)),
            Kind::Bytes(bytes) => Ok(Arc::from(&bytes[..])),
            Kind::Page(page) => Ok(self.list(&control, number, *page, node.mtime)?.0),
            Kind::Dir(_) => Err(Error::IsDir(this)),
            Kind::Symlink(_) => Err(Error::WrongType(this)),
        }
    }

    /// The target of a control symlink.
    pub(super) fn control_link(&self, number: u64) -> Result<Vec<u8>> {
        let control = self.control();
        let this = Node::control(number);
        match &control.node(number).ok_or(Error::Stale(this))?.kind {
            Kind::Symlink(target) => Ok(target.clone().into_bytes()),
            _ => Err(Error::WrongType(this)),
        }
    }

    /// A manifest or config, checked against its digest.
    fn document(&self, digest: &Digest) -> Result<Arc<[u8]>> {
        if let Some(known) = self.documents.lock().get(digest) {
            return Ok(Arc::clone(known));
        }
        let document = self.fetch_document(digest)?;
        self.documents.lock().put(*digest, Arc::clone(&document));
        Ok(document)
    }

    /// The same, past what is remembered.
    pub(super) fn fetch_document(&self, digest: &Digest) -> Result<Arc<[u8]>> {
        let budget = crate::budget::Budget::current();
        if budget.quick {
            // Metad is asked over a connection that may be slow.
            return Err(Error::Later);
        }
        let document = self
            .outside
            .catalogue
            .document(digest, budget.deadline)
            .map_err(|source| Error::Document {
                digest: *digest,
                source,
            })?;
        if Digest::of(&document) != *digest {
            return Err(Error::WrongDocument(*digest));
        }
        Ok(document)
    }
}

fn kind_of(control: &Control, child: &Child) -> FileType {
    match child.target {
        Target::Root(_) => FileType::Dir,
        Target::Erofs(..) => FileType::File,
        Target::Control(number) => control.file_type(number),
    }
}
