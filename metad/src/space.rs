//! Which bytes of the lent memory are free, and the books over the rest.
//!
//! Every byte of a donor is in exactly one book: free, reserved by a pull, used by a committed
//! extent, or in quarantine. The map lives in memory and is built again from the store at start;
//! a mistake in either shows as an overlap or as books that do not balance, see [`Space::check`].

mod region;

use std::collections::BTreeMap;

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

    fn of(&mut self, book: Book) -> &mut u64 {
        match book {
            Book::Reserved => &mut self.reserved,
            Book::Used => &mut self.used,
            Book::Quarantined => &mut self.quarantined,
        }
    }

    fn add(&mut self, other: &Self) {
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
#[derive(Debug, Default)]
pub struct Space {
    donors: BTreeMap<u64, Donor>,
}

#[derive(Debug, Default)]
struct Donor {
    /// New places are only given on these; a silent donor keeps what it has.
    open: bool,
    books: Books,
    regions: BTreeMap<u32, Region>,
}

impl Space {
    /// No memory at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a donor in, all free: regions by number and length in bytes. One that is known is
    /// replaced, with all its books.
    pub fn add_donor(&mut self, donor: u64, regions: impl IntoIterator<Item = (u32, u64)>) {
        let mut entry = Donor {
            open: true,
            ..Donor::default()
        };
        for (number, len) in regions {
            let len = len - len % ALIGN;
            entry.books.lent += len;
            entry.books.free += len;
            entry.regions.insert(number, Region::new(len));
        }
        self.donors.insert(donor, entry);
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

    /// Space for `len` bytes on an open donor that is not in `avoid`, best fit on the donor with
    /// the most free space that has a fitting hole; it goes into the reserved book.
    pub fn reserve(&mut self, len: u32, avoid: &[u64]) -> Option<Place> {
        let want = held(len);
        let mut order: Vec<(u64, u64)> = self
            .donors
            .iter()
            .filter(|(id, donor)| {
                len > 0 && donor.open && donor.books.free >= want && !avoid.contains(id)
            })
            .map(|(id, donor)| (donor.books.free, *id))
            .collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        for (_, id) in order {
            let Some(donor) = self.donors.get_mut(&id) else {
                continue;
            };
            let best = donor
                .regions
                .iter()
                .filter_map(|(number, region)| Some((region.best_fit(want)?, *number)))
                .min();
            let Some(((_, offset), number)) = best else {
                continue;
            };
            let place = Place {
                donor: id,
                region: number,
                offset,
                len,
            };
            if self.claim(&place, Book::Reserved).is_ok() {
                return Some(place);
            }
        }
        None
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
