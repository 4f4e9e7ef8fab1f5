//! Reliable connected queue pairs.

use std::{
    ffi::{c_int, c_uint},
    io, ptr,
    ptr::NonNull,
    sync::Arc,
};

use super::{
    Completions, Domain, MAX_PIECES, MAX_POST, Registration, Rights, abi, done, ended, made,
};

/// How long the peer's device may take to answer a packet: 4.096 µs times 2 to this power, 134 ms.
const ANSWER_TIMEOUT: u8 = 15;
/// How often a packet is sent again: with the timeout above a peer that is gone shows after about a
/// second, and a network that loses a percent of all packets does not.
const RETRIES: u8 = 7;
/// Routers that a packet may cross.
const HOPS: u8 = 64;

/// A queue pair. With a buffer it can be given work, which reads and writes that buffer alone.
#[derive(Debug)]
pub(crate) struct QueuePair {
    pair: NonNull<abi::QueuePair>,
    // Let go of in this order, after the pair.
    domain: Arc<Domain>,
    _completions: Arc<Completions>,
    buffer: Option<Arc<Registration>>,
}

// SAFETY: libibverbs allows every call on its objects from any thread; `QueuePair` owns the pair.
unsafe impl Send for QueuePair {}
// SAFETY: as above: calls on one pair may run at the same time.
unsafe impl Sync for QueuePair {}

/// Both ends of a connection, as one end sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    /// Port of this device.
    pub(crate) port: u8,
    /// Index of this end's address in the port's table.
    pub(crate) gid_index: u8,
    /// Address of the other end.
    pub(crate) peer_gid: [u8; 16],
    /// Number of the other end's queue pair.
    pub(crate) peer_number: u32,
    /// First packet number of the other end.
    pub(crate) peer_psn: u32,
    /// First packet number of this end.
    pub(crate) psn: u32,
    /// The largest packet, as verbs write it.
    pub(crate) mtu: u8,
    /// Reads of this end under way at one time.
    pub(crate) reads_asked: u8,
    /// Reads of the other end answered at one time.
    pub(crate) reads_answered: u8,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the peer into the buffer.
    Read,
    /// From the buffer to the peer.
    Write,
}

/// One piece of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Comes back with its completion.
    pub(crate) id: u64,
    /// Which way.
    pub(crate) direction: Direction,
    /// Offset and length of the buffer's parts, in the order of the peer's bytes. Empty parts are
    /// passed over.
    pub(crate) pieces: [(usize, usize); MAX_PIECES],
    /// The peer's first byte.
    pub(crate) address: u64,
    /// The peer's key.
    pub(crate) key: u32,
}

