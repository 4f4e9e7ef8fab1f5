//! The contract on huge pages. Needs root and a host that can set some aside for the while.

use std::fs;

use harbour_pool::{HugePages, transport::TransportKind};

use crate::{
    subjects::Threaded,
    suite::{self, REGIONS, Subject},
};

/// Pages for one donor at a time, and as many again while memory of an epoch that has just ended
/// is still mapped by its readers.
const PAGES: u64 = 2 * (REGIONS[0] + REGIONS[1]) / (2 << 20);
const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// More huge pages for as long as it lives.
struct MorePages {
    before: u64,
}

impl MorePages {
    fn new() -> Self {
        let before = count();
        fs::write(COUNT, (before + PAGES).to_string())
            .expect("this test needs root, to have huge pages");
        let more = Self { before };
        assert_eq!(
            count(),
            before + PAGES,
            "this test needs a host with {PAGES} huge pages to give"
        );
        more
    }
}

impl Drop for MorePages {
    fn drop(&mut self) {
        fs::write(COUNT, self.before.to_string()).unwrap();
    }
}

fn count() -> u64 {
    fs::read_to_string(COUNT)
        .expect("this test needs a kernel with huge pages")
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn the_contract_holds_on_huge_pages() {
    let _more = MorePages::new();
    type Case = fn(&dyn Subject, TransportKind);
    let cases: [(&str, Case); 13] = [
        ("describes_itself", suite::describes_itself),
        ("zero_lengths", suite::zero_lengths),
        ("bounds", suite::bounds),
        ("overflow", suite::overflow),
        (
            "moves_nothing_when_one_is_outside",
            suite::moves_nothing_when_one_is_outside,
        ),
        ("all_of_a_region", suite::all_of_a_region),
        ("writes_in_order", suite::writes_in_order),
        ("many_operations", suite::many_operations),
        ("seen_by_others", suite::seen_by_others),
        ("matches_a_model", suite::matches_a_model),
        ("readers_and_writers", suite::readers_and_writers),
        ("read_only", suite::read_only),
        ("death", suite::death),
    ];
    for (name, case) in cases {
        println!("{name}");
        let subject = Threaded::with(|config| config.huge = HugePages::Require);
        assert!(subject.regions().iter().all(|region| region.huge_pages));
        case(&subject, TransportKind::Shm);
    }
    let subject = Threaded::with(|config| config.huge = HugePages::Require);
    suite::epoch_change(&subject, TransportKind::Shm);
}
