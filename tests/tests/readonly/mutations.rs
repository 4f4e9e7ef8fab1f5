//! Every call that changes something, and the errno it has to give.

use std::{fs::File, os::unix::net::UnixListener, path::Path};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid,
        XattrFlags, chmodat, chownat, fchmod, fchown, fremovexattr, fsetxattr, futimens, linkat,
        lremovexattr, lsetxattr, mkdirat, mknodat, open, removexattr, renameat, renameat_with,
        setxattr, symlinkat, unlinkat, utimensat,
    },
    io::{Errno, Result},
};

type Call = fn(&Path) -> Result<()>;

const NOW: Timestamps = Timestamps {
    last_access: Timespec {
        tv_sec: 1,
        tv_nsec: 2,
    },
    last_modification: Timespec {
        tv_sec: 3,
        tv_nsec: 4,
    },
};

/// Calls on the planted tree; the path given is its top.
const CALLS: &[(&str, Call)] = &[
    ("open O_WRONLY", |t| {
        open_as(&t.join("file"), OFlags::WRONLY)
    }),
    ("open O_RDWR", |t| open_as(&t.join("file"), OFlags::RDWR)),
    ("open O_WRONLY|O_APPEND", |t| {
        open_as(&t.join("file"), OFlags::WRONLY | OFlags::APPEND)
    }),
    ("open O_TRUNC", |t| {
        open_as(&t.join("file"), OFlags::RDONLY | OFlags::TRUNC)
    }),
    ("open O_CREAT, new", |t| {
        open_as(&t.join("new"), OFlags::RDONLY | OFlags::CREATE)
    }),
    ("open O_CREAT|O_EXCL, new", |t| {
        open_as(
            &t.join("new"),
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
        )
    }),
    ("open O_CREAT through a dangling link", |t| {
        open_as(&t.join("dangling"), OFlags::WRONLY | OFlags::CREATE)
    }),
    ("open O_WRONLY through a link", |t| {
        open_as(&t.join("link"), OFlags::WRONLY)
    }),
    ("truncate", |t| {
        nix::unistd::truncate(&t.join("file"), 1).map_err(errno)
    }),
    ("truncate to its own size", |t| {
        nix::unistd::truncate(&t.join("empty"), 0).map_err(errno)
    }),
    ("mkdir", |t| mkdirat(CWD, t.join("new"), Mode::RWXU)),
    ("mkdir below", |t| {
        mkdirat(CWD, t.join("dir/new"), Mode::RWXU)
    }),
    ("mknod file", |t| {
        mknodat(CWD, t.join("new"), FileType::RegularFile, Mode::RWXU, 0)
    }),
    ("mknod fifo", |t| {
        mknodat(CWD, t.join("new"), FileType::Fifo, Mode::RWXU, 0)
    }),
    ("mknod device", |t| {
        mknodat(
            CWD,
            t.join("new"),
            FileType::CharacterDevice,
            Mode::RWXU,
            0x103,
        )
    }),
    ("mknod socket", |t| {
        mknodat(CWD, t.join("new"), FileType::Socket, Mode::RWXU, 0)
    }),
    ("bind", |t| {
        UnixListener::bind(t.join("new"))
            .map(drop)
            .map_err(|e| Errno::from_io_error(&e).unwrap())
    }),
    ("link", |t| {
        linkat(CWD, t.join("file"), CWD, t.join("new"), AtFlags::empty())
    }),
    ("link of a symbolic link", |t| {
        linkat(CWD, t.join("link"), CWD, t.join("new"), AtFlags::empty())
    }),
    ("symlink", |t| symlinkat("x", CWD, t.join("new"))),
    ("rename", |t| {
        renameat(CWD, t.join("file"), CWD, t.join("new"))
    }),
    ("rename over another", |t| {
        renameat(CWD, t.join("file"), CWD, t.join("empty"))
    }),
    ("rename of a directory", |t| {
        renameat(CWD, t.join("dir"), CWD, t.join("new"))
    }),
    ("rename into a directory", |t| {
        renameat(CWD, t.join("file"), CWD, t.join("dir/new"))
    }),
    ("renameat2 RENAME_NOREPLACE", |t| {
        renameat_with(
            CWD,
            t.join("file"),
            CWD,
            t.join("new"),
            RenameFlags::NOREPLACE,
        )
    }),
    ("renameat2 RENAME_EXCHANGE", |t| {
        renameat_with(
            CWD,
            t.join("file"),
            CWD,
            t.join("empty"),
            RenameFlags::EXCHANGE,
        )
    }),
    ("unlink", |t| {
        unlinkat(CWD, t.join("file"), AtFlags::empty())
    }),
    ("unlink of a link", |t| {
        unlinkat(CWD, t.join("dangling"), AtFlags::empty())
    }),
    ("unlink of a fifo", |t| {
        unlinkat(CWD, t.join("fifo"), AtFlags::empty())
    }),
    ("rmdir", |t| {
        unlinkat(CWD, t.join("empty-dir"), AtFlags::REMOVEDIR)
    }),
    ("rmdir, not empty", |t| {
        unlinkat(CWD, t.join("dir"), AtFlags::REMOVEDIR)
    }),
    ("chmod", |t| {
        chmodat(CWD, t.join("file"), Mode::RWXU, AtFlags::empty())
    }),
    ("chmod of a directory", |t| {
        chmodat(CWD, t.join("dir"), Mode::RWXU, AtFlags::empty())
    }),
    ("chmod to what it is", |t| {
        chmodat(
            CWD,
            t.join("empty"),
            Mode::from_raw_mode(0o644),
            AtFlags::empty(),
        )
    }),
    ("fchmod", |t| {
        fchmod(File::open(t.join("file")).unwrap(), Mode::RWXU)
    }),
    ("chown", |t| {
        chownat(
            CWD,
            t.join("file"),
            Some(Uid::from_raw(7)),
            None,
            AtFlags::empty(),
        )
    }),
    ("chgrp", |t| {
        chownat(
            CWD,
            t.join("file"),
            None,
            Some(Gid::from_raw(7)),
            AtFlags::empty(),
        )
    }),
    ("lchown", |t| {
        chownat(
            CWD,
            t.join("link"),
            Some(Uid::from_raw(7)),
            None,
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }),
    ("fchown", |t| {
        fchown(
            File::open(t.join("file")).unwrap(),
            Some(Uid::from_raw(7)),
            None,
        )
    }),
    ("utimensat", |t| {
        utimensat(CWD, t.join("file"), &NOW, AtFlags::empty())
    }),
    ("utimensat of a link", |t| {
        utimensat(CWD, t.join("link"), &NOW, AtFlags::SYMLINK_NOFOLLOW)
    }),
    ("utimensat of a directory", |t| {
        utimensat(CWD, t.join("dir"), &NOW, AtFlags::empty())
    }),
    ("futimens", |t| {
        futimens(File::open(t.join("file")).unwrap(), &NOW)
    }),
    ("setxattr user", |t| {
        setxattr(t.join("file"), "user.new", b"1", XattrFlags::empty())
    }),
    ("setxattr user, replacing", |t| {
        setxattr(t.join("marked"), "user.mark", b"1", XattrFlags::REPLACE)
    }),
    ("setxattr trusted", |t| {
        setxattr(t.join("dir"), "trusted.new", b"1", XattrFlags::empty())
    }),
    ("setxattr security", |t| {
        setxattr(t.join("file"), "security.new", b"1", XattrFlags::empty())
    }),
    ("lsetxattr", |t| {
        lsetxattr(t.join("link"), "trusted.new", b"1", XattrFlags::empty())
    }),
    ("fsetxattr", |t| {
        fsetxattr(
            File::open(t.join("file")).unwrap(),
            "user.new",
            b"1",
            XattrFlags::empty(),
        )
    }),
    ("removexattr", |t| {
        removexattr(t.join("marked"), "user.mark")
    }),
    ("lremovexattr", |t| {
        lremovexattr(t.join("marked"), "user.mark")
    }),
    ("fremovexattr", |t| {
        fremovexattr(File::open(t.join("marked")).unwrap(), "user.mark")
    }),
    ("access W_OK", |t| {
        rustix::fs::access(t.join("file"), rustix::fs::Access::WRITE_OK)
    }),
    ("access W_OK of a directory", |t| {
        rustix::fs::access(t.join("dir"), rustix::fs::Access::WRITE_OK)
    }),
];

/// Calls that make something in a directory that is not of an image.
const IN_DIRECTORY: &[(&str, Call)] = &[
    ("open O_CREAT", |d| {
        open_as(&d.join("new"), OFlags::WRONLY | OFlags::CREATE)
    }),
    ("mkdir", |d| mkdirat(CWD, d.join("new"), Mode::RWXU)),
    ("symlink", |d| symlinkat("x", CWD, d.join("new"))),
    ("mknod", |d| {
        mknodat(CWD, d.join("new"), FileType::Fifo, Mode::RWXU, 0)
    }),
    ("chmod", |d| chmodat(CWD, d, Mode::RWXU, AtFlags::empty())),
    ("chown", |d| {
        chownat(CWD, d, Some(Uid::from_raw(7)), None, AtFlags::empty())
    }),
    ("utimensat", |d| utimensat(CWD, d, &NOW, AtFlags::empty())),
    ("setxattr", |d| {
        setxattr(d, "trusted.new", b"1", XattrFlags::empty())
    }),
];

pub fn check(top: &Path) -> Vec<String> {
    CALLS
        .iter()
        .filter_map(|(what, call)| complaint(what, call(top)))
        .collect()
}

pub fn check_directory(dir: &Path) -> Vec<String> {
    let all = IN_DIRECTORY
        .iter()
        .filter_map(|(what, call)| complaint(what, call(dir)));
    all.map(|c| format!("{}: {c}", dir.display())).collect()
}

fn complaint(what: &str, got: Result<()>) -> Option<String> {
    (got != Err(Errno::ROFS)).then(|| format!("{what}: {got:?} instead of EROFS"))
}

fn open_as(path: &Path, flags: OFlags) -> Result<()> {
    open(path, flags | OFlags::CLOEXEC, Mode::RUSR).map(drop)
}

fn errno(error: nix::Error) -> Errno {
    Errno::from_raw_os_error(error as i32)
}
