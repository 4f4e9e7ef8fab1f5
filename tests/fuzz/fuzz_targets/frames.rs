//! Messages between readers and donors of shared memory.
//!
//! Invariant: the parsers take any bytes without panicking, allocate no more than 64 regions, and
//! accept only what the encoders give: what was parsed encodes to the same bytes.
#![no_main]

use harbour_pool::shm::frames::{Answer, Hello, MAX_ANSWER_LEN_BYTES, MAX_REGIONS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(hello) = Hello::parse(bytes) {
        assert_eq!(hello.encode(), bytes);
    }
    if let Ok(answer) = Answer::parse(bytes) {
        assert_eq!(answer.encode(), bytes);
        assert!(bytes.len() <= MAX_ANSWER_LEN_BYTES);
        if let Answer::Welcome { regions, .. } = answer {
            assert!(!regions.is_empty() && regions.len() <= MAX_REGIONS);
        }
    }
});
