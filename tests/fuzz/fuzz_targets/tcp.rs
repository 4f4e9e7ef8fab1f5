//! Messages between readers and donors over TCP.
//!
//! The invariant is the one that `pool/tests/corpus_tcp.rs` replays over the corpus.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../invariants/tcp.rs"]
mod invariant;

fuzz_target!(|bytes: &[u8]| {
    invariant::holds(bytes);
});
