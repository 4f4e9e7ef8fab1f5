//! Data sets for measurements: bytes that follow from seeds, trees of them, and OCI images of
//! those trees. The command `harbour-bench` and the benches of the parts share them.
#![forbid(unsafe_code)]

pub mod content;
pub mod layout;
pub mod sets;
