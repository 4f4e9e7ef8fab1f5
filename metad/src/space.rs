//! Which bytes of the lent memory are free, and the books over the rest.
//!
//! Every byte of a donor is in exactly one book: free, reserved by a pull, used by a committed
//! extent, or in quarantine. The map lives in memory and is built again from the store at start;
//! a mistake in either shows as an overlap or as books that do not balance, see [`Space::check`].

mod choice;
mod look;
mod region;

use std::collections::BTreeMap;

pub use choice::Ask;
pub use look::RegionLook;
use region::Region;

/// Unit of allocation in bytes: a page, so that readers can map and align.
pub const ALIGN: u64 = 4096;

/// Where a pack lies, or may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Donor by metad's number.
    pub donor: u64,
    /// Region of that donor.
    pub region: u32,
    /// Offset in the region in bytes, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Length of the pack in bytes.
    pub len: u32,
}

impl Place {
    /// Bytes that it takes: its length rounded up to [`ALIGN`].
    pub fn held_bytes(&self) -> u64 {
        held(self.len)
    }
}

/// Bytes that `len` bytes of content take.
pub fn held(len: u32) -> u64 {
    u64::from(len).next_multiple_of(ALIGN)
}

/// The books in which a byte can be, other than free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Book {
    /// Given to a pull that has not committed.
    Reserved,
    /// Part of a committed extent.
    Used,
    /// Freed, and readers may still know of it.
    Quarantined,
}

/// Sums in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// All that is lent, in whole units of [`ALIGN`].
    pub lent: u64,
    /// Not in any other book.
    pub free: u64,
    /// See [`Book::Reserved`].
    pub reserved: u64,
    /// See [`Book::Used`].
    pub used: u64,
    /// See [`Book::Quarantined`].
    pub quarantined: u64,
}

impl Books {
    /// Whether every lent byte is in one book.
    pub fn balance(&self) -> bool {
        self.lent == self.free + self.reserved + self.used + self.quarantined
    }

    /// Bytes in one book, to be changed.
    pub(crate) fn of(&mut self, book: Book) -> &mut u64 {
        match book {
            Book::Reserved => &mut self.reserved,
            Book::Used => &mut self.used,
            Book::Quarantined => &mut self.quarantined,
        }
    }

    /// Adds another's sums.
    pub(crate) fn add(&mut self, other: &Self) {
        self.lent += other.lent;
        self.free += other.free;
        self.reserved += other.reserved;
        self.used += other.used;
        self.quarantined += other.quarantined;
    }
}

/// A place that cannot be what it is said to be: outside its region, or taken already.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is outside of its region or overlaps another")]
pub struct Conflict(pub Place);

/// All lent memory.
#[derive(Clone, Debug, Default)]
pub struct Space {
    donors: BTreeMap<u64, Donor>,
}

#[derive(Clone, Debug, Default)]
struct Donor {
    /// New places are only given on these; a silent donor keeps what it has.
    open: bool,
    /// What fails together with it; empty when it fails by itself.
    domain: String,
    books: Books,
    regions: BTreeMap<u32, Region>,
    /// What it was given so far, in parts of itself: the one with the least is next.
    turn: f64,
    /// Bytes that were read from it lately.
    load: f64,
}

impl Space {
    /// No memory at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a donor in, all free: regions by number and length in bytes. One that is known is
    /// replaced, with all its books.
    pub fn add_donor(&mut self, donor: u64, regions: impl IntoIterator<Item = (u32, u64)>) {
        let known = self.donors.remove(&donor);
        let mut entry = Donor {
            open: true,
            // Who comes late does not get everything until it has caught up.
            turn: self.least_turn(),
            ..Donor::default()
        };
        if let Some(known) = known {
            (entry.domain, entry.turn, entry.load) = (known.domain, known.turn, known.load);
        }
        self.donors.insert(donor, entry);
        for (number, len) in regions {
            self.add_region(donor, number, len);
        }
    }

