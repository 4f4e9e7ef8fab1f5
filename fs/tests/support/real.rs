//! A mount of a world, and its comparison with a model through system calls.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use harbour_fs::{
    Config, Fs,
    session::{self, MountConfig, Mounted, Unmount},
};
use harbour_image::{
    index::ViewKind,
    tree::{Kind, NodeId, Tree},
};
use rustix::fs::{FileType, Mode, OFlags, RawDir};

use super::{
    model::{Model, sample},
    world::World,
};

/// A world and its mount in a directory of its own.
pub struct Real {
    pub fs: Arc<Fs>,
    pub mounted: Mounted,
    pub dir: tempfile::TempDir,
}

impl Real {
    pub fn new(world: &Arc<World>, config: Config) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts, so it has to run as root"
        );
        assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
        let dir = tempfile::tempdir().unwrap();
        let fs = world.fs(config);
        let mounted =
            session::mount(Arc::clone(&fs), &MountConfig::new(dir.path().join("mnt"))).unwrap();
        Self { fs, mounted, dir }
    }

    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mounted.mountpoint().join(path)
    }

    /// Unmounts, which must work: nothing may be in use any more.
    pub fn end(self) {
        self.mounted.unmount(Unmount::Plain).unwrap();
        assert!(!self.mounted.is_alive());
        assert_eq!(
            fs::read_dir(self.dir.path().join("mnt")).unwrap().count(),
            0
        );
    }
}

/// A layer and an image of the sample tree, mounted.
pub fn mounted(large_dir: usize) -> (Real, Model, Model, [PathBuf; 3]) {
    let world = World::new();
    let mut layer_model = sample(ViewKind::Layer, large_dir);
    let mut image_model = sample(ViewKind::Image, 10);
    let layer = world.layer(&mut layer_model, 1, &[1]);
    let mut image = world.image(("r", "app", "v1"), &mut image_model, 2, &[1]);
    image.diff_ids = vec![layer.diff_id];
    let name = layer.diff_id.short();
    world.show(vec![image], vec![layer]);
    let real = Real::new(&world, Config::default());
    let layer = real.path("layers").join(&name);
    let rootfs = real.path("images/r/app/v1/rootfs");
    let erofs = real.path("erofs").join(format!("{name}.erofs"));
    (real, layer_model, image_model, [layer, rootfs, erofs])
}

pub fn drop_caches() {
    // Pages, dentries and inodes; so that the next look asks us again.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// One name of a listing, as getdents gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    pub name: Vec<u8>,
    pub ino: u64,
    pub kind: FileType,
    pub next: u64,
}

/// Lists a directory with a buffer of `room` bytes, from position `from`.
pub fn getdents(path: &Path, room: usize, from: u64) -> Vec<Dirent> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).unwrap();
    if from > 0 {
        rustix::fs::seek(&dir, rustix::fs::SeekFrom::Start(from)).unwrap();
    }
    let mut buffer = Vec::with_capacity(room);
    let mut raw = RawDir::new(&dir, buffer.spare_capacity_mut());
    let mut found = Vec::new();
    while let Some(entry) = raw.next() {
        let entry = entry.unwrap();
        found.push(Dirent {
            name: entry.file_name().to_bytes().to_vec(),
            ino: entry.ino(),
            kind: entry.file_type(),
            next: entry.next_entry_cookie(),
        });
    }
    found
}

