#![allow(clippy::unwrap_used, clippy::expect_used)]
use proptest::prelude::*;

use super::*;

fn space(regions: &[(u64, u32, u64)]) -> Space {
    let mut space = Space::new();
    let mut donors: BTreeMap<u64, Vec<(u32, u64)>> = BTreeMap::new();
    for (donor, region, len) in regions {
        donors.entry(*donor).or_default().push((*region, *len));
    }
    donors
        .into_iter()
        .for_each(|(donor, regions)| space.add_donor(donor, regions));
    space
}

#[test]
fn fills_to_the_last_page_and_joins_what_comes_back() {
    let mut space = space(&[(1, 0, 3 * ALIGN + 100)]);
    let places: Vec<_> = (0..3).map(|_| space.reserve(100, &[]).unwrap()).collect();
    assert_eq!(
        space.reserve(1, &[]),
        None,
        "the odd 100 bytes are not lent"
    );
    assert_eq!(
        space.books(),
        Books {
            lent: 3 * ALIGN,
            reserved: 3 * ALIGN,
            ..Books::default()
        }
    );
    for at in [1, 0, 2] {
        space.free(&places[at], Book::Reserved);
        space.check().unwrap();
    }
    assert_eq!(
        space
            .reserve(3 * ALIGN as u32, &[])
            .map(|place| place.offset),
        Some(0),
        "one hole again"
    );
}

#[test]
fn best_fit_keeps_large_holes() {
    let mut space = space(&[(1, 0, 16 * ALIGN)]);
    let page = ALIGN as u32;
    let small = space.reserve(2 * page, &[]).unwrap();
    let _wall = space.reserve(page, &[]).unwrap();
    space.free(&small, Book::Reserved);
    assert_eq!(
        space.reserve(2 * page, &[]).unwrap().offset,
        0,
        "the hole of two pages, not the large one"
    );
}

#[test]
fn donors_are_chosen_by_free_space_and_can_be_avoided_or_shut() {
    let mut space = space(&[(1, 0, 8 * ALIGN), (2, 0, 9 * ALIGN), (3, 0, 2 * ALIGN)]);
    assert_eq!(space.reserve(100, &[]).unwrap().donor, 2);
    assert_eq!(space.reserve(100, &[2]).unwrap().donor, 1);
    space.set_open(2, false);
    assert_eq!(space.reserve(100, &[]).unwrap().donor, 1);
    assert_eq!(space.reserve(100, &[1]).unwrap().donor, 3);
    assert_eq!(space.reserve(100, &[1, 3]), None);
    assert_eq!(space.open_books().lent, 10 * ALIGN);
    space.remove_donor(1);
    assert_eq!(space.books().lent, 11 * ALIGN);
}

#[test]
fn claims_that_cannot_be_are_refused() {
    let mut space = space(&[(1, 0, 8 * ALIGN)]);
    let place = |donor, region, offset, len| Place {
        donor,
        region,
        offset,
        len,
    };
    let good = place(1, 0, ALIGN, 2 * ALIGN as u32);
    space.claim(&good, Book::Used).unwrap();
    for bad in [
        good,
        place(1, 0, 0, 4097),
        place(1, 0, 2 * ALIGN, 1),
        place(1, 0, 7 * ALIGN, 4097),
        place(1, 0, u64::MAX - 100, 4096),
        place(1, 1, 0, 1),
        place(2, 0, 0, 1),
        place(1, 0, 4 * ALIGN, 0),
    ] {
        assert_eq!(space.claim(&bad, Book::Used), Err(Conflict(bad)), "{bad:?}");
    }
    space.check().unwrap();
    assert_eq!(space.books().used, 2 * ALIGN);
}

proptest! {
    #[test]
    fn no_byte_is_given_twice_or_lost(
        ops in prop::collection::vec((any::<bool>(), 1u32..200_000, any::<prop::sample::Index>()), 1..200)
    ) {
        let mut space = space(&[(1, 0, 300_000), (1, 7, 100_000), (2, 3, 250_000)]);
        let mut held: Vec<(Place, Book)> = Vec::new();
        for (give, len, which) in ops {
            if give {
                if let Some(place) = space.reserve(len, &[]) {
                    for (other, _) in &held {
                        let apart = (other.donor, other.region) != (place.donor, place.region)
                            || other.offset + other.held_bytes() <= place.offset
                            || place.offset + place.held_bytes() <= other.offset;
                        prop_assert!(apart, "{place:?} overlaps {other:?}");
                    }
                    held.push((place, Book::Reserved));
                }
            } else if !held.is_empty() {
                let at = which.index(held.len());
                let (place, book) = held[at];
                match book {
                    Book::Reserved => { space.shift(&place, book, Book::Used); held[at].1 = Book::Used; }
                    Book::Used => { space.shift(&place, book, Book::Quarantined); held[at].1 = Book::Quarantined; }
                    Book::Quarantined => { space.free(&place, book); held.swap_remove(at); }
                }
            }
            prop_assert_eq!(space.check(), Ok(()));
            let sum: u64 = held.iter().map(|(place, _)| place.held_bytes()).sum();
            let books = space.books();
            prop_assert_eq!(books.lent - books.free, sum);
        }
    }
}