impl QueuePair {
    /// A new pair with room for `depth` pieces of work on `buffer`; with neither it only answers.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        completions: &Arc<Completions>,
        buffer: Option<Arc<Registration>>,
        depth: u32,
    ) -> io::Result<Self> {
        let other_device = !Arc::ptr_eq(domain.device(), &completions.device);
        if other_device
            || buffer
                .as_ref()
                .is_some_and(|buffer| !Arc::ptr_eq(domain, &buffer.domain))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut init = abi::QueuePairInit {
            qp_context: ptr::null_mut(),
            send_cq: completions.queue.as_ptr(),
            recv_cq: completions.queue.as_ptr(),
            srq: ptr::null_mut(),
            cap: abi::QueuePairCap {
                max_send_wr: depth.max(1),
                max_recv_wr: 1,
                max_send_sge: MAX_PIECES as u32,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: abi::QPT_RC,
            sq_sig_all: 0,
        };
        let create = domain.device.verbs.create_qp;
        // SAFETY: a live domain, and queues of the same device that `Self` keeps until after the pair
        // is gone; `init` outlives the call.
        let pair = made(unsafe { create(domain.domain.as_ptr(), &mut init) })?;
        Ok(Self {
            pair,
            domain: Arc::clone(domain),
            _completions: Arc::clone(completions),
            buffer,
        })
    }

    /// The number that the other end names it by.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: a live pair, whose number does not change.
        unsafe { (*self.pair.as_ptr()).qp_num }
    }

    /// Connects: the pair answers what `rights` allow from then on, and can be given work.
    pub(crate) fn connect(&self, path: &Path, rights: Rights) -> io::Result<()> {
        let remote = rights.flags() & (abi::ACCESS_REMOTE_READ | abi::ACCESS_REMOTE_WRITE);
        self.modify(
            abi::QueuePairAttr {
                qp_state: abi::QPS_INIT,
                port_num: path.port,
                qp_access_flags: remote,
                ..Default::default()
            },
            abi::QP_STATE | abi::QP_PKEY_INDEX | abi::QP_PORT | abi::QP_ACCESS_FLAGS,
        )?;
        self.modify(
            abi::QueuePairAttr {
                qp_state: abi::QPS_RTR,
                path_mtu: c_uint::from(path.mtu),
                dest_qp_num: path.peer_number,
                rq_psn: path.peer_psn,
                max_dest_rd_atomic: path.reads_answered,
                min_rnr_timer: 12,
                ah_attr: abi::AddressHandle {
                    grh: abi::GlobalRoute {
                        dgid: abi::GidBytes(path.peer_gid),
                        sgid_index: path.gid_index,
                        hop_limit: HOPS,
                        ..Default::default()
                    },
                    is_global: 1,
                    port_num: path.port,
                    ..Default::default()
                },
                ..Default::default()
            },
            abi::QP_STATE
                | abi::QP_AV
                | abi::QP_PATH_MTU
                | abi::QP_DEST_QPN
                | abi::QP_RQ_PSN
                | abi::QP_MAX_DEST_RD_ATOMIC
                | abi::QP_MIN_RNR_TIMER,
        )?;
        self.modify(
            abi::QueuePairAttr {
                qp_state: abi::QPS_RTS,
                timeout: ANSWER_TIMEOUT,
                retry_cnt: RETRIES,
                rnr_retry: RETRIES,
                sq_psn: path.psn,
                max_rd_atomic: path.reads_asked,
                ..Default::default()
            },
            abi::QP_STATE
                | abi::QP_TIMEOUT
                | abi::QP_RETRY_CNT
                | abi::QP_RNR_RETRY
                | abi::QP_SQ_PSN
                | abi::QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// Stops: no packet of work posted before is sent after this, and what has not ended is flushed.
    pub(crate) fn stop(&self) -> io::Result<()> {
        let attr = abi::QueuePairAttr {
            qp_state: abi::QPS_ERR,
            ..Default::default()
        };
        self.modify(attr, abi::QP_STATE)
    }

    /// Gives it at most [`MAX_POST`] pieces of work, which take effect in their order and each give
    /// a completion.
    pub(crate) fn post(&self, work: &[Work]) -> io::Result<()> {
        let buffer = self.buffer.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        if work.len() > MAX_POST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut pieces = [[abi::ScatterGather::default(); MAX_PIECES]; MAX_POST];
        let mut chain: Vec<abi::SendWork> = Vec::with_capacity(work.len());
        for (work, pieces) in work.iter().zip(&mut pieces) {
            let parts = work.pieces.iter().filter(|(_, len)| *len > 0);
            let mut count = 0;
            for ((offset, len), piece) in parts.zip(pieces.iter_mut()) {
                *piece = buffer
                    .piece(*offset, *len)
                    .ok_or(io::ErrorKind::InvalidInput)?;
                count += 1;
            }
            chain.push(abi::SendWork {
                wr_id: work.id,
                next: ptr::null_mut(),
                sg_list: pieces.as_mut_ptr(),
                num_sge: count,
                opcode: match work.direction {
                    Direction::Read => abi::WR_RDMA_READ,
                    Direction::Write => abi::WR_RDMA_WRITE,
                },
                send_flags: abi::SEND_SIGNALED,
                imm_data: 0,
                remote_addr: work.address,
                rkey: work.key,
                rest: [0; 9],
            });
        }
        // Each points at the next; the vector is not moved any more.
        let mut next = ptr::null_mut();
        for entry in chain.iter_mut().rev() {
            entry.next = next;
            next = ptr::from_mut(entry);
        }
        if next.is_null() {
            return Ok(());
        }
        // SAFETY: a live context, whose table is written only when it is opened.
        let post = unsafe { (*self.domain.device.context.as_ptr()).ops.post_send };
        let post = post.ok_or(io::ErrorKind::Unsupported)?;
        let mut bad = ptr::null_mut();
        // SAFETY: a live pair; the chain and its pieces outlive the call, which copies them. Every
        // piece lies in the registered buffer, which `Self` keeps until after the pair is gone.
        done(unsafe { post(self.pair.as_ptr(), next, &mut bad) })
    }

    fn modify(&self, mut attr: abi::QueuePairAttr, mask: c_int) -> io::Result<()> {
        // SAFETY: a live pair; `attr` outlives the call.
        done(unsafe { (self.domain.device.verbs.modify_qp)(self.pair.as_ptr(), &mut attr, mask) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the only owner. After it the hardware touches neither buffer nor queue for it.
        ended("queue pair", unsafe {
            (self.domain.device.verbs.destroy_qp)(self.pair.as_ptr())
        });
    }
}
