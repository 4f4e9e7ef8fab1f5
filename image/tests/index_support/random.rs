//! Random trees and layers, as lists of steps that shrink well.

use harbour_image::tree::{Content, Dir, Kind, Meta, NodeId, Run, Time, Tree};
use proptest::{collection::vec, prelude::*, sample::select};

use super::{Builder, noise};

/// One entry of a layer, in the order of its stream.
#[derive(Clone, Debug)]
pub struct Step {
    /// Components, as places in [`NAMES`].
    pub path: Vec<usize>,
    pub what: What,
    pub meta: MetaSeed,
}

#[derive(Clone, Debug)]
pub enum What {
    Dir {
        opaque: bool,
    },
    /// Blocks: whether there is content, and bytes beyond the last whole one.
    File {
        blocks: Vec<bool>,
        tail: usize,
        seed: u64,
    },
    /// A further name for the n-th node that is not a directory.
    Link(usize),
    Symlink(usize),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
    Whiteout,
}

#[derive(Clone, Debug)]
pub struct MetaSeed {
    mode: u16,
    uid: u32,
    secs: i64,
    nanos: u32,
    xattrs: u8,
}

/// Few names, so that paths meet; odd ones, so that order and lengths are tried.
pub const NAMES: [&[u8]; 10] = [
    b"a",
    b"b",
    b"etc",
    b"!",
    b"...",
    b".-",
    b"\xff\xfe\x01",
    b" ",
    &[b'n'; 255],
    b"a\xcc\x81",
];

pub fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    vec(step(), 0..most)
}

fn step() -> impl Strategy<Value = Step> {
    (vec(0..NAMES.len(), 1..5), what(), meta()).prop_map(|(path, what, meta)| Step {
        path,
        what,
        meta,
    })
}

fn what() -> impl Strategy<Value = What> {
    let file = (
        vec(any::<bool>(), 0..6),
        select(vec![0, 1, 4095, 17]),
        0..8u64,
    );
    prop_oneof![
        4 => prop::bool::weighted(0.2).prop_map(|opaque| What::Dir { opaque }),
        6 => file.prop_map(|(blocks, tail, seed)| What::File { blocks, tail, seed }),
        2 => any::<usize>().prop_map(What::Link),
        2 => select(vec![1, 59, 60, 3900, 3969, 4032, 4095]).prop_map(What::Symlink),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|(major, minor)| What::Char(major, minor)),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|(major, minor)| What::Block(major, minor)),
        1 => Just(What::Fifo),
        1 => Just(What::Socket),
        2 => Just(What::Whiteout),
    ]
}

fn meta() -> impl Strategy<Value = MetaSeed> {
    let secs = select(vec![0, 1, -1, -86_400 * 3650, 1_700_000_000, 5_000_000_000]);
    (
        0..0o10000u16,
        select(vec![0, 1000, 65_536, u32::MAX - 3]),
        secs,
        0..1_000_000_000u32,
        0..32u8,
    )
        .prop_map(|(mode, uid, secs, nanos, xattrs)| MetaSeed {
            mode,
            uid,
            secs,
            nanos,
            xattrs,
        })
}

/// A tree from steps: later ones replace earlier ones, directories on the way are implied.
pub fn build(steps: &[Step]) -> Builder {
    let mut builder = Builder::default();
    for step in steps {
        apply(&mut builder, step);
    }
    builder
}

/// Turns directories that are implied into ones that entries named.
pub fn name_all_dirs(builder: &mut Builder) {
    for node in &mut builder.tree.nodes {
        if let Kind::Dir(dir) = &mut node.kind {
            dir.implied = false;
        }
    }
}

