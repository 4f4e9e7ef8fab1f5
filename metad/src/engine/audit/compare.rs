//! The comparison itself: a function of what was counted and what was copied.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use harbour_metad_client::v1;

use super::{Findings, Kept, KeptDonor, message};
use crate::{
    space::{ALIGN, Book, Books, Place},
    store::{DonorRow, ExtentRow, PackCount, Recount},
};

/// Holes that a difference of free maps names on each side.
const HOLES_SHOWN: usize = 3;

/// Books as counted, in all and for each donor.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) stored: Books,
    pub(super) donors: Vec<v1::DonorBooks>,
}

/// A place in the store: its book, and what has it.
type Taken = (Place, Book, String);

/// Compares everything.
pub(super) fn all(count: &Recount, kept: &Kept, findings: &mut Findings) -> Counts {
    let counts = donors(count, kept, findings);
    findings.same(
        || "books of all donors".into(),
        &counts.stored,
        &kept.space.books(),
    );
    if let Err(why) = kept.space.check() {
        findings.differ("free map", "sound", why);
    }
    extents(count, findings);
    packs(count, kept, findings);
    let copies = count.copies.iter().map(|copy| (copy.id, *copy)).collect();
    findings.same_rows("copy", &copies, &kept.copies, |row| format!("{row:?}"));
    let held = count.quarantine.iter().map(|row| (row.id, *row)).collect();
    findings.same_rows("quarantine", &held, &kept.quarantine, |row| {
        format!("{row:?}")
    });
    // Without the fencing token, which is its holder's.
    findings.same_rows("pull", &count.pulls, &kept.pulls, |row| {
        let (what, host, pid) = (&row.what, &row.host, row.pid);
        format!("{what:?} by {host} ({pid}), {} replicas", row.replicas)
    });
    let astray = count
        .loose
        .iter()
        .filter(|number| !kept.used.contains(number));
    let astray = astray.count();
    if astray > 0 && !kept.collects {
        let what = "layers in sight that neither an image, a pull nor an engine refers to";
        findings.differ(what, astray.to_string(), "0");
    }
    for (what, found) in &count.astray {
        findings.differ(what.as_str(), found.to_string(), "0");
    }
    counts
}

/// How many there are of what was looked at.
pub(super) fn counted(count: &Recount) -> Vec<v1::Counted> {
    let regions = count.donors.values().map(|donor| donor.regions.len()).sum();
    let reserved = count.extents.iter().filter(|e| e.pull.is_some()).count();
    let sized: [(&str, usize); 8] = [
        ("donors", count.donors.len()),
        ("regions", regions),
        ("extents committed", count.extents.len() - reserved),
        ("extents reserved", reserved),
        ("places in quarantine", count.quarantine.len()),
        ("copies", count.copies.len()),
        ("pulls", count.pulls.len()),
        ("packs", count.packs.len()),
    ];
    let sized = sized.into_iter().map(|(what, n)| (what, n as u64));
    let all = sized.chain(count.rows.iter().copied());
    all.map(|(what, count)| v1::Counted {
        what: what.to_owned(),
        count,
    })
    .collect()
}

fn donors(count: &Recount, kept: &Kept, findings: &mut Findings) -> Counts {
    let stored: BTreeMap<u64, KeptDonor> = count
        .donors
        .values()
        .map(|row| (row.id, standing(row)))
        .collect();
    findings.same_rows("donor", &stored, &kept.donors, |row| format!("{row:?}"));
    let mapped: BTreeSet<u64> = kept.space.donors().into_iter().collect();
    for id in mapped.iter().filter(|id| !stored.contains_key(id)) {
        findings.differ(format!("free map of donor {id}"), "no such donor", "there");
    }
    let mut taken = places(count, findings);
    let mut counts = Counts::default();
    for (id, row) in &count.donors {
        if !mapped.contains(id) {
            findings.differ(format!("free map of donor {:?}", row.name), "there", "none");
        }
        let places = taken.remove(id).unwrap_or_default();
        let books = donor(row, &places, kept, findings);
        let known = kept.space.donor_books(*id).unwrap_or_default();
        counts.donors.push(v1::DonorBooks {
            name: row.name.clone(),
            stored: Some(message(&books)),
            kept: Some(message(&known)),
        });
        counts.stored.add(&books);
    }
    counts
}

