//! The messages between a reader and a donor over TCP.
//!
//! Little-endian, with no padding but reserved bytes, which are zero. The parsers are pure
//! functions over bytes and accept exactly what the encoders give: `parse(bytes) == Ok(x)` implies
//! `x.encode() == bytes`. A connection begins with one greeting (donor), one hello (reader) and one
//! answer (donor); what follows a welcome to a hello for data is in [`data`].
//!
//! ```text
//! greeting, 64 bytes                      hello, a head of 32 bytes, then proofs of 40, then a payload
//!    0  8  magic "HRBRTCP\0"                 0  8  magic "HRBRTCP\0"
//!    8  2  version, 1                        8  2  version, 1
//!   10  2  kind, 1                          10  2  kind: 2 data, 3 verbs set-up
//!   12  4  reserved                         12  2  access: 1 read, 2 read and write
//!   16  8  epoch of the donor               14  2  number of proofs, 1 to 128
//!   24 32  nonce                            16  8  epoch of the greeting
//!   56  8  reserved                         24  4  length of the payload, 0 for data
//!                                           28  4  reserved
//! proof, 40 bytes, by growing region      answer, a head of 32 bytes, then regions of 16, then a payload
//! and right                                  0  8  magic "HRBRTCP\0"
//!    0  4  region                            8  2  version, 1
//!    4  4  right: 1 read, 2 write           10  2  kind: 4 welcome, 5 wrong epoch, 6 refused
//!    8 32  BLAKE3 keyed with the token      12  4  number of regions, 0 to 64; reason of a refusal
//!                                           16  8  epoch of the donor, 0 in a refusal
//! region, 16 bytes, by growing id           24  4  length of the payload, 0 unless a welcome to verbs
//!    0  4  id                               28  4  reserved
//!    4  4  flags: 1 huge pages, 2 may be
//!          read, 4 may be written
//!    8  8  length in bytes
//! ```
//!
//! A proof of a region that the donor does not lend (any more) is passed over, so a welcome may
//! name fewer regions than the hello, or none; a proof that is wrong is a refusal.

use crate::{
    memory::REGION_ALIGN_BYTES,
    shm::frames::{MAX_REGION_BYTES, MAX_REGIONS},
    token::{Proof, Right},
    transport::{Access, RegionId, RegionInfo},
    wire::{FrameError, array_at, field, put, u16_at, u32_at, u64_at, zero},
};

pub mod data;

/// First bytes of every message of a handshake.
pub const MAGIC: [u8; 8] = *b"HRBRTCP\0";
/// The one version there is: everything above.
pub const VERSION: u16 = 1;
/// Length of a greeting in bytes.
pub const GREETING_LEN_BYTES: usize = 64;
/// Length of the fixed part of a hello or an answer in bytes.
pub const HEAD_LEN_BYTES: usize = 32;
/// Length of one proof in bytes.
pub const PROOF_LEN_BYTES: usize = 40;
/// Length of one region of a welcome in bytes.
pub const REGION_LEN_BYTES: usize = 16;
/// Proofs of one hello: two for each region.
pub const MAX_PROOFS: usize = 2 * MAX_REGIONS;
/// Length of the longest payload in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 4096;
/// Length of the longest hello in bytes.
pub const MAX_HELLO_LEN_BYTES: usize =
    HEAD_LEN_BYTES + MAX_PROOFS * PROOF_LEN_BYTES + MAX_PAYLOAD_BYTES;
/// Length of the longest answer in bytes.
pub const MAX_ANSWER_LEN_BYTES: usize =
    HEAD_LEN_BYTES + MAX_REGIONS * REGION_LEN_BYTES + MAX_PAYLOAD_BYTES;

const KIND_GREETING: u16 = 1;
const KIND_DATA: u16 = 2;
const KIND_VERBS: u16 = 3;
const KIND_WELCOME: u16 = 4;
const KIND_WRONG_EPOCH: u16 = 5;
const KIND_REFUSED: u16 = 6;
const FLAG_HUGE_PAGES: u32 = 1;
const FLAG_READ: u32 = 2;
const FLAG_WRITE: u32 = 4;

