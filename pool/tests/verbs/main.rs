//! The contract over real queue pairs, what only `verbs` has to bear, and figures beside perftest.
//!
//! Needs two RDMA devices that reach each other, named by `HARBOUR_TEST_RDMA=<address of the
//! donor's>,<name of the readers'>`, and fails without. `tests/run rdma` makes a guest that has them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    // The suite has promises and helpers for other transports too.
    dead_code
)]

mod donors;
mod faults;
mod figures;
#[path = "../contract"]
mod promises {
    pub mod suite;
}

use donors::Threaded;
use harbour_pool::transport::TransportKind;
use promises::suite;

contract!(verbs, TransportKind::Verbs, Threaded::new());

/// Not a test: the process of [`donors::Process`], which runs this binary with this name.
#[test]
fn donor_process() {
    donors::be_a_donor_if_asked();
}
