//! Invariant: the parsers take any bytes without panicking, allocate no more than 64 regions, 128
//! proofs and 4 KiB of payload, and accept only what the encoders give: what was parsed encodes to
//! the same bytes.

use harbour_pool::tcp::frames::{
    Answer, Greeting, Hello, MAX_ANSWER_LEN_BYTES, MAX_HELLO_LEN_BYTES,
    data::{REPLY_LEN_BYTES, REQUEST_LEN_BYTES, Reply, Request},
};

/// Checks it; which of greeting, hello, answer, request and reply the bytes are.
pub fn holds(bytes: &[u8]) -> [bool; 5] {
    let mut kinds = [false; 5];
    if let Ok(greeting) = Greeting::parse(bytes) {
        assert_eq!(greeting.encode(), bytes);
        kinds[0] = true;
    }
    if let Ok(hello) = Hello::parse(bytes) {
        assert_eq!(hello.encode(), bytes);
        assert!(bytes.len() <= MAX_HELLO_LEN_BYTES);
        kinds[1] = true;
    }
    if let Ok(answer) = Answer::parse(bytes) {
        assert_eq!(answer.encode(), bytes);
        assert!(bytes.len() <= MAX_ANSWER_LEN_BYTES);
        kinds[2] = true;
    }
    if let Ok(whole) = <&[u8; REQUEST_LEN_BYTES]>::try_from(bytes)
        && let Ok(request) = Request::parse(whole)
    {
        assert_eq!(request.encode(), *whole);
        kinds[3] = true;
    }
    if let Ok(whole) = <&[u8; REPLY_LEN_BYTES]>::try_from(bytes)
        && let Ok(reply) = Reply::parse(whole)
    {
        assert_eq!(reply.encode(), *whole);
        kinds[4] = true;
    }
    kinds
}
