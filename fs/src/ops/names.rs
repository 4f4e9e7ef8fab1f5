//! Names in directories: LOOKUP, READDIR, READDIRPLUS, FORGET.

use std::{ops::ControlFlow, time::Duration};

use harbour_image::index::{FileType, Nid};

use super::Fs;
use crate::{
    attr::Attr,
    error::{Error, Result},
    inode::{Node, Place},
    view::View,
};

/// Longest name in bytes.
const NAME_MAX: usize = 255;
/// Position behind `.`; the start is 0.
const AFTER_DOT: u64 = 1;
/// Position behind `..`; positions of the index are higher.
const AFTER_DOT_DOT: u64 = 2;

/// Answer to a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The node, or `None` when it is certain that there is none for [`Found::entry_ttl`].
    pub attr: Option<Attr>,
    /// How long the name means this.
    pub entry_ttl: Duration,
    /// How long the attributes stay true.
    pub attr_ttl: Duration,
}

/// One name of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The node.
    pub node: Node,
    /// Its type.
    pub kind: FileType,
    /// Where to go on behind it.
    pub next: u64,
    /// Attributes with their lifetime, in a listing that asked for them.
    pub attr: Option<(Attr, Duration)>,
}

/// Takes entries; says whether the entry was taken and there may be room for another.
pub(super) type Emit<'a> = dyn FnMut(&Entry<'_>) -> bool + 'a;

impl Fs {
    /// The node called `name` in `parent`. The kernel's count of it grows: it comes back with
    /// [`Self::forget`].
    pub fn lookup(&self, parent: Node, name: &[u8]) -> Result<Found> {
        if name.len() > NAME_MAX {
            return Err(Error::NameTooLong(name.len()));
        }
        let found = match parent.place() {
            Place::Control(number) => self.control_lookup(number, name)?,
            Place::Erofs(..) => return Err(Error::NotDir(parent)),
            Place::View { number, nid } => self.view_lookup(parent, number, Nid(nid), name)?,
        };
        if let Some(attr) = &found.attr {
            self.given(attr.node);
        }
        Ok(found)
    }

    fn view_lookup(&self, parent: Node, number: u32, nid: Nid, name: &[u8]) -> Result<Found> {
        let (view, opened) = self.view(number, parent)?;
        if name == b".." && nid == opened.root {
            return self.view_parent(number, parent);
        }
        let index = opened.index(&self.outside);
        let fail = |error| view.error(error);
        let dir = index.inode(nid).map_err(fail)?;
        if dir.file_type != FileType::Dir {
            return Err(Error::NotDir(parent));
        }
        let ttl = self.config().content_ttl;
        let attr = match index.lookup(&dir, name).map_err(fail)? {
            Some((child, _)) => Some(Attr::of_inode(&view, &index.inode(child).map_err(fail)?)?),
            None => None,
        };
        Ok(Found {
            attr,
            entry_ttl: ttl,
            attr_ttl: ttl,
        })
    }

    /// The directory that shows the root of a view.
    fn view_parent(&self, number: u32, node: Node) -> Result<Found> {
        let control = self.control();
        let home = control.home(number).ok_or(Error::Stale(node))?;
        let attr = self.control_attr(&control, home)?;
        Ok(Found {
            attr: Some(attr),
            entry_ttl: self.control_ttl(),
            attr_ttl: self.control_ttl(),
        })
    }

    /// Takes back `count` of the times that the kernel was given `node`.
    pub fn forget(&self, node: Node, count: u64) {
        match node.place() {
            Place::Control(_) => {}
            Place::Erofs(number, _) | Place::View { number, .. } => {
                self.views.forget(number, count)
            }
        }
    }

    /// Lists `dir` from position `from` (0, or [`Entry::next`] of an entry), `.` and `..` first.
    /// With `plus`, entries carry attributes, and those that `emit` takes count as given to the
    /// kernel. An error after the first entry ends the listing instead: the next call meets it.
    pub fn readdir(
        &self,
        dir: Node,
        from: u64,
        plus: bool,
        emit: &mut dyn FnMut(&Entry<'_>) -> bool,
    ) -> Result<()> {
        let mut taken = false;
        let mut counted = |entry: &Entry<'_>| {
            let more = emit(entry);
            taken |= more;
            if more && plus && entry.attr.is_some() && !matches!(entry.name, b"." | b"..") {
                self.given(entry.node);
            }
            more
        };
        let result = match dir.place() {
            Place::Control(number) => self.control_readdir(number, from, plus, &mut counted),
            Place::Erofs(..) => Err(Error::NotDir(dir)),
            Place::View { number, nid } => {
                self.view_readdir(dir, number, Nid(nid), from, plus, &mut counted)
            }
        };
        if taken { Ok(()) } else { result }
    }

    fn view_readdir(
        &self,
        node: Node,
        number: u32,
        nid: Nid,
        from: u64,
        plus: bool,
        emit: &mut Emit<'_>,
    ) -> Result<()> {
        let (view, opened) = self.view(number, node)?;
        let index = opened.index(&self.outside);
        let fail = |error| view.error(error);
        let dir = index.inode(nid).map_err(fail)?;
        if dir.file_type != FileType::Dir {
            return Err(Error::NotDir(node));
        }
        let ttl = self.config().content_ttl;
        if from < AFTER_DOT_DOT {
            let up = if nid == opened.root {
                self.control()
                    .home(number)
                    .map_or(Node::ROOT, Node::control)
            } else {
                let up = index.lookup(&dir, b"..").map_err(fail)?;
                up.map_or(Ok(node), |(nid, _)| view.node(nid))?
            };
            let own = Attr::of_inode(&view, &dir)?;
            if !emit_dots(own, Attr { node: up, ..own }, ttl, from, plus, emit) {
                return Ok(());
            }
        }
        let cookie = if from <= AFTER_DOT_DOT { 0 } else { from };
        let mut failure = None;
        let visit = |entry: harbour_image::index::DirEntry<'_>| {
            let result = view.node(entry.nid).and_then(|node| {
                let attr = match plus {
                    true => {
                        let inode = index.inode(entry.nid).map_err(fail)?;
                        Some((Attr::of_inode(&view, &inode)?, ttl))
                    }
                    false => None,
                };
                let entry = Entry {
                    name: entry.name,
                    node,
                    kind: entry.file_type,
                    next: entry.next_cookie,
                    attr,
                };
                Ok(emit(&entry))
            });
            match result {
                Ok(true) => ControlFlow::Continue(()),
                Ok(false) => ControlFlow::Break(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        index.readdir(&dir, cookie, visit).map_err(fail)?;
        failure.map_or(Ok(()), Err)
    }

    /// Counts a node as given to the kernel.
    fn given(&self, node: Node) {
        if let Place::Erofs(number, _) | Place::View { number, .. } = node.place()
            && let Some(view) = self.views.get(number)
        {
            View::given(&view);
        }
    }
}

/// `.` and `..`, as far as `from` has not passed them; `false` when there is no room for them.
pub(super) fn emit_dots(
    own: Attr,
    parent: Attr,
    ttl: Duration,
    from: u64,
    plus: bool,
    emit: &mut Emit<'_>,
) -> bool {
    let dots = [(&b"."[..], own, AFTER_DOT), (b"..", parent, AFTER_DOT_DOT)];
    dots.into_iter()
        .filter(|(.., next)| *next > from)
        .all(|(name, attr, next)| {
            let plus = plus.then_some((attr, ttl));
            emit(&Entry {
                name,
                node: attr.node,
                kind: FileType::Dir,
                next,
                attr: plus,
            })
        })
}
