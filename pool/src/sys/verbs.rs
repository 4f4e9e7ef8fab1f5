//! The verbs of libibverbs, made safe to call.
//!
//! The library is opened when it is first asked for, so the same program runs on hosts without it.
//! Everything here owns what it was made of: a queue pair the memory that its work reads and writes,
//! a registration its mapping, each its protection domain, that its device. So nothing can be freed
//! while the hardware may still use it. Local memory is named by offsets into a registered
//! [`Mapping`], whose bounds are checked at every post; nobody outside this file sees an address,
//! and what the hardware has written is read through [`Mapping::copy_out`] like any lent memory.

use std::{
    ffi::{CStr, c_int, c_uint},
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::Arc,
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::Mapping;

pub(crate) mod abi;
mod library;
#[cfg(test)]
mod tests;

/// Work posted with one ring of the doorbell.
pub(crate) const MAX_POST: usize = 16;
/// Pieces of local memory that one piece of work gathers or scatters.
pub(crate) const MAX_PIECES: usize = 2;
/// Completions taken at one time.
pub(crate) const MAX_POLL: usize = 16;

/// Turns a null pointer into the error that the call left in `errno`.
fn made<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// Turns the error number that a verb returns into an error.
fn done(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}

/// For destructors, which have nobody to tell.
fn ended(what: &'static str, code: c_int) {
    if let Err(error) = done(code) {
        tracing::warn!(what, %error, "an RDMA object could not be ended");
    }
}

/// An open device.
#[derive(Debug)]
pub(crate) struct Device {
    context: NonNull<abi::Context>,
    verbs: &'static abi::Functions,
}

// SAFETY: libibverbs allows every call on its objects from any thread; `Device` owns the context.
unsafe impl Send for Device {}
// SAFETY: as above: calls on one context may run at the same time.
unsafe impl Sync for Device {}

/// What a port is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// Ready to carry data.
    pub(crate) active: bool,
    /// The largest packet as verbs write it: 1 for 256 bytes to 5 for 4096.
    pub(crate) mtu: u8,
}

/// Bounds of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Work in one queue.
    pub(crate) work: u32,
    /// Reads that one queue pair answers at one time.
    pub(crate) reads_answered: u8,
    /// Reads that one queue pair has under way at one time.
    pub(crate) reads_asked: u8,
    /// Pieces of local memory in one piece of work.
    pub(crate) pieces: u32,
}