/// What a donor says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Its epoch, not 0.
    pub epoch: u64,
    /// Random, of this connection alone.
    pub nonce: [u8; 32],
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Reads and writes over this connection.
    Data,
    /// Reads and writes over queue pairs that this connection sets up and whose life it is. The
    /// payload, 1 to [`MAX_PAYLOAD_BYTES`] bytes, means nothing here.
    Verbs(Vec<u8>),
}

/// What a reader asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What for.
    pub purpose: Purpose,
    /// What it wants to do.
    pub access: Access,
    /// The epoch of the greeting, not 0.
    pub epoch: u64,
    /// 1 to [`MAX_PROOFS`] proofs by growing region and right.
    pub proofs: Vec<(RegionId, Right, Proof)>,
}

/// A region and what the connection may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The region.
    pub info: RegionInfo,
    /// It may be read.
    pub read: bool,
    /// It may be written.
    pub write: bool,
}

/// Why a donor refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The hello was none.
    Malformed,
    /// The donor speaks another version.
    Version,
    /// A proof is wrong.
    Token,
    /// Every slot is taken, or the donor is between two epochs: come back later.
    Busy,
    /// The donor has no RDMA, or could not set it up: there is still TCP.
    Verbs,
}

/// What a donor answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The regions that were proved and are lent.
    Welcome {
        /// The donor's epoch, not 0.
        epoch: u64,
        /// At most [`MAX_REGIONS`] with growing ids, each with a right at least.
        regions: Vec<Grant>,
        /// The other half of a verbs set-up, at most [`MAX_PAYLOAD_BYTES`] bytes; empty for data.
        payload: Vec<u8>,
    },
    /// The epoch changed since the greeting.
    WrongEpoch {
        /// The donor's epoch, not 0.
        actual: u64,
    },
    /// No.
    Refused(Refusal),
}

impl Greeting {
    /// The message.
    pub fn encode(&self) -> [u8; GREETING_LEN_BYTES] {
        let mut bytes = [0; GREETING_LEN_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 10, &KIND_GREETING.to_le_bytes());
        put(&mut bytes, 16, &self.epoch.to_le_bytes());
        put(&mut bytes, 24, &self.nonce);
        bytes
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        check_head(bytes)?;
        whole(bytes, GREETING_LEN_BYTES)?;
        match u16_at(bytes, 10)? {
            KIND_GREETING => {}
            other => return Err(field("kind", other)),
        }
        zero("reserved bytes", u32_at(bytes, 12)?)?;
        zero("reserved bytes", u64_at(bytes, 56)?)?;
        Ok(Self {
            epoch: epoch_at(bytes, 16)?,
            nonce: array_at(bytes, 24)?,
        })
    }
}

impl Hello {
    /// The message.
    pub fn encode(&self) -> Vec<u8> {
        let none: &[u8] = &[];
        let (kind, payload) = match &self.purpose {
            Purpose::Data => (KIND_DATA, none),
            Purpose::Verbs(payload) => (KIND_VERBS, payload.as_slice()),
        };
        let access: u16 = match self.access {
            Access::Read => 1,
            Access::ReadWrite => 2,
        };
        // More of either than fits in its field is more than `parse` takes anyway.
        let proofs = u16::try_from(self.proofs.len()).unwrap_or(u16::MAX);
        let mut bytes = Vec::with_capacity(
            HEAD_LEN_BYTES + self.proofs.len() * PROOF_LEN_BYTES + payload.len(),
        );
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(access.to_le_bytes());
        bytes.extend(proofs.to_le_bytes());
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(len_of(payload).to_le_bytes());
        bytes.extend([0; 4]);
        for (region, right, proof) in &self.proofs {
            let right: u32 = match right {
                Right::Read => 1,
                Right::Write => 2,
            };
            bytes.extend(region.0.to_le_bytes());
            bytes.extend(right.to_le_bytes());
            bytes.extend(proof.0);
        }
        bytes.extend(payload);
        bytes
    }

