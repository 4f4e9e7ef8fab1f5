//! The messages between a reader and a donor of shared memory.
//!
//! Each is one packet of a `SOCK_SEQPACKET` unix socket, little-endian, with no padding but the
//! reserved bytes, which are zero. The parsers are pure functions over bytes and accept exactly
//! what the encoders give: `parse(bytes) == Ok(x)` implies `x.encode() == bytes`.
//!
//! ```text
//! hello, 64 bytes, the reader's first and only message
//!    0  8  magic "HRBRSHM\0"          12  4  reserved
//!    8  2  version, 2                 16  8  epoch wanted, 0 for whichever it is
//!   10  2  access: 1 read,            24 32  token, zeros for none
//!          2 read and write           56  8  reserved
//!
//! answer, a head of 32 bytes, then regions in order of their id: of a welcome and of an addition
//! 16 bytes each, of a retirement only the id
//!    0  8  magic "HRBRSHM\0"           0  4  id
//!    8  2  version, 2                  4  4  flags: 1 huge pages
//!   10  2  kind                        8  8  length in bytes
//!   12  4  number of regions, reason of a refusal, else 0
//!   16  8  epoch of the donor, 0 in a refusal
//!   24  8  reserved
//! ```
//!
//! A welcome and an addition carry one memfd for each region, in the same order, as `SCM_RIGHTS`.
//! After the welcome the reader sends nothing; the donor sends retirements and additions as its
//! regions go and come, and at most one revocation before it closes.
//!
//! Version 2 added retirements and additions.

use crate::{
    memory::REGION_ALIGN_BYTES,
    transport::{Access, RegionId, RegionInfo},
    wire::{array_at, field, put, u16_at, u32_at, u64_at, zero},
};

pub use crate::{token::Token, wire::FrameError};

/// First bytes of every message.
pub const MAGIC: [u8; 8] = *b"HRBRSHM\0";
/// The one version that is spoken.
pub const VERSION: u16 = 2;
/// Length of a hello in bytes.
pub const HELLO_LEN_BYTES: usize = 64;
/// Length of the fixed part of an answer in bytes.
pub const HEAD_LEN_BYTES: usize = 32;
/// Length of one region of a welcome in bytes.
pub const REGION_LEN_BYTES: usize = 16;
/// Length of one region of a retirement in bytes.
pub const ID_LEN_BYTES: usize = 4;
/// A donor lends at most this many regions: their memfds go into one message.
pub const MAX_REGIONS: usize = 64;
/// Length of the longest answer in bytes.
pub const MAX_ANSWER_LEN_BYTES: usize = HEAD_LEN_BYTES + MAX_REGIONS * REGION_LEN_BYTES;
/// Length of the longest region in bytes: 64 TiB.
pub const MAX_REGION_BYTES: u64 = 1 << 46;

const KIND_WELCOME: u16 = 1;
const KIND_WRONG_EPOCH: u16 = 2;
const KIND_REFUSED: u16 = 3;
const KIND_REVOKED: u16 = 4;
const KIND_RETIRED: u16 = 5;
const KIND_ADDED: u16 = 6;
const FLAG_HUGE_PAGES: u32 = 1;

/// What a reader asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What it wants to do.
    pub access: Access,
    /// The epoch that it knows, or 0 for whichever it is.
    pub epoch: u64,
    /// The donor's token.
    pub token: Token,
}

/// Why a donor refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The hello was none.
    Malformed,
    /// The donor speaks another version.
    Version,
    /// This user may not have the access it asked for.
    Access,
    /// Wrong token.
    Token,
    /// Every slot is taken, or the donor is between two epochs: come back later.
    Busy,
}

