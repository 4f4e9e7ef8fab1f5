//! From FUSE requests to operations and back, and nothing else.
//!
//! An operation that needs more time than a thread that serves the kernel has (a donor that does
//! not answer, a refill) is done again in a thread that may wait: all of them only read, so doing
//! one twice is doing it once.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode,
    OpenFlags, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use harbour_image::{index::FileType, tree::Time};
use parking_lot::Mutex;

use crate::{
    ahead::Ahead,
    attr::{Attr, BLOCK},
    error::{Error, Result},
    inode::{Node, Part, Place},
    ops::{Access, Entry, Fs, Seek, XattrReply},
};

/// Numbers are never used again, so there is one generation of all.
const GENERATION: Generation = Generation(0);
const NAME_MAX: u32 = 255;

/// What the kernel was asked for at INIT and what it agreed to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes {
    /// Largest read in bytes.
    pub(crate) read_max: u32,
    /// Background requests at a time.
    pub(crate) background: u16,
    /// Capabilities to be asked for, as far as the kernel has them.
    pub(crate) flags: InitFlags,
}

/// A file system as fuser wants it.
pub(crate) struct Adapter {
    pub(crate) fs: Arc<Fs>,
    pub(crate) wishes: Wishes,
    /// What the kernel can, for the session to report.
    pub(crate) agreed: Arc<Mutex<InitFlags>>,
    pub(crate) no_open: bool,
    pub(crate) no_opendir: bool,
    /// Whether the kernel is to tell of every open, so that large files can be read past its cache.
    pub(crate) opens: bool,
    pub(crate) ahead: Arc<Ahead>,
}

/// What the kernel was given in one part of a listing.
#[derive(Default)]
struct Listed {
    names: usize,
    /// Files with their lengths in bytes.
    files: Vec<(Node, u64)>,
}

impl Listed {
    fn note(&mut self, entry: &Entry<'_>, taken: bool) {
        self.names += 1;
        if let Some((attr, _)) = entry.attr.filter(|_| taken && entry.kind == FileType::File) {
            self.files.push((attr.node, attr.size));
        }
    }
}