    /// How long the message is that `head` begins, once [`HEAD_LEN_BYTES`] of it are there.
    pub fn len(head: &[u8]) -> Result<usize, FrameError> {
        check_head(head)?;
        let proofs = usize::from(u16_at(head, 14)?);
        if proofs == 0 || proofs > MAX_PROOFS {
            return Err(field("number of proofs", proofs as u64));
        }
        let payload = payload_at(head)?;
        match (u16_at(head, 10)?, payload) {
            (KIND_DATA, 0) | (KIND_VERBS, 1..) => {}
            (KIND_DATA | KIND_VERBS, other) => return Err(field("payload", other as u64)),
            (other, _) => return Err(field("kind", other)),
        }
        Ok(HEAD_LEN_BYTES + proofs * PROOF_LEN_BYTES + payload)
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let len = Self::len(bytes)?;
        whole(bytes, len)?;
        zero("reserved bytes", u32_at(bytes, 28)?)?;
        let access = match u16_at(bytes, 12)? {
            1 => Access::Read,
            2 => Access::ReadWrite,
            other => return Err(field("access", other)),
        };
        let epoch = epoch_at(bytes, 16)?;
        let payload = len - payload_at(bytes)?;
        let proofs = parse_proofs(bytes.get(HEAD_LEN_BYTES..payload).unwrap_or_default())?;
        let payload = bytes.get(payload..).unwrap_or_default();
        let purpose = if payload.is_empty() {
            Purpose::Data
        } else {
            Purpose::Verbs(payload.to_vec())
        };
        Ok(Self {
            purpose,
            access,
            epoch,
            proofs,
        })
    }
}

