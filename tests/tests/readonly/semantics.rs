//! What reading calls give, where it can go wrong: path resolution, permissions, offsets,
//! directories read in pieces, the ways in which the kernel moves bytes.

use std::{
    fs::{self, File},
    io::{Read, Seek},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use harbour_tests::shell;
use rustix::{
    fs::{
        Mode, OFlags, SeekFrom, StatVfsMountFlags, copy_file_range, open, seek, sendfile, statvfs,
    },
    io::Errno,
};

use crate::{
    directories,
    plant::{FILE_BYTES, pattern},
};

type Check = fn(&Path) -> Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("errors of path resolution", resolution),
    ("errors of open", opening),
    ("permissions of another user", permissions),
    ("executing", executing),
    ("reading at offsets", offsets),
    ("seeking data and holes", holes),
    ("sendfile, copy_file_range, splice", moving),
    ("mmap", mapping),
    ("several readers", several),
    ("directories in pieces", directories::pieces),
    ("inode numbers", directories::inodes),
    ("extended attributes", directories::attributes),
    ("statvfs", statistics),
    ("fsync and locks", harmless),
];

pub fn check(top: &Path) -> Vec<String> {
    let results = CHECKS.iter().map(|(what, check)| (what, check(top)));
    results
        .filter_map(|(what, r)| r.err().map(|e| format!("{what}: {e:#}")))
        .collect()
}

/// One errno of one call on one path.
pub fn expect<T>(what: &str, got: rustix::io::Result<T>, wanted: Errno) -> Result<()> {
    match got {
        Err(errno) if errno == wanted => Ok(()),
        Err(errno) => anyhow::bail!("{what}: {errno:?} instead of {wanted:?}"),
        Ok(_) => anyhow::bail!("{what}: success instead of {wanted:?}"),
    }
}

fn open_ro(path: &Path, more: OFlags) -> rustix::io::Result<File> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC | more, Mode::empty()).map(File::from)
}

fn resolution(top: &Path) -> Result<()> {
    let stat = |path: &str| rustix::fs::stat(format!("{}/{path}", top.display()));
    for (path, wanted) in [
        ("nothing", Errno::NOENT),
        ("nothing/below", Errno::NOENT),
        ("dangling", Errno::NOENT),
        ("dir/nothing", Errno::NOENT),
        ("file/", Errno::NOTDIR),
        ("file/below", Errno::NOTDIR),
        ("fifo/below", Errno::NOTDIR),
        ("link/below", Errno::NOTDIR),
        ("loop", Errno::LOOP),
        ("loop/below", Errno::LOOP),
    ] {
        expect(path, stat(path), wanted)?;
    }
    let long = "n".repeat(256);
    expect("a name of 256 bytes", stat(&long), Errno::NAMETOOLONG)?;
    expect(
        "a name of 256 bytes below",
        stat(&format!("dir/{long}")),
        Errno::NAMETOOLONG,
    )?;
    expect(
        "a path of 4096 bytes",
        stat(&"./".repeat(2048)),
        Errno::NAMETOOLONG,
    )?;
    stat(&"n".repeat(255)).context("a name of 255 bytes")?;
    stat("dir-link/entry-0000").context("through a link")?;
    stat("dir-link/").context("a link with a slash")?;
    stat("dir/../dir/./entry-0001").context("dots")?;
    expect(
        "readlink of a file",
        rustix::fs::readlink(top.join("file"), Vec::new()),
        Errno::INVAL,
    )?;
    ensure!(
        fs::read_link(top.join("loop"))? == Path::new("loop"),
        "readlink of a loop"
    );
    Ok(())
}

