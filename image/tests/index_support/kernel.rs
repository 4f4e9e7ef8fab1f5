//! The kernel and `fsck.erofs` as judges: mounts that end with the test, and an exact comparison
//! of a mounted tree with the one that was written.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsStr},
    fs::{self, File},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    process::Command,
};

use harbour_image::{
    index::ViewKind,
    tree::{Content, Kind, Node, NodeId, ObjectKey, Tree},
};
use rustix::{
    fs::{lgetxattr, llistxattr},
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

use super::{Builder, materialise, objects};

/// A mounted file system, unmounted when it goes.
pub struct Mounted {
    pub path: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.path, UnmountFlags::DETACH).unwrap();
    }
}

/// Mounts an EROFS file by itself, with no loop device. Needs root and a kernel of 6.12 or later.
pub fn mount_erofs(file: &Path, dir: &Path) -> Mounted {
    fs::create_dir_all(dir).unwrap();
    mount(file, dir, "erofs", MountFlags::RDONLY, None).unwrap_or_else(|error| {
        panic!(
            "mount of {} (needs root and kernel 6.12): {error}",
            file.display()
        )
    });
    Mounted {
        path: dir.to_path_buf(),
    }
}

/// Mounts a read-only overlay of `lowers`, the highest first.
pub fn mount_overlay(lowers: &[PathBuf], dir: &Path) -> Mounted {
    fs::create_dir_all(dir).unwrap();
    let paths: Vec<_> = lowers.iter().map(|path| path.to_str().unwrap()).collect();
    let data = CString::new(format!("lowerdir={}", paths.join(":"))).unwrap();
    mount("overlay", dir, "overlay", MountFlags::RDONLY, &*data).unwrap();
    Mounted {
        path: dir.to_path_buf(),
    }
}

/// `fsck.erofs` has nothing to say against `file`, and `dump.erofs` reads its superblock.
pub fn fsck(file: &Path) {
    // It walks directories by recursion, and at its usual stack gives up on long chains of them.
    let script = "ulimit -s 262144; exec fsck.erofs \"$0\"";
    let run = Command::new("sh")
        .args(["-c", script])
        .arg(file)
        .output()
        .unwrap();
    let said = [run.stdout, run.stderr].concat();
    assert!(
        run.status.success(),
        "fsck.erofs (of erofs-utils) on an index: {}: {}",
        run.status,
        String::from_utf8_lossy(&said)
    );
    let dump = Command::new("dump.erofs")
        .arg(file)
        .output()
        .expect("dump.erofs of erofs-utils is needed");
    let said = String::from_utf8_lossy(&dump.stdout).into_owned();
    assert!(
        dump.status.success() && said.contains("sb_csum mtime"),
        "dump.erofs: {said}"
    );
}

/// Writes the index of `builder`, and has it judged by `fsck.erofs` and the kernel.
pub fn judge(builder: &Builder, kind: ViewKind) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("view.erofs");
    materialise(&builder.write(kind), &objects(&builder.store), &file);
    fsck(&file);
    let mounted = mount_erofs(&file, &dir.path().join("mnt"));
    let object = |key: ObjectKey| builder.store.object(key);
    Comparison {
        tree: &builder.tree,
        object: &object,
        overlay: false,
    }
    .run(&mounted.path);
}

/// What to compare, and how to get content.
pub struct Comparison<'a> {
    pub tree: &'a Tree,
    pub object: &'a dyn Fn(ObjectKey) -> &'a [u8],
    /// Whether the other side is an overlay, which counts links its own way and may list names
    /// that are not there.
    pub overlay: bool,
}

