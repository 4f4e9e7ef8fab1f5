//! A batch as one stream of bytes: which pieces of the donor's memory it is made of, and the
//! caller's buffers that it comes from or goes to.

use crate::{
    sys::Mapping,
    transport::{Read, Write},
};

/// Bytes of one piece of work: enough to keep a link busy, few enough that copying them out overlaps
/// with the next ones under way.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// Where one operation lies in the donor's memory. Its bounds have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// What the donor's device calls its first byte.
    pub(super) address: u64,
    /// What opens it.
    pub(super) key: u32,
    /// Its length in bytes.
    pub(super) len: usize,
}

/// Cuts places into pieces: neighbours are joined, long ones divided.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    places: &'a [Place],
    /// Bytes of the first place that are behind us.
    done: usize,
}

impl<'a> Plan<'a> {
    pub(super) fn new(places: &'a [Place]) -> Self {
        Self { places, done: 0 }
    }

    /// The next piece, without taking it.
    pub(super) fn peek(&self) -> Option<Place> {
        self.clone_from_here().take()
    }

    /// The next piece.
    pub(super) fn take(&mut self) -> Option<Place> {
        let mut piece: Option<Place> = None;
        while let Some((first, rest)) = self.places.split_first() {
            let left = first.len - self.done;
            if left == 0 {
                (self.places, self.done) = (rest, 0);
                continue;
            }
            let address = first.address.wrapping_add(self.done as u64);
            let joined = match &mut piece {
                None => piece.insert(Place {
                    address,
                    key: first.key,
                    len: 0,
                }),
                Some(piece) => {
                    let end = piece.address.wrapping_add(piece.len as u64);
                    if end != address || piece.key != first.key || piece.len == PIECE_BYTES {
                        break;
                    }
                    piece
                }
            };
            let step = left.min(PIECE_BYTES - joined.len);
            joined.len += step;
            self.done += step;
        }
        piece
    }

    fn clone_from_here(&self) -> Plan<'a> {
        Plan {
            places: self.places,
            done: self.done,
        }
    }
}

/// The caller's side of a batch: filled or read from front to back, in the order of the plan.
#[derive(Debug)]
pub(super) enum Stream<'a, 'b> {
    /// Bytes arrive.
    Into(&'a mut [Read<'b>], Cursor),
    /// Bytes leave.
    From(&'a [Write<'b>], Cursor),
}

/// How far a batch has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    index: usize,
    at: usize,
}

impl Cursor {
    /// Says that `step` bytes of a buffer of `len` are done.
    fn advance(&mut self, step: usize, len: usize) {
        self.at += step;
        if self.at >= len {
            *self = Self {
                index: self.index + 1,
                at: 0,
            };
        }
    }
}

impl Stream<'_, '_> {
    /// Moves `len` bytes between the stream and `offset` of `buffer`; false when either has not as
    /// many.
    #[must_use]
    pub(super) fn transfer(&mut self, buffer: &Mapping, offset: usize, len: usize) -> bool {
        let (mut offset, mut left) = (offset, len);
        while left > 0 {
            let step = match self {
                Self::Into(batch, cursor) => {
                    let Some(read) = batch.get_mut(cursor.index) else {
                        return false;
                    };
                    let total = read.into.len();
                    let rest = read.into.get_mut(cursor.at..).unwrap_or_default();
                    let step = rest.len().min(left);
                    let (now, _) = rest.split_at_mut(step);
                    if !buffer.copy_out(offset, now) {
                        return false;
                    }
                    cursor.advance(step, total);
                    step
                }
                Self::From(batch, cursor) => {
                    let Some(write) = batch.get(cursor.index) else {
                        return false;
                    };
                    let rest = write.from.get(cursor.at..).unwrap_or_default();
                    let step = rest.len().min(left);
                    let (now, _) = rest.split_at(step);
                    if !buffer.copy_in(offset, now) {
                        return false;
                    }
                    cursor.advance(step, write.from.len());
                    step
                }
            };
            offset += step;
            left -= step;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::{HugePages, Memory, REGION_ALIGN_BYTES},
        transport::RegionId,
    };

    fn place(address: u64, key: u32, len: usize) -> Place {
        Place { address, key, len }
    }

    fn pieces(places: &[Place]) -> Vec<Place> {
        let mut plan = Plan::new(places);
        let mut pieces = Vec::new();
        loop {
            let peeked = plan.peek();
            let taken = plan.take();
            assert_eq!(peeked, taken);
            match taken {
                Some(piece) => pieces.push(piece),
                None => return pieces,
            }
        }
    }

    #[test]
    fn neighbours_are_joined_and_long_ones_divided() {
        assert_eq!(pieces(&[]), []);
        assert_eq!(pieces(&[place(5, 1, 0), place(9, 1, 0)]), []);
        let apart = [
            place(0, 1, 10),
            place(11, 1, 10),
            place(21, 2, 10),
            place(0, 1, 5),
        ];
        assert_eq!(pieces(&apart), apart);
        let joined = [
            place(100, 1, 10),
            place(0, 3, 0),
            place(110, 1, 20),
            place(130, 1, 1),
            place(131, 2, 1),
        ];
        assert_eq!(pieces(&joined), [place(100, 1, 31), place(131, 2, 1)]);
        let long = [
            place(0, 1, PIECE_BYTES - 1),
            place(PIECE_BYTES as u64 - 1, 1, PIECE_BYTES + 2),
        ];
        let expected = [
            place(0, 1, PIECE_BYTES),
            place(PIECE_BYTES as u64, 1, PIECE_BYTES),
            place(2 * PIECE_BYTES as u64, 1, 1),
        ];
        assert_eq!(pieces(&long), expected);
    }

    #[test]
    fn streams_go_from_front_to_back() {
        let memory = Memory::new(REGION_ALIGN_BYTES, HugePages::Never, false).unwrap();
        let buffer = Mapping::new(&memory, true).unwrap();
        let write = |from| Write {
            region: RegionId(0),
            offset: 0,
            from,
        };
        let batch = [
            write(b"one".as_slice()),
            write(b""),
            write(b"two!"),
            write(b"5"),
        ];
        let mut stream = Stream::From(&batch, Cursor::default());
        assert!(stream.transfer(&buffer, 100, 2));
        assert!(stream.transfer(&buffer, 200, 6));
        assert!(!stream.transfer(&buffer, 0, 1), "nothing is left");
        let (mut a, mut b, mut c) = ([0; 1], [0; 0], [0; 7]);
        let read = |into| Read {
            region: RegionId(0),
            offset: 0,
            into,
        };
        let mut batch = [read(a.as_mut_slice()), read(&mut b), read(&mut c)];
        let mut stream = Stream::Into(&mut batch, Cursor::default());
        assert!(stream.transfer(&buffer, 100, 2));
        assert!(stream.transfer(&buffer, 200, 6));
        assert_eq!((&a, &c), (b"o", b"netwo!5"));
    }
}
