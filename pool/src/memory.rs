//! Lent memory as files: memfds that can be passed to other processes, sealed so that they keep
//! their size.

use std::{
    fs::{File, OpenOptions, Permissions},
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        statfs::{HUGETLBFS_MAGIC, fstatfs},
    },
};

use crate::sys::Mapping;

mod gather;
mod nodes;

use gather::Gathering;

/// Regions are multiples of this many bytes: one huge page.
pub const REGION_ALIGN_BYTES: u64 = 2 << 20;

/// Memory is taken in steps of this size, so that a signal undoes little.
const POPULATE_STEP_BYTES: u64 = 64 << 20;

/// The unit of `stat`'s count of blocks, whatever a file system's own.
const BLOCK_BYTES: u64 = 512;

/// `MFD_NOEXEC_SEAL` of `linux/memfd.h` (Linux 6.3): some hosts insist on it.
const MFD_NOEXEC_SEAL: u32 = 8;

/// Whether to lend huge pages (hugetlb, 2 MiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Where the host has enough of them free, ordinary pages otherwise.
    #[default]
    Auto,
    /// Ordinary pages.
    Never,
    /// An error where the host has too few.
    Require,
}

/// Memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The length is 0, not a multiple of [`REGION_ALIGN_BYTES`], or beyond what can be addressed.
    #[error("a region of {0} bytes: it must be a positive multiple of {REGION_ALIGN_BYTES}")]
    Length(u64),
    /// Too few huge pages.
    #[error(
        "{len} bytes of huge pages are not to be had: raise vm.nr_hugepages or lend ordinary pages"
    )]
    NoHugePages {
        /// Bytes wanted.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not enough memory to take it all at once.
    #[error("{wanted} bytes are wanted at once and the host has {available} available")]
    TooLittle {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes that `/proc/meminfo` calls available.
        available: u64,
    },
    /// A system call failed.
    #[error("{call} failed on {len} bytes of lent memory")]
    Call {
        /// Its name.
        call: &'static str,
        /// Bytes of the region.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A memfd that cannot shrink: what makes mapping it sound.
#[derive(Debug)]
pub(crate) struct Memory {
    file: File,
    len: u64,
    huge_pages: bool,
    /// What was asked for in pages of 2 MiB; `None` for huge pages, which are nothing else.
    gathering: Option<Gathering>,
}

impl Memory {
    /// New memory of `len` bytes, all zero. Huge pages are taken from the host at once; ordinary
    /// pages too with `populate`, else as they are first written.
    pub(crate) fn new(len: u64, huge: HugePages, populate: bool) -> Result<Self, MemoryError> {
        if len == 0 || !len.is_multiple_of(REGION_ALIGN_BYTES) || i64::try_from(len).is_err() {
            return Err(MemoryError::Length(len));
        }
        if huge != HugePages::Never {
            match Self::huge(len) {
                Ok(memory) => return Ok(memory),
                Err(source) if huge == HugePages::Require => {
                    return Err(MemoryError::NoHugePages { len, source });
                }
                Err(error) => {
                    tracing::debug!(len, %error, "lending ordinary pages instead of huge ones")
                }
            }
        }
        let call = |call| move |source| MemoryError::Call { call, len, source };
        let file = create(MFdFlags::empty()).map_err(call("memfd_create"))?;
        file.set_len(len).map_err(call("ftruncate"))?;
        seal(&file).map_err(call("sealing"))?;
        let memory = Self {
            file,
            len,
            huge_pages: false,
            gathering: Some(Gathering::new(len)),
        };
        nodes::choose(&memory);
        if populate {
            check_available(len)?;
            let mapping = Mapping::new(&memory, true).map_err(call("mmap"))?;
            memory.prepare(&mapping, 0..len);
            allocate(&memory.file, len).map_err(call("fallocate"))?;
        }
        Ok(memory)
    }

    /// Huge pages, all of them held, or an error.
    fn huge(len: u64) -> io::Result<Self> {
        let file = create(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?;
        file.set_len(len)?;
        seal(&file)?;
        let memory = Self {
            file,
            len,
            huge_pages: true,
            gathering: None,
        };
        nodes::choose(&memory);
        allocate(&memory.file, len)?;
        Ok(memory)
    }

    /// Takes a descriptor that a donor passed and says to be `len` bytes long, after checking that
    /// it is what makes mapping sound. The error says what is wrong with it.
    pub(crate) fn received(fd: OwnedFd, len: u64) -> Result<Self, String> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)
            .map_err(|_| "a descriptor that is not a memfd".to_owned())?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err("a memfd that is not sealed against shrinking".to_owned());
        }
        let kind =
            fstatfs(&fd).map_err(|error| format!("a descriptor without a file system: {error}"))?;
        let huge_pages = kind.filesystem_type() == HUGETLBFS_MAGIC;
        let file = File::from(fd);
        let actual = file
            .metadata()
            .map_err(|error| format!("a descriptor without a size: {error}"))?
            .len();
        if actual < len {
            return Err(format!("a memfd of {actual} bytes announced as {len}"));
        }
        Ok(Self {
            file,
            len,
            huge_pages,
            gathering: (!huge_pages).then(|| Gathering::new(len)),
        })
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of pages that it has now; all of it when that cannot be told.
    pub(crate) fn held(&self) -> u64 {
        let pages = self.file.metadata().map(|data| data.blocks() * BLOCK_BYTES);
        pages.map_or(self.len, |held| held.min(self.len))
    }

    /// Backed by huge pages.
    pub(crate) fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Gets pages of 2 MiB for `range` before it is written for the first time, where the kernel has
    /// them. `mapping` is one of this memory.
    pub(crate) fn prepare(&self, mapping: &Mapping, range: Range<u64>) {
        if let Some(gathering) = &self.gathering {
            gathering.prepare(&self.file, mapping, self.len, range);
        }
    }

    /// Writes through the file, not through a mapping: five times as fast on pages that were never
    /// touched (2.6 against 0.56 GB/s measured), because they need neither zeroing nor a fault
    /// each, and nothing is added to the writer's resident set. [`Self::prepare`] comes first where
    /// the memory is mapped. Not for huge pages: hugetlbfs has no write. The bytes are in every mapping when this returns.
    pub(crate) fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    /// Reads through the file: for who has no mapping.
    pub(crate) fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// A second descriptor that can neither write nor be mapped for writing. The file's mode keeps
    /// all but the owner and root from reopening it for more.
    pub(crate) fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(OpenOptions::new().read(true).open(path)?.into())
    }

    /// Gives the pages of `range` back to the host at once; the bytes read as zero from then on.
    /// Pages that are only partly inside are zeroed and kept.
    pub(crate) fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.len);
        let Some(len) = end.checked_sub(range.start).filter(|len| *len > 0) else {
            return Ok(());
        };
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        uninterrupted(|| fallocate(&self.file, mode, signed(range.start)?, signed(len)?))
    }
}

