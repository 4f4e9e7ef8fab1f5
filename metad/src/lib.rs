//! The metadata daemon.
pub mod clock;
pub mod engine;
pub mod error;
pub mod failpoint;
pub mod policy;
pub mod space;
mod store;
