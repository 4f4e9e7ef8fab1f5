//! What follows the handshake of a connection for data: requests one way, replies the other, each
//! in the order of the requests.
//!
//! ```text
//! request, 32 bytes, then the bytes of a write     reply, 24 bytes, then the bytes of a read
//!    0  8  id, one more than the one before,          0  8  id of the request
//!          from 1                                     8  4  kind: 1 data, 2 done, 3 out of bounds,
//!    8  4  kind: 1 read, 2 write                            4 wrong epoch, 5 no right, 6 failed
//!   12  4  region                                    12  4  number of bytes that follow
//!   16  8  offset in the region                      16  8  epoch of the donor when that is wrong,
//!   24  4  length, at most 1 MiB                            else 0
//!   28  4  reserved
//! ```

use crate::{
    transport::RegionId,
    wire::{FrameError, field, put, u32_at, u64_at, zero},
};

/// Length of a request without the bytes of a write.
pub const REQUEST_LEN_BYTES: usize = 32;
/// Length of a reply without the bytes of a read.
pub const REPLY_LEN_BYTES: usize = 24;
/// Bytes that one request may move.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the reader.
    Read,
    /// To the donor; they follow the request.
    Write,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number.
    pub id: u64,
    /// Which way.
    pub way: Way,
    /// Where.
    pub region: RegionId,
    /// From which byte on.
    pub offset: u64,
    /// How many bytes, at most [`MAX_REQUEST_BYTES`].
    pub len: u32,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// So many bytes follow, at most [`MAX_REQUEST_BYTES`].
    Data(u32),
    /// The bytes were written.
    Done,
    /// The donor lends no such bytes.
    OutOfBounds,
    /// The donor is in this epoch now, not 0.
    WrongEpoch(u64),
    /// The connection did not prove that it may.
    NoRight,
    /// The donor could not.
    Failed,
}

/// A reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Number of the request.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
}

impl Request {
    /// The message.
    pub fn encode(&self) -> [u8; REQUEST_LEN_BYTES] {
        let mut bytes = [0; REQUEST_LEN_BYTES];
        let kind: u32 = match self.way {
            Way::Read => 1,
            Way::Write => 2,
        };
        put(&mut bytes, 0, &self.id.to_le_bytes());
        put(&mut bytes, 8, &kind.to_le_bytes());
        put(&mut bytes, 12, &self.region.0.to_le_bytes());
        put(&mut bytes, 16, &self.offset.to_le_bytes());
        put(&mut bytes, 24, &self.len.to_le_bytes());
        bytes
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8; REQUEST_LEN_BYTES]) -> Result<Self, FrameError> {
        let way = match u32_at(bytes, 8)? {
            1 => Way::Read,
            2 => Way::Write,
            other => return Err(field("kind", other)),
        };
        let len = u32_at(bytes, 24)?;
        if usize::try_from(len).map_or(true, |len| len > MAX_REQUEST_BYTES) {
            return Err(field("length", len));
        }
        zero("reserved bytes", u32_at(bytes, 28)?)?;
        Ok(Self {
            id: id_at(bytes)?,
            way,
            region: RegionId(u32_at(bytes, 12)?),
            offset: u64_at(bytes, 16)?,
            len,
        })
    }
}

impl Reply {
    /// The message.
    pub fn encode(&self) -> [u8; REPLY_LEN_BYTES] {
        let mut bytes = [0; REPLY_LEN_BYTES];
        let (kind, len, epoch): (u32, u32, u64) = match self.outcome {
            Outcome::Data(len) => (1, len, 0),
            Outcome::Done => (2, 0, 0),
            Outcome::OutOfBounds => (3, 0, 0),
            Outcome::WrongEpoch(epoch) => (4, 0, epoch),
            Outcome::NoRight => (5, 0, 0),
            Outcome::Failed => (6, 0, 0),
        };
        put(&mut bytes, 0, &self.id.to_le_bytes());
        put(&mut bytes, 8, &kind.to_le_bytes());
        put(&mut bytes, 12, &len.to_le_bytes());
        put(&mut bytes, 16, &epoch.to_le_bytes());
        bytes
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8; REPLY_LEN_BYTES]) -> Result<Self, FrameError> {
        let (kind, len, epoch) = (u32_at(bytes, 8)?, u32_at(bytes, 12)?, u64_at(bytes, 16)?);
        let outcome = match kind {
            1 if usize::try_from(len).is_ok_and(|len| len <= MAX_REQUEST_BYTES) => {
                Outcome::Data(len)
            }
            2 => Outcome::Done,
            3 => Outcome::OutOfBounds,
            4 if epoch != 0 => Outcome::WrongEpoch(epoch),
            5 => Outcome::NoRight,
            6 => Outcome::Failed,
            1 => return Err(field("length", len)),
            4 => return Err(field("epoch", epoch)),
            other => return Err(field("kind", other)),
        };
        if kind != 1 {
            zero("length", len)?;
        }
        if kind != 4 {
            zero("epoch", epoch)?;
        }
        Ok(Self {
            id: id_at(bytes)?,
            outcome,
        })
    }
}

fn id_at(bytes: &[u8]) -> Result<u64, FrameError> {
    match u64_at(bytes, 0)? {
        0 => Err(field("id", 0_u64)),
        id => Ok(id),
    }
}