fn opening(top: &Path) -> Result<()> {
    expect(
        "O_DIRECTORY on a file",
        open_ro(&top.join("file"), OFlags::DIRECTORY),
        Errno::NOTDIR,
    )?;
    expect(
        "O_NOFOLLOW on a link",
        open_ro(&top.join("link"), OFlags::NOFOLLOW),
        Errno::LOOP,
    )?;
    expect(
        "O_CREAT|O_EXCL on what is there",
        open_ro(&top.join("file"), OFlags::CREATE | OFlags::EXCL),
        Errno::EXIST,
    )?;
    expect(
        "O_EXCL on a dangling link",
        open_ro(&top.join("dangling"), OFlags::CREATE | OFlags::EXCL),
        Errno::EXIST,
    )?;
    let wr = |p: &str, f| {
        open(
            top.join(p),
            OFlags::WRONLY | OFlags::CLOEXEC | f,
            Mode::empty(),
        )
    };
    expect(
        "a directory for writing",
        wr("dir", OFlags::empty()),
        Errno::ISDIR,
    )?;
    expect(
        "mkdir of what is there",
        rustix::fs::mkdir(top.join("dir"), Mode::RWXU),
        Errno::EXIST,
    )?;
    expect(
        "a fifo without a reader",
        wr("fifo", OFlags::NONBLOCK),
        Errno::NXIO,
    )?;
    open_ro(&top.join("fifo"), OFlags::NONBLOCK).context("a fifo for reading")?;
    open_ro(&top.join("file"), OFlags::CREATE).context("O_CREAT of what is there")?;
    open_ro(&top.join("dir"), OFlags::DIRECTORY | OFlags::NOFOLLOW).context("a directory")?;
    expect(
        "read of a directory",
        rustix::io::read(open_ro(&top.join("dir"), OFlags::empty())?, &mut [0_u8; 8]),
        Errno::ISDIR,
    )?;
    let path =
        open_ro(&top.join("link"), OFlags::PATH | OFlags::NOFOLLOW).context("O_PATH on a link")?;
    ensure!(
        path.metadata()?.file_type().is_symlink(),
        "O_PATH|O_NOFOLLOW opened something else"
    );
    let file = open_ro(&top.join("file"), OFlags::empty())?;
    expect(
        "write on a reading descriptor",
        rustix::io::write(&file, b"x"),
        Errno::BADF,
    )?;
    expect(
        "ftruncate on a reading descriptor",
        rustix::fs::ftruncate(&file, 1),
        Errno::INVAL,
    )
}

/// In a thread of its own whose file system identity is another user's.
fn as_user<T: Send>(uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // Both calls work on the calling thread alone, which ends right after.
            nix::unistd::setfsgid(gid.into());
            nix::unistd::setfsuid(uid.into());
            work()
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))
    })
}

fn permissions(top: &Path) -> Result<()> {
    let read = |path: &str| open_ro(&top.join(path), OFlags::empty());
    as_user(1000, 1000, || -> Result<()> {
        for path in [
            "file",
            "of-1000",
            "script",
            "dir",
            "sticky",
            "no-search",
            "dir/entry-0003",
        ] {
            read(path).with_context(|| format!("{path} as 1000"))?;
        }
        for path in [
            "root-only",
            "closed",
            "closed/inside",
            "no-search/inside",
            "group-reads",
        ] {
            expect(path, read(path), Errno::ACCESS)?;
        }
        let listed = fs::read_dir(top.join("no-search"))
            .context("listing no-search")?
            .count();
        ensure!(listed == 1, "no-search lists {listed} entries");
        expect(
            "stat below closed",
            rustix::fs::stat(top.join("closed/inside")),
            Errno::ACCESS,
        )
    })??;
    as_user(2000, 1000, || -> Result<()> {
        read("of-1000").context("of-1000 through its group")?;
        read("group-reads").context("group-reads through its group")?;
        Ok(())
    })??;
    as_user(2000, 2000, || {
        expect("of-1000 as a stranger", read("of-1000"), Errno::ACCESS)
    })??;
    let test = |flag: &str, path: &str| -> Result<bool> {
        let path = top.join(path);
        let args = [
            "--reuid=1000",
            "--regid=1000",
            "--clear-groups",
            "test",
            flag,
            path.to_str().context("path")?,
        ];
        Ok(
            shell::run(Command::new("setpriv").args(args), Duration::from_secs(20))?
                .status
                .success(),
        )
    };
    for (flag, path, wanted) in [
        ("-r", "file", true),
        ("-w", "of-1000", false),
        ("-x", "script", true),
        ("-x", "file", false),
        ("-x", "dir", true),
        ("-x", "closed", false),
        ("-r", "root-only", false),
    ] {
        ensure!(
            test(flag, path)? == wanted,
            "access(2): test {flag} {path} as 1000 is not {wanted}"
        );
    }
    Ok(())
}

