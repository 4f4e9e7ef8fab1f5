//! The declarations against what a C compiler makes of the header (package libibverbs-dev).

use std::{fmt::Write as _, fs, mem::offset_of, process::Command};

use super::abi;

/// (what C calls it, what it is here).
fn sizes() -> Vec<(&'static str, usize)> {
    macro_rules! layout {
        ($($c:literal = $ours:ident $(size $size:tt)? { $($field:literal: $member:ident),* $(,)? })*) => {
            vec![$(
                $( (concat!("sizeof(struct ", $c, ")"), { let _: () = $size; size_of::<abi::$ours>() }), )?
                $( (concat!("offsetof(struct ", $c, ", ", $field, ")"), offset_of!(abi::$ours, $member)), )*
            )*]
        };
    }
    layout! {
        "ibv_context" = Context { "device": device, "ops": ops }
        "ibv_context_ops" = ContextOps size () {
            "poll_cq": poll_cq, "req_notify_cq": req_notify_cq, "post_send": post_send,
        }
        "ibv_comp_channel" = CompletionChannel size () { "context": context, "fd": fd, "refcnt": refcnt }
        "ibv_qp" = QueuePair { "send_cq": send_cq, "handle": handle, "qp_num": qp_num }
        "ibv_mr" = MemoryRegion size () { "addr": addr, "length": length, "lkey": lkey, "rkey": rkey }
        "ibv_port_attr" = PortAttr {
            "state": state, "active_mtu": active_mtu, "gid_tbl_len": gid_tbl_len, "lid": lid,
            "phys_state": phys_state, "link_layer": link_layer, "port_cap_flags2": port_cap_flags2,
        }
        "ibv_device_attr" = DeviceAttr size () {
            "max_qp": max_qp, "max_qp_wr": max_qp_wr, "max_sge": max_sge, "max_sge_rd": max_sge_rd,
            "max_qp_rd_atom": max_qp_rd_atom, "max_qp_init_rd_atom": max_qp_init_rd_atom,
        }
        "ibv_qp_cap" = QueuePairCap size () {
            "max_send_wr": max_send_wr, "max_send_sge": max_send_sge, "max_inline_data": max_inline_data,
        }
        "ibv_qp_init_attr" = QueuePairInit size () {
            "send_cq": send_cq, "recv_cq": recv_cq, "cap": cap, "qp_type": qp_type, "sq_sig_all": sq_sig_all,
        }
        "ibv_global_route" = GlobalRoute size () {
            "dgid": dgid, "flow_label": flow_label, "sgid_index": sgid_index, "hop_limit": hop_limit,
        }
        "ibv_ah_attr" = AddressHandle size () {
            "grh": grh, "dlid": dlid, "is_global": is_global, "port_num": port_num,
        }
        "ibv_qp_attr" = QueuePairAttr size () {
            "qp_state": qp_state, "path_mtu": path_mtu, "rq_psn": rq_psn, "sq_psn": sq_psn,
            "dest_qp_num": dest_qp_num, "qp_access_flags": qp_access_flags, "cap": cap, "ah_attr": ah_attr,
            "alt_ah_attr": alt_ah_attr, "pkey_index": pkey_index, "max_rd_atomic": max_rd_atomic,
            "max_dest_rd_atomic": max_dest_rd_atomic, "min_rnr_timer": min_rnr_timer, "port_num": port_num,
            "timeout": timeout, "retry_cnt": retry_cnt, "rnr_retry": rnr_retry, "rate_limit": rate_limit,
        }
        "ibv_sge" = ScatterGather size () { "addr": addr, "length": length, "lkey": lkey }
        "ibv_send_wr" = SendWork size () {
            "wr_id": wr_id, "next": next, "sg_list": sg_list, "num_sge": num_sge, "opcode": opcode,
            "send_flags": send_flags, "wr.rdma.remote_addr": remote_addr, "wr.rdma.rkey": rkey,
        }
        "ibv_wc" = WorkCompletion size () {
            "wr_id": wr_id, "status": status, "byte_len": byte_len, "qp_num": qp_num, "wc_flags": wc_flags,
            "dlid_path_bits": dlid_path_bits,
        }
    }
}

fn constants() -> Vec<(&'static str, usize)> {
    macro_rules! constants {
        ($($name:ident),* $(,)?) => {
            vec![$((concat!("IBV_", stringify!($name)), usize::try_from(abi::$name).unwrap())),*]
        };
    }
    constants![
        QPS_INIT,
        QPS_RTR,
        QPS_RTS,
        QPS_ERR,
        QP_STATE,
        QP_ACCESS_FLAGS,
        QP_PKEY_INDEX,
        QP_PORT,
        QP_AV,
        QP_PATH_MTU,
        QP_TIMEOUT,
        QP_RETRY_CNT,
        QP_RNR_RETRY,
        QP_RQ_PSN,
        QP_MAX_QP_RD_ATOMIC,
        QP_MIN_RNR_TIMER,
        QP_SQ_PSN,
        QP_MAX_DEST_RD_ATOMIC,
        QP_DEST_QPN,
        QPT_RC,
        WR_RDMA_WRITE,
        WR_RDMA_READ,
        SEND_SIGNALED,
        ACCESS_LOCAL_WRITE,
        ACCESS_REMOTE_WRITE,
        ACCESS_REMOTE_READ,
        PORT_ACTIVE,
        WC_SUCCESS,
        WC_WR_FLUSH_ERR,
        WC_REM_INV_REQ_ERR,
        WC_REM_ACCESS_ERR,
        WC_RETRY_EXC_ERR,
        WC_RESP_TIMEOUT_ERR,
    ]
}

#[test]
fn declarations_are_those_of_the_header() {
    let ours = [sizes(), constants()].concat();
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("layout.c"), dir.path().join("layout"));
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\nint main(void) {\n",
    );
    for (expression, _) in &ours {
        writeln!(text, "printf(\"%zu\\n\", (size_t)({expression}));").unwrap();
    }
    text.push_str("return 0; }\n");
    fs::write(&source, text).unwrap();
    let built = Command::new("cc")
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .output()
        .expect("this test needs cc");
    assert!(
        built.status.success(),
        "this test needs the header of libibverbs (package libibverbs-dev): {}",
        String::from_utf8_lossy(&built.stderr)
    );
    let said = Command::new(&binary).output().unwrap();
    let theirs: Vec<usize> = String::from_utf8(said.stdout)
        .unwrap()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(theirs.len(), ours.len());
    for ((expression, here), there) in ours.iter().zip(theirs) {
        assert_eq!(*here, there, "{expression}");
    }
}
