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

fn of(len: u32) -> Ask<'static> {
    Ask {
        len,
        ..Ask::default()
    }
}

#[test]
fn fills_to_the_last_page_and_joins_what_comes_back() {
    let mut space = space(&[(1, 0, 3 * ALIGN + 100)]);
    let places: Vec<_> = (0..3).map(|_| space.reserve(of(100)).unwrap()).collect();
    assert_eq!(space.reserve(of(1)), None, "the odd 100 bytes are not lent");
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
            .reserve(of(3 * ALIGN as u32))
            .map(|place| place.offset),
        Some(0),
        "one hole again"
    );
}

#[test]
fn best_fit_keeps_large_holes() {
    let mut space = space(&[(1, 0, 16 * ALIGN)]);
    let page = ALIGN as u32;
    let small = space.reserve(of(2 * page)).unwrap();
    let _wall = space.reserve(of(page)).unwrap();
    space.free(&small, Book::Reserved);
    assert_eq!(
        space.reserve(of(2 * page)).unwrap().offset,
        0,
        "the hole of two pages, not the large one"
    );
}

#[test]
fn donors_take_turns_and_can_be_avoided_or_shut() {
    let mut space = space(&[(1, 0, 8 * ALIGN), (2, 0, 9 * ALIGN), (3, 0, 2 * ALIGN)]);
    assert_eq!(space.reserve(of(100)).unwrap().donor, 1);
    assert_eq!(
        space.reserve(of(100)).unwrap().donor,
        2,
        "1 has had its turn"
    );
    space.set_open(2, false);
    let asked = |holders, avoid| Ask {
        len: 100,
        holders,
        avoid,
        headroom: false,
    };
    assert_eq!(space.reserve(asked(&[], &[3])).unwrap().donor, 1);
    assert_eq!(space.reserve(asked(&[1], &[])).unwrap().donor, 3);
    assert_eq!(space.reserve(asked(&[1], &[3])), None);
    assert_eq!(space.without_room(of(9 * ALIGN as u32)), [1, 3]);
    assert_eq!(space.open_books().lent, 10 * ALIGN);
    space.remove_donor(1);
    assert_eq!(space.books().lent, 11 * ALIGN);
}

/// Bytes on each donor after `packs` packs of 1 MiB.
fn spread(space: &mut Space, packs: u32) -> Vec<u64> {
    let before: Vec<u64> = (1..=4).map(|id| reserved(space, id)).collect();
    for _ in 0..packs {
        space.reserve(of(1 << 20)).unwrap();
    }
    let after = (1..=4).map(|id| reserved(space, id));
    after
        .zip(before)
        .map(|(after, before)| after - before)
        .collect()
}

fn reserved(space: &Space, donor: u64) -> u64 {
    space.donor_books(donor).map_or(0, |books| books.reserved)
}

#[test]
fn an_image_is_spread_within_a_fifth_of_even_however_full_donors_are() {
    let gib = 1 << 30;
    let mut space = space(&[(1, 0, gib), (2, 0, gib), (3, 0, gib)]);
    spread(&mut space, 1500);
    // A donor that joins late does not get the whole next image.
    space.add_donor(4, [(0, gib)]);
    space.served(1, 100 << 20);
    let parts = spread(&mut space, 400);
    for part in &parts {
        let even = 100 << 20;
        assert!(part.abs_diff(even) * 5 <= even, "{parts:?}");
    }
    assert!(
        parts[0] < parts[1] && parts[1] < parts[3],
        "busy, full, empty: {parts:?}"
    );
}

#[test]
fn an_almost_full_donor_is_left_for_last() {
    let mut space = space(&[(1, 0, 100 << 20), (2, 0, 100 << 20)]);
    for _ in 0..88 {
        space.reserve_on(1, 1 << 20).unwrap();
    }
    let parts = spread(&mut space, 80);
    assert_eq!(parts[..2], [2 << 20, 78 << 20]);
    assert_eq!(
        spread(&mut space, 32).iter().sum::<u64>(),
        32 << 20,
        "and then it is used"
    );
}

#[test]
fn replicas_go_to_other_failure_domains_first() {
    let mut space = space(&[
        (1, 0, 1 << 20),
        (2, 0, 1 << 20),
        (3, 0, 1 << 20),
        (4, 0, 1 << 20),
    ]);
    for (donor, domain) in [(1, "a"), (2, "a"), (3, "b"), (4, "")] {
        space.set_domain(donor, domain);
    }
    for _ in 0..12 {
        let mut holders = Vec::new();
        for _ in 0..4 {
            let ask = Ask {
                len: 4096,
                holders: &holders,
                ..Ask::default()
            };
            holders.push(space.reserve(ask).unwrap().donor);
        }
        let ask = Ask {
            len: 4096,
            holders: &holders,
            ..Ask::default()
        };
        assert_eq!(space.reserve(ask), None, "every donor has one");
        let last_of_a = holders.iter().rposition(|id| *id < 3).unwrap();
        assert_eq!(
            last_of_a, 3,
            "the second of domain a is the last choice: {holders:?}"
        );
    }
}

#[test]
fn regions_come_and_go_when_nothing_lies_in_them() {
    let mut space = space(&[(1, 0, 2 * ALIGN)]);
    let first = space.reserve(of(100)).unwrap();
    space.add_region(1, 1, 3 * ALIGN + 5);
    assert_eq!(space.books().lent, 5 * ALIGN);
    assert!(!space.remove_region(1, 0), "something lies there");
    space.free(&first, Book::Reserved);
    assert!(space.remove_region(1, 0));
    assert!(space.remove_region(1, 0), "again is no error");
    space.check().unwrap();
    assert_eq!(
        (space.books().lent, space.books().free),
        (3 * ALIGN, 3 * ALIGN)
    );
    assert_eq!(space.reserve(of(100)).unwrap().region, 1);
}

#[test]
fn copies_leave_some_memory_free() {
    let mut space = space(&[(1, 0, 32 * ALIGN)]);
    let copy = Ask {
        len: 1,
        headroom: true,
        ..Ask::default()
    };
    assert_eq!(space.spare_bytes(), 30 * ALIGN);
    let given = std::iter::from_fn(|| space.reserve(copy)).count();
    assert_eq!(given, 30);
    assert_eq!(space.spare_bytes(), 0);
    assert!(space.reserve(of(1)).is_some());
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
                if let Some(place) = space.reserve(of(len)) {
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
