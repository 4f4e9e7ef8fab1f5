//! How much memory a donor lends: what its host can spare, now and for a while.
//!
//! [`readings`] takes numbers from the kernel, [`policy`] decides, [`keeper`] is the thread that
//! does what was decided.

pub mod keeper;
pub mod policy;
pub mod readings;
