//! What libibverbs and its callers agree on: the structures and functions of
//! `infiniband/verbs.h` that are used here, and no others.
//!
//! They are written down by hand because the library is opened at run time (see
//! [`super`]) and its binary interface has not changed since version 1.1 of its symbols (2006): what
//! is linked against it then still runs. `tests.rs` compares every size and offset below with what
//! a C compiler makes of the header.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// Opaque: only ever pointed to.
#[repr(C)]
pub(crate) struct Device(c_void);
/// Opaque.
#[repr(C)]
pub(crate) struct ProtectionDomain(c_void);
/// Opaque.
#[repr(C)]
pub(crate) struct CompletionQueue(c_void);

/// The beginning of `struct ibv_context`.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
}

/// `struct ibv_context_ops`: the calls that the header makes through the device's own table.
#[repr(C)]
pub(crate) struct ContextOps {
    unused_0: [*mut c_void; 11],
    pub(crate) poll_cq:
        Option<unsafe extern "C" fn(*mut CompletionQueue, c_int, *mut WorkCompletion) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut CompletionQueue, c_int) -> c_int>,
    unused_1: [*mut c_void; 12],
    pub(crate) post_send:
        Option<unsafe extern "C" fn(*mut QueuePair, *mut SendWork, *mut *mut SendWork) -> c_int>,
    unused_2: [*mut c_void; 6],
}

/// `struct ibv_comp_channel`.
#[repr(C)]
pub(crate) struct CompletionChannel {
    pub(crate) context: *mut Context,
    pub(crate) fd: c_int,
    pub(crate) refcnt: c_int,
}

/// The beginning of `struct ibv_qp`.
#[repr(C)]
pub(crate) struct QueuePair {
    pub(crate) context: *mut Context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut ProtectionDomain,
    pub(crate) send_cq: *mut CompletionQueue,
    pub(crate) recv_cq: *mut CompletionQueue,
    pub(crate) srq: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
}

/// `struct ibv_mr`.
#[repr(C)]
pub(crate) struct MemoryRegion {
    pub(crate) context: *mut Context,
    pub(crate) pd: *mut ProtectionDomain,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// `struct ibv_port_attr`. The function fills what it knows and leaves the rest.
#[repr(C)]
#[derive(Default)]
pub(crate) struct PortAttr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    pub(crate) lmc: u8,
    pub(crate) max_vl_num: u8,
    pub(crate) sm_sl: u8,
    pub(crate) subnet_timeout: u8,
    pub(crate) init_type_reply: u8,
    pub(crate) active_width: u8,
    pub(crate) active_speed: u8,
    pub(crate) phys_state: u8,
    pub(crate) link_layer: u8,
    pub(crate) flags: u8,
    pub(crate) port_cap_flags2: u16,
    pub(crate) active_speed_ex: u32,
}

