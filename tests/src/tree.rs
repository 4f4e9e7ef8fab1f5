//! An exact comparison of two directory trees: every name, type, mode, owner, time, size, link
//! count, link target, extended attribute, device number, hard-link group and byte.
//!
//! A tree is scanned once ([`Tree::scan`]) and can then be compared with several others. What two
//! honest trees may differ in is said by [`Rules`]; nothing is left out that they do not name.

mod content;
mod scan;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use anyhow::Result;

/// A path inside a tree: bytes, no leading slash, empty for the root.
pub type Name = Vec<u8>;

/// A directory tree as it was found.
#[derive(Debug)]
pub struct Tree {
    /// Where it was found.
    pub root: PathBuf,
    /// Everything in it, the root included.
    pub entries: BTreeMap<Name, Entry>,
    /// What is wrong in itself, without another tree beside it: a name listed twice, a `d_type`
    /// that `lstat` contradicts.
    pub faults: Vec<Difference>,
}

/// One name and what `lstat`, `readlink` and `listxattr` say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `S_IFMT` and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds of the last modification.
    pub mtime: (i64, u32),
    /// Length in bytes; of a directory whatever the file system likes.
    pub size: u64,
    /// Link count as `lstat` gives it.
    pub nlink: u64,
    /// Names of the same inode seen in this tree.
    pub names: u64,
    /// First name, by bytes, of the same inode, when it has several names.
    pub group: Option<Name>,
    /// Device number, major and minor; (0, 0) for what is no device.
    pub device: (u32, u32),
    /// A symbolic link's target.
    pub target: Option<Vec<u8>>,
    /// All extended attributes by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// How link counts of files are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// As `lstat` gives them.
    Exact,
    /// By the names seen: a kernel overlay keeps telling the lower file's count after a layer
    /// above took one of its names away.
    Names,
}

/// What the comparison may overlook.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Link counts of files.
    pub links: Links,
    /// Whether link counts of directories must agree; overlayfs answers 1 for merged ones.
    pub dir_links: bool,
    /// Extended attributes left out, by full name.
    pub ignored_xattrs: BTreeSet<Vec<u8>>,
    /// Directories whose mode, owner, time and attributes are left out: those that no entry of
    /// a layer named.
    pub loose_dirs: BTreeSet<Name>,
    /// Whether bytes are compared.
    pub content: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            links: Links::Exact,
            dir_links: true,
            ignored_xattrs: BTreeSet::new(),
            loose_dirs: BTreeSet::new(),
            content: true,
        }
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub name: Name,
    /// What, with both sides' values.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}: {}", self.name.escape_ascii(), self.what)
    }
}

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Report {
    /// All differences, by name.
    pub differences: Vec<Difference>,
    /// Names compared.
    pub entries: usize,
    /// Bytes of file content compared.
    pub bytes: u64,
}

impl Report {
    /// An error that shows the first `shown` differences, or nothing when there are none.
    pub fn into_result(self, what: &str, shown: usize) -> Result<Self> {
        if self.differences.is_empty() {
            return Ok(self);
        }
        let list: Vec<String> = self
            .differences
            .iter()
            .take(shown)
            .map(|d| format!("  {d}"))
            .collect();
        anyhow::bail!(
            "{what}: {} differences in {} names:\n{}",
            self.differences.len(),
            self.entries,
            list.join("\n")
        )
    }
}

impl Tree {
    /// Walks `root` without following a link.
    pub fn scan(root: &Path) -> Result<Self> {
        scan::scan(root)
    }

    /// Without complaints about names that are listed and cannot be found: overlayfs does that
    /// for a whiteout in a directory that no lower layer has.
    pub fn without_ghosts(mut self) -> Self {
        self.faults.retain(|f| f.what != GHOST);
        self
    }

