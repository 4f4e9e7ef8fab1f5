//! A host's node: joins the mount to metad and the pool.
//!
//! [`catalogue::Remote`] answers the file system from a snapshot that a watch keeps fresh; [`session`] keeps the node's lease, drops locations of freed packs before
//! acknowledging them, and mounts fast views; [`refill::Refiller`] is the rung before EIO, and
//! [`spool`] has what the pool could not take.

pub mod catalogue;
pub mod refill;
pub mod session;
pub mod spool;
pub mod views;