impl Comparison<'_> {
    /// Compares every name, type, mode, owner, time, size, link count, target, attribute, device
    /// number and byte.
    pub fn run(&self, root: &Path) {
        let links = names_of(self.tree);
        let mut inos: HashMap<u64, NodeId> = HashMap::new();
        let mut open = vec![(root.to_path_buf(), Tree::ROOT)];
        while let Some((path, id)) = open.pop() {
            let node = self.tree.node(id);
            self.stat(&path, node, links.get(&id).copied().unwrap_or(0));
            self.xattrs(&path, node);
            if !self.overlay {
                let ino = fs::symlink_metadata(&path).unwrap().ino();
                assert_eq!(
                    *inos.entry(ino).or_insert(id),
                    id,
                    "{}: two nodes, one inode",
                    path.display()
                );
            }
            match &node.kind {
                Kind::Dir(dir) => {
                    self.names(&path, &dir.entries);
                    open.extend(
                        dir.entries
                            .iter()
                            .map(|(name, id)| (path.join(OsStr::from_bytes(name)), *id)),
                    );
                }
                Kind::Symlink(target) => {
                    assert_eq!(
                        fs::read_link(&path).unwrap().as_os_str().as_bytes(),
                        &**target,
                        "{}",
                        path.display()
                    );
                }
                Kind::File(content) => self.content(&path, content),
                _ => {}
            }
        }
    }

    fn stat(&self, path: &Path, node: &Node, names: u32) {
        let at = path.display();
        let stat = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{at}: {error}"));
        let (kind, size, rdev) = match &node.kind {
            Kind::Dir(_) => (0o040_000, None, (0, 0)),
            Kind::File(content) => (0o100_000, Some(content.size), (0, 0)),
            Kind::Symlink(target) => (0o120_000, Some(target.len() as u64), (0, 0)),
            Kind::Char(major, minor) => (0o020_000, Some(0), (*major, *minor)),
            Kind::Block(major, minor) => (0o060_000, Some(0), (*major, *minor)),
            Kind::Fifo => (0o010_000, Some(0), (0, 0)),
            Kind::Socket => (0o140_000, Some(0), (0, 0)),
            Kind::Whiteout => (0o020_000, Some(0), (0, 0)),
        };
        assert_eq!(
            format!("{:o}", stat.mode()),
            format!("{:o}", kind | u32::from(node.meta.mode)),
            "{at}"
        );
        assert_eq!(
            (stat.uid(), stat.gid()),
            (node.meta.uid, node.meta.gid),
            "{at}"
        );
        assert_eq!(
            (stat.mtime(), stat.mtime_nsec()),
            (node.meta.mtime.secs, i64::from(node.meta.mtime.nanos)),
            "{at}"
        );
        if let Some(size) = size {
            assert_eq!(stat.size(), size, "{at}");
            let found = (
                rustix::fs::major(stat.rdev()),
                rustix::fs::minor(stat.rdev()),
            );
            assert_eq!(found, rdev, "{at}");
        }
        if !self.overlay {
            let want = match &node.kind {
                Kind::Dir(dir) => {
                    let is_dir = |id: &&NodeId| matches!(self.tree.node(**id).kind, Kind::Dir(_));
                    2 + dir.entries.values().filter(is_dir).count() as u64
                }
                _ => u64::from(names),
            };
            assert_eq!(stat.nlink(), want, "{at}: link count");
        }
    }

    fn names(&self, path: &Path, entries: &BTreeMap<Box<[u8]>, NodeId>) {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            if self.overlay && fs::symlink_metadata(entry.path()).is_err() {
                continue;
            }
            let file_type = entry.file_type().unwrap();
            let id = entries.get(entry.file_name().as_bytes());
            let id = id.unwrap_or_else(|| panic!("{} should not be there", entry.path().display()));
            let same = match self.tree.node(*id).kind {
                Kind::Dir(_) => file_type.is_dir(),
                Kind::File(_) => file_type.is_file(),
                Kind::Symlink(_) => file_type.is_symlink(),
                Kind::Char(..) | Kind::Whiteout => file_type.is_char_device(),
                Kind::Block(..) => file_type.is_block_device(),
                Kind::Fifo => file_type.is_fifo(),
                Kind::Socket => file_type.is_socket(),
            };
            assert!(same, "{}: {file_type:?}", entry.path().display());
            found.insert(entry.file_name().into_vec(), ());
        }
        for name in entries.keys() {
            assert!(
                found.contains_key(&name[..]),
                "{}/{} is missing",
                path.display(),
                name.escape_ascii()
            );
        }
    }

    fn xattrs(&self, path: &Path, node: &Node) {
        let mut list = vec![0u8; 64 << 10];
        let len = llistxattr(path, &mut list[..]).unwrap();
        let mut found: BTreeMap<Box<[u8]>, Box<[u8]>> = BTreeMap::new();
        for name in list[..len]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            let mut value = vec![0u8; 64 << 10];
            let name_text = CString::new(name).unwrap();
            let len = lgetxattr(path, &*name_text, &mut value[..])
                .unwrap_or_else(|error| panic!("{} {name_text:?}: {error}", path.display()));
            found.insert(name.into(), value[..len].into());
        }
        let mut want = node.meta.xattrs.clone();
        if matches!(&node.kind, Kind::Dir(dir) if dir.opaque) && !self.overlay {
            want.insert((*b"trusted.overlay.opaque").into(), (*b"y").into());
        }
        assert_eq!(found, want, "{}", path.display());
    }

    fn content(&self, path: &Path, content: &Content) {
        let file = File::open(path).unwrap();
        // Big files are holes mostly: look at what is there and at the blocks around it.
        let mut checks: Vec<(u64, u64)> = vec![(0, content.size.min(1 << 20))];
        for run in &content.runs {
            let start = run.offset.saturating_sub(4096);
            checks.push((
                start,
                (run.offset + u64::from(run.len) + 4096).min(content.size),
            ));
        }
        checks.push((content.size.saturating_sub(8192), content.size));
        for (start, end) in checks {
            let mut found = vec![0xee; (end - start) as usize];
            file.read_exact_at(&mut found, start).unwrap();
            let mut want = vec![0; found.len()];
            for run in &content.runs {
                let bytes = (self.object)(run.object);
                let from = run.offset.max(start);
                let to = (run.offset + u64::from(run.len)).min(end);
                if from < to {
                    want[(from - start) as usize..(to - start) as usize].copy_from_slice(
                        &bytes[(from - run.offset) as usize..(to - run.offset) as usize],
                    );
                }
            }
            assert!(
                found == want,
                "{}: bytes {start} to {end} differ",
                path.display()
            );
        }
        let mut one = [0];
        assert_eq!(
            file.read_at(&mut one, content.size).unwrap(),
            0,
            "{}: longer than its size",
            path.display()
        );
    }
}

/// How many names each node has, those in directories that nothing names not counted.
fn names_of(tree: &Tree) -> HashMap<NodeId, u32> {
    let mut names: HashMap<NodeId, u32> = HashMap::new();
    let mut open = vec![Tree::ROOT];
    while let Some(id) = open.pop() {
        if let Kind::Dir(dir) = &tree.node(id).kind {
            dir.entries
                .values()
                .for_each(|id| *names.entry(*id).or_default() += 1);
            open.extend(dir.entries.values());
        }
    }
    names
}
