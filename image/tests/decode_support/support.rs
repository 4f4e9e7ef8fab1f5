//! What the decode tests share: tars made byte by byte, and trees as lines of text.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, fmt::Write as _};

use harbour_image::{
    decode::{
        Compression, DecodeError, DecodeOptions, Decoded, MemorySink, Remedy, check::check_tree,
        decode_layer,
    },
    digest::Digest,
    tree::{Kind, NodeId, Tree},
};

pub const BLOCK: usize = 512;

/// Fields of one header; the checksum is right whatever they hold.
#[derive(Clone)]
pub struct Head<'a> {
    pub name: &'a [u8],
    pub prefix: &'a [u8],
    pub flag: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub mtime: u64,
    pub link: &'a [u8],
    /// Magic and version.
    pub magic: &'a [u8; 8],
    pub device: (u32, u32),
    /// Raw bytes put over the finished header at an offset, before the checksum.
    pub patches: Vec<(usize, Vec<u8>)>,
}

pub const USTAR: &[u8; 8] = b"ustar\x0000";
pub const GNU: &[u8; 8] = b"ustar  \0";
pub const V7: &[u8; 8] = &[0; 8];

impl Default for Head<'_> {
    fn default() -> Self {
        Self {
            name: b"f",
            prefix: b"",
            flag: b'0',
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            link: b"",
            magic: USTAR,
            device: (0, 0),
            patches: Vec::new(),
        }
    }
}

impl Head<'_> {
    pub fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, self.name);
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.uid).as_bytes());
        put(116, format!("{:07o}\0", self.gid).as_bytes());
        put(124, format!("{:011o}\0", self.size).as_bytes());
        put(136, format!("{:011o}\0", self.mtime).as_bytes());
        put(156, &[self.flag]);
        put(157, self.link);
        put(257, self.magic);
        put(329, format!("{:07o}\0", self.device.0).as_bytes());
        put(337, format!("{:07o}\0", self.device.1).as_bytes());
        if !self.prefix.is_empty() {
            put(345, self.prefix);
        }
        for (at, bytes) in &self.patches {
            put(*at, bytes);
        }
        seal(&mut block);
        block
    }
}

/// Writes the checksum of a header.
pub fn seal(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A tar under construction.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn head(mut self, head: Head<'_>) -> Self {
        self.0.extend(head.block());
        self
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Data, filled up to whole blocks.
    pub fn data(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    pub fn with_data(self, head: Head<'_>, data: &[u8]) -> Self {
        self.head(Head {
            size: data.len() as u64,
            ..head
        })
        .data(data)
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.with_data(
            Head {
                name: name.as_bytes(),
                ..Head::default()
            },
            data,
        )
    }

    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.head(Head {
            name: name.as_bytes(),
            flag: b'5',
            mode,
            ..Head::default()
        })
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.head(Head {
            name,
            link,
            flag: b'2',
            mode: 0o777,
            ..Head::default()
        })
    }

    pub fn hard(self, name: &str, target: &str) -> Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.head(Head {
            name,
            link,
            flag: b'1',
            ..Head::default()
        })
    }

    /// A PAX header with these records; flag `x` or `g`.
    pub fn pax(self, flag: u8, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        self.with_data(
            Head {
                name: b"pax",
                flag,
                ..Head::default()
            },
            &data,
        )
    }

    /// A GNU long name (`L`) or link target (`K`).
    pub fn long(self, flag: u8, name: &[u8]) -> Self {
        let data = [name, b"\0"].concat();
        self.with_data(
            Head {
                name: b"././@LongLink",
                flag,
                magic: GNU,
                ..Head::default()
            },
            &data,
        )
    }

    /// The end-of-archive blocks.
    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 2 * BLOCK]);
        self.0
    }
}

/// One PAX record with its own length in front.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [
        len.to_string().as_bytes(),
        b" ",
        key.as_bytes(),
        b"=",
        value,
        b"\n",
    ]
    .concat()
}

pub fn options(compression: Compression) -> DecodeOptions {
    DecodeOptions {
        label: "test".to_owned(),
        compression,
        ..DecodeOptions::default()
    }
}

/// Decodes a plain tar and checks what every result promises.
pub fn decode(tar: &[u8]) -> Result<(Decoded, MemorySink), DecodeError> {
    decode_with(tar, &options(Compression::None))
}

