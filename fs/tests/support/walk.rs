//! Compares a view, through operations, with the tree that it was made from.

use std::collections::{BTreeMap, HashMap};

use harbour_fs::{
    Attr, Error, Fs, Node, Result,
    ops::{Entry, XattrReply},
};
use harbour_image::{
    index::FileType,
    tree::{Kind, NodeId, Tree},
};

use super::model::Model;

/// The node at `path`, from the mount's root.
pub fn find(fs: &Fs, path: &str) -> Result<Attr> {
    let mut attr = fs.patiently(|fs| fs.getattr(Node::ROOT))?.0;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        attr = fs
            .patiently(|fs| fs.lookup(attr.node, name.as_bytes()))?
            .attr
            .ok_or(Error::NotFound)?;
    }
    Ok(attr)
}

/// One listed name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub node: Node,
    pub kind: FileType,
    pub attr: Option<Attr>,
}

/// Lists a directory, at most `step` entries a call, resuming where it stopped.
pub fn list(fs: &Fs, dir: Node, plus: bool, step: usize) -> Result<Vec<(Vec<u8>, Listed)>> {
    let mut found = Vec::new();
    let mut from = 0;
    loop {
        let before = found.len();
        fs.patiently(|fs| {
            fs.readdir(dir, from, plus, &mut |entry: &Entry<'_>| {
                if found.len() - before == step {
                    return false;
                }
                from = entry.next;
                let attr = entry.attr.map(|(attr, _)| attr);
                found.push((
                    entry.name.to_vec(),
                    Listed {
                        node: entry.node,
                        kind: entry.kind,
                        attr,
                    },
                ));
                true
            })
        })?;
        if found.len() == before {
            return Ok(found);
        }
    }
}

/// Compares the view whose root is `root` with `model`, every operation on every node.
pub fn compare(fs: &Fs, root: Node, model: &Model, whiteouts: bool) {
    let mut walk = Walk {
        fs,
        model,
        names: names(&model.tree),
        seen: HashMap::new(),
        whiteouts,
    };
    walk.node(root, Tree::ROOT, "");
    assert_eq!(
        walk.seen.len(),
        walk.names.len(),
        "each node of the tree was met"
    );
}

/// Number of names of each node that can be reached.
fn names(tree: &Tree) -> HashMap<NodeId, u32> {
    let mut names = HashMap::from([(Tree::ROOT, 1)]);
    let mut todo = vec![Tree::ROOT];
    while let Some(id) = todo.pop() {
        if let Kind::Dir(dir) = &tree.node(id).kind {
            for child in dir.entries.values() {
                let count = names.entry(*child).or_insert(0);
                *count += 1;
                if *count == 1 {
                    todo.push(*child);
                }
            }
        }
    }
    names
}

struct Walk<'a> {
    fs: &'a Fs,
    model: &'a Model,
    names: HashMap<NodeId, u32>,
    seen: HashMap<NodeId, Node>,
    whiteouts: bool,
}

