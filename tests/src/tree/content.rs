//! Comparing bytes: several threads, each reading both sides of one file in step.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{Mode, OFlags, SeekFrom, openat, seek};

use super::Difference;

const THREADS: usize = 4;
const CHUNK_BYTES: usize = 1 << 20;
/// Longest path handed to the kernel at once.
const PATH_BYTES: usize = 3000;

pub(super) fn compare(a: &Path, b: &Path, files: &[(&[u8], u64)]) -> Result<Vec<Difference>> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        let (mut left, mut right) = (vec![0_u8; CHUNK_BYTES], vec![0_u8; CHUNK_BYTES]);
        while let Some((name, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let differs = first_difference(&open(a, name)?, &open(b, name)?, &mut left, &mut right)
                .with_context(|| format!("comparing /{}", name.escape_ascii()))?;
            if let Some(what) = differs {
                let mut found = found
                    .lock()
                    .map_err(|_| anyhow!("another comparing thread panicked"))?;
                found.push(Difference {
                    name: name.to_vec(),
                    what,
                });
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|t| {
            t.join()
                .map_err(|_| anyhow!("a comparing thread panicked"))?
        })
    })?;
    found
        .into_inner()
        .map_err(|_| anyhow!("a comparing thread panicked"))
}

fn first_difference(
    a: &File,
    b: &File,
    left: &mut [u8],
    right: &mut [u8],
) -> Result<Option<String>> {
    let mut offset = 0_u64;
    loop {
        // A judge's holes are known to be zeros; only the other side has to prove it.
        let n = if in_hole(a, offset, left.len() as u64) {
            left.fill(0);
            left.len()
        } else {
            fill(a, left, offset).context("first")?
        };
        let m = fill(b, right, offset).context("second")?;
        if left[..n] != right[..m] {
            let at = left[..n]
                .iter()
                .zip(&right[..m])
                .position(|(x, y)| x != y)
                .unwrap_or(n.min(m));
            return Ok(Some(format!(
                "bytes differ from offset {}",
                offset + at as u64
            )));
        }
        if n < left.len() {
            return Ok(None);
        }
        offset += n as u64;
    }
}

/// Whether the `len` bytes from `offset` on are a hole of `file`.
fn in_hole(file: &File, offset: u64, len: u64) -> bool {
    seek(file, SeekFrom::Data(offset)).is_ok_and(|data| data >= offset + len)
}

fn fill(file: &File, into: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => {
                return Err(e)
                    .with_context(|| format!("reading at offset {}", offset + done as u64));
            }
        }
    }
    Ok(done)
}

/// Opens `name` below `root` in steps short enough for the kernel.
fn open(root: &Path, name: &[u8]) -> Result<File> {
    let shown = || format!("opening {}/{}", root.display(), name.escape_ascii());
    let mut dir: OwnedFd = File::open(root).with_context(shown)?.into();
    let mut rest = name;
    while rest.len() > PATH_BYTES {
        let cut = rest[..PATH_BYTES]
            .iter()
            .rposition(|b| *b == b'/')
            .with_context(shown)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = openat(dir.as_fd(), &rest[..cut], flags, Mode::empty()).with_context(shown)?;
        rest = &rest[cut + 1..];
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(dir.as_fd(), rest, flags, Mode::empty())
        .with_context(shown)?
        .into())
}