pub fn decode_with(
    blob: &[u8],
    options: &DecodeOptions,
) -> Result<(Decoded, MemorySink), DecodeError> {
    let mut sink = MemorySink::new();
    let decoded = decode_layer(blob, options, &mut sink)?;
    check_tree(&decoded.tree, |key| sink.object(key).map(<[u8]>::len)).unwrap();
    assert_eq!(decoded.stats.blob_bytes, blob.len() as u64);
    if options.compression == Compression::None {
        assert_eq!(decoded.diff_id, Digest::of(blob));
    }
    Ok((decoded, sink))
}

/// Decodes a plain tar that must be refused, and checks the message.
#[track_caller]
pub fn refuse(tar: &[u8], remedy: Remedy, message: &str) {
    refuse_with(tar, &options(Compression::None), remedy, message);
}

#[track_caller]
pub fn refuse_with(blob: &[u8], options: &DecodeOptions, remedy: Remedy, message: &str) {
    let error = decode_layer(blob, options, &mut MemorySink::new()).expect_err(message);
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("layer {}", options.label)),
        "{text}"
    );
    assert!(text.contains(message), "want {message:?}, got {text:?}");
    assert_eq!(error.remedy(), remedy, "{text}");
}

/// The lines of a tar that must be good.
pub fn lines_of(tar: &[u8]) -> Vec<String> {
    let (decoded, sink) = decode(tar).unwrap();
    lines(&decoded.tree, &sink)
}

/// Every name of the tree as a line, sorted by path:
/// `path type mode uid:gid mtime_ns details xattrs`. Names of one node share `#first-path`.
pub fn lines(tree: &Tree, sink: &MemorySink) -> Vec<String> {
    let mut names = BTreeMap::new();
    collect(tree, Tree::ROOT, &mut Vec::new(), &mut names);
    let mut first: BTreeMap<NodeId, (Vec<u8>, usize)> = BTreeMap::new();
    for (path, id) in &names {
        first.entry(*id).or_insert_with(|| (path.clone(), 0)).1 += 1;
    }
    names
        .iter()
        .map(|(path, id)| line(tree, sink, path, *id, &first[id]))
        .collect()
}

fn collect(tree: &Tree, id: NodeId, path: &mut Vec<u8>, names: &mut BTreeMap<Vec<u8>, NodeId>) {
    names.insert(
        if path.is_empty() {
            b".".to_vec()
        } else {
            path.clone()
        },
        id,
    );
    let Kind::Dir(dir) = &tree.node(id).kind else {
        return;
    };
    for (name, child) in &dir.entries {
        let len = path.len();
        if len > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        collect(tree, *child, path, names);
        path.truncate(len);
    }
}

fn line(
    tree: &Tree,
    sink: &MemorySink,
    path: &[u8],
    id: NodeId,
    first: &(Vec<u8>, usize),
) -> String {
    let node = tree.node(id);
    let meta = &node.meta;
    let (letter, details) = match &node.kind {
        Kind::Dir(dir) => {
            let mark = |is, text| if is { text } else { "" };
            (
                "d",
                mark(dir.opaque, " opaque").to_owned() + mark(dir.implied, " implied"),
            )
        }
        Kind::File(content) => {
            let bytes = sink.content(content);
            (
                "f",
                format!(" {} {}", bytes.len(), &Digest::of(&bytes).hex()[..16]),
            )
        }
        Kind::Symlink(target) => ("l", format!(" -> {}", escaped(target))),
        Kind::Char(major, minor) => ("c", format!(" {major},{minor}")),
        Kind::Block(major, minor) => ("b", format!(" {major},{minor}")),
        Kind::Fifo => ("p", String::new()),
        Kind::Socket => ("s", String::new()),
        Kind::Whiteout => return format!("{} whiteout", escaped(path)),
    };
    let time = i128::from(meta.mtime.secs) * 1_000_000_000 + i128::from(meta.mtime.nanos);
    let mut text = format!(
        "{} {letter} {:o} {}:{} {time}{details}",
        escaped(path),
        meta.mode,
        meta.uid,
        meta.gid
    );
    for (name, value) in &meta.xattrs {
        write!(text, " {}={}", escaped(name), escaped(value)).unwrap();
    }
    if first.1 > 1 {
        write!(text, " #{}", escaped(&first.0)).unwrap();
    }
    text
}

/// Printable ASCII as it is, all else as `\xNN`.
pub fn escaped(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        match byte {
            b'!'..=b'~' if *byte != b'\\' => text.push(char::from(*byte)),
            _ => write!(text, "\\x{byte:02x}").unwrap(),
        }
        text
    })
}

/// What `lines` says of a file's content.
pub fn content(bytes: &[u8]) -> String {
    format!("{} {}", bytes.len(), &Digest::of(bytes).hex()[..16])
}
