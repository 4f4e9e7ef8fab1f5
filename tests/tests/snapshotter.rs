//! `harbour snapshotter`, called as containerd calls it, with real mounts.
//!
//! `suite` has containerd's own cases for any snapshotter (containerd, `core/snapshots/testsuite`), written
//! anew against the service; `layers` what is particular to ours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "snapshotter/client.rs"]
mod client;
#[path = "snapshotter/layers.rs"]
mod layers;
#[path = "snapshotter/steps.rs"]
mod steps;
#[path = "snapshotter/suite.rs"]
mod suite;
