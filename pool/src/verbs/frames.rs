//! The two messages that join a pair of queue pairs: payloads of a hello and a welcome on the
//! donor's TCP listener ([`crate::tcp::frames`]), which is where tokens are proved.
//!
//! Little-endian, addresses in network order; reserved bytes are zero. The parsers are pure
//! functions over bytes and accept exactly what the encoders give: `parse(bytes) == Ok(x)` implies
//! `x.encode() == bytes`.
//!
//! ```text
//! head of both, 64 bytes                    key of one region, 16 bytes, in the order of the
//!    0  8  magic "HRBRVRB\0"                 welcome's regions
//!    8  2  version, 1                           0  4  region
//!   10  2  kind: 1 request, 2 answer            4  4  remote key
//!   12  4  number of the queue pair             8  8  address of the region's first byte
//!   16  4  first packet number
//!   20  1  largest packet: 1 for 256 bytes to 5 for 4096
//!   21  1  reads at one time: asked by the reader, answered by the donor
//!   22  2  number of keys that follow, 0 to 64; 0 in a request
//!   24 16  GID of this end
//!   40 16  GID of the other end, as this end knows it: the address that was dialled
//!   56  8  reserved
//! ```

use crate::{
    shm::frames::MAX_REGIONS,
    transport::RegionId,
    wire::{FrameError, array_at, field, put, u16_at, u32_at, u64_at, zero},
};

/// First bytes of both messages.
pub const MAGIC: [u8; 8] = *b"HRBRVRB\0";
/// The one version there is: everything above.
pub const VERSION: u16 = 1;
/// Length of the fixed part in bytes.
pub const HEAD_LEN_BYTES: usize = 64;
/// Length of one key in bytes.
pub const KEY_LEN_BYTES: usize = 16;
/// Length of the longest answer in bytes.
pub const MAX_ANSWER_LEN_BYTES: usize = HEAD_LEN_BYTES + MAX_REGIONS * KEY_LEN_BYTES;

const KIND_REQUEST: u16 = 1;
const KIND_ANSWER: u16 = 2;
/// Queue pairs and packets are numbered with 24 bits.
const MAX_NUMBER: u32 = (1 << 24) - 1;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Number of its queue pair, 1 to 2^24 - 1.
    pub number: u32,
    /// First packet number, below 2^24.
    pub psn: u32,
    /// Largest packet as verbs write it, 1 to 5.
    pub mtu: u8,
    /// Reads at one time, not 0.
    pub reads: u8,
    /// Its address.
    pub gid: [u8; 16],
    /// The other end's address.
    pub peer_gid: [u8; 16],
}

/// Where a region lies for a peer that may reach it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RemoteKey {
    /// The region.
    pub region: RegionId,
    /// What opens it.
    pub key: u32,
    /// What its first byte is called, not 0.
    pub address: u64,
}

impl std::fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RemoteKey({:?}, …)", self.region)
    }
}

/// What a reader asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub End);

/// What a donor answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its end.
    pub end: End,
    /// At most [`MAX_REGIONS`] keys by growing region.
    pub keys: Vec<RemoteKey>,
}

impl Request {
    /// The message.
    pub fn encode(&self) -> Vec<u8> {
        self.0.encode(KIND_REQUEST, 0)
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let (end, keys) = End::parse(bytes, KIND_REQUEST)?;
        zero("number of keys", u64::from(keys))?;
        whole(bytes, HEAD_LEN_BYTES)?;
        Ok(Self(end))
    }
}

impl Answer {
    /// The message.
    pub fn encode(&self) -> Vec<u8> {
        // More than fits in a count is more than `parse` takes anyway.
        let count = u16::try_from(self.keys.len()).unwrap_or(u16::MAX);
        let mut bytes = self.end.encode(KIND_ANSWER, count);
        for key in &self.keys {
            bytes.extend(key.region.0.to_le_bytes());
            bytes.extend(key.key.to_le_bytes());
            bytes.extend(key.address.to_le_bytes());
        }
        bytes
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let (end, count) = End::parse(bytes, KIND_ANSWER)?;
        let count = usize::from(count);
        if count > MAX_REGIONS {
            return Err(field("number of keys", count as u64));
        }
        whole(bytes, HEAD_LEN_BYTES + count * KEY_LEN_BYTES)?;
        let mut keys = Vec::with_capacity(count);
        for at in (HEAD_LEN_BYTES..bytes.len()).step_by(KEY_LEN_BYTES) {
            let key = RemoteKey {
                region: RegionId(u32_at(bytes, at)?),
                key: u32_at(bytes, at + 4)?,
                address: u64_at(bytes, at + 8)?,
            };
            if key.address == 0 {
                return Err(field("address of a region", 0_u64));
            }
            let last: Option<&RemoteKey> = keys.last();
            if last.is_some_and(|last| last.region >= key.region) {
                return Err(field("order of regions", key.region.0));
            }
            keys.push(key);
        }
        Ok(Self { end, keys })
    }
}

impl End {
    fn encode(&self, kind: u16, keys: u16) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_LEN_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 10, &kind.to_le_bytes());
        put(&mut bytes, 12, &self.number.to_le_bytes());
        put(&mut bytes, 16, &self.psn.to_le_bytes());
        put(&mut bytes, 20, &[self.mtu, self.reads]);
        put(&mut bytes, 22, &keys.to_le_bytes());
        put(&mut bytes, 24, &self.gid);
        put(&mut bytes, 40, &self.peer_gid);
        bytes
    }

    fn parse(bytes: &[u8], kind: u16) -> Result<(Self, u16), FrameError> {
        if array_at::<8>(bytes, 0)? != MAGIC {
            return Err(FrameError::Magic);
        }
        match u16_at(bytes, 8)? {
            VERSION => {}
            other => return Err(FrameError::Version(other)),
        }
        match u16_at(bytes, 10)? {
            other if other != kind => return Err(field("kind", other)),
            _ => {}
        }
        let [mtu, reads] = array_at(bytes, 20)?;
        let end = Self {
            number: u32_at(bytes, 12)?,
            psn: u32_at(bytes, 16)?,
            mtu,
            reads,
            gid: array_at(bytes, 24)?,
            peer_gid: array_at(bytes, 40)?,
        };
        zero("reserved bytes", u64_at(bytes, 56)?)?;
        if end.number == 0 || end.number > MAX_NUMBER {
            return Err(field("number of a queue pair", end.number));
        }
        if end.psn > MAX_NUMBER {
            return Err(field("first packet number", end.psn));
        }
        if !(1..=5).contains(&mtu) {
            return Err(field("largest packet", mtu));
        }
        if reads == 0 {
            return Err(field("reads at one time", reads));
        }
        Ok((end, u16_at(bytes, 22)?))
    }
}

fn whole(bytes: &[u8], len: usize) -> Result<(), FrameError> {
    if bytes.len() == len {
        Ok(())
    } else {
        Err(FrameError::Length(bytes.len()))
    }
}

#[cfg(test)]
mod tests;