/// What a donor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Its regions, with their memfds.
    Welcome {
        /// Its epoch, not 0.
        epoch: u64,
        /// 1 to [`MAX_REGIONS`] regions with growing ids.
        regions: Vec<RegionInfo>,
    },
    /// The wanted epoch is not this one.
    WrongEpoch {
        /// The donor's epoch, not 0.
        actual: u64,
    },
    /// No.
    Refused(Refusal),
    /// The memory was taken back; the next epoch has begun.
    Revoked {
        /// It, not 0.
        epoch: u64,
    },
    /// These regions are no longer lent; the others and the epoch stay.
    Retired {
        /// The donor's epoch, not 0.
        epoch: u64,
        /// 1 to [`MAX_REGIONS`] growing ids.
        regions: Vec<RegionId>,
    },
    /// These regions are lent too, with their memfds.
    Added {
        /// The donor's epoch, not 0.
        epoch: u64,
        /// 1 to [`MAX_REGIONS`] regions with growing ids.
        regions: Vec<RegionInfo>,
    },
}

impl Hello {
    /// The message.
    pub fn encode(&self) -> [u8; HELLO_LEN_BYTES] {
        let mut bytes = [0; HELLO_LEN_BYTES];
        let access: u16 = match self.access {
            Access::Read => 1,
            Access::ReadWrite => 2,
        };
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 10, &access.to_le_bytes());
        put(&mut bytes, 16, &self.epoch.to_le_bytes());
        put(&mut bytes, 24, &self.token.0);
        bytes
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        check_head(bytes)?;
        if bytes.len() != HELLO_LEN_BYTES {
            return Err(FrameError::Length(bytes.len()));
        }
        let access = match u16_at(bytes, 10)? {
            1 => Access::Read,
            2 => Access::ReadWrite,
            other => return Err(field("access", other)),
        };
        zero("reserved bytes", u32_at(bytes, 12)?)?;
        zero("reserved bytes", u64_at(bytes, 56)?)?;
        Ok(Self {
            access,
            epoch: u64_at(bytes, 16)?,
            token: Token(array_at(bytes, 24)?),
        })
    }
}

impl Answer {
    /// The message.
    pub fn encode(&self) -> Vec<u8> {
        // More regions than fit in a count are more than `parse` takes anyway.
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (kind, count, epoch) = match self {
            Self::Welcome { epoch, regions } => (KIND_WELCOME, number(regions.len()), *epoch),
            Self::WrongEpoch { actual } => (KIND_WRONG_EPOCH, 0, *actual),
            Self::Refused(refusal) => (KIND_REFUSED, refusal.code(), 0),
            Self::Revoked { epoch } => (KIND_REVOKED, 0, *epoch),
            Self::Retired { epoch, regions } => (KIND_RETIRED, number(regions.len()), *epoch),
            Self::Added { epoch, regions } => (KIND_ADDED, number(regions.len()), *epoch),
        };
        let mut bytes = Vec::with_capacity(HEAD_LEN_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(epoch.to_le_bytes());
        bytes.extend([0; 8]);
        match self {
            Self::Welcome { regions, .. } | Self::Added { regions, .. } => {
                for region in regions {
                    let flags = if region.huge_pages {
                        FLAG_HUGE_PAGES
                    } else {
                        0
                    };
                    bytes.extend(region.id.0.to_le_bytes());
                    bytes.extend(flags.to_le_bytes());
                    bytes.extend(region.len.to_le_bytes());
                }
            }
            Self::Retired { regions, .. } => {
                bytes.extend(regions.iter().flat_map(|id| id.0.to_le_bytes()));
            }
            Self::WrongEpoch { .. } | Self::Refused(_) | Self::Revoked { .. } => {}
        }
        bytes
    }

    /// Reads a whole message.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        check_head(bytes)?;
        let (kind, count, epoch) = (u16_at(bytes, 10)?, u32_at(bytes, 12)?, u64_at(bytes, 16)?);
        zero("reserved bytes", u64_at(bytes, 24)?)?;
        if (epoch == 0) != (kind == KIND_REFUSED) {
            return Err(field("epoch", epoch));
        }
        match kind {
            KIND_WELCOME => {
                let regions = parse_regions(bytes, count)?;
                return Ok(Self::Welcome { epoch, regions });
            }
            KIND_ADDED => {
                let regions = parse_regions(bytes, count)?;
                return Ok(Self::Added { epoch, regions });
            }
            KIND_RETIRED => {
                let regions = parse_ids(bytes, count)?;
                return Ok(Self::Retired { epoch, regions });
            }
            _ => {}
        }
        if bytes.len() != HEAD_LEN_BYTES {
            return Err(FrameError::Length(bytes.len()));
        }
        if kind == KIND_REFUSED {
            return Refusal::from_code(count)
                .map(Self::Refused)
                .ok_or_else(|| field("reason", count));
        }
        zero("count", count)?;
        match kind {
            KIND_WRONG_EPOCH => Ok(Self::WrongEpoch { actual: epoch }),
            KIND_REVOKED => Ok(Self::Revoked { epoch }),
            other => Err(field("kind", other)),
        }
    }
}