    /// Compares with `other`; messages call this tree the first and `other` the second.
    pub fn compare(&self, other: &Self, rules: &Rules) -> Result<Report> {
        let mut report = Report {
            differences: [&self.faults[..], &other.faults[..]].concat(),
            ..Report::default()
        };
        let mut files = Vec::new();
        for (name, a) in &self.entries {
            report.entries += 1;
            let Some(b) = other.entries.get(name) else {
                report.push(name, format!("only in {}", self.root.display()));
                continue;
            };
            for what in a.differs(b, rules.loose_dirs.contains(name), rules) {
                report.push(name, what);
            }
            let is_first_name = a.group.as_ref().is_none_or(|first| first == name);
            if rules.content
                && is_first_name
                && a.kind() == S_IFREG
                && b.kind() == S_IFREG
                && a.size == b.size
            {
                files.push((name.as_slice(), a.size));
            }
        }
        for name in other
            .entries
            .keys()
            .filter(|n| !self.entries.contains_key(*n))
        {
            report.entries += 1;
            report.push(name, format!("only in {}", other.root.display()));
        }
        report.bytes = files.iter().map(|f| f.1).sum();
        report
            .differences
            .extend(content::compare(&self.root, &other.root, &files)?);
        report.differences.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(report)
    }
}

impl Report {
    fn push(&mut self, name: &[u8], what: String) {
        self.differences.push(Difference {
            name: name.to_vec(),
            what,
        });
    }
}

const GHOST: &str = "listed, but lstat finds nothing";
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;

impl Entry {
    /// The type: `mode` without permissions.
    pub fn kind(&self) -> u32 {
        self.mode & S_IFMT
    }

    fn differs(&self, other: &Self, loose: bool, rules: &Rules) -> Vec<String> {
        let mut found = Differs::default();
        if self.kind() != other.kind() {
            found.check("type", &kind_name(self.mode), &kind_name(other.mode));
            return found.0;
        }
        let is_dir = self.kind() == S_IFDIR;
        if !(loose && is_dir) {
            found.check("mode", &Octal(self.mode), &Octal(other.mode));
            found.check("uid", &self.uid, &other.uid);
            found.check("gid", &self.gid, &other.gid);
            found.check("mtime", &self.mtime, &other.mtime);
            self.differs_in_xattrs(other, rules, &mut found);
        }
        if !is_dir {
            found.check("size", &self.size, &other.size);
            found.check("hard-link group", &Shown(&self.group), &Shown(&other.group));
        }
        match (is_dir, rules.links) {
            (true, _) if !rules.dir_links => {}
            (false, Links::Names) => found.check("names", &self.names, &other.names),
            _ => found.check("nlink", &self.nlink, &other.nlink),
        }
        found.check("device", &self.device, &other.device);
        found.check("target", &Shown(&self.target), &Shown(&other.target));
        found.0
    }

    fn differs_in_xattrs(&self, other: &Self, rules: &Rules, found: &mut Differs) {
        let keys: BTreeSet<_> = self.xattrs.keys().chain(other.xattrs.keys()).collect();
        for key in keys
            .into_iter()
            .filter(|k| !rules.ignored_xattrs.contains(*k))
        {
            let (a, b) = (
                self.xattrs.get(key).cloned(),
                other.xattrs.get(key).cloned(),
            );
            found.check(
                &format!("xattr {}", key.escape_ascii()),
                &Shown(&a),
                &Shown(&b),
            );
        }
    }
}

#[derive(Default)]
struct Differs(Vec<String>);

impl Differs {
    fn check<T: PartialEq + fmt::Debug>(&mut self, what: &str, a: &T, b: &T) {
        if a != b {
            self.0.push(format!("{what} {a:?} against {b:?}"));
        }
    }
}

#[derive(PartialEq)]
struct Octal(u32);

impl fmt::Debug for Octal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#o}", self.0)
    }
}

#[derive(PartialEq)]
struct Shown<'a>(&'a Option<Vec<u8>>);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(bytes) if bytes.len() > 80 => write!(
                f,
                "\"{}…\" ({} bytes)",
                bytes[..80].escape_ascii(),
                bytes.len()
            ),
            Some(bytes) => write!(f, "\"{}\"", bytes.escape_ascii()),
        }
    }
}

fn kind_name(mode: u32) -> &'static str {
    match mode & S_IFMT {
        S_IFREG => "file",
        S_IFDIR => "directory",
        0o120_000 => "symbolic link",
        0o020_000 => "character device",
        0o060_000 => "block device",
        0o010_000 => "fifo",
        0o140_000 => "socket",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests;
