//! Trees of the data sets, as lists of entries in the order of a layer.

use crate::content::{Rng, Texture};

/// One entry of a layer.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Relative path.
    pub path: String,
    /// What it is.
    pub kind: Kind,
}

/// What an entry is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Length in bytes.
        len: u64,
        /// What its content follows from.
        seed: u64,
        /// What its content is like.
        texture: Texture,
    },
    /// A symbolic link.
    Symlink(String),
}

/// Text with few incompressible blocks: deflates to about 0.4, as files of packages do.
const PACKAGE: Texture = Texture::Text { percent: 8 };

/// About `count` files of some 10 KiB on average under `small/`, in a tree as deep and as wide as
/// that of a language's library.
pub fn small_files(count: u64) -> Vec<Entry> {
    let mut out = Tree::new("small", 0x5a11);
    while out.files < count {
        out.walk_to_next_directory();
        let here = out.rng.length(9.0, 0.8).clamp(1, 120);
        for _ in 0..here {
            let len = out.rng.length(4300.0, 1.31).clamp(16, 1 << 20);
            out.file(len, PACKAGE);
        }
    }
    out.entries
}

/// `count` names under `meta/` with little behind them: a tenth directories, a seventh symbolic
/// links, half of the files empty, the others below 2 KiB.
pub fn metadata(count: u64) -> Vec<Entry> {
    let mut out = Tree::new("meta", 0x3e7a);
    while (out.entries.len() as u64) < count {
        out.walk_to_next_directory();
        for _ in 0..out.rng.length(8.0, 0.9).clamp(1, 400) {
            if out.entries.len() as u64 >= count {
                break;
            }
            match out.rng.below(100) {
                0..16 => out.symlink(),
                16..58 => out.file(0, PACKAGE),
                _ => {
                    let len = 1 + out.rng.below(2047);
                    out.file(len, PACKAGE);
                }
            }
        }
    }
    out.entries
}

/// The one large file, `big.bin`.
pub fn big_file(len: u64) -> Entry {
    Entry {
        path: "big.bin".to_owned(),
        kind: Kind::File {
            len,
            seed: 0xb16,
            texture: Texture::Random,
        },
    }
}

/// A layer of about `bytes` as package managers fill them: mostly small files, a few large
/// libraries that hold most of the bytes. `number` tells layers apart.
pub fn image_like(bytes: u64, number: u64) -> Vec<Entry> {
    let mut out = Tree::new(&format!("usr/lib/part{number}"), 0x1a7e + number);
    while out.bytes < bytes {
        out.walk_to_next_directory();
        for _ in 0..out.rng.length(9.0, 0.8).clamp(1, 120) {
            let len = match out.rng.below(1000) {
                0..10 => out.rng.length(2_200_000.0, 0.8),
                10..150 => out.rng.length(90_000.0, 0.6),
                150..180 => {
                    out.symlink();
                    continue;
                }
                _ => out.rng.length(4300.0, 1.31),
            };
            let len = len.clamp(16, 64 << 20).min(bytes.saturating_sub(out.bytes));
            if len == 0 {
                break;
            }
            out.file(len, PACKAGE);
        }
    }
    out.entries
}

/// A tree under construction, walked as a person fills it: down, along, and up again.
struct Tree {
    rng: Rng,
    entries: Vec<Entry>,
    stack: Vec<String>,
    names: u64,
    files: u64,
    bytes: u64,
}

const STEMS: [&str; 16] = [
    "core", "util", "test", "data", "lib", "include", "locale", "models", "views", "parser",
    "codec", "net", "io", "types", "plugins", "share",
];
const ENDINGS: [&str; 8] = [".py", ".pyc", ".h", ".js", ".so.1", ".txt", ".json", ""];
/// Deepest directory below the set's root.
const DEPTH_MAX: usize = 7;

