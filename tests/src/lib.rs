//! What the whole-system tests stand on: judges, images made from Debian packages, a real
//! registry, and a harness that runs the `harbour` binary and cleans up after it.
//!
//! Judges share no code with what they judge: this crate reads served trees through the kernel
//! like any program, and drives `harbour` through its command line. From the rooms it takes only
//! the list of failpoints to die at.

pub mod beside;
pub mod cluster;
pub mod engines;
pub mod faults;
pub mod fixtures;
pub mod hosts;
pub mod layers;
pub mod mounts;
pub mod overlay;
pub mod pulling;
pub mod registry;
pub mod shell;
pub mod tree;
pub mod web;

/// A number that the environment gives, else `default`: how long a long test lasts, or its seed.
///
/// # Panics
/// When it is there and no number: a test that is asked for must not run as another one.
#[allow(clippy::panic)]
pub fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|e| panic!("{name}={text}: {e}")),
        Err(_) => default,
    }
}
