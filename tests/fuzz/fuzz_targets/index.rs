//! Any bytes as an index. The invariant stands in `image/tests/index_support/walk.rs`, which the
//! replay of the corpus (`image/tests/corpus_index.rs`) shares: no panic, no hang, and no more
//! reading than a fixed multiple of the length. Memory is bounded by running with
//! `-rss_limit_mb=512 -malloc_limit_mb=256`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../image/tests/index_support/walk.rs"]
mod walk;

fuzz_target!(|data: &[u8]| {
    walk::walk(data);
    // The header's checksum would stop all but one change in 2^32.
    let mut bytes = data.to_vec();
    walk::mend(&mut bytes);
    walk::walk(&bytes);
});
