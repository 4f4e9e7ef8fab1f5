//! The only unsafe code of the workspace: mappings of lent memory, and descriptors that arrive in
//! messages.
//!
//! Lent memory is written by other processes at any time. Two rules follow, the same that
//! virtual machine monitors keep for their guests' memory:
//! 1. No Rust reference to it ever exists, not for a moment: a reference promises that the bytes
//!    behind it hold still.
//! 2. It is reached only by copies in and out whose bounds are checked here, whatever was checked
//!    before.
//!
//! The copies are plain `memcpy`. A byte that changes during the copy arrives old or new, which
//! the contract allows and the caller's digest check sorts out; the private side holds still.
//! Copies made of relaxed atomic words would say this in the language's own terms as well, but
//! were measured at 0.63 to 0.76 of `memcpy`'s speed (16 KiB and 1 MiB reads, one core), which is
//! more than the last letter of the memory model is worth where no optimiser can see the writer:
//! it sits in another process or behind a system call.
#![allow(unsafe_code)]

use std::{
    ffi::c_void,
    io::{self, IoSliceMut},
    num::NonZeroUsize,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::{self, NonNull},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
    },
};

use crate::memory::{Memory, REGION_ALIGN_BYTES};

pub(crate) mod verbs;

/// The kernel passes at most this many descriptors with one message (`SCM_MAX_FD`).
const MAX_PASSED_FDS: usize = 253;

/// NUMA nodes that a kernel may have (`MAX_NUMNODES`).
pub(crate) const NODES_MAX: usize = 1024;

