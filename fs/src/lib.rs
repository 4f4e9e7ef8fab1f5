//! The mount.
pub mod source;
