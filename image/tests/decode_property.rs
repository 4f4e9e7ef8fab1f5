//! Random trees, written as tars by another writer, come back as they were.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use std::collections::BTreeMap;

use harbour_image::decode::Compression;
use proptest::{collection::vec, prelude::*};
use support::*;

/// A file's or a link's place in a random tree: a path of one to four short names.
type Path = Vec<u8>;

#[derive(Clone, Debug)]
enum Entry {
    Dir,
    /// Length and seed of the bytes.
    File(usize, u8),
    Symlink(Vec<u8>),
    Fifo,
    Char(u32, u32),
}

#[derive(Clone)]
struct Item {
    path: Path,
    entry: Entry,
    mode: u32,
    uid: u64,
    mtime: u64,
    xattr: Option<Vec<u8>>,
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            entry,
            mode,
            uid,
            mtime,
            xattr,
        } = self;
        write!(
            f,
            "{} {entry:?} {mode:o} {uid} {mtime} {xattr:?}",
            escaped(path)
        )
    }
}

fn component() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[a-c]".prop_map(String::into_bytes),
        1 => vec(prop_oneof![Just(0xff), Just(b'\n'), Just(b' '), b'0'..=b'9'], 1..3),
        1 => (100usize..=255, b'd'..=b'f').prop_map(|(len, byte)| vec![byte; len]),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    let entry = prop_oneof![
        3 => Just(Entry::Dir),
        4 => (prop_oneof![0usize..2000, Just(1 << 20), (1usize << 20)..(5 << 19)], any::<u8>())
            .prop_map(|(len, seed)| Entry::File(len, seed)),
        1 => vec(1u8.., 1..200).prop_map(Entry::Symlink),
        1 => Just(Entry::Fifo),
        1 => (1u32..300, 0u32..300).prop_map(|(major, minor)| Entry::Char(major, minor)),
    ];
    (
        vec(component(), 1..5).prop_map(|parts| parts.join(&b'/')),
        entry,
        0u32..=0o7777,
        prop_oneof![0u64..5000, Just(u64::from(u32::MAX) - 1)],
        0u64..(1 << 33),
        proptest::option::of(vec(any::<u8>(), 0..300)),
    )
        .prop_map(|(path, entry, mode, uid, mtime, xattr)| Item {
            path,
            entry,
            mode,
            uid,
            mtime,
            xattr,
        })
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