/// Memory that is not swapped out for as long as this lives. Locking takes all of it from the host.
#[derive(Debug)]
pub(crate) struct Locked(#[allow(dead_code, reason = "held for what its end does")] Mapping);

impl Locked {
    /// Locks all of `memory`, or says in the log why not: it is lent all the same. Huge pages are
    /// never swapped out.
    pub(crate) fn take(memory: &Memory) -> Option<Self> {
        if memory.huge_pages() {
            return None;
        }
        let locked = Mapping::new(memory, true).and_then(|mapping| {
            memory.prepare(&mapping, 0..memory.len());
            mapping.lock()?;
            Ok(Self(mapping))
        });
        match locked {
            Ok(locked) => Some(locked),
            Err(error) => {
                tracing::warn!(len = memory.len(), %error, "lent memory is not locked and may be swapped out: raise the limit of locked memory (ulimit -l)");
                None
            }
        }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A memfd that only its owner may open again.
fn create(flags: MFdFlags) -> io::Result<File> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let strict = flags | MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL);
    let fd = match memfd_create(c"harbour", strict) {
        // A kernel before 6.3 does not know the flag.
        Err(Errno::EINVAL) => memfd_create(c"harbour", flags)?,
        other => other?,
    };
    let file = File::from(fd);
    // A memfd is born with mode 0777: whoever holds a read-only descriptor could open it again
    // for writing through /proc.
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

fn allocate(file: &File, len: u64) -> io::Result<()> {
    let mut from = 0;
    while from < len {
        let step = POPULATE_STEP_BYTES.min(len - from);
        uninterrupted(|| fallocate(file, FallocateFlags::empty(), signed(from)?, signed(step)?))?;
        from += step;
    }
    Ok(())
}

/// Asking for more than there is would wake the kernel's OOM killer instead of failing.
fn check_available(wanted: u64) -> Result<(), MemoryError> {
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok());
    match kib.map(|kib| kib.saturating_mul(1024)) {
        Some(available) if available < wanted => Err(MemoryError::TooLittle { wanted, available }),
        _ => Ok(()),
    }
}

fn uninterrupted(mut call: impl FnMut() -> nix::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

fn signed(bytes: u64) -> nix::Result<i64> {
    i64::try_from(bytes).map_err(|_| Errno::EOVERFLOW)
}

#[cfg(test)]
mod tests;
