//! Donors of the model: what they lend, what is in it, and the copies that they were told to make.

use std::collections::{BTreeMap, HashMap};

use harbour_metad_client::v1;

use super::{Model, PAGES, World};
use crate::error::Hash;

/// How long a donor that was told to make a copy may write it, in milliseconds.
const COPY_LEASE_MS: u64 = 15_000;

/// Regions that a donor lends at most, so that a history stays small.
const REGIONS_MAX: usize = 3;

/// Pages of all donors' memory (donor, epoch, region, page), and the pack whose bytes each has.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pages: HashMap<(u64, u64, u32, u64), Hash>,
}

/// A donor as it sees itself.
#[derive(Debug)]
pub(super) struct Donor {
    number: usize,
    id: u64,
    epoch: u64,
    regions: BTreeMap<u32, u64>,
    next_region: u32,
    /// Regions that came and went without metad having heard of it.
    untold: (Vec<(u32, u64)>, Vec<u32>),
    draining: bool,
    tasks: Vec<(v1::CopyTask, u64)>,
}

fn pages(extent: &v1::Extent) -> impl Iterator<Item = (u64, u64, u32, u64)> {
    let extent = *extent;
    let end = (extent.offset + u64::from(extent.len)).div_ceil(4096);
    (extent.offset / 4096..end).map(move |page| (extent.donor, extent.epoch, extent.region, page))
}

/// Whether an extent is in memory that its donor lends now.
pub(super) fn lends(donors: &[Donor], extent: &v1::Extent) -> bool {
    donors.iter().any(|donor| {
        (donor.id, donor.epoch) == (extent.donor, extent.epoch)
            && donor.regions.contains_key(&extent.region)
    })
}

impl Memory {
    /// Writes a pack, if the donor lends that memory.
    pub(super) fn write(&mut self, donors: &[Donor], pack: Hash, extent: &v1::Extent) {
        if lends(donors, extent) {
            self.pages.extend(pages(extent).map(|page| (page, pack)));
        }
    }

    /// Whether a pack's bytes are all there.
    pub(super) fn holds(&self, pack: &Hash, extent: &v1::Extent) -> bool {
        pages(extent).all(|page| self.pages.get(&page) == Some(pack))
    }
}

impl Donor {
    pub(super) fn join(world: &World, number: usize) -> Self {
        let mut donor = Self {
            number,
            id: 0,
            epoch: 1,
            regions: BTreeMap::from([(0, PAGES)]),
            next_region: 1,
            untold: Default::default(),
            draining: false,
            tasks: Vec::new(),
        };
        donor.register(world);
        assert_eq!(donor.id, number as u64 + 1);
        donor
    }

    pub(super) fn lent_bytes(&self) -> u64 {
        self.regions.values().sum::<u64>() * 4096
    }

    fn reference(&self) -> Option<v1::DonorRef> {
        Some(v1::DonorRef {
            id: self.id,
            epoch: self.epoch,
        })
    }

    fn heard(&mut self, world: &World, lease: v1::DonorLease) {
        self.id = lease.id;
        let now_ms = world.now();
        let told = lease.tasks.into_iter().map(|task| (task, now_ms));
        self.tasks.extend(told);
    }

    fn try_register(&mut self, world: &World, epoch: u64) -> bool {
        let name = format!("d{}", self.number);
        let domain = if self.number == 0 { "x" } else { "y" };
        let regions: Vec<(u32, u64)> = self.regions.iter().map(|(id, len)| (*id, *len)).collect();
        match world.try_donor_in(domain, &name, epoch, &regions) {
            Ok(lease) => {
                self.untold = Default::default();
                self.heard(world, lease);
                true
            }
            Err(_) => false,
        }
    }

    /// The same memory once more.
    pub(super) fn register(&mut self, world: &World) {
        assert!(self.try_register(world, self.epoch));
    }

    /// Other memory, when metad takes that.
    pub(super) fn renew(&mut self, world: &World) {
        let kept = std::mem::take(&mut self.tasks);
        let regions = std::mem::replace(&mut self.regions, BTreeMap::from([(0, PAGES)]));
        if self.try_register(world, self.epoch + 1) {
            (self.epoch, self.next_region, self.draining) = (self.epoch + 1, 1, false);
        } else {
            (self.tasks, self.regions) = (kept, regions);
        }
    }

    pub(super) fn beat(&mut self, world: &World) {
        let beat = v1::DonorHeartbeat {
            donor: self.reference(),
        };
        match world.engine.donor_heartbeat(&beat) {
            Ok(lease) => self.heard(world, lease),
            Err(_) => self.register(world),
        }
    }

    /// Gives a region back or lends one more, and tells metad, or waits with telling.
    pub(super) fn resize(&mut self, world: &World, grow: bool, told: bool) {
        if grow && self.regions.len() < REGIONS_MAX {
            let id = self.next_region;
            self.next_region += 1;
            self.regions.insert(id, 4);
            self.untold.0.push((id, 4));
        } else if let Some((id, _)) = (!grow).then(|| self.regions.pop_first()).flatten() {
            self.untold.0.retain(|(added, _)| *added != id);
            self.untold.1.push(id);
        }
        if told {
            self.tell(world);
        }
    }

    pub(super) fn drain(&mut self, world: &World, draining: bool) {
        self.draining = draining;
        self.tell(world);
    }

    fn tell(&mut self, world: &World) {
        let (added, retired) = std::mem::take(&mut self.untold);
        let request = v1::ResizeDonor {
            donor: self.reference(),
            added: added
                .iter()
                .map(|(id, len)| super::super::world::region(*id, *len))
                .collect(),
            retired,
            draining: self.draining,
        };
        match world.engine.donor_resize(&request) {
            Ok(lease) => {
                assert_eq!(lease.draining, self.draining);
                // An answer that is lost is asked for again.
                let again = world.engine.donor_resize(&request).unwrap();
                self.heard(world, lease);
                self.heard(world, again);
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

impl Model {
    /// A donor makes the copy that it was told of first: reads from whoever has it, checks, writes
    /// while its time lasts, and tells metad, or dies before that.
    pub(super) fn copy(&mut self, at: usize, report: bool) {
        let donor = &mut self.donors[at];
        if donor.tasks.is_empty() {
            return;
        }
        let (task, told_ms) = donor.tasks.remove(0);
        let (id, reference) = (donor.id, donor.reference());
        let (pack, to) = (Hash::try_from(&task.pack[..]).unwrap(), task.to.unwrap());
        let in_time = self.world.now() < told_ms + COPY_LEASE_MS;
        assert_eq!(to.donor, id);
        let sources = || task.from.iter().filter(|from| lends(&self.donors, from));
        let holds = |from: &&v1::Extent| self.memory.holds(&pack, from);
        let good = sources().any(|from| holds(&from));
        let bad: Vec<v1::Extent> = sources().filter(|from| !holds(from)).copied().collect();
        let ok = good && in_time && lends(&self.donors, &to);
        if ok {
            self.memory.write(&self.donors, pack, &to);
        }
        if !report {
            return;
        }
        let request = v1::CopiedReport {
            donor: reference,
            outcomes: vec![v1::CopyOutcome {
                task: task.task,
                ok,
                why: String::new(),
                bad,
            }],
        };
        if let Ok(lease) = self.world.engine.copied(&request) {
            self.donors[at].heard(&self.world, lease);
        }
    }
}