fn standing(row: &DonorRow) -> KeptDonor {
    KeptDonor {
        name: row.name.clone(),
        epoch: row.epoch,
        live: row.live,
        draining: row.draining,
    }
}

/// Every place that the store has, by donor and in order.
fn places(count: &Recount, findings: &mut Findings) -> HashMap<u64, Vec<Taken>> {
    let mut all: HashMap<u64, Vec<Taken>> = HashMap::new();
    let extents = count.extents.iter().map(|extent| {
        let what = format!("extent {} of pack {}", extent.id, extent.pack);
        (extent.place, book_of(extent), what)
    });
    let copies = count.copies.iter().map(|copy| {
        let what = format!("copy {} of pack {}", copy.id, copy.pack);
        (copy.place, Book::Reserved, what)
    });
    let held = count.quarantine.iter().map(|row| {
        let what = format!("quarantine {}", row.id);
        (row.place, Book::Quarantined, what)
    });
    for taken in extents.chain(copies).chain(held) {
        if count.donors.contains_key(&taken.0.donor) {
            all.entry(taken.0.donor).or_default().push(taken);
        } else {
            findings.differ(taken.2, format!("{:?}", taken.0), "no such donor");
        }
    }
    for places in all.values_mut() {
        places.sort_by_key(|(place, ..)| *place);
    }
    all
}

fn book_of(extent: &ExtentRow) -> Book {
    if extent.pull.is_some() {
        Book::Reserved
    } else {
        Book::Used
    }
}

/// One donor: its regions, its books, its free map, its standing.
fn donor(row: &DonorRow, places: &[Taken], kept: &Kept, findings: &mut Findings) -> Books {
    let name = |what: &str| format!("donor {:?}: {what}", row.name);
    let mut books = Books::default();
    for (place, book, _) in places {
        *books.of(*book) += place.held_bytes();
    }
    let known: BTreeMap<u32, _> = kept
        .space
        .regions(row.id)
        .into_iter()
        .map(|look| (look.region, look))
        .collect();
    let stored: BTreeMap<u32, u64> = row.regions.iter().map(|r| (r.id, whole(r.len))).collect();
    for id in known.keys().filter(|id| !stored.contains_key(id)) {
        findings.differ(name(&format!("region {id}")), "none", "in the free map");
    }
    for (id, len) in &stored {
        let inside = places.iter().filter(|(place, ..)| place.region == *id);
        let holes = holes(row, *len, inside, findings);
        books.lent += len;
        books.free += holes.iter().map(|(_, len)| len).sum::<u64>();
        let Some(look) = known.get(id) else {
            findings.differ(
                name(&format!("region {id}")),
                format!("{len} bytes"),
                "none",
            );
            continue;
        };
        findings.same(|| name(&format!("region {id}, bytes")), len, &look.len);
        let map = name(&format!("region {id}, free map"));
        same_holes(map, &holes, &look.holes, findings);
    }
    for (place, _, what) in places
        .iter()
        .filter(|(p, ..)| !stored.contains_key(&p.region))
    {
        findings.differ(name(what), format!("{place:?}"), "no such region");
    }
    let space = kept.space.donor_books(row.id).unwrap_or_default();
    for (what, stored, kept) in [
        ("lent bytes", books.lent, space.lent),
        ("free bytes", books.free, space.free),
        ("reserved bytes", books.reserved, space.reserved),
        ("used bytes", books.used, space.used),
        ("quarantined bytes", books.quarantined, space.quarantined),
    ] {
        findings.same(|| name(what), &stored, &kept);
    }
    let open = Some(row.live && !row.draining);
    findings.same(
        || name("gets new packs"),
        &open,
        &kept.space.is_open(row.id),
    );
    let domain = Some(row.domain.as_str());
    findings.same(
        || name("failure domain"),
        &domain,
        &kept.space.domain(row.id),
    );
    books
}

fn whole(len: u64) -> u64 {
    len - len % ALIGN
}

