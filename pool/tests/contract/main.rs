//! One contract, every transport; and what only `shm` or only `tcp` has to bear.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub
)]

mod crowd;
mod huge;
mod lying;
mod rights;
mod subjects;
mod suite;
mod tcp_crowd;
mod tcp_lying;
mod veiled;

use harbour_pool::transport::TransportKind;
use subjects::{Local, Process, Tcp, Threaded, Wrapped};

contract!(local, TransportKind::Local, Local::new());
contract!(faulty_local, TransportKind::Local, Wrapped(Local::new()));
contract!(shm, TransportKind::Shm, Threaded::new());
contract!(shm_of_a_process, TransportKind::Shm, Process::new());
contract!(tcp, TransportKind::Tcp, Tcp::threaded(false));
contract!(tcp_over_ipv6, TransportKind::Tcp, Tcp::threaded(true));
contract!(
    tcp_of_a_process,
    TransportKind::Tcp,
    Tcp::new(Process::new(), false)
);
contract!(
    faulty_tcp,
    TransportKind::Tcp,
    Wrapped(Tcp::threaded(false))
);
contract!(tls, TransportKind::Tcp, Tcp::veiled(false));
contract!(tls_over_ipv6, TransportKind::Tcp, Tcp::veiled(true));
contract!(faulty_shm, TransportKind::Shm, Wrapped(Threaded::new()));

/// Not a test: the process of [`Process`], which runs this binary with this name.
#[test]
fn donor_process() {
    subjects::be_a_donor_if_asked();
}
