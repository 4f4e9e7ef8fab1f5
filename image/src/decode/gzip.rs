//! Gzip as a state machine that is fed and drained in pieces: many members, zero padding behind
//! the last one (as tapes and some registries leave it), nothing else.
//!
//! Source: RFC 1952. Deflate and CRC-32 are flate2's; framing is done here because layers of many
//! small members (eStargz makes one per file) need the inflater kept between members.

use flate2::{Crc, Decompress, FlushDecompress, Status};

use super::stream::{Inflate, Step};

const FLAG_HEADER_CRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;
const FLAGS_RESERVED: u8 = 0b1110_0000;

/// Longest file name or comment in a member's header that is skipped without complaint.
const TEXT_MAX: u32 = 64 << 10;

/// What the next input byte belongs to.
#[derive(Clone, Copy, Debug)]
enum Expect {
    /// The fixed ten bytes of a member's header, this many seen.
    Header(usize),
    /// Length of the extra field, this many bytes seen.
    ExtraLength(usize),
    /// Extra field, this many bytes left.
    Extra(u16),
    /// File name, this many bytes seen.
    Name(u32),
    /// Comment, this many bytes seen.
    Comment(u32),
    /// Checksum of the header, this many bytes left.
    HeaderCrc(u8),
    /// Deflate data.
    Body,
    /// CRC-32 and length, this many bytes seen.
    Trailer(usize),
    /// Zeros behind the last member.
    Padding,
}

/// Decompresses one blob.
pub(super) struct Gunzip {
    expect: Expect,
    /// Header or trailer bytes of the current member.
    field: [u8; 10],
    /// Flags of the header parts that are still to come.
    flags: u8,
    members: u64,
    inflate: Decompress,
    crc: Crc,
}

impl Gunzip {
    pub(super) fn new() -> Self {
        Self {
            expect: Expect::Header(0),
            field: [0; 10],
            flags: 0,
            members: 0,
            inflate: Decompress::new(false),
            crc: Crc::new(),
        }
    }

    /// Takes one byte that is not deflate data.
    fn frame_byte(&mut self, byte: u8) -> Result<(), &'static str> {
        self.expect = match self.expect {
            Expect::Header(0) if byte == 0 && self.members > 0 => Expect::Padding,
            Expect::Header(seen) => {
                self.field[seen] = byte;
                self.check_magic(seen)?;
                if seen == 9 {
                    self.next_part()
                } else {
                    Expect::Header(seen + 1)
                }
            }
            Expect::ExtraLength(0) => {
                self.field[0] = byte;
                Expect::ExtraLength(1)
            }
            Expect::ExtraLength(_) => match u16::from_le_bytes([self.field[0], byte]) {
                0 => self.next_part(),
                length => Expect::Extra(length),
            },
            Expect::Extra(1) => self.next_part(),
            Expect::Extra(left) => Expect::Extra(left - 1),
            Expect::Name(_) | Expect::Comment(_) if byte == 0 => self.next_part(),
            Expect::Name(seen) if seen < TEXT_MAX => Expect::Name(seen + 1),
            Expect::Comment(seen) if seen < TEXT_MAX => Expect::Comment(seen + 1),
            Expect::Name(_) | Expect::Comment(_) => return Err("the member's header is too long"),
            Expect::HeaderCrc(1) => self.next_part(),
            Expect::HeaderCrc(left) => Expect::HeaderCrc(left - 1),
            Expect::Trailer(seen) => {
                self.field[seen] = byte;
                if seen < 7 {
                    Expect::Trailer(seen + 1)
                } else {
                    self.check_trailer()?;
                    self.members += 1;
                    Expect::Header(0)
                }
            }
            Expect::Padding if byte == 0 => Expect::Padding,
            Expect::Padding => return Err("something other than zeros follows the last member"),
            Expect::Body => Expect::Body,
        };
        Ok(())
    }

    fn check_magic(&mut self, seen: usize) -> Result<(), &'static str> {
        let byte = self.field[seen];
        match seen {
            0 if byte != 0x1f => Err(self.not_gzip()),
            1 if byte != 0x8b => Err(self.not_gzip()),
            2 if byte != 8 => Err("the member is not compressed with deflate"),
            3 if byte & FLAGS_RESERVED != 0 => Err("the member's header has reserved flags"),
            3 => {
                self.flags = byte;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn not_gzip(&self) -> &'static str {
        if self.members == 0 {
            "this is not gzip"
        } else {
            "something that is neither a member nor zeros follows a member"
        }
    }

    /// The next optional part of the header, in the order of RFC 1952 section 2.3, or the body.
    fn next_part(&mut self) -> Expect {
        for (flag, part) in [
            (FLAG_EXTRA, Expect::ExtraLength(0)),
            (FLAG_NAME, Expect::Name(0)),
            (FLAG_COMMENT, Expect::Comment(0)),
            (FLAG_HEADER_CRC, Expect::HeaderCrc(2)),
        ] {
            if self.flags & flag != 0 {
                self.flags &= !flag;
                return part;
            }
        }
        self.inflate.reset(false);
        self.crc.reset();
        Expect::Body
    }

    fn check_trailer(&self) -> Result<(), &'static str> {
        let word = |at: usize| {
            u32::from_le_bytes([
                self.field[at],
                self.field[at + 1],
                self.field[at + 2],
                self.field[at + 3],
            ])
        };
        if word(0) != self.crc.sum() {
            return Err("a member's checksum is wrong");
        }
        if word(4) != self.crc.amount() {
            return Err("a member's length is wrong");
        }
        Ok(())
    }
}

impl Inflate for Gunzip {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, String> {
        let mut used = 0;
        while !matches!(self.expect, Expect::Body) {
            let Some(&byte) = input.get(used) else {
                return Ok(Step { used, made: 0 });
            };
            self.frame_byte(byte)?;
            used += 1;
        }
        let (in_before, out_before) = (self.inflate.total_in(), self.inflate.total_out());
        let status = self
            .inflate
            .decompress(&input[used..], output, FlushDecompress::None)
            .map_err(|error| format!("damaged deflate data: {error}"))?;
        let made = (self.inflate.total_out() - out_before) as usize;
        used += (self.inflate.total_in() - in_before) as usize;
        self.crc.update(&output[..made]);
        if status == Status::StreamEnd {
            self.expect = Expect::Trailer(0);
        }
        Ok(Step { used, made })
    }

    fn finish(&self) -> Result<(), String> {
        match self.expect {
            Expect::Padding => Ok(()),
            Expect::Header(0) if self.members > 0 => Ok(()),
            _ => Err("the stream ends in the middle of a member".to_owned()),
        }
    }

    fn format(&self) -> &'static str {
        "gzip"
    }
}
