#![allow(clippy::unwrap_used, clippy::expect_used)]

mod catalogue;
mod donors;
mod eviction;
mod model;
mod pulls;
mod world;