/// A whole [`Memory`] in this process's address space.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<c_void>,
    len: usize,
    writable: bool,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Mapping` is its only owner.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference the memory is only copied in and out; other processes do the
// same all the time, so a second thread adds nothing that the copies must not bear anyway.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all of `memory`, shared, for reading or for reading and writing. Pages are not touched:
    /// the kernel maps present pages sixteen at a time on the first read of each, which costs
    /// 45 ms for a GiB and needs no populating.
    pub(crate) fn new(memory: &Memory, writable: bool) -> io::Result<Self> {
        let len = usize::try_from(memory.len())
            .ok()
            .and_then(NonZeroUsize::new);
        let len = len.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        let room = Room::new(len)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: what is mapped over is `room`, which is ours, at least this long, and holds
        // nothing. `Memory` is sealed against shrinking and is no shorter than `len`, so no page of
        // the mapping lies behind the end of the file for as long as it stands.
        let base = unsafe { mmap(Some(room.start), len, protection, flags, memory, 0) }?;
        room.keep(len);
        let mapping = Self {
            base,
            len: len.get(),
            writable,
        };
        // Children of this process have no business here, nor do core dumps.
        mapping.advise(MmapAdvise::MADV_DONTFORK)?;
        mapping.advise(MmapAdvise::MADV_DONTDUMP)?;
        // Where transparent huge pages of shared memory are switched on, take them.
        if let Err(error) = mapping.advise(MmapAdvise::MADV_HUGEPAGE) {
            tracing::trace!(%error, "no transparent huge pages for a mapping");
        }
        Ok(mapping)
    }

    /// Copies `into.len()` bytes from `offset`, or nothing and false when they do not lie inside.
    #[must_use]
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, into.len()) else {
            return false;
        };
        // SAFETY: `at` checked that all of `from..+into.len()` lies in the mapping, which lives as
        // long as `self`; `into` is the caller's alone, and cannot overlap the mapping because no
        // reference into it is ever made. Bytes have no alignment and no invalid value. Concurrent
        // writers: see the module's head.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies `from` to `offset`, or nothing and false when it does not fit inside or the mapping
    /// is not writable.
    #[must_use]
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) -> bool {
        if !self.writable {
            return false;
        }
        let Some(to) = self.at(offset, from.len()) else {
            return false;
        };
        // SAFETY: as in `copy_out` with the sides exchanged; `writable` says that the pages were
        // mapped for writing.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
        true
    }

    /// Sends up to `len` bytes from `offset` over a socket, with `head` in front: the kernel copies
    /// them from the mapping to its own buffers, so no copy is made on the way. Bytes that others
    /// write meanwhile arrive old or new. Returns how many bytes of both were taken.
    pub(crate) fn send(
        &self,
        socket: BorrowedFd<'_>,
        head: &[u8],
        offset: usize,
        len: usize,
        flags: MsgFlags,
    ) -> io::Result<usize> {
        let from = self
            .at(offset, len)
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut parts = [
            libc::iovec {
                iov_base: head.as_ptr().cast_mut().cast(),
                iov_len: head.len(),
            },
            libc::iovec {
                iov_base: from.as_ptr().cast(),
                iov_len: len,
            },
        ];
        // SAFETY: a message header of zeros is one without name, parts, and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len() as _;
        // SAFETY: the kernel only reads what the header describes: `parts`, which outlives the call,
        // and of these `head`, which is the caller's, and `from..+len`, which `at` checked to lie
        // in a live mapping. A page that cannot be had makes the call fail.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags.bits()) };
        Ok(Errno::result(sent)?.unsigned_abs())
    }

    /// The address of `offset` when `len` bytes from there lie inside.
    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset <= self.len`, so the result is inside the mapping or one past its end,
        // and `self.len` fits in `isize` because the kernel could map it.
        Some(unsafe { self.base.cast::<u8>().add(offset) })
    }

    /// Takes every page from the host and keeps it from being swapped out until this is dropped.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: base and length are those of a live mapping; locking changes neither what it
        // holds nor where it lies, and unmapping undoes it.
        unsafe { mlock(self.base, self.len) }?;
        Ok(())
    }

    /// Has pages that are not there yet come from a NUMA node where it has any, whoever touches them
    /// first through whichever mapping: the policy is the file's.
    pub(crate) fn prefer(&self, node: u32) -> io::Result<()> {
        const WORD: usize = u64::BITS as usize;
        let mut mask = [0_u64; NODES_MAX / WORD];
        let word = mask.get_mut(node as usize / WORD);
        *word.ok_or(io::ErrorKind::InvalidInput)? = 1 << (node as usize % WORD);
        // SAFETY: base and length are those of a live mapping, whose content does not change; the
        // kernel reads as many bits of the mask as it is told, less one.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                libc::MPOL_PREFERRED,
                mask.as_ptr(),
                NODES_MAX + 1,
                0,
            )
        };
        Errno::result(done)?;
        Ok(())
    }

    /// Has the kernel put the pages of `range` that are there into pages of 2 MiB, one for each
    /// aligned 2 MiB of it that has at least one (`MADV_COLLAPSE`, Linux 6.1: at once, and whatever
    /// `transparent_hugepage/shmem_enabled` says, unless it says "deny"). What the memory holds does
    /// not change, whoever else reads or writes it meanwhile. The error says that some could not.
    pub(crate) fn gather(&self, range: Range<usize>) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = range.end.checked_sub(range.start).ok_or_else(invalid)?;
        let start = self.at(range.start, len).ok_or_else(invalid)?;
        // SAFETY: `at` checked that the range lies inside of a live mapping; which pages hold the
        // bytes is nothing that a program can see.
        let done = unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_COLLAPSE) };
        Errno::result(done)?;
        Ok(())
    }

    fn advise(&self, advice: MmapAdvise) -> nix::Result<()> {
        // SAFETY: base and length are those of a live mapping, and none of the advice used here
        // changes what the memory holds.
        unsafe { madvise(self.base, self.len, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are what `mmap` gave, this is the only owner, and no pointer
        // into the mapping outlives a call.
        if let Err(error) = unsafe { munmap(self.base, self.len) } {
            tracing::error!(%error, len = self.len, "a region could not be unmapped");
        }
    }
}

/// Addresses that nothing uses yet, of which a mapping takes some. They begin at a multiple of 2 MiB:
/// only there can one entry of the page table stand for a page of 2 MiB, and by itself the kernel
/// aligns no memfd so.
struct Room {
    /// All that was reserved.
    base: NonNull<c_void>,
    len: usize,
    start: NonZeroUsize,
}

impl Room {
    fn new(len: NonZeroUsize) -> io::Result<Self> {
        let align = REGION_ALIGN_BYTES as usize;
        let whole = len.checked_add(align).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address, so nothing of ours is mapped over.
        let base = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }?;
        let start = base.addr().get().next_multiple_of(align);
        let start = NonZeroUsize::new(start).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            base,
            len: whole.get(),
            start,
        })
    }

    /// Gives back what lies around the `len` bytes that were taken.
    fn keep(self, len: NonZeroUsize) {
        let this = std::mem::ManuallyDrop::new(self);
        let before = this.start.get() - this.base.addr().get();
        let after = this.len - before - len.get();
        // SAFETY: `before + len` is at most `this.len`, so this is inside what was reserved or one
        // past its end.
        let end = unsafe { this.base.byte_add(before + len.get()) };
        for (from, len) in [(this.base, before), (end, after)] {
            if len == 0 {
                continue;
            }
            // SAFETY: these addresses were reserved by `new`, the mapping that was put among them
            // does not reach here, and nobody knows of them.
            if let Err(error) = unsafe { munmap(from, len) } {
                tracing::debug!(%error, len, "addresses around a region stay reserved");
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: base and length are what was reserved, and nothing was put there.
        if let Err(error) = unsafe { munmap(self.base, self.len) } {
            tracing::debug!(%error, len = self.len, "addresses stay reserved");
        }
    }
}

/// One message with what came with it.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes of the message that were stored; 0 at the end of the stream.
    pub(crate) len: usize,
    /// The message or its descriptors did not fit.
    pub(crate) truncated: bool,
    /// Descriptors that came along, closed on drop.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Takes one message from a `SOCK_SEQPACKET` socket without waiting.
pub(crate) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
    let mut parts = [IoSliceMut::new(into)];
    let mut control = nix::cmsg_space!([RawFd; MAX_PASSED_FDS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
    let mut received = Received {
        len: message.bytes,
        truncated: message.flags.intersects(cut),
        fds: Vec::new(),
    };
    // With room for all that the kernel passes, and neither credentials nor labels asked for, the
    // control part is never cut, so no descriptor gets lost here.
    let Ok(parts) = message.cmsgs() else {
        return Ok(received);
    };
    for part in parts {
        let ControlMessageOwned::ScmRights(fds) = part else {
            continue;
        };
        for fd in fds {
            // SAFETY: the kernel installed this descriptor for this message, and nobody else has
            // seen its number.
            received.fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Ok(received)
}
