//! A path through the layer's own tree, symbolic links followed as inside a chroot, except that
//! `..` at the root is an error instead of nothing.

use std::borrow::Cow;

use super::{
    error::{DecodeErrorKind as Kind, printable},
    path::check_component,
};
use crate::tree::{NodeId, Tree};

/// Most symbolic links followed for one path, as in Linux (`MAXSYMLINKS`).
const SYMLINKS_MAX: usize = 40;

/// Deepest directory: as deep as a path of 4096 bytes can name. Links could lead deeper, and
/// whoever walks the tree later should not have to fear for its stack.
const DEPTH_MAX: usize = 2048;

/// Where the way has come to and what is left of it.
pub(super) struct Walk<'a> {
    /// Directories from the one below the root to here, and where the path of each ends.
    stack: Vec<(NodeId, usize)>,
    /// Path from the root to here.
    path: Vec<u8>,
    rest: Cow<'a, [u8]>,
    /// Bytes of `rest` gone.
    at: usize,
    links: usize,
    /// Last link followed and its target: to blame when the way leaves the tree.
    last_link: (Vec<u8>, Box<[u8]>),
}

impl<'a> Walk<'a> {
    pub(super) fn new(path: &'a [u8]) -> Self {
        Self {
            stack: Vec::new(),
            path: Vec::new(),
            rest: Cow::Borrowed(path),
            at: 0,
            links: 0,
            last_link: Default::default(),
        }
    }

    /// The directory that the way has come to.
    pub(super) fn here(&self) -> NodeId {
        self.stack.last().map_or(Tree::ROOT, |(id, _)| *id)
    }

    /// The next name to look up in [`Walk::here`], as a range of the rest; nothing at the end.
    pub(super) fn next_name(&mut self) -> Result<Option<Name>, Kind> {
        while self.at < self.rest.len() {
            let rest = &self.rest[self.at..];
            let len = rest
                .iter()
                .position(|byte| *byte == b'/')
                .unwrap_or(rest.len());
            let (from, until) = (self.at, self.at + len);
            self.at = (until + 1).min(self.rest.len());
            match &self.rest[from..until] {
                b"" | b"." => {}
                b".." => self.up()?,
                component => {
                    // The entry's own components were checked; this one is of a link's target.
                    let what = "symbolic link in the path";
                    check_component(component).map_err(|reason| Kind::Name { what, reason })?;
                    return Ok(Some(Name { from, until }));
                }
            }
        }
        Ok(None)
    }

    /// The bytes of `name`, which this walk has just given.
    pub(super) fn bytes(&self, name: Name) -> &[u8] {
        &self.rest[name.from..name.until]
    }

    /// Enters the directory `id`, found under `name`.
    pub(super) fn down(&mut self, name: Name, id: NodeId) -> Result<(), Kind> {
        if self.stack.len() == DEPTH_MAX {
            return Err(Kind::TooDeep { max: DEPTH_MAX });
        }
        self.path.push(b'/');
        self.path
            .extend_from_slice(&self.rest[name.from..name.until]);
        self.stack.push((id, self.path.len()));
        Ok(())
    }

    /// Goes on along `target`, the target of the symbolic link `name`.
    pub(super) fn follow(&mut self, name: Name, target: &[u8]) -> Result<(), Kind> {
        let link = self.path_of(name);
        self.links += 1;
        if self.links > SYMLINKS_MAX {
            return Err(Kind::SymlinkLoop {
                link: printable(&link),
            });
        }
        if target.starts_with(b"/") {
            self.stack.clear();
            self.path.clear();
        }
        self.rest = Cow::Owned([target, b"/", &self.rest[self.at..]].concat());
        self.at = 0;
        self.last_link = (link, target.into());
        Ok(())
    }

    /// The error for `name` being no directory.
    pub(super) fn not_a_directory(&self, name: Name) -> Kind {
        Kind::ParentNotDirectory {
            parent: printable(&self.path_of(name)),
        }
    }

    fn path_of(&self, name: Name) -> Vec<u8> {
        let path = [&self.path, &b"/"[..], self.bytes(name)].concat();
        path[1..].to_vec()
    }

    fn up(&mut self) -> Result<(), Kind> {
        if self.stack.pop().is_none() {
            let (link, target) = &self.last_link;
            return Err(Kind::SymlinkEscapes {
                link: printable(link),
                target: printable(target),
            });
        }
        self.path
            .truncate(self.stack.last().map_or(0, |(_, end)| *end));
        Ok(())
    }
}

/// A component: a part of the walk's rest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    from: usize,
    until: usize,
}