/// Writes the items with the `tar` crate: base-256 numbers, and what is too long for a header by
/// turns as GNU and PAX extensions. (Its own way to split names fails on some.)
fn write(items: &[Item]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, item) in items.iter().enumerate() {
        let mut pax: Vec<(&str, &[u8])> = Vec::new();
        if let Some(value) = &item.xattr {
            pax.push(("SCHILY.xattr.user.x", value));
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(item.mode);
        header.set_uid(item.uid);
        header.set_gid(1);
        header.set_mtime(item.mtime);
        let mut data = Vec::new();
        let mut target: &[u8] = b"";
        let kind = match &item.entry {
            Entry::Dir => tar::EntryType::Directory,
            Entry::File(len, seed) => {
                data = bytes(*len, *seed);
                tar::EntryType::Regular
            }
            Entry::Symlink(to) => {
                target = to;
                tar::EntryType::Symlink
            }
            Entry::Fifo => tar::EntryType::Fifo,
            Entry::Char(major, minor) => {
                header.set_device_major(*major).unwrap();
                header.set_device_minor(*minor).unwrap();
                tar::EntryType::Char
            }
        };
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        for (text, key, kind) in [(&item.path[..], "path", b'L'), (target, "linkpath", b'K')] {
            let field = match kind {
                b'L' => &mut header.as_old_mut().name,
                _ => &mut header.as_old_mut().linkname,
            };
            let fits = text.len().min(field.len());
            field[..fits].copy_from_slice(&text[..fits]);
            if fits < text.len() && number % 2 == 0 {
                pax.push((key, text));
            } else if fits < text.len() {
                let mut long = tar::Header::new_gnu();
                long.set_entry_type(tar::EntryType::new(kind));
                long.set_size(text.len() as u64);
                long.set_cksum();
                builder.append(&long, text).unwrap();
            }
        }
        builder.append_pax_extensions(pax).unwrap();
        header.set_cksum();
        builder.append(&header, &data[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// What stands at a path: how its line goes on, and whether it is a directory, and opaque.
#[derive(Clone, Default)]
struct Expected {
    line: String,
    is_dir: bool,
    opaque: bool,
    implied: bool,
}

/// What a plain extraction of the items gives.
enum Outcome {
    Lines(Vec<String>),
    /// One of them has no place, because its parent is no directory.
    Refused,
    /// One goes through a symbolic link, which this model does not follow.
    Unknown,
}

fn model(items: &[Item]) -> Outcome {
    let mut tree: BTreeMap<Path, Expected> = BTreeMap::new();
    for item in items {
        for (at, _) in item
            .path
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
        {
            let implied = Expected {
                line: "d 755 0:0 0".to_owned(),
                is_dir: true,
                implied: true,
                opaque: false,
            };
            let parent = tree.entry(item.path[..at].to_vec()).or_insert(implied);
            if parent.line.starts_with('l') {
                return Outcome::Unknown;
            }
            if !parent.is_dir {
                return Outcome::Refused;
            }
        }
        let old = tree.get(&item.path).cloned();
        let is_dir = matches!(item.entry, Entry::Dir);
        let stays_dir = is_dir && old.as_ref().is_some_and(|old| old.is_dir);
        if !stays_dir {
            let below = [&item.path[..], b"/"].concat();
            tree.retain(|path, _| !path.starts_with(&below));
        }
        let opaque = is_dir && old.is_some_and(|old| !old.is_dir || old.opaque);
        let (letter, details) = match &item.entry {
            Entry::Dir => ("d", String::new()),
            Entry::File(len, seed) => ("f", format!(" {}", content(&bytes(*len, *seed)))),
            Entry::Symlink(target) => ("l", format!(" -> {}", escaped(target))),
            Entry::Fifo => ("p", String::new()),
            Entry::Char(major, minor) => ("c", format!(" {major},{minor}")),
        };
        let opaque_mark = if opaque { " opaque" } else { "" };
        let xattr = item
            .xattr
            .as_ref()
            .map(|value| format!(" user.x={}", escaped(value)));
        let line = format!(
            "{letter} {:o} {}:1 {}{details}{opaque_mark}{}",
            if letter == "l" { 0o777 } else { item.mode },
            item.uid,
            u128::from(item.mtime) * 1_000_000_000,
            xattr.unwrap_or_default(),
        );
        tree.insert(
            item.path.clone(),
            Expected {
                line,
                is_dir,
                opaque,
                implied: false,
            },
        );
    }
    let lines = tree.into_iter().map(|(path, expected)| {
        let implied = if expected.implied { " implied" } else { "" };
        format!("{} {}{implied}", escaped(&path), expected.line)
    });
    let root = ". d 755 0:0 0 implied".to_owned();
    Outcome::Lines(std::iter::once(root).chain(lines).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_random_tree_comes_back(items in vec(item(), 0..40)) {
        let tar = write(&items);
        match model(&items) {
            Outcome::Unknown => {
                let _ = decode(&tar);
            }
            Outcome::Refused => prop_assert!(decode(&tar).is_err()),
            Outcome::Lines(want) => {
                let mut got = lines_of(&tar);
                // The root sorts before names that the model has no dot for.
                got.sort();
                let mut want = want;
                want.sort();
                prop_assert_eq!(got, want);
            }
        }
    }

    /// Whatever one byte of a good tar is changed to, decoding ends in an answer, and a tree that
    /// comes out keeps its promises (checked in `decode`).
    #[test]
    fn a_changed_byte_does_no_harm(
        items in vec(item(), 1..6),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut tar = write(&items);
        let at = at.index(tar.len());
        tar[at] = byte;
        // With a checksum that fits, so that the change is looked at.
        let start = at - at % BLOCK;
        if start + BLOCK <= tar.len() {
            let mut block: [u8; BLOCK] = tar[start..start + BLOCK].try_into().unwrap();
            if &block[257..262] == b"ustar" {
                seal(&mut block);
                tar[start..start + BLOCK].copy_from_slice(&block);
            }
        }
        let _ = decode_with(&tar, &options(Compression::None));
    }
}
