//! Where RDMA joins: a connection whose hello is a verbs set-up is handed to a [`VerbsHook`], and
//! from then on is only the sign of life of what the hook made.

use std::{fmt, sync::Arc};

use super::frames::Grant;
use crate::donor::Lent;

/// The donor's side of verbs.
pub(crate) trait VerbsHook: Send + Sync + fmt::Debug {
    /// Makes the donor's half of a connection for a reader that proved `grants` (by growing id,
    /// all of them regions of `lent`). `request` is the payload of its hello, 1 to
    /// [`super::frames::MAX_PAYLOAD_BYTES`] bytes from outside.
    ///
    /// Runs on the connection's own thread. The error says why not; the reader sees only that it was
    /// refused.
    fn set_up(&self, lent: &Arc<Lent>, grants: &[Grant], request: &[u8]) -> Result<SetUp, String>;
}

/// What a hook made.
pub(crate) struct SetUp {
    /// The payload of the welcome, 1 to [`super::frames::MAX_PAYLOAD_BYTES`] bytes.
    pub(crate) answer: Vec<u8>,
    /// Dropped when the reader hangs up, the donor stops, the epoch ends or a region is taken back.
    pub(crate) alive: Box<dyn Send>,
}