fn apply(builder: &mut Builder, step: &Step) {
    let Some((last, way)) = step.path.split_last() else {
        return;
    };
    let mut parent = Tree::ROOT;
    for name in way {
        let dir = builder.dir_mut(parent);
        match dir.entries.get(NAMES[*name]).copied() {
            Some(id) if matches!(builder.tree.node(id).kind, Kind::Dir(_)) => parent = id,
            Some(_) => return,
            None => {
                let dir = Dir {
                    implied: true,
                    ..Dir::default()
                };
                parent = builder.add(parent, NAMES[*name], super::meta(0o755), Kind::Dir(dir));
            }
        }
    }
    let name = NAMES[*last];
    let there = builder.dir_mut(parent).entries.get(name).copied();
    let meta = |is_plain| meta_of(&step.meta, is_plain);
    match &step.what {
        What::Dir { opaque } => {
            if let Some(id) = there.filter(|id| matches!(builder.tree.node(*id).kind, Kind::Dir(_)))
            {
                builder.tree.nodes[id.0 as usize].meta = meta(true);
                let dir = builder.dir_mut(id);
                dir.implied = false;
                dir.opaque |= *opaque;
            } else {
                builder.add(
                    parent,
                    name,
                    meta(true),
                    Kind::Dir(Dir {
                        opaque: *opaque,
                        ..Dir::default()
                    }),
                );
            }
        }
        What::File { blocks, tail, seed } => {
            let content = content(builder, blocks, *tail, *seed);
            builder.add(parent, name, meta(true), Kind::File(content));
        }
        What::Link(number) => {
            let leaves: Vec<u32> = (0..builder.tree.nodes.len() as u32)
                .filter(|id| !matches!(builder.tree.node(NodeId(*id)).kind, Kind::Dir(_)))
                .collect();
            if !leaves.is_empty() {
                builder.link(parent, name, NodeId(leaves[number % leaves.len()]));
            }
        }
        other => {
            let kind = match other {
                What::Symlink(len) => Kind::Symlink(vec![b't'; *len].into()),
                What::Char(major, minor) => Kind::Char(*major, *minor),
                What::Block(major, minor) => Kind::Block(*major, *minor),
                What::Fifo => Kind::Fifo,
                What::Socket => Kind::Socket,
                _ => Kind::Whiteout,
            };
            builder.add(parent, name, meta(false), kind);
        }
    }
}

fn content(builder: &mut Builder, blocks: &[bool], tail: usize, seed: u64) -> Content {
    let size = blocks.len() * 4096 + tail;
    let mut content = Content {
        size: size as u64,
        runs: Vec::new(),
    };
    let mut at = 0;
    for run in blocks.chunk_by(|a, b| a == b) {
        let mut len = run.len() * 4096;
        if at + len + tail == size {
            len += tail;
        }
        if run[0] {
            let object = builder.store.put(&noise(seed, len));
            content.runs.push(Run {
                offset: at as u64,
                object,
                len: len as u32,
            });
        }
        at += run.len() * 4096;
    }
    if blocks.is_empty() && tail > 0 {
        content.runs.push(Run {
            offset: 0,
            object: builder.store.put(&noise(seed, tail)),
            len: tail as u32,
        });
    }
    content
}

/// `is_plain`: a file or directory, the only kinds that may have attributes of users.
fn meta_of(seed: &MetaSeed, is_plain: bool) -> Meta {
    let mut meta = Meta {
        mode: seed.mode,
        uid: seed.uid,
        gid: seed.uid ^ 1,
        mtime: Time {
            secs: seed.secs,
            nanos: seed.nanos,
        },
        ..Meta::default()
    };
    let mut set = |name: &[u8], value: &[u8]| meta.xattrs.insert(name.into(), value.into());
    if seed.xattrs & 3 == 3 {
        set(b"trusted.note", &noise(1, usize::from(seed.xattrs)));
    }
    if seed.xattrs & 5 == 5 && is_plain {
        set(b"user.empty", b"");
        set(
            b"user.long",
            &noise(2, 3000 + usize::from(seed.xattrs) * 50),
        );
    }
    if seed.xattrs & 24 == 24 && is_plain {
        set(b"security.capability", CAPABILITY);
    }
    meta
}

/// `cap_net_raw+ep` in the kernel's second format.
pub const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
