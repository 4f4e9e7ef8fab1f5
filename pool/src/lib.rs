//! Memory that hosts lend, and one-sided access to it.
//!
//! A *donor* ([`donor::DonorServer`]) holds memory and lends it in *regions* for as long as its
//! *epoch* lives. Whoever wants bytes connects once and from then on copies them in and out itself
//! through a [`transport::Transport`], with nobody on the other side taking part: `shm` maps the
//! donor's memory, `local` is the reference inside one process. A [`connector::Connector`] keeps
//! the connections of a process. [`faulty::Faulty`] puts seeded faults between the two for tests.
//!
//! The path of one read over `shm`: the connector finds the connection of (donor, epoch); the
//! connection checks that its donor still stands (a flag that a watcher keeps, no system call) and
//! every bound of the batch, then copies from the mapping into the caller's private memory. The
//! caller checks digests: this room moves bytes and vouches for none.
//!
//! Unsafe code lives in `sys.rs` and below it.
#![deny(unsafe_code)]

pub mod connector;
pub mod donor;
pub mod faulty;
pub mod host;
pub mod local;
mod memory;
pub mod shm;
mod sys;
pub mod tcp;
pub mod token;
pub mod transport;
pub mod verbs;
mod wire;

pub use memory::{HugePages, MemoryError, REGION_ALIGN_BYTES};
