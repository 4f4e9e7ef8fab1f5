//! Arbitrary bytes as a layer; the invariant stands in `invariants/decode.rs`.
#![no_main]

#[path = "../invariants/decode.rs"]
mod invariant;

libfuzzer_sys::fuzz_target!(|data: &[u8]| invariant::check(data));