pub fn xattr(path: &Path, name: &[u8]) -> rustix::io::Result<Vec<u8>> {
    let name = std::ffi::CString::new(name).unwrap();
    let mut value = vec![0; 65536];
    let len = rustix::fs::lgetxattr(path, &*name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

pub fn xattr_names(path: &Path) -> BTreeSet<Vec<u8>> {
    let mut list = vec![0u8; 65536];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    list[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

/// Compares the tree at `root` with `model` by system calls. `opaque_marks` says whether marks of
/// overlayfs are to be seen.
pub fn compare(root: &Path, model: &Model, opaque_marks: bool) {
    let mut compare = Compare {
        model,
        opaque_marks,
        inodes: HashMap::new(),
    };
    compare.node(root, Tree::ROOT);
    let distinct: BTreeSet<u64> = compare.inodes.values().copied().collect();
    assert_eq!(
        distinct.len(),
        compare.inodes.len(),
        "two nodes have one inode number"
    );
}

struct Compare<'a> {
    model: &'a Model,
    opaque_marks: bool,
    inodes: HashMap<NodeId, u64>,
}

impl Compare<'_> {
    fn node(&mut self, path: &Path, id: NodeId) {
        let node = self.model.tree.node(id);
        let stat = fs::symlink_metadata(path).unwrap();
        if let Some(before) = self.inodes.insert(id, stat.ino()) {
            assert_eq!(before, stat.ino(), "{path:?}: hard links");
            return;
        }
        let (format, rdev) = format_of(&node.kind);
        assert_eq!(stat.mode(), format | u32::from(node.meta.mode), "{path:?}");
        assert_eq!(
            (stat.uid(), stat.gid()),
            (node.meta.uid, node.meta.gid),
            "{path:?}"
        );
        let mtime = (node.meta.mtime.secs, i64::from(node.meta.mtime.nanos));
        assert_eq!((stat.mtime(), stat.mtime_nsec()), mtime, "{path:?}");
        assert_eq!((stat.ctime(), stat.ctime_nsec()), mtime, "{path:?}");
        assert_eq!(stat.rdev(), rdev, "{path:?}");
        assert_eq!(stat.blksize(), 4096, "{path:?}");
        assert_eq!(stat.blocks(), stat.size().div_ceil(4096) * 8, "{path:?}");
        self.xattrs(path, id);
        match &node.kind {
            Kind::Dir(_) => self.dir(path, id, stat.nlink()),
            Kind::File(_) => {
                let mut content = Vec::new();
                fs::File::open(path)
                    .unwrap()
                    .read_to_end(&mut content)
                    .unwrap();
                assert!(content == self.model.contents[&id], "{path:?}: content");
                assert_eq!(stat.size(), content.len() as u64, "{path:?}");
            }
            Kind::Symlink(target) => {
                assert_eq!(
                    fs::read_link(path).unwrap().as_os_str().as_bytes(),
                    &**target,
                    "{path:?}"
                );
            }
            _ => {}
        }
    }

    fn dir(&mut self, path: &Path, id: NodeId, nlink: u64) {
        let Kind::Dir(dir) = &self.model.tree.node(id).kind else {
            unreachable!()
        };
        let listed = getdents(path, 4096, 0);
        let names: BTreeMap<&[u8], &Dirent> = listed
            .iter()
            .map(|entry| (&entry.name[..], entry))
            .collect();
        assert_eq!(names.len(), listed.len(), "{path:?}: a name twice");
        assert_eq!(names.len(), dir.entries.len() + 2, "{path:?}");
        let mut subdirs = 0;
        for (name, child) in &dir.entries {
            let below = path.join(OsStr::from_bytes(name));
            let entry = names
                .get(&name[..])
                .unwrap_or_else(|| panic!("{below:?} is not listed"));
            let (format, _) = format_of(&self.model.tree.node(*child).kind);
            assert_eq!(
                entry.kind,
                FileType::from_raw_mode(format),
                "{below:?}: d_type"
            );
            subdirs += u64::from(entry.kind == FileType::Directory);
            self.node(&below, *child);
            assert_eq!(entry.ino, self.inodes[child], "{below:?}: d_ino");
        }
        assert_eq!(nlink, 2 + subdirs, "{path:?}");
    }

    fn xattrs(&self, path: &Path, id: NodeId) {
        let node = self.model.tree.node(id);
        let mut wanted: BTreeMap<Vec<u8>, Vec<u8>> = node
            .meta
            .xattrs
            .iter()
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect();
        if self.opaque_marks && matches!(&node.kind, Kind::Dir(dir) if dir.opaque) {
            wanted.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        }
        assert_eq!(
            xattr_names(path),
            wanted.keys().cloned().collect(),
            "{path:?}"
        );
        for (name, value) in wanted {
            assert_eq!(xattr(path, &name).unwrap(), value, "{path:?}");
        }
        assert_eq!(
            xattr(path, b"trusted.nothing"),
            Err(rustix::io::Errno::NODATA),
            "{path:?}"
        );
    }
}

fn format_of(kind: &Kind) -> (u32, u64) {
    let device = |major: u32, minor: u32| rustix::fs::makedev(major, minor);
    match *kind {
        Kind::Dir(_) => (0o040_000, 0),
        Kind::File(_) => (0o100_000, 0),
        Kind::Symlink(_) => (0o120_000, 0),
        Kind::Char(major, minor) => (0o020_000, device(major, minor)),
        Kind::Block(major, minor) => (0o060_000, device(major, minor)),
        Kind::Fifo => (0o010_000, 0),
        Kind::Socket => (0o140_000, 0),
        Kind::Whiteout => (0o020_000, 0),
    }
}
