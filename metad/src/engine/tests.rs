#![allow(clippy::unwrap_used, clippy::expect_used)]

mod audit;
mod catalogue;
mod commits;
mod copies;
mod donors;
mod eviction;
mod locks;
mod model;
mod pulls;
mod rebalance;
mod replicas;
mod resize;
mod world;
