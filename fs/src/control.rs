//! The directories above the views, made anew from each snapshot of the catalogue.
//!
//! ```text
//! images/<registry>/<repository…>/<tag>/{rootfs/,layers/<n>,config.json,manifest.json}
//! layers/<12 hex of diff ID>/
//! erofs/<12 hex of diff ID or manifest digest>.erofs
//! .status/{status.json,views.json}
//! .devices/<12 hex of diff ID or manifest digest>.{head,bulk}
//! store/{overlay,overlay-layers,overlay-images}/
//! layerstore/<base64 of a reference>/<digest of a blob>/{diff,info,blob,use}
//! ```
//!
//! `store` and `layerstore` are what Podman and CRI-O read ([`store`]). `.devices` has each EROFS file in two parts, for a mount with `device=` (see
//! [`crate::fastview`]).
//!
//! Where names could clash:
//! - A repository may be the beginning of another (`app` and `app/web`), and a tag may have the
//!   name of that next component: the directory then is both, an image's directory with further
//!   directories in it. A component or tag named `rootfs`, `layers`, `config.json` or
//!   `manifest.json` stands with a colon behind it, as those names are an image's own. Neither
//!   components nor tags can end with a colon.
//! - Views whose names share the 12 digits: the one with the lower number has the short name, the
//!   other one four digits more, and so on. A view keeps the name it got for as long as it is shown.
//! - An image with several names has its `rootfs` at the first of them (by registry, repository
//!   and tag); at the others `rootfs` is a symlink there, as the kernel wants a directory to have
//!   one place.

mod build;
mod changes;
mod names;
mod store;

use std::{collections::HashMap, sync::Arc};

use harbour_image::{digest::Digest, index::FileType, tree::Time};

use self::store::Item;
pub(crate) use self::store::{DocumentFacts, Page, Store};
pub use self::{build::image_path, changes::Changes};
use crate::inode::{Node, Part, made};

/// One state of the directories.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// Generation of the snapshot that it shows.
    pub(crate) generation: u64,
    nodes: HashMap<u64, Arc<ControlNode>>,
    /// Numbers given to paths. Kept from state to state, so that a collision is decided once.
    numbers: HashMap<Box<str>, u64>,
    /// Names given to views, likewise.
    names: HashMap<u32, String>,
    /// Where the root of a view is shown: number of the directory.
    homes: HashMap<u32, u64>,
    /// Names of layers in the image store, kept likewise.
    links: HashMap<u32, String>,
    /// What engines' stores show.
    pub(crate) store: Arc<Store>,
    /// Directories of it whose members are made when they are looked at.
    made: HashMap<u64, MadeDir>,
}

/// A directory of an engine's store, by its number in [`Control`].
#[derive(Debug)]
struct MadeDir {
    /// Number of the directory above.
    parent: u64,
    item: Item,
    /// Tells whether what is in it changed.
    print: u64,
    mtime: Time,
}

/// One node.
#[derive(Debug)]
pub(crate) struct ControlNode {
    /// Number of the directory above; the root's is its own.
    pub(crate) parent: u64,
    pub(crate) kind: Kind,
    /// When it became what it is.
    pub(crate) mtime: Time,
}

/// What a control node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Children by cookie, which is made from the name, so that a listing under way stays right
    /// when names come and go.
    Dir(Vec<Child>),
    /// A relative target.
    Symlink(String),
    /// A manifest or config.
    Document(Digest),
    /// A page made when it is read.
    Status(Status),
    /// A small file.
    Bytes(Box<[u8]>),
    /// The list of layers or images for an engine, made when it is first looked at.
    Page(Page),
}

/// One name in a control directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) name: Box<str>,
    pub(crate) target: Target,
    /// Position behind this entry.
    pub(crate) cookie: u64,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Another control node.
    Control(u64),
    /// The root of a view.
    Root(u32),
    /// The EROFS file of a view, or a part of it.
    Erofs(u32, Part),
}

/// A page under `.status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    /// Counters and health.
    Status,
    /// Views: what they show, whether they are open and held.
    Views,
}

impl Control {
    /// The node with this number.
    pub(crate) fn node(&self, number: u64) -> Option<Arc<ControlNode>> {
        let Some((dir, member)) = made(number) else {
            return self.nodes.get(&number).map(Arc::clone);
        };
        let made = self.made.get(&dir)?;
        let kind = match member {
            0 => Kind::Dir(self.store.members(dir, made.item)),
            member => self.store.member(made.item, member)?,
        };
        let parent = if member == 0 { made.parent } else { dir };
        Some(Arc::new(ControlNode {
            parent,
            kind,
            mtime: made.mtime,
        }))
    }

    /// What kind of file the node with this number is, without making it.
    pub(crate) fn file_type(&self, number: u64) -> FileType {
        if let Some((_, member)) = made(number) {
            return store::file_type(member);
        }
        match self.nodes.get(&number).map(|node| &node.kind) {
            Some(Kind::Dir(_)) => FileType::Dir,
            Some(Kind::Symlink(_)) => FileType::Symlink,
            _ => FileType::File,
        }
    }

    /// Whether the node with this number is a page that changes with time.
    pub(crate) fn is_volatile(&self, number: u64) -> bool {
        (self.nodes.get(&number)).is_some_and(|node| matches!(node.kind, Kind::Status(_)))
    }

    /// Number of the directory that shows the root of a view.
    pub(crate) fn home(&self, view: u32) -> Option<u64> {
        self.homes.get(&view).copied()
    }

    /// The name of a view's directory or, with `.erofs`, of its file.
    pub(crate) fn name(&self, view: u32) -> Option<&str> {
        self.names.get(&view).map(String::as_str)
    }
}

impl ControlNode {
    /// Children, if it is a directory.
    pub(crate) fn children(&self) -> Option<&[Child]> {
        match &self.kind {
            Kind::Dir(children) => Some(children),
            _ => None,
        }
    }

    /// The child called `name`.
    pub(crate) fn child(&self, name: &[u8]) -> Option<&Child> {
        // Sorted by cookie; names that share one stand behind each other.
        const NEIGHBOURS: usize = 16;
        let children = self.children()?;
        let cookie = build::cookie(name);
        let start = children.partition_point(|child| child.cookie < cookie);
        children[start..]
            .iter()
            .take(NEIGHBOURS)
            .find(|child| child.name.as_bytes() == name)
    }
}

impl Target {
    /// The node, but for a view's root, whose nid only its index tells.
    pub(crate) const fn node(self) -> Option<Node> {
        match self {
            Self::Control(number) => Some(Node::control(number)),
            Self::Erofs(view, part) => Some(Node::erofs(view, part)),
            Self::Root(_) => None,
        }
    }
}