impl Adapter {
    /// Runs `operation`, again and patiently if it needs that, and answers.
    fn serve<R: Send + 'static, T>(
        &self,
        name: &'static str,
        node: INodeNo,
        mut reply: R,
        operation: impl Fn(&Fs, Node, &mut R) -> Result<T> + Send + 'static,
        answer: impl FnOnce(R, std::result::Result<T, Errno>) + Send + 'static,
    ) {
        let node = Node::from_raw(node.0);
        let told = move |fs: &Fs, result: Result<T>| {
            result.map_err(|error| Errno::from_i32(fs.report(name, node, &error) as i32))
        };
        match self.fs.quickly(|fs| operation(fs, node, &mut reply)) {
            Err(Error::Later) => self.fs.later(move |fs| {
                let result = fs.patiently(|fs| operation(fs, node, &mut reply));
                answer(reply, told(fs, result));
            }),
            result => answer(reply, told(&self.fs, result)),
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let can = config.capabilities();
        let flags = self.wishes.flags & can;
        // Only what it can is asked for, so none of these is refused.
        let _ = config.add_capabilities(flags);
        let _ = config.set_max_write(self.wishes.read_max);
        let _ = config.set_max_background(self.wishes.background);
        let _ = config.set_congestion_threshold(self.wishes.background / 4 * 3);
        self.no_open = !self.opens && can.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = can.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        *self.agreed.lock() = flags;
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.serve(
            "lookup",
            parent,
            reply,
            move |fs, node, _| fs.lookup(node, &name),
            |reply, result| match result {
                Ok(found) => {
                    let attr = found.attr.map_or(NO_NODE, |attr| fuse_attr(&attr));
                    reply.entry_with_ttls(&found.attr_ttl, &found.entry_ttl, &attr, GENERATION);
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(Node::from_raw(ino.0), nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve(
            "getattr",
            ino,
            reply,
            |fs, node, _| fs.getattr(node),
            |reply, result| match result {
                Ok((attr, ttl)) => reply.attr(&ttl, &fuse_attr(&attr)),
                Err(error) => reply.error(error),
            },
        );
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.serve(
            "readlink",
            ino,
            reply,
            |fs, node, _| fs.readlink(node),
            |reply, result| match result {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(error),
            },
        );
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let bulk = matches!(Node::from_raw(ino.0).place(), Place::Erofs(_, Part::Bulk));
        match self.fs.open(flags.acc_mode() != OpenAccMode::O_RDONLY) {
            Err(_) => reply.error(Errno::EROFS),
            // Said once, the kernel opens files by itself from then on, and keeps their pages.
            Ok(()) if self.no_open => reply.error(Errno::ENOSYS),
            Ok(()) if bulk => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = move |fs: &Fs, node, _: &mut _| fs.read(node, offset, size as usize);
        let (fs, ahead) = (Arc::clone(&self.fs), Arc::clone(&self.ahead));
        self.serve(
            "read",
            ino,
            reply,
            read,
            move |reply: ReplyData, result| match result {
                Ok(data) => {
                    reply.data(&data);
                    ahead.was_read(&fs, Node::from_raw(ino.0), offset, data.len());
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.no_opendir {
            reply.error(Errno::ENOSYS);
        } else {
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            reply.opened(FileHandle(0), flags);
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let list = move |fs: &Fs, node, reply: &mut ReplyDirectory| {
            fs.readdir(node, offset, false, &mut |entry: &Entry<'_>| {
                let name = OsStr::from_bytes(entry.name);
                !reply.add(
                    INodeNo(entry.node.raw()),
                    entry.next,
                    fuse_type(entry.kind),
                    name,
                )
            })
        };
        self.serve("readdir", ino, reply, list, |reply, result| match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let list = move |fs: &Fs, node, reply: &mut (ReplyDirectoryPlus, Listed)| {
            let (reply, listed) = reply;
            *listed = Listed::default();
            fs.readdir(node, offset, true, &mut |entry: &Entry<'_>| {
                let nameless = FileAttr {
                    kind: fuse_type(entry.kind),
                    ..NO_NODE
                };
                let (attr, ttl) = entry
                    .attr
                    .map_or((nameless, Duration::ZERO), |(attr, ttl)| {
                        (fuse_attr(&attr), ttl)
                    });
                let taken = !reply.add(
                    attr.ino,
                    entry.next,
                    OsStr::from_bytes(entry.name),
                    &ttl,
                    &attr,
                    GENERATION,
                );
                listed.note(entry, taken);
                taken
            })
        };
        let ahead = Arc::clone(&self.ahead);
        self.serve(
            "readdirplus",
            ino,
            (reply, Listed::default()),
            list,
            move |(reply, listed), result| match result {
                Ok(()) => {
                    reply.ok();
                    let dir = Node::from_raw(ino.0);
                    ahead.was_listed(dir, offset, &listed.files, listed.names == 0);
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.serve(
            "statfs",
            ino,
            reply,
            |fs, node, _| fs.statfs(node),
            |reply, result| match result {
                Ok(space) => {
                    reply.statfs(space.blocks, 0, 0, space.files, 0, BLOCK, NAME_MAX, BLOCK)
                }
                Err(error) => reply.error(error),
            },
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        self.serve(
            "getxattr",
            ino,
            reply,
            move |fs, node, _| fs.getxattr(node, &name, size),
            answer_xattr,
        );
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.serve(
            "listxattr",
            ino,
            reply,
            move |fs, node, _| fs.listxattr(node, size),
            answer_xattr,
        );
    }

    fn access(&self, _req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let access = Access {
            write: mask.contains(AccessFlags::W_OK),
        };
        self.serve(
            "access",
            ino,
            reply,
            move |fs, node, _| fs.access(node, access),
            answer_empty,
        );
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let seek = match whence {
            SEEK_DATA => Seek::Data,
            SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        self.serve(
            "lseek",
            ino,
            reply,
            move |fs, node, _| fs.lseek(node, offset, seek),
            |reply, result| match result.map(i64::try_from) {
                Ok(Ok(place)) => reply.offset(place),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(error) => reply.error(error),
            },
        );
    }

    // Nothing is buffered, so there is nothing to flush: ENOSYS lets the kernel stop asking.
    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // What overlayfs takes for "no such flags here" when it copies a file up.
        reply.error(Errno::ENOTTY);
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    // From here on: changes. The mount is read-only, so the kernel refuses these before we see
    // them; the answer is here for a mount that somebody made writable.
    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }
}

fn answer_xattr(reply: ReplyXattr, result: std::result::Result<XattrReply, Errno>) {
    match result {
        Ok(XattrReply::Size(size)) => reply.size(size),
        Ok(XattrReply::Value(value)) => reply.data(&value),
        Err(error) => reply.error(error),
    }
}

fn answer_empty(reply: ReplyEmpty, result: std::result::Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

/// "No such name", in a form that the kernel may remember; in a listing, a name without a node.
const NO_NODE: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: fuser::FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: BLOCK,
    flags: 0,
};

fn fuse_attr(attr: &Attr) -> FileAttr {
    let time = system_time(attr.mtime);
    FileAttr {
        ino: INodeNo(attr.node.raw()),
        size: attr.size,
        blocks: attr.blocks(),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: fuse_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev_bits(),
        blksize: BLOCK,
        flags: 0,
    }
}

fn system_time(time: Time) -> SystemTime {
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let second = if time.secs < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let exact =
        second.and_then(|second| second.checked_add(Duration::from_nanos(u64::from(time.nanos))));
    exact.unwrap_or(UNIX_EPOCH)
}

const fn fuse_type(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::File => fuser::FileType::RegularFile,
        FileType::Dir => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Char => fuser::FileType::CharDevice,
        FileType::Block => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_the_epoch_are_exact() {
        let before = system_time(Time {
            secs: -2,
            nanos: 800_000_000,
        });
        assert_eq!(
            UNIX_EPOCH.duration_since(before).ok(),
            Some(Duration::from_millis(1200))
        );
        let after = system_time(Time { secs: 3, nanos: 1 });
        assert_eq!(
            after.duration_since(UNIX_EPOCH).ok(),
            Some(Duration::new(3, 1))
        );
        let _ = system_time(Time {
            secs: i64::MIN,
            nanos: 999_999_999,
        });
        let _ = system_time(Time {
            secs: i64::MAX,
            nanos: 999_999_999,
        });
    }
}