fn executing(top: &Path) -> Result<()> {
    let run = |path: &str, user: &str| {
        let mut command = Command::new("setpriv");
        command
            .args([
                &format!("--reuid={user}"),
                &format!("--regid={user}"),
                "--clear-groups",
            ])
            .arg(top.join(path));
        shell::run(&mut command, Duration::from_secs(20))
    };
    let output = run("script", "1000")?.ok()?;
    ensure!(
        output.text() == "ran as 1000\n",
        "the script printed {:?}",
        output.text()
    );
    ensure!(
        !run("file", "1000")?.status.success(),
        "a file without x bits was executed"
    );
    Ok(())
}

fn offsets(top: &Path) -> Result<()> {
    let file = File::open(top.join("file"))?;
    ensure!(
        file.metadata()?.len() == FILE_BYTES as u64,
        "size {}",
        file.metadata()?.len()
    );
    let mut steps = vec![
        (0, 1),
        (0, 4096),
        (1, 4096),
        (4095, 2),
        (FILE_BYTES - 1, 10),
        (FILE_BYTES, 10),
    ];
    steps.extend([
        (FILE_BYTES + 5000, 10),
        (1 << 20, 1 << 20),
        ((1 << 20) - 1, 3),
        (16_383, 40_000),
        (77_777, 1_234_567),
    ]);
    for (offset, len) in steps {
        let mut bytes = vec![0xAA; len];
        let mut done = 0;
        loop {
            let n = file.read_at(&mut bytes[done..], (offset + done) as u64)?;
            done += n;
            if n == 0 || done == len {
                break;
            }
        }
        let wanted = len.min(FILE_BYTES.saturating_sub(offset));
        ensure!(done == wanted, "{len} bytes at {offset}: {done} came");
        let wrong = (0..done).find(|i| bytes[*i] != pattern(offset + i));
        ensure!(
            wrong.is_none(),
            "{len} bytes at {offset}: wrong from {wrong:?} on"
        );
    }
    expect(
        "pread at a negative offset",
        rustix::io::pread(&file, &mut [0_u8; 1], u64::MAX),
        Errno::INVAL,
    )?;
    ensure!(
        fs::read(top.join("empty"))?.is_empty(),
        "the empty file is not"
    );
    Ok(())
}

fn holes(top: &Path) -> Result<()> {
    let file = File::open(top.join("file"))?;
    let size = FILE_BYTES as u64;
    ensure!(
        seek(&file, SeekFrom::Data(0))? == 0,
        "data does not start at 0"
    );
    ensure!(
        seek(&file, SeekFrom::Hole(0))? == size,
        "a hole before the end"
    );
    ensure!(seek(&file, SeekFrom::End(0))? == size, "SEEK_END");
    expect(
        "SEEK_DATA at the end",
        seek(&file, SeekFrom::Data(size)),
        Errno::NXIO,
    )?;
    expect(
        "SEEK_HOLE beyond the end",
        seek(&file, SeekFrom::Hole(size + 1)),
        Errno::NXIO,
    )
}