impl Tree {
    fn new(root: &str, seed: u64) -> Self {
        let mut tree = Self {
            rng: Rng::new(seed),
            entries: Vec::new(),
            stack: Vec::new(),
            names: 0,
            files: 0,
            bytes: 0,
        };
        let mut path = String::new();
        for part in root.split('/') {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            tree.entries.push(Entry {
                path: path.clone(),
                kind: Kind::Dir,
            });
        }
        tree.stack.push(path);
        tree
    }

    fn name(&mut self) -> String {
        self.names += 1;
        let stem = STEMS[self.rng.below(STEMS.len() as u64) as usize];
        format!(
            "{}/{stem}_{:x}",
            self.stack.last().map_or("", String::as_str),
            self.names
        )
    }

    fn walk_to_next_directory(&mut self) {
        let depth = self.stack.len();
        if depth > DEPTH_MAX || (depth > 1 && self.rng.below(3) == 0) {
            let keep = 1 + self.rng.below(depth as u64 - 1) as usize;
            self.stack.truncate(keep);
        }
        let path = self.name();
        self.entries.push(Entry {
            path: path.clone(),
            kind: Kind::Dir,
        });
        self.stack.push(path);
    }

    fn file(&mut self, len: u64, texture: Texture) {
        let path = self.name() + ENDINGS[self.rng.below(ENDINGS.len() as u64) as usize];
        let seed = self.rng.bits();
        self.entries.push(Entry {
            path,
            kind: Kind::File { len, seed, texture },
        });
        self.files += 1;
        self.bytes += len;
    }

    fn symlink(&mut self) {
        let path = self.name();
        let target = match self.entries.last() {
            Some(entry) => entry.path.rsplit('/').next().unwrap_or(".").to_owned(),
            None => ".".to_owned(),
        };
        self.entries.push(Entry {
            path,
            kind: Kind::Symlink(target),
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::collections::HashSet;

    use super::*;

    fn well_formed(entries: &[Entry]) {
        let mut seen = HashSet::new();
        for entry in entries {
            assert!(seen.insert(entry.path.as_str()), "{} twice", entry.path);
            if let Some((parent, _)) = entry.path.rsplit_once('/') {
                assert!(seen.contains(parent), "{} before its parent", entry.path);
            }
        }
    }

    #[test]
    fn sets_have_the_shape_that_is_promised() {
        let small = small_files(20_000);
        well_formed(&small);
        let lens: Vec<u64> = small
            .iter()
            .filter_map(|e| {
                if let Kind::File { len, .. } = e.kind {
                    Some(len)
                } else {
                    None
                }
            })
            .collect();
        let mean = lens.iter().sum::<u64>() / lens.len() as u64;
        assert!(
            (20_000..20_200).contains(&lens.len()),
            "{} files",
            lens.len()
        );
        assert!((8_500..12_000).contains(&mean), "{mean} bytes on average");
        let depth = small
            .iter()
            .map(|e| e.path.matches('/').count())
            .max()
            .unwrap();
        assert!((4..=9).contains(&depth), "depth {depth}");

        let meta = metadata(50_000);
        well_formed(&meta);
        assert!(
            (50_000..50_010).contains(&meta.len()),
            "{} entries",
            meta.len()
        );
        let share =
            |f: fn(&Kind) -> bool| meta.iter().filter(|e| f(&e.kind)).count() * 100 / meta.len();
        assert!((5..20).contains(&share(|k| matches!(k, Kind::Dir))));
        assert!((8..20).contains(&share(|k| matches!(k, Kind::Symlink(_)))));

        for bytes in [1_000_000, 5_000_000, 130_000_000] {
            let layer = image_like(bytes, 3);
            well_formed(&layer);
            let sum: u64 = layer
                .iter()
                .map(|e| {
                    if let Kind::File { len, .. } = e.kind {
                        len
                    } else {
                        0
                    }
                })
                .sum();
            assert_eq!(sum, bytes);
        }
    }
}