    /// Takes one more region of a donor in, all free.
    pub fn add_region(&mut self, donor: u64, number: u32, len: u64) {
        if let Some(entry) = self.donors.get_mut(&donor) {
            let len = len - len % ALIGN;
            entry.books.lent += len;
            entry.books.free += len;
            entry.regions.insert(number, Region::new(len));
        }
    }

    /// Forgets a region in which nothing lies any more; `false`, and nothing changed, when
    /// something does.
    pub fn remove_region(&mut self, donor: u64, number: u32) -> bool {
        let Some(entry) = self.donors.get_mut(&donor) else {
            return true;
        };
        let Some(region) = entry.regions.get(&number) else {
            return true;
        };
        let free = region.free_bytes();
        if free != region.len() {
            return false;
        }
        entry.regions.remove(&number);
        entry.books.lent -= free;
        entry.books.free -= free;
        true
    }

    /// Forgets a donor and its books.
    pub fn remove_donor(&mut self, donor: u64) {
        self.donors.remove(&donor);
    }

    /// Whether new places may be given on a donor.
    pub fn set_open(&mut self, donor: u64, open: bool) {
        if let Some(donor) = self.donors.get_mut(&donor) {
            donor.open = open;
        }
    }

    /// Puts a place into a book, as the store has it.
    pub fn claim(&mut self, place: &Place, book: Book) -> Result<(), Conflict> {
        let donor = self.donors.get_mut(&place.donor).ok_or(Conflict(*place))?;
        let region = donor
            .regions
            .get_mut(&place.region)
            .ok_or(Conflict(*place))?;
        if place.len == 0 || !region.take_at(place.offset, place.held_bytes()) {
            return Err(Conflict(*place));
        }
        donor.books.free -= place.held_bytes();
        *donor.books.of(book) += place.held_bytes();
        Ok(())
    }

    /// Moves a place from one book to another. One of a donor that is gone is nobody's.
    pub fn shift(&mut self, place: &Place, from: Book, to: Book) {
        if let Some(donor) = self.donors.get_mut(&place.donor) {
            *donor.books.of(from) -= place.held_bytes();
            *donor.books.of(to) += place.held_bytes();
        }
    }

    /// Makes a place free. One of a donor that is gone is nobody's.
    pub fn free(&mut self, place: &Place, from: Book) {
        if let Some(donor) = self.donors.get_mut(&place.donor)
            && let Some(region) = donor.regions.get_mut(&place.region)
        {
            region.give_back(place.offset, place.held_bytes());
            *donor.books.of(from) -= place.held_bytes();
            donor.books.free += place.held_bytes();
        }
    }

    /// Books of one donor.
    pub fn donor_books(&self, donor: u64) -> Option<Books> {
        self.donors.get(&donor).map(|donor| donor.books)
    }

    /// Books of all donors.
    pub fn books(&self) -> Books {
        self.sum(|_| true)
    }

    /// Books of the donors on which places are given.
    pub fn open_books(&self) -> Books {
        self.sum(|donor| donor.open)
    }

    fn sum(&self, of: impl Fn(&Donor) -> bool) -> Books {
        let mut sum = Books::default();
        self.donors
            .values()
            .filter(|donor| of(donor))
            .for_each(|donor| sum.add(&donor.books));
        sum
    }

    /// Checks that the free map and the books agree; the text names what does not.
    pub fn check(&self) -> Result<(), String> {
        for (id, donor) in &self.donors {
            let free: u64 = donor.regions.values().map(Region::free_bytes).sum();
            if free != donor.books.free || !donor.books.balance() {
                return Err(format!(
                    "donor {id}: {:?}, but {free} bytes are free in its map",
                    donor.books
                ));
            }
            for (number, region) in &donor.regions {
                region
                    .check()
                    .map_err(|why| format!("donor {id} region {number}: {why}"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
