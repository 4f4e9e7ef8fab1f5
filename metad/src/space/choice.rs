//! Which donor gets a pack.
//!
//! Donors take turns by what they were given in parts of what they lend, so an image is spread
//! evenly however full they are; how full and how busy they are only tilts that a little
//! ([`TILT_FREE`], [`TILT_LOAD`]), because moving packs later is what evens large differences. A donor
//! that is almost full is left for last, and replicas go to different failure domains first.

use super::{ALIGN, Book, Donor, Place, Space, held};

/// Weight of an empty donor over that of a full one. With [`TILT_LOAD`] far enough below 0.2 that
/// an image is spread within a fifth of even.
const TILT_FREE: f64 = 0.08;
/// Weight of an idle donor over that of the busiest.
const TILT_LOAD: f64 = 0.04;
/// A donor with less than this part of its memory free is almost full.
const ALMOST_FULL: u64 = 10;
/// Part of a donor that copies leave free, so that pulls need not evict at once.
const HEADROOM: u64 = 16;

/// What is asked of the map.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask<'a> {
    /// Bytes of the pack.
    pub len: u32,
    /// Donors that have a replica of it, or space for one: never again, and not their failure
    /// domains when there are others.
    pub holders: &'a [u64],
    /// Donors that are out of the question for another reason.
    pub avoid: &'a [u64],
    /// Whether some of a donor's memory has to stay free.
    pub headroom: bool,
}

impl Space {
    /// Space for a pack on the open donor whose turn it is, best fit, in the reserved book.
    pub fn reserve(&mut self, ask: Ask<'_>) -> Option<Place> {
        let mut order: Vec<(bool, bool, f64, u64)> = self
            .donors
            .iter()
            .filter(|(id, donor)| donor.takes(&ask) && !ask.names(**id))
            .map(|(id, donor)| {
                let almost = donor.books.free - held(ask.len) < donor.books.lent / ALMOST_FULL;
                (
                    self.shares_domain(*id, ask.holders),
                    almost,
                    donor.turn,
                    *id,
                )
            })
            .collect();
        order.sort_by(|a, b| {
            (a.0, a.1)
                .cmp(&(b.0, b.1))
                .then(a.2.total_cmp(&b.2))
                .then(a.3.cmp(&b.3))
        });
        let place = order
            .iter()
            .find_map(|(.., id)| self.reserve_on(*id, ask.len))?;
        if ask.holders.is_empty() {
            self.no_credit(place.donor, &order);
        }
        self.count(&place);
        Some(place)
    }

    /// Space for a pack on one donor, open or not, best fit.
    pub fn reserve_on(&mut self, id: u64, len: u32) -> Option<Place> {
        let donor = self.donors.get(&id).filter(|_| len > 0)?;
        let best = donor
            .regions
            .iter()
            .filter_map(|(number, region)| Some((region.best_fit(held(len))?, *number)))
            .min();
        let ((_, offset), region) = best?;
        let place = Place {
            donor: id,
            region,
            offset,
            len,
        };
        self.claim(&place, Book::Reserved).ok()?;
        Some(place)
    }

    /// Open donors that could hold one more replica beside `holders` if they had room.
    pub fn without_room(&self, ask: Ask<'_>) -> Vec<u64> {
        let full = self
            .donors
            .iter()
            .filter(|(id, donor)| donor.open && !donor.takes(&ask) && !ask.names(**id));
        full.map(|(id, _)| *id).collect()
    }

    /// Open donors.
    pub fn open_donors(&self) -> Vec<u64> {
        let open = self.donors.iter().filter(|(_, donor)| donor.open);
        open.map(|(id, _)| *id).collect()
    }

    /// Bytes that copies may still take on open donors.
    pub fn spare_bytes(&self) -> u64 {
        let open = self.donors.values().filter(|donor| donor.open);
        open.map(|donor| donor.books.free.saturating_sub(donor.books.lent / HEADROOM))
            .sum()
    }

    /// What fails together with a donor; empty when it fails by itself.
    pub fn set_domain(&mut self, donor: u64, domain: &str) {
        if let Some(donor) = self.donors.get_mut(&donor) {
            domain.clone_into(&mut donor.domain);
        }
    }

    /// Whether a donor fails together with one of `others`, or is one of them.
    pub fn shares_domain(&self, donor: u64, others: &[u64]) -> bool {
        let Some(one) = self.donors.get(&donor) else {
            return false;
        };
        others.iter().any(|other| {
            *other == donor
                || !one.domain.is_empty()
                    && self
                        .donors
                        .get(other)
                        .is_some_and(|other| other.domain == one.domain)
        })
    }

    /// Bytes were read from a donor.
    pub fn served(&mut self, donor: u64, bytes: u64) {
        if let Some(donor) = self.donors.get_mut(&donor) {
            donor.load += bytes as f64;
        }
    }

    /// What was read before counts half from now on.
    pub fn cool(&mut self) {
        self.donors.values_mut().for_each(|donor| donor.load /= 2.0);
    }

    pub(super) fn least_turn(&self) -> f64 {
        let open = self.donors.values().filter(|donor| donor.open);
        let least = open.map(|donor| donor.turn).min_by(f64::total_cmp);
        least.unwrap_or(0.0)
    }

    /// Donors that could not be asked do not save up turns for when they can.
    fn no_credit(&mut self, chosen: u64, asked: &[(bool, bool, f64, u64)]) {
        let now = self.donors.get(&chosen).map_or(0.0, |donor| donor.turn);
        for (id, donor) in &mut self.donors {
            if !asked.iter().any(|(.., asked)| asked == id) {
                donor.turn = donor.turn.max(now);
            }
        }
    }

    fn count(&mut self, place: &Place) {
        let busiest = self
            .donors
            .values()
            .map(|donor| donor.load)
            .fold(1.0, f64::max);
        if let Some(donor) = self.donors.get_mut(&place.donor) {
            let lent = donor.books.lent.max(ALIGN) as f64;
            let tilt = 1.0 + TILT_FREE * (donor.books.free as f64 / lent - 0.5)
                - TILT_LOAD * (donor.load / busiest - 0.5);
            donor.turn += place.held_bytes() as f64 / (lent * tilt);
        }
    }
}

impl Ask<'_> {
    fn names(&self, donor: u64) -> bool {
        self.holders.contains(&donor) || self.avoid.contains(&donor)
    }
}

impl Donor {
    /// Whether it is open and has the bytes, in whatever pieces.
    fn takes(&self, ask: &Ask<'_>) -> bool {
        let kept = if ask.headroom {
            self.books.lent / HEADROOM
        } else {
            0
        };
        ask.len > 0 && self.open && self.books.free >= held(ask.len) + kept
    }
}