/// `struct ibv_device_attr`.
#[repr(C)]
pub(crate) struct DeviceAttr {
    unused_0: [u64; 12],
    unused_1: [u32; 3],
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    unused_2: [c_int; 4],
    pub(crate) max_qp_rd_atom: c_int,
    unused_3: [c_int; 2],
    pub(crate) max_qp_init_rd_atom: c_int,
    unused_4: [c_int; 16],
    unused_5: [u8; 4],
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QueuePairCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub(crate) struct QueuePairInit {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut CompletionQueue,
    pub(crate) recv_cq: *mut CompletionQueue,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QueuePairCap,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// `union ibv_gid` with the alignment that its 64-bit half gives it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub(crate) struct GidBytes(pub(crate) [u8; 16]);

/// `struct ibv_global_route`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct GlobalRoute {
    pub(crate) dgid: GidBytes,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct AddressHandle {
    pub(crate) grh: GlobalRoute,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QueuePairAttr {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: QueuePairCap,
    pub(crate) ah_attr: AddressHandle,
    pub(crate) alt_ah_attr: AddressHandle,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ScatterGather {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `struct ibv_send_wr`, of whose unions only the RDMA arm is used here.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SendWork {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut SendWork,
    pub(crate) sg_list: *mut ScatterGather,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    pub(crate) rest: [u64; 9],
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct WorkCompletion {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    pub(crate) opcode: c_uint,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

pub(crate) const QPS_INIT: c_uint = 1;
pub(crate) const QPS_RTR: c_uint = 2;
pub(crate) const QPS_RTS: c_uint = 3;
pub(crate) const QPS_ERR: c_uint = 6;

pub(crate) const QP_STATE: c_int = 1 << 0;
pub(crate) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(crate) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(crate) const QP_PORT: c_int = 1 << 5;
pub(crate) const QP_AV: c_int = 1 << 7;
pub(crate) const QP_PATH_MTU: c_int = 1 << 8;
pub(crate) const QP_TIMEOUT: c_int = 1 << 9;
pub(crate) const QP_RETRY_CNT: c_int = 1 << 10;
pub(crate) const QP_RNR_RETRY: c_int = 1 << 11;
pub(crate) const QP_RQ_PSN: c_int = 1 << 12;
pub(crate) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(crate) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(crate) const QP_SQ_PSN: c_int = 1 << 16;
pub(crate) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(crate) const QP_DEST_QPN: c_int = 1 << 20;

pub(crate) const QPT_RC: c_uint = 2;
pub(crate) const WR_RDMA_WRITE: c_uint = 0;
pub(crate) const WR_RDMA_READ: c_uint = 4;
pub(crate) const SEND_SIGNALED: c_uint = 1 << 1;

pub(crate) const ACCESS_LOCAL_WRITE: c_uint = 1;
pub(crate) const ACCESS_REMOTE_WRITE: c_uint = 1 << 1;
pub(crate) const ACCESS_REMOTE_READ: c_uint = 1 << 2;

pub(crate) const PORT_ACTIVE: c_uint = 4;

pub(crate) const WC_SUCCESS: c_uint = 0;
pub(crate) const WC_WR_FLUSH_ERR: c_uint = 5;
pub(crate) const WC_REM_INV_REQ_ERR: c_uint = 9;
pub(crate) const WC_REM_ACCESS_ERR: c_uint = 10;
pub(crate) const WC_RETRY_EXC_ERR: c_uint = 12;
pub(crate) const WC_RESP_TIMEOUT_ERR: c_uint = 20;

/// The functions that are exported by name.
#[derive(Debug)]
pub(crate) struct Functions {
    pub(crate) get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut Device,
    pub(crate) free_device_list: unsafe extern "C" fn(*mut *mut Device),
    pub(crate) get_device_name: unsafe extern "C" fn(*mut Device) -> *const c_char,
    pub(crate) open_device: unsafe extern "C" fn(*mut Device) -> *mut Context,
    pub(crate) close_device: unsafe extern "C" fn(*mut Context) -> c_int,
    pub(crate) query_device: unsafe extern "C" fn(*mut Context, *mut DeviceAttr) -> c_int,
    pub(crate) query_port: unsafe extern "C" fn(*mut Context, u8, *mut PortAttr) -> c_int,
    pub(crate) alloc_pd: unsafe extern "C" fn(*mut Context) -> *mut ProtectionDomain,
    pub(crate) dealloc_pd: unsafe extern "C" fn(*mut ProtectionDomain) -> c_int,
    pub(crate) reg_mr:
        unsafe extern "C" fn(*mut ProtectionDomain, *mut c_void, usize, c_int) -> *mut MemoryRegion,
    pub(crate) dereg_mr: unsafe extern "C" fn(*mut MemoryRegion) -> c_int,
    pub(crate) create_comp_channel: unsafe extern "C" fn(*mut Context) -> *mut CompletionChannel,
    pub(crate) destroy_comp_channel: unsafe extern "C" fn(*mut CompletionChannel) -> c_int,
    pub(crate) create_cq: unsafe extern "C" fn(
        *mut Context,
        c_int,
        *mut c_void,
        *mut CompletionChannel,
        c_int,
    ) -> *mut CompletionQueue,
    pub(crate) destroy_cq: unsafe extern "C" fn(*mut CompletionQueue) -> c_int,
    pub(crate) get_cq_event: unsafe extern "C" fn(
        *mut CompletionChannel,
        *mut *mut CompletionQueue,
        *mut *mut c_void,
    ) -> c_int,
    pub(crate) ack_cq_events: unsafe extern "C" fn(*mut CompletionQueue, c_uint),
    pub(crate) create_qp:
        unsafe extern "C" fn(*mut ProtectionDomain, *mut QueuePairInit) -> *mut QueuePair,
    pub(crate) modify_qp: unsafe extern "C" fn(*mut QueuePair, *mut QueuePairAttr, c_int) -> c_int,
    pub(crate) destroy_qp: unsafe extern "C" fn(*mut QueuePair) -> c_int,
}