impl Refusal {
    fn code(self) -> u32 {
        match self {
            Self::Malformed => 1,
            Self::Version => 2,
            Self::Access => 3,
            Self::Token => 4,
            Self::Busy => 5,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [
            Self::Malformed,
            Self::Version,
            Self::Access,
            Self::Token,
            Self::Busy,
        ]
        .into_iter()
        .find(|refusal| refusal.code() == code)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it does not understand this reader",
            Self::Version => "it speaks another version of the protocol",
            Self::Access => "this user may not write to its memory",
            Self::Token => "wrong token",
            Self::Busy => "it has no room for another reader now",
        })
    }
}

/// The number of regions of a message, once its length fits.
fn number_of(bytes: &[u8], count: u32, each_len: usize) -> Result<usize, FrameError> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count == 0 || count > MAX_REGIONS {
        return Err(field("number of regions", count as u64));
    }
    if bytes.len() != HEAD_LEN_BYTES + count * each_len {
        return Err(FrameError::Length(bytes.len()));
    }
    Ok(count)
}

fn parse_ids(bytes: &[u8], count: u32) -> Result<Vec<RegionId>, FrameError> {
    let count = number_of(bytes, count, ID_LEN_BYTES)?;
    let mut ids: Vec<RegionId> = Vec::with_capacity(count);
    for index in 0..count {
        let id = RegionId(u32_at(bytes, HEAD_LEN_BYTES + index * ID_LEN_BYTES)?);
        if ids.last().is_some_and(|before| *before >= id) {
            return Err(field("region out of order", id.0));
        }
        ids.push(id);
    }
    Ok(ids)
}

fn parse_regions(bytes: &[u8], count: u32) -> Result<Vec<RegionInfo>, FrameError> {
    let count = number_of(bytes, count, REGION_LEN_BYTES)?;
    let mut regions: Vec<RegionInfo> = Vec::with_capacity(count);
    for index in 0..count {
        let at = HEAD_LEN_BYTES + index * REGION_LEN_BYTES;
        let (id, flags, len) = (
            u32_at(bytes, at)?,
            u32_at(bytes, at + 4)?,
            u64_at(bytes, at + 8)?,
        );
        if regions.last().is_some_and(|before| before.id.0 >= id) {
            return Err(field("region out of order", id));
        }
        if flags & !FLAG_HUGE_PAGES != 0 {
            return Err(field("region flags", flags));
        }
        if len == 0 || len > MAX_REGION_BYTES || !len.is_multiple_of(REGION_ALIGN_BYTES) {
            return Err(field("region length", len));
        }
        regions.push(RegionInfo {
            id: RegionId(id),
            len,
            huge_pages: flags & FLAG_HUGE_PAGES != 0,
        });
    }
    Ok(regions)
}

/// Magic and version, which every message of every version begins with.
fn check_head(bytes: &[u8]) -> Result<(), FrameError> {
    if array_at::<8>(bytes, 0)? != MAGIC {
        return Err(FrameError::Magic);
    }
    match u16_at(bytes, 8)? {
        VERSION => Ok(()),
        other => Err(FrameError::Version(other)),
    }
}

#[cfg(test)]
mod tests;