fn moving(top: &Path) -> Result<()> {
    let wanted: Vec<u8> = (0..FILE_BYTES).map(pattern).collect();
    let source = File::open(top.join("file"))?;
    let same = |what: &str, mut sink: File| -> Result<()> {
        let mut got = Vec::new();
        sink.rewind()?;
        sink.read_to_end(&mut got)?;
        ensure!(got == wanted, "{what} gave {} other bytes", got.len());
        Ok(())
    };
    let (sink, mut offset) = (tempfile::tempfile()?, 0);
    while sendfile(&sink, &source, Some(&mut offset), 1 << 20).context("sendfile")? > 0 {}
    same("sendfile", sink)?;

    let (sink, mut offset) = (tempfile::tempfile()?, 0);
    loop {
        match copy_file_range(&source, Some(&mut offset), &sink, None, 1 << 20) {
            Ok(0) => break same("copy_file_range", sink)?,
            Ok(_) => {}
            // Between file systems it may refuse; programs then read and write.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL) if offset == 0 => break,
            Err(e) => return Err(e).context("copy_file_range"),
        }
    }

    let (mut reader, writer) = std::io::pipe()?;
    let mut got = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let feed = scope.spawn(move || -> Result<()> {
            while sendfile(&writer, &source, None, 100_000)? > 0 {}
            Ok(())
        });
        reader.read_to_end(&mut got)?;
        feed.join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })?;
    ensure!(
        got == wanted,
        "sendfile to a pipe gave {} other bytes",
        got.len()
    );
    Ok(())
}

/// Through Python, because mapping a file is not a safe thing to do in Rust.
fn mapping(top: &Path) -> Result<()> {
    const PROGRAM: &str = "
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
want = hashlib.sha256(os.pread(fd, 1 << 30, 0)).hexdigest()
for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
    m = mmap.mmap(fd, 0, flags, mmap.PROT_READ)
    assert hashlib.sha256(m[:]).hexdigest() == want, 'other bytes'
    assert m[len(m) - 1:] == os.pread(fd, 1, len(m) - 1), 'last byte'
    m.close()
m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
m[0:4] = b'mine'
assert os.pread(fd, 4, 0) != b'mine', 'a private page was written through'
try:
    mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    raise SystemExit('a shared writable map was given')
except PermissionError:
    pass
";
    let path = top.join("file");
    let args = ["-c", PROGRAM, path.to_str().context("path")?];
    shell::check("python3", args, Duration::from_secs(60)).map(drop)
}

fn several(top: &Path) -> Result<()> {
    let path = top.join("file");
    thread::scope(|scope| {
        let readers: Vec<_> = (0..8)
            .map(|n: usize| {
                let path = &path;
                scope.spawn(move || -> Result<()> {
                    let file = File::open(path)?;
                    for step in 0..40 {
                        let offset = (n * 7_919 + step * 104_729) % FILE_BYTES;
                        let mut bytes = [0_u8; 9_000];
                        let got = file.read_at(&mut bytes, offset as u64)?;
                        ensure!(
                            (0..got).all(|i| bytes[i] == pattern(offset + i)),
                            "wrong bytes at {offset}"
                        );
                    }
                    Ok(())
                })
            })
            .collect();
        readers
            .into_iter()
            .try_for_each(|r| r.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })
}

fn statistics(top: &Path) -> Result<()> {
    let found = statvfs(top)?;
    ensure!(
        found.f_flag.contains(StatVfsMountFlags::RDONLY),
        "not marked read-only: {:?}",
        found.f_flag
    );
    ensure!(found.f_namemax == 255, "names of {} bytes", found.f_namemax);
    ensure!(
        found.f_bsize >= 512 && found.f_frsize >= 512,
        "blocks of {} and {}",
        found.f_bsize,
        found.f_frsize
    );
    ensure!(
        found.f_blocks > 0 && found.f_bavail <= found.f_blocks,
        "{} blocks, {} free",
        found.f_blocks,
        found.f_bavail
    );
    Ok(())
}

fn harmless(top: &Path) -> Result<()> {
    use rustix::fs::{FlockOperation, fadvise, fdatasync, flock, fsync};
    let file = File::open(top.join("file"))?;
    // A file system without anything to write may say that it does not know fsync.
    let may = |what: &'static str, got: rustix::io::Result<()>| match got {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(e) => Err(e).context(what),
    };
    may("fsync", fsync(&file))?;
    may("fdatasync", fdatasync(&file))?;
    may("fsync of a directory", fsync(File::open(top.join("dir"))?))?;
    flock(&file, FlockOperation::LockShared).context("flock")?;
    fadvise(&file, 0, None, rustix::fs::Advice::WillNeed).context("posix_fadvise")?;
    Ok(())
}
