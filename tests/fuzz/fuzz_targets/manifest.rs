//! Arbitrary bytes as a manifest and a config; the invariant stands in `invariants/manifest.rs`.
#![no_main]

#[path = "../invariants/manifest.rs"]
mod invariant;

libfuzzer_sys::fuzz_target!(|data: &[u8]| invariant::check(data));
