//! One layer, entry by entry: what each of them does to the tree.

use super::{
    DecodeOptions, DecodeStats, Limit,
    build::Builder,
    content::Cutter,
    entry::{Entry, EntryKind, EntryReader},
    error::{DecodeErrorKind as Kind, NameFault, printable},
    path::{EntryPath, Mark, PATH_MAX, mark},
    stream::TarStream,
};
use crate::tree::{self, Content, Node, ObjectSink, Tree};

/// An error and the entry it belongs to.
pub(super) struct Fault {
    pub(super) entry: Option<String>,
    pub(super) kind: Kind,
}

impl Fault {
    pub(super) fn at(entry: &[u8], kind: Kind) -> Self {
        Self {
            entry: Some(printable(entry)),
            kind,
        }
    }
}

impl From<Kind> for Fault {
    fn from(kind: Kind) -> Self {
        Self { entry: None, kind }
    }
}

/// Reads all entries up to the end of the archive.
pub(super) fn decode_tar<S: ObjectSink>(
    tar: &mut TarStream<'_>,
    options: &DecodeOptions,
    sink: &mut S,
) -> Result<(Tree, DecodeStats), Fault> {
    let mut layer = Layer {
        options,
        sink,
        stats: DecodeStats::default(),
        builder: Builder::new(&options.limits),
        cutter: Cutter::default(),
    };
    let mut reader = EntryReader::default();
    while let Some(mut entry) = reader.next(tar, &options.limits, &mut layer.stats)? {
        layer
            .entry(tar, &mut entry)
            .map_err(|kind| Fault::at(&entry.path, kind))?;
    }
    Ok((layer.builder.finish()?, layer.stats))
}

struct Layer<'a, S> {
    options: &'a DecodeOptions,
    sink: &'a mut S,
    stats: DecodeStats,
    builder: Builder<'a>,
    cutter: Cutter,
}

impl<S: ObjectSink> Layer<'_, S> {
    fn entry(&mut self, tar: &mut TarStream<'_>, entry: &mut Entry) -> Result<(), Kind> {
        let path = self.path("name", &entry.path)?;
        let mark = mark(&path).map_err(|reason| Kind::Name {
            what: "name",
            reason,
        })?;
        match mark {
            Mark::None => return self.ordinary(tar, entry, &path),
            Mark::Opaque => self.builder.set_opaque(path.parent())?,
            Mark::Whiteout(name) => self.builder.whiteout(path.parent(), name)?,
            Mark::Aufs => self.stats.aufs_skipped += 1,
        }
        tar.skip(entry.stored + entry.padding, "an entry's data")
    }

    fn ordinary(
        &mut self,
        tar: &mut TarStream<'_>,
        entry: &mut Entry,
        path: &EntryPath,
    ) -> Result<(), Kind> {
        let mut meta = std::mem::take(&mut entry.meta);
        if path.is_root() {
            if entry.kind != EntryKind::Dir {
                return Err(Kind::RootNotDirectory);
            }
            self.builder.set_root(meta)?;
            return tar.skip(entry.stored + entry.padding, "an entry's data");
        }
        // Before the data, so that an entry with no place fails without reading it.
        let parent = self.builder.directory(path.parent())?;
        let kind = match entry.kind {
            EntryKind::Dir => {
                self.builder.dir(parent, path.name(), meta)?;
                return tar.skip(entry.stored + entry.padding, "an entry's data");
            }
            EntryKind::HardLink => {
                let target = self.path("hard link target", &entry.link)?;
                return self.builder.hard_link(parent, path, &target);
            }
            // As overlayfs stores a whiteout; some tools put that form into the tar.
            EntryKind::Char(0, 0) => return self.builder.whiteout(path.parent(), path.name()),
            EntryKind::Char(major, minor) => tree::Kind::Char(major, minor),
            EntryKind::Block(major, minor) => tree::Kind::Block(major, minor),
            EntryKind::Fifo => tree::Kind::Fifo,
            EntryKind::Symlink => {
                // Linux has no other mode for a link, whatever a header says.
                meta.mode = 0o777;
                tree::Kind::Symlink(symlink_target(&entry.link)?)
            }
            EntryKind::File => {
                let content = self.content(tar, entry)?;
                tar.skip(entry.padding, "the padding of a file")?;
                tree::Kind::File(content)
            }
        };
        self.builder.node(parent, path.name(), Node { meta, kind })
    }

    fn content(&mut self, tar: &mut TarStream<'_>, entry: &Entry) -> Result<Content, Kind> {
        let limits = &self.options.limits;
        let size = entry
            .sparse
            .as_ref()
            .map_or(entry.stored, |map| map.real_size);
        if size > limits.file_bytes_max {
            return Err(Kind::limit(Limit::FileBytes, limits.file_bytes_max));
        }
        self.stats.logical_bytes = self.stats.logical_bytes.saturating_add(size);
        if self.stats.logical_bytes > limits.logical_bytes_max {
            return Err(Kind::limit(Limit::LogicalBytes, limits.logical_bytes_max));
        }
        match &entry.sparse {
            None => self.cutter.whole(size, tar, self.sink, &mut self.stats),
            Some(map) => self
                .cutter
                .sparse(size, &map.segments, tar, self.sink, &mut self.stats),
        }
    }

    fn path(&self, what: &'static str, raw: &[u8]) -> Result<EntryPath, Kind> {
        EntryPath::parse(raw, self.options.strip_absolute)
            .map_err(|reason: NameFault| Kind::Name { what, reason })
    }
}

fn symlink_target(raw: &[u8]) -> Result<Box<[u8]>, Kind> {
    if raw.is_empty() {
        return Err(Kind::SymlinkTarget("it is empty"));
    }
    if raw.contains(&0) {
        return Err(Kind::SymlinkTarget("it has a NUL byte"));
    }
    if raw.len() >= PATH_MAX {
        return Err(Kind::SymlinkTarget(
            "it is longer than 4095 bytes, the most that Linux can have",
        ));
    }
    Ok(raw.into())
}
