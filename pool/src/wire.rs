//! What the parsers of this room share: fields of messages from outside, read with their bounds
//! checked, and what can be wrong with one.

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Too short or too long for what they say they are.
    #[error("a message of {0} bytes")]
    Length(usize),
    /// They do not begin with the protocol's magic number.
    #[error("a message without the magic number")]
    Magic,
    /// A version that is not spoken here.
    #[error("protocol version {0}, this is 1")]
    Version(u16),
    /// A field holds a value that it may not have.
    #[error("{field} {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
}

/// A [`FrameError::Field`].
pub(crate) fn field(field: &'static str, value: impl TryInto<u64>) -> FrameError {
    FrameError::Field {
        field,
        value: value.try_into().unwrap_or(u64::MAX),
    }
}

/// Fails unless `value` is 0.
pub(crate) fn zero(name: &'static str, value: impl Into<u64>) -> Result<(), FrameError> {
    match value.into() {
        0 => Ok(()),
        other => Err(field(name, other)),
    }
}

/// Copies `value` to `at`; what does not fit is cut.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FrameError> {
    let part = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
    part.copied().ok_or(FrameError::Length(bytes.len()))
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Result<u16, FrameError> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Result<u32, FrameError> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Result<u64, FrameError> {
    array_at(bytes, at).map(u64::from_le_bytes)
}
