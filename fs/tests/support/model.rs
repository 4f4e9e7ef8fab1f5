//! Trees with the bytes of their files, and their objects laid into packs.

use std::collections::HashMap;

use harbour_image::{
    index::{PackRef, Placement, ViewKind, Written, write},
    object::{OBJECT_MAX, PackId, hash_object},
    tree::{Content, Dir, Kind, Meta, Node, NodeId, ObjectKey, Run, Time, Tree},
};

/// Space between the starts of objects in a file, as the packer leaves it.
const BLOCK: u64 = 4096;

/// A tree, what its files hold, and packs with all of it.
pub struct Model {
    pub tree: Tree,
    /// Whole content of each regular file.
    pub contents: HashMap<NodeId, Vec<u8>>,
    placement: Placement,
    /// Packs that are full, by name.
    pub packs: HashMap<PackId, Vec<u8>>,
    open: Vec<u8>,
    pack_max: usize,
}

impl Model {
    /// An empty tree whose packs hold up to `pack_max` bytes (one larger object has its own).
    pub fn new(pack_max: usize) -> Self {
        Self {
            tree: Tree::new(),
            contents: HashMap::new(),
            placement: Placement::default(),
            packs: HashMap::new(),
            open: Vec::new(),
            pack_max,
        }
    }

    /// A new node called `name` in `dir`.
    pub fn add(&mut self, dir: NodeId, name: &[u8], meta: Meta, kind: Kind) -> NodeId {
        let id = NodeId(self.tree.nodes.len() as u32);
        self.tree.nodes.push(Node { meta, kind });
        self.link(dir, name, id);
        id
    }

    pub fn link(&mut self, dir: NodeId, name: &[u8], id: NodeId) {
        match &mut self.tree.nodes[dir.0 as usize].kind {
            Kind::Dir(dir) => dir.entries.insert(name.into(), id),
            other => panic!("{other:?} is no directory"),
        };
    }

    pub fn dir(&mut self, parent: NodeId, name: &[u8]) -> NodeId {
        self.add(parent, name, meta(0o755), Kind::Dir(Dir::default()))
    }

    /// A file whose 4 KiB blocks of zeros are holes when `sparse`.
    pub fn file(
        &mut self,
        dir: NodeId,
        name: &[u8],
        meta: Meta,
        content: Vec<u8>,
        sparse: bool,
    ) -> NodeId {
        let mut runs = Vec::new();
        let mut at = 0;
        while at < content.len() {
            let zero = |start: usize| {
                content[start..content.len().min(start + BLOCK as usize)]
                    .iter()
                    .all(|b| *b == 0)
            };
            if sparse && zero(at) {
                at += BLOCK as usize;
                continue;
            }
            let mut end = at;
            while end < content.len() && end - at < OBJECT_MAX && !(sparse && zero(end)) {
                end += BLOCK as usize;
            }
            let end = end.min(content.len());
            let object = self.object(&content[at..end]);
            runs.push(Run {
                offset: at as u64,
                object,
                len: (end - at) as u32,
            });
            at = end;
        }
        let size = content.len() as u64;
        let id = self.add(dir, name, meta, Kind::File(Content { size, runs }));
        self.contents.insert(id, content);
        id
    }

    fn object(&mut self, bytes: &[u8]) -> ObjectKey {
        if !self.open.is_empty() && self.open.len() + bytes.len() > self.pack_max {
            self.close_pack();
        }
        let offset = self.open.len() as u32;
        self.open.extend_from_slice(bytes);
        let pack = self.placement.packs.len() as u32;
        self.placement
            .push(&hash_object(bytes), bytes.len() as u32, pack, offset)
            .unwrap()
    }

    fn close_pack(&mut self) {
        let bytes = std::mem::take(&mut self.open);
        // The number keeps packs of equal content apart, which a test may want to lose one by one.
        let number = (self.placement.packs.len() as u64).to_le_bytes();
        let id = PackId(
            hash_object(&[&bytes[..], &number].concat()[..(bytes.len() + 8).min(OBJECT_MAX)])
                .id
                .0,
        );
        let mut name = id.0;
        name[..8].copy_from_slice(&number);
        name[8] = self.pack_max as u8;
        let id = PackId(name);
        self.placement.packs.push(PackRef {
            id,
            len: bytes.len() as u32,
        });
        self.packs.insert(id, bytes);
    }