impl Device {
    /// Opens the device of this name; `None` when the library knows no such device.
    pub(crate) fn open(
        verbs: &'static abi::Functions,
        name: &str,
    ) -> io::Result<Option<Arc<Self>>> {
        let mut count = 0;
        // SAFETY: `count` outlives the call.
        let list = made(unsafe { (verbs.get_device_list)(&mut count) })?;
        let mut opened = Ok(None);
        for index in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` entries.
            let entry = unsafe { list.add(index) };
            // SAFETY: as above; the list is not freed yet.
            let device = unsafe { entry.read() };
            // SAFETY: an entry of the list.
            let called = unsafe { (verbs.get_device_name)(device) };
            // SAFETY: the name lives as long as the list and is NUL-terminated.
            let called = unsafe { CStr::from_ptr(called) };
            if called.to_bytes() == name.as_bytes() {
                // SAFETY: an entry of the list, which is not freed yet.
                opened = made(unsafe { (verbs.open_device)(device) }).map(Some);
                break;
            }
        }
        // SAFETY: the list that was given, freed once; open devices do not need it.
        unsafe { (verbs.free_device_list)(list.as_ptr()) };
        Ok(opened?.map(|context| Arc::new(Self { context, verbs })))
    }

    /// How many devices the library has drivers for.
    pub(crate) fn count(verbs: &'static abi::Functions) -> io::Result<usize> {
        let mut count = 0;
        // SAFETY: `count` outlives the call.
        let list = made(unsafe { (verbs.get_device_list)(&mut count) })?;
        // SAFETY: the list that was given, freed once.
        unsafe { (verbs.free_device_list)(list.as_ptr()) };
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The state of a port.
    pub(crate) fn port(&self, number: u8) -> io::Result<Port> {
        let mut attr = abi::PortAttr::default();
        // SAFETY: a live context and a structure of the size that the function fills at most.
        done(unsafe { (self.verbs.query_port)(self.context.as_ptr(), number, &mut attr) })?;
        Ok(Port {
            active: attr.state == abi::PORT_ACTIVE,
            mtu: u8::try_from(attr.active_mtu).unwrap_or(0),
        })
    }

    /// The bounds of the device.
    pub(crate) fn limits(&self) -> io::Result<Limits> {
        let mut attr = MaybeUninit::<abi::DeviceAttr>::zeroed();
        // SAFETY: a live context and a structure of the size that the function fills.
        done(unsafe { (self.verbs.query_device)(self.context.as_ptr(), attr.as_mut_ptr()) })?;
        // SAFETY: integers only, of which zeros are values; the call filled them.
        let attr = unsafe { attr.assume_init() };
        let small = |n: c_int| u8::try_from(n.clamp(0, 255)).unwrap_or(0);
        Ok(Limits {
            work: u32::try_from(attr.max_qp_wr).unwrap_or(0),
            reads_answered: small(attr.max_qp_rd_atom),
            reads_asked: small(attr.max_qp_init_rd_atom),
            pieces: u32::try_from(attr.max_sge.min(attr.max_sge_rd)).unwrap_or(0),
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the only owner; everything made of it holds an `Arc` of it, so all is gone.
        ended("device", unsafe {
            (self.verbs.close_device)(self.context.as_ptr())
        });
    }
}

/// A protection domain: keys and queue pairs of one do not work with those of another.
#[derive(Debug)]
pub(crate) struct Domain {
    domain: NonNull<abi::ProtectionDomain>,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Domain {}
// SAFETY: as for `Device`.
unsafe impl Sync for Domain {}

impl Domain {
    /// A new domain.
    pub(crate) fn new(device: &Arc<Device>) -> io::Result<Arc<Self>> {
        // SAFETY: a live context.
        let domain = made(unsafe { (device.verbs.alloc_pd)(device.context.as_ptr()) })?;
        Ok(Arc::new(Self {
            domain,
            device: Arc::clone(device),
        }))
    }

    /// Its device.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: the only owner; what was made in it held an `Arc` of it.
        ended("protection domain", unsafe {
            (self.device.verbs.dealloc_pd)(self.domain.as_ptr())
        });
    }
}

/// What a registration lets others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rights {
    /// Nothing: a buffer of this process, for its own work to read and write.
    Local,
    /// Peers read.
    Read,
    /// Peers read and write.
    ReadWrite,
}

impl Rights {
    const fn flags(self) -> c_uint {
        match self {
            Self::Local => abi::ACCESS_LOCAL_WRITE,
            Self::Read => abi::ACCESS_REMOTE_READ,
            Self::ReadWrite => {
                abi::ACCESS_LOCAL_WRITE | abi::ACCESS_REMOTE_READ | abi::ACCESS_REMOTE_WRITE
            }
        }
    }
}

/// A mapping that the hardware knows, pinned for as long as it is registered.
#[derive(Debug)]
pub(crate) struct Registration {
    region: NonNull<abi::MemoryRegion>,
    // Let go of in this order, after the region.
    domain: Arc<Domain>,
    mapping: Arc<Mapping>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Registration {}
// SAFETY: as for `Device`; the structure behind `region` is not written after it was made.
unsafe impl Sync for Registration {}

impl Registration {
    /// Registers all of `mapping`, which takes every page of it from the host.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        mapping: Arc<Mapping>,
        rights: Rights,
    ) -> io::Result<Self> {
        if !mapping.writable && rights != Rights::Read {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let flags = c_int::try_from(rights.flags()).unwrap_or(0);
        let (verbs, base) = (domain.device.verbs, mapping.base.as_ptr());
        // SAFETY: base and length are those of a mapping that `Self` keeps until after the region is
        // gone. What others then write to it is never behind a Rust reference.
        let region =
            made(unsafe { (verbs.reg_mr)(domain.domain.as_ptr(), base, mapping.len, flags) })?;
        Ok(Self {
            region,
            domain: Arc::clone(domain),
            mapping,
        })
    }

    /// What peers name its first byte by.
    pub(crate) fn address(&self) -> u64 {
        self.mapping.base.as_ptr().expose_provenance() as u64
    }

    /// What peers must show.
    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: a live region, which nobody writes to.
        unsafe { (*self.region.as_ptr()).rkey }
    }

    /// Its memory.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// `len` bytes at `offset` for a piece of work, when they lie inside.
    fn piece(&self, offset: usize, len: usize) -> Option<abi::ScatterGather> {
        let address = self.mapping.at(offset, len)?;
        // SAFETY: as in `remote_key`.
        let lkey = unsafe { (*self.region.as_ptr()).lkey };
        Some(abi::ScatterGather {
            addr: address.as_ptr().expose_provenance() as u64,
            length: u32::try_from(len).ok()?,
            lkey,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: the only owner. Queue pairs whose work names it hold an `Arc` of it.
        ended("memory region", unsafe {
            (self.domain.device.verbs.dereg_mr)(self.region.as_ptr())
        });
    }
}

/// A completion queue and the channel that says when something came.
#[derive(Debug)]
pub(crate) struct Completions {
    queue: NonNull<abi::CompletionQueue>,
    channel: NonNull<abi::CompletionChannel>,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for Completions {}
// SAFETY: as for `Device`.
unsafe impl Sync for Completions {}

/// How a piece of work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Well.
    Done,
    /// The peer's device refused: no such key, not these bytes, or not this right.
    Denied,
    /// The peer does not answer.
    Silent,
    /// Not tried, because work before it failed or the queue pair was ended.
    Flushed,
    /// Anything else, by the number that verbs give it.
    Failed(u32),
}

impl Outcome {
    fn of(status: c_uint) -> Self {
        match status {
            abi::WC_SUCCESS => Self::Done,
            abi::WC_REM_ACCESS_ERR | abi::WC_REM_INV_REQ_ERR => Self::Denied,
            abi::WC_RETRY_EXC_ERR | abi::WC_RESP_TIMEOUT_ERR => Self::Silent,
            abi::WC_WR_FLUSH_ERR => Self::Flushed,
            other => Self::Failed(other),
        }
    }
}

impl Completions {
    /// Room for `entries`.
    pub(crate) fn new(device: &Arc<Device>, entries: u32) -> io::Result<Arc<Self>> {
        let verbs = device.verbs;
        let context = device.context.as_ptr();
        // SAFETY: a live context.
        let channel = made(unsafe { (verbs.create_comp_channel)(context) })?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: a live context and channel; no context of ours is passed.
        let queue = made(unsafe {
            (verbs.create_cq)(context, entries, ptr::null_mut(), channel.as_ptr(), 0)
        });
        let queue = queue.inspect_err(|_| {
            // SAFETY: the channel was just made and has no queue.
            ended("completion channel", unsafe {
                (verbs.destroy_comp_channel)(channel.as_ptr())
            });
        })?;
        let completions = Arc::new(Self {
            queue,
            channel,
            device: Arc::clone(device),
        });
        fcntl(&*completions, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(completions)
    }

    /// Takes what has come: (id, outcome) of each.
    pub(crate) fn poll(&self, into: &mut Vec<(u64, Outcome)>) -> io::Result<usize> {
        let mut entries = [abi::WorkCompletion::default(); MAX_POLL];
        // SAFETY: a live context, whose table is written only when it is opened.
        let poll = unsafe { (*self.device.context.as_ptr()).ops.poll_cq };
        let poll = poll.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: a live queue, and room for as many entries as are asked for.
        let count = unsafe { poll(self.queue.as_ptr(), MAX_POLL as c_int, entries.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| io::Error::other("polling failed"))?;
        let came = entries.iter().take(count);
        into.extend(came.map(|entry| (entry.wr_id, Outcome::of(entry.status))));
        Ok(count)
    }

    /// Asks for an event at the next completion. What came before the call may give none: poll again.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: as in `poll`.
        let arm = unsafe { (*self.device.context.as_ptr()).ops.req_notify_cq };
        let arm = arm.ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: a live queue.
        done(unsafe { arm(self.queue.as_ptr(), 0) })
    }

    /// Takes the events that came, without waiting.
    pub(crate) fn drain(&self) -> io::Result<()> {
        let verbs = self.device.verbs;
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a live channel, made non-blocking; both results outlive the call.
        while unsafe { (verbs.get_cq_event)(self.channel.as_ptr(), &mut queue, &mut context) } == 0
        {
            // SAFETY: the one queue of this channel, and one event of it that was taken.
            unsafe { (verbs.ack_cq_events)(self.queue.as_ptr(), 1) };
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        }
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: a live channel, which nobody writes to.
        let fd = unsafe { (*self.channel.as_ptr()).fd };
        // SAFETY: the channel's descriptor is open for as long as the channel is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        let verbs = self.device.verbs;
        // SAFETY: the only owner; queue pairs that use it hold an `Arc` of it, events are acknowledged.
        ended("completion queue", unsafe {
            (verbs.destroy_cq)(self.queue.as_ptr())
        });
        // SAFETY: the only owner, and its queue is gone.
        ended("completion channel", unsafe {
            (verbs.destroy_comp_channel)(self.channel.as_ptr())
        });
    }
}

mod queue;

pub(crate) use library::{LibraryError, library};
pub(crate) use queue::{Direction, Path, QueuePair, Work};
