//! The metadata daemon: what images, layers and packs there are, where packs lie, who lends and
//! who reads. It never sees the content of a file.
//!
//! The path of one call: a socket of [`server`] takes it, `service` turns the message into a call
//! of [`engine::Engine`] on a thread that may block, the engine decides with its free map
//! ([`space`]) and its order of eviction ([`policy`]) and writes one transaction through `store`,
//! the only place with SQL. Readers' questions go past the engine's lock to read-only connections.
//!
//! Who holds what under which lease is a machine of its own ([`locks`]).
//!
//! Time is an argument ([`clock`]), and so are faults ([`failpoint`]).

pub mod clock;
pub mod engine;
pub mod error;
pub mod failpoint;
pub mod locks;
mod metrics;
pub mod policy;
pub mod server;
mod service;
pub mod space;
mod store;