impl Walk<'_> {
    fn node(&mut self, node: Node, id: NodeId, path: &str) {
        if let Some(before) = self.seen.insert(id, node) {
            assert_eq!(before, node, "{path}: hard links are one node");
            return;
        }
        let fs = self.fs;
        let expected = self.model.tree.node(id);
        let (attr, _) = fs.patiently(|fs| fs.getattr(node)).unwrap();
        assert_eq!(attr.node, node, "{path}");
        assert_eq!(
            (attr.perm, attr.uid, attr.gid, attr.mtime),
            {
                let meta = &expected.meta;
                (meta.mode, meta.uid, meta.gid, meta.mtime)
            },
            "{path}"
        );
        let (kind, rdev) = kind_of(&expected.kind);
        assert_eq!((attr.kind, attr.rdev), (kind, rdev), "{path}");
        self.xattrs(node, id, path);
        match &expected.kind {
            Kind::Dir(_) => self.dir(node, id, path, &attr),
            Kind::File(content) => {
                assert_eq!(attr.size, content.size, "{path}");
                assert_eq!(attr.nlink, self.names[&id], "{path}");
                self.content(node, &self.model.contents[&id], path);
            }
            Kind::Symlink(target) => {
                assert_eq!(
                    fs.patiently(|fs| fs.readlink(node)).unwrap(),
                    &target[..],
                    "{path}"
                );
                assert_eq!(attr.size, target.len() as u64, "{path}");
            }
            _ => assert!(fs.patiently(|fs| fs.read(node, 0, 1)).is_err(), "{path}"),
        }
    }

    fn dir(&mut self, node: Node, id: NodeId, path: &str, attr: &Attr) {
        let fs = self.fs;
        let Kind::Dir(expected) = &self.model.tree.node(id).kind else {
            unreachable!()
        };
        let subdirs = expected
            .entries
            .values()
            .filter(|child| matches!(self.model.tree.node(**child).kind, Kind::Dir(_)));
        assert_eq!(attr.nlink as usize, 2 + subdirs.count(), "{path}");
        let step = 1 + (id.0 as usize * 7) % 40;
        let plain = list(fs, node, false, step).unwrap();
        let plus = list(fs, node, true, step + 1).unwrap();
        assert!(
            plain[0].0 == b"." && plain[1].0 == b".." && plain[0].1.node == node,
            "{path}"
        );
        assert_eq!(plain.len(), plus.len(), "{path}");
        let found: BTreeMap<&[u8], &Listed> = plain[2..]
            .iter()
            .map(|(name, listed)| (&name[..], listed))
            .collect();
        assert_eq!(found.len(), plain.len() - 2, "{path}: a name twice");
        let wanted: Vec<&[u8]> = expected.entries.keys().map(|name| &name[..]).collect();
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), wanted, "{path}");
        for ((name, plain), (other, plus)) in plain.iter().zip(&plus) {
            assert_eq!(
                (name, plain.node, plain.kind),
                (other, plus.node, plus.kind),
                "{path}"
            );
            let attr = plus.attr.unwrap();
            assert_eq!((attr.node, attr.kind), (plain.node, plain.kind), "{path}");
        }
        for (name, child) in &expected.entries {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            let attr = fs
                .patiently(|fs| fs.lookup(node, name))
                .unwrap()
                .attr
                .unwrap();
            let listed = found[&name[..]];
            assert_eq!((attr.node, attr.kind), (listed.node, listed.kind), "{path}");
            self.node(attr.node, *child, &path);
        }
        let none = fs
            .patiently(|fs| fs.lookup(node, b"no such name, surely"))
            .unwrap();
        assert_eq!(none.attr, None, "{path}");
        let me = fs
            .patiently(|fs| fs.lookup(node, b"."))
            .unwrap()
            .attr
            .unwrap();
        assert_eq!(me, *attr, "{path}");
    }

    fn content(&self, node: Node, expected: &[u8], path: &str) {
        let fs = self.fs;
        let read = |offset: usize, len: usize| {
            let data = fs
                .patiently(|fs| fs.read(node, offset as u64, len))
                .unwrap();
            let end = expected.len().min(offset + len);
            let want = &expected[expected.len().min(offset)..end];
            assert!(*data == *want, "{path}: {len} bytes at {offset}");
        };
        read(0, expected.len() + 10);
        read(expected.len(), 10);
        let mut offset = 1;
        for len in [1, 4096, 5000, 16384, 70_000, 1 << 20] {
            read(offset, len);
            read(offset / 4096 * 4096, len);
            offset = (offset * 7 + 4093) % (expected.len() + 1);
        }
    }

    fn xattrs(&self, node: Node, id: NodeId, path: &str) {
        let fs = self.fs;
        let expected = self.model.tree.node(id);
        let mut wanted: BTreeMap<Vec<u8>, Vec<u8>> = expected
            .meta
            .xattrs
            .iter()
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect();
        if matches!(&expected.kind, Kind::Dir(dir) if dir.opaque) {
            wanted.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            let also = fs
                .patiently(|fs| fs.getxattr(node, b"user.overlay.opaque", 10))
                .unwrap();
            assert_eq!(also, XattrReply::Value(b"y".to_vec()), "{path}");
            assert!(self.whiteouts);
        } else {
            let none = fs.patiently(|fs| fs.getxattr(node, b"user.overlay.opaque", 10));
            assert!(matches!(none, Err(Error::NoAttribute)), "{path}");
        }
        let listed = match fs.patiently(|fs| fs.listxattr(node, 65536)).unwrap() {
            XattrReply::Value(list) => list,
            XattrReply::Size(_) => panic!("a size was not asked for"),
        };
        let size = fs.patiently(|fs| fs.listxattr(node, 0)).unwrap();
        assert_eq!(size, XattrReply::Size(listed.len() as u32), "{path}");
        let mut names: Vec<&[u8]> = listed
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            wanted.keys().map(|name| &name[..]).collect::<Vec<_>>(),
            "{path}"
        );
        for (name, value) in wanted {
            let get = |size| fs.patiently(|fs| fs.getxattr(node, &name, size));
            assert_eq!(
                get(0).unwrap(),
                XattrReply::Size(value.len() as u32),
                "{path}"
            );
            if !value.is_empty() {
                assert_eq!(
                    get(value.len() as u32).unwrap(),
                    XattrReply::Value(value.clone()),
                    "{path}"
                );
                if value.len() > 1 {
                    assert!(matches!(get(1), Err(Error::SmallBuffer(_))), "{path}");
                }
            }
        }
    }
}

pub fn kind_of(kind: &Kind) -> (FileType, (u32, u32)) {
    match *kind {
        Kind::Dir(_) => (FileType::Dir, (0, 0)),
        Kind::File(_) => (FileType::File, (0, 0)),
        Kind::Symlink(_) => (FileType::Symlink, (0, 0)),
        Kind::Char(major, minor) => (FileType::Char, (major, minor)),
        Kind::Block(major, minor) => (FileType::Block, (major, minor)),
        Kind::Fifo => (FileType::Fifo, (0, 0)),
        Kind::Socket => (FileType::Socket, (0, 0)),
        Kind::Whiteout => (FileType::Char, (0, 0)),
    }
}