/// What is free of a region of `len` bytes between these places, which are in order.
fn holes<'t>(
    row: &DonorRow,
    len: u64,
    places: impl Iterator<Item = &'t Taken>,
    findings: &mut Findings,
) -> Vec<(u64, u64)> {
    let mut holes = Vec::new();
    let mut at = 0;
    let mut before = "the start";
    for (place, _, what) in places {
        let end = place.offset.saturating_add(place.held_bytes());
        if place.offset < at || place.offset % ALIGN != 0 || place.len == 0 || end > len {
            let wrong = format!("donor {:?}: place of {what}", row.name);
            let free = format!("{at} to {len} of region {} after {before}", place.region);
            findings.differ(wrong, format!("{place:?}"), free);
        }
        if place.offset > at {
            holes.push((at, place.offset.min(len) - at.min(len)));
        }
        at = at.max(end);
        before = what;
    }
    if at < len {
        holes.push((at, len - at));
    }
    holes
}

fn same_holes(what: String, stored: &[(u64, u64)], kept: &[(u64, u64)], findings: &mut Findings) {
    if stored == kept {
        return;
    }
    let only = |these: &[(u64, u64)], others: &[(u64, u64)]| {
        let others: BTreeSet<_> = others.iter().collect();
        let mine = these.iter().filter(|hole| !others.contains(hole));
        let mine = mine.take(HOLES_SHOWN);
        let shown: Vec<String> = mine.map(|(at, len)| format!("{at}+{len}")).collect();
        format!("{} holes, {}", these.len(), shown.join(" "))
    };
    findings.differ(what, only(stored, kept), only(kept, stored));
}

/// Extents against their packs and pulls.
fn extents(count: &Recount, findings: &mut Findings) {
    let mut committed: BTreeSet<(u64, u64)> = BTreeSet::new();
    for extent in &count.extents {
        let name = |what: &str| format!("extent {} of pack {}: {what}", extent.id, extent.pack);
        let Some(pack) = count.packs.get(&extent.pack) else {
            findings.differ(name("its pack"), "none", "named");
            continue;
        };
        findings.same(|| name("length"), &extent.place.len, &pack.len);
        match extent.pull {
            None => {
                if !pack.visible {
                    findings.differ(name("its pack"), "not known to readers", "committed");
                }
                if !committed.insert((extent.pack, extent.place.donor)) {
                    let second = format!("{:?}", extent.place);
                    findings.differ(name("second replica on one donor"), second, "one");
                }
            }
            Some(pull) => {
                if !count.pulls.contains_key(&pull) {
                    findings.differ(name("its pull"), "none", format!("{pull:x}"));
                }
                if !count.pins.contains(&(pull, extent.pack)) {
                    findings.differ(name("pin of its pull"), "none", format!("{pull:x}"));
                }
            }
        }
    }
}

/// Packs against their objects, their references, and the policy's order.
fn packs(count: &Recount, kept: &Kept, findings: &mut Findings) {
    for (id, pack) in &count.packs {
        let name = |what: &str| format!("pack {id} ({}): {what}", short(pack));
        findings.same(|| name("objects"), &pack.objects, &pack.said);
        if pack.end > u64::from(pack.len) {
            let end = format!("the last object ends at {}", pack.end);
            findings.differ(name("length"), end, pack.len.to_string());
        }
        if pack.layers + pack.images + pack.pins == 0 {
            findings.differ(name("references"), "0", "of a layer, an image or a pull");
        }
    }
    let replicas = count.extents.iter().filter(|extent| extent.pull.is_none());
    let stored: BTreeSet<u64> = replicas.map(|extent| extent.pack).collect();
    let ranked: BTreeSet<u64> = kept.ranked.iter().copied().collect();
    for id in stored.symmetric_difference(&ranked) {
        let has = |there: bool, what: &str| if there { what } else { "none" }.to_owned();
        findings.differ(
            format!("pack {id} in the order of eviction"),
            has(stored.contains(id), "a replica"),
            has(ranked.contains(id), "a rank"),
        );
    }
}

fn short(pack: &PackCount) -> String {
    hex::encode(&pack.digest[..6])
}