impl Answer {
    /// The message.
    pub fn encode(&self) -> Vec<u8> {
        let (no_regions, no_payload): (&[Grant], &[u8]) = (&[], &[]);
        let (kind, count, epoch, regions, payload) = match self {
            Self::Welcome {
                epoch,
                regions,
                payload,
            } => (
                KIND_WELCOME,
                u32::try_from(regions.len()).unwrap_or(u32::MAX),
                *epoch,
                regions.as_slice(),
                payload.as_slice(),
            ),
            Self::WrongEpoch { actual } => (KIND_WRONG_EPOCH, 0, *actual, no_regions, no_payload),
            Self::Refused(refusal) => (KIND_REFUSED, refusal.code(), 0, no_regions, no_payload),
        };
        let mut bytes =
            Vec::with_capacity(HEAD_LEN_BYTES + regions.len() * REGION_LEN_BYTES + payload.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(epoch.to_le_bytes());
        bytes.extend(len_of(payload).to_le_bytes());
        bytes.extend([0; 4]);
        for grant in regions {
            let flag = |set, flag| if set { flag } else { 0 };
            let flags = flag(grant.info.huge_pages, FLAG_HUGE_PAGES)
                | flag(grant.read, FLAG_READ)
                | flag(grant.write, FLAG_WRITE);
            bytes.extend(grant.info.id.0.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(grant.info.len.to_le_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    /// How long the message is that `head` begins, once [`HEAD_LEN_BYTES`] of it are there.
    pub fn len(head: &[u8]) -> Result<usize, FrameError> {
        check_head(head)?;
        let (kind, count, payload) = (u16_at(head, 10)?, u32_at(head, 12)?, payload_at(head)?);
        let regions = match kind {
            KIND_WELCOME => usize::try_from(count).unwrap_or(usize::MAX),
            KIND_WRONG_EPOCH | KIND_REFUSED if payload == 0 => 0,
            KIND_WRONG_EPOCH | KIND_REFUSED => return Err(field("payload", payload as u64)),
            other => return Err(field("kind", other)),
        };
        if regions > MAX_REGIONS {
            return Err(field("number of regions", count));
        }
        Ok(HEAD_LEN_BYTES + regions * REGION_LEN_BYTES + payload)
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let len = Self::len(bytes)?;
        whole(bytes, len)?;
        let (kind, count, epoch) = (u16_at(bytes, 10)?, u32_at(bytes, 12)?, u64_at(bytes, 16)?);
        zero("reserved bytes", u32_at(bytes, 28)?)?;
        if (epoch == 0) != (kind == KIND_REFUSED) {
            return Err(field("epoch", epoch));
        }
        match kind {
            KIND_WELCOME => {
                let payload = len - payload_at(bytes)?;
                let regions = bytes.get(HEAD_LEN_BYTES..payload).unwrap_or_default();
                Ok(Self::Welcome {
                    epoch,
                    regions: parse_regions(regions)?,
                    payload: bytes.get(payload..).unwrap_or_default().to_vec(),
                })
            }
            KIND_WRONG_EPOCH => {
                zero("count", count)?;
                Ok(Self::WrongEpoch { actual: epoch })
            }
            _ => Refusal::from_code(count)
                .map(Self::Refused)
                .ok_or_else(|| field("reason", count)),
        }
    }
}

impl Refusal {
    const ALL: [Self; 5] = [
        Self::Malformed,
        Self::Version,
        Self::Token,
        Self::Busy,
        Self::Verbs,
    ];

    fn code(self) -> u32 {
        match self {
            Self::Malformed => 1,
            Self::Version => 2,
            Self::Token => 3,
            Self::Busy => 4,
            Self::Verbs => 5,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| refusal.code() == code)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it does not understand this reader",
            Self::Version => "it speaks another version of the protocol",
            Self::Token => "wrong token",
            Self::Busy => "it has no room for another reader now",
            Self::Verbs => "it set up no RDMA",
        })
    }
}

fn parse_proofs(bytes: &[u8]) -> Result<Vec<(RegionId, Right, Proof)>, FrameError> {
    let mut proofs: Vec<(RegionId, Right, Proof)> =
        Vec::with_capacity(bytes.len() / PROOF_LEN_BYTES);
    for proof in bytes.chunks(PROOF_LEN_BYTES) {
        let region = RegionId(u32_at(proof, 0)?);
        let right = match u32_at(proof, 4)? {
            1 => Right::Read,
            2 => Right::Write,
            other => return Err(field("right", other)),
        };
        let last = proofs.last();
        if last.is_some_and(|(r, before, _)| (*r, *before) >= (region, right)) {
            return Err(field("proof out of order, of region", region.0));
        }
        proofs.push((region, right, Proof(array_at(proof, 8)?)));
    }
    Ok(proofs)
}

fn parse_regions(bytes: &[u8]) -> Result<Vec<Grant>, FrameError> {
    let mut regions: Vec<Grant> = Vec::with_capacity(bytes.len() / REGION_LEN_BYTES);
    for region in bytes.chunks(REGION_LEN_BYTES) {
        let (id, flags, len) = (u32_at(region, 0)?, u32_at(region, 4)?, u64_at(region, 8)?);
        if regions.last().is_some_and(|before| before.info.id.0 >= id) {
            return Err(field("region out of order", id));
        }
        let (read, write) = (flags & FLAG_READ != 0, flags & FLAG_WRITE != 0);
        if flags & !(FLAG_HUGE_PAGES | FLAG_READ | FLAG_WRITE) != 0 || !(read || write) {
            return Err(field("region flags", flags));
        }
        if len == 0 || len > MAX_REGION_BYTES || !len.is_multiple_of(REGION_ALIGN_BYTES) {
            return Err(field("region length", len));
        }
        regions.push(Grant {
            info: RegionInfo {
                id: RegionId(id),
                len,
                huge_pages: flags & FLAG_HUGE_PAGES != 0,
            },
            read,
            write,
        });
    }
    Ok(regions)
}

/// Magic and version, which every message of a handshake of every version begins with.
fn check_head(bytes: &[u8]) -> Result<(), FrameError> {
    if array_at::<8>(bytes, 0)? != MAGIC {
        return Err(FrameError::Magic);
    }
    match u16_at(bytes, 8)? {
        VERSION => Ok(()),
        other => Err(FrameError::Version(other)),
    }
}

fn whole(bytes: &[u8], len: usize) -> Result<(), FrameError> {
    if bytes.len() == len {
        Ok(())
    } else {
        Err(FrameError::Length(bytes.len()))
    }
}

fn epoch_at(bytes: &[u8], at: usize) -> Result<u64, FrameError> {
    match u64_at(bytes, at)? {
        0 => Err(field("epoch", 0_u64)),
        epoch => Ok(epoch),
    }
}

fn payload_at(head: &[u8]) -> Result<usize, FrameError> {
    let len = u32_at(head, 24)?;
    match usize::try_from(len) {
        Ok(payload) if payload <= MAX_PAYLOAD_BYTES => Ok(payload),
        _ => Err(field("payload", len)),
    }
}

fn len_of(payload: &[u8]) -> u32 {
    u32::try_from(payload.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