    /// Writes the index; nothing can be added afterwards.
    pub fn write(&mut self, kind: ViewKind) -> Written {
        if !self.open.is_empty() {
            self.close_pack();
        }
        write(&self.tree, &self.placement, kind).unwrap()
    }

    /// Packs in the order they were filled.
    pub fn pack_ids(&self) -> Vec<PackId> {
        self.placement.packs.iter().map(|pack| pack.id).collect()
    }
}

pub fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        uid: 0,
        gid: 0,
        mtime: Time {
            secs: 1_700_000_000,
            nanos: 123_456_789,
        },
        ..Meta::default()
    }
}

/// Bytes that look random and differ by `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A tree with one of everything, files of awkward lengths and a large directory.
pub fn sample(kind: ViewKind, large_dir: usize) -> Model {
    let mut model = Model::new(1 << 20);
    let root = Tree::ROOT;
    let usr = model.dir(root, b"usr");
    let bin = model.dir(usr, b"bin");
    let lens = [
        0,
        1,
        4095,
        4096,
        4097,
        16383,
        16384,
        16385,
        65536,
        100_000,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 1,
        3 * (1 << 20) + 5000,
    ];
    for (seed, len) in lens.into_iter().enumerate() {
        model.file(
            bin,
            format!("f{len}").as_bytes(),
            meta(0o644),
            noise(seed as u64 + 1, len),
            false,
        );
    }
    for seed in 0..200 {
        let len = 100 + seed as usize * 97;
        model.file(
            usr,
            format!("small{seed:03}").as_bytes(),
            meta(0o600),
            noise(1000 + seed, len),
            false,
        );
    }
    let mut holes = noise(77, 300_000);
    holes[8192..150_000].fill(0);
    holes[200_000..].fill(0);
    model.file(root, b"sparse", meta(0o640), holes, true);
    model.file(root, b"all hole", meta(0o640), vec![0; 2 << 20], true);
    let hard = model.file(root, b"one name", meta(0o4755), noise(5, 5000), false);
    model.link(bin, b"another name", hard);
    model.add(
        root,
        b"link",
        meta(0o777),
        Kind::Symlink(b"usr/bin/f1"[..].into()),
    );
    model.add(
        root,
        b"long link",
        meta(0o777),
        Kind::Symlink(vec![b'x'; 4000].into()),
    );
    model.add(root, b"null", meta(0o666), Kind::Char(1, 3));
    model.add(root, b"big device", meta(0o600), Kind::Block(259, 70_000));
    model.add(root, b"fifo", meta(0o620), Kind::Fifo);
    model.add(root, b"socket", meta(0o755), Kind::Socket);
    model.add(root, b"not utf-8 \xff\xfe", meta(0o644), Kind::Fifo);
    let mut marked = meta(0o750);
    marked.uid = 1000;
    marked.gid = 100;
    marked.mtime = Time {
        secs: -5,
        nanos: 999_999_999,
    };
    marked
        .xattrs
        .insert(b"user.colour"[..].into(), b"blue"[..].into());
    marked
        .xattrs
        .insert(b"user.empty"[..].into(), b""[..].into());
    marked
        .xattrs
        .insert(b"security.capability"[..].into(), CAPABILITY.into());
    model.file(root, b"marked", marked, noise(9, 20_000), false);
    let large = model.dir(root, b"large");
    for number in 0..large_dir {
        model.add(
            large,
            format!("entry {number:06}").as_bytes(),
            meta(0o644),
            Kind::Fifo,
        );
    }
    if kind == ViewKind::Layer {
        model.add(usr, b"deleted", Meta::default(), Kind::Whiteout);
        let opaque = Dir {
            opaque: true,
            ..Dir::default()
        };
        let hidden = model.add(root, b"opaque", meta(0o755), Kind::Dir(opaque));
        model.file(hidden, b"only this", meta(0o644), b"seen".to_vec(), false);
    }
    model
}

/// `cap_net_raw=ep`, version 2, as the kernel wants it.
const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];
