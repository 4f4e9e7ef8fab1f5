//! Messages that join queue pairs.
//!
//! Invariant: the parsers take any bytes without panicking, allocate no more than 64 keys, and accept
//! only what the encoders give: what was parsed encodes to the same bytes.
#![no_main]

use harbour_pool::verbs::frames::{Answer, MAX_ANSWER_LEN_BYTES, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::parse(bytes) {
        assert_eq!(request.encode(), bytes);
    }
    if let Ok(answer) = Answer::parse(bytes) {
        assert_eq!(answer.encode(), bytes);
        assert!(bytes.len() <= MAX_ANSWER_LEN_BYTES);
    }
});
