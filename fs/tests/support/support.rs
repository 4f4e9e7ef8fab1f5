//! What the tests of this room share.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used
)]

#[path = "model.rs"]
pub mod model;
#[path = "walk.rs"]
pub mod walk;
#[path = "world.rs"]
pub mod world;
