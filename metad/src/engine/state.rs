//! What is in memory: leases, the free map, the log of freed packs.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use super::{
    Timing,
    copies::Copies,
    effects::Effects,
    locks::{Listener, progress::Progress},
    nodes::Budget,
};
use crate::{
    error::{Error, Hash},
    locks::{Key, Machine},
    policy::Policy,
    space::{Book, Place, Space},
    store::{DonorRow, ExtentRow, PullRow, QuarantineRow, Writer},
};

/// Freed packs that are remembered for nodes that lag; one that lags more forgets everything.
const FREED_LOG: usize = 65_536;

/// A donor's lease.
#[derive(Debug)]
pub(super) struct DonorLease {
    pub(super) name: String,
    pub(super) epoch: u64,
    pub(super) heard_ms: u64,
    pub(super) expires_ms: u64,
    /// As the store has it.
    pub(super) live: bool,
    /// It spoke since this daemon started.
    pub(super) heard: bool,
    /// It wants to leave: it gets nothing new.
    pub(super) draining: bool,
    /// What it may still call lost as the maker of copies.
    pub(super) lost: Budget,
}

/// A node's lease.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) heard_ms: u64,
    pub(super) expires_ms: u64,
    pub(super) acknowledged: u64,
    pub(super) held: HashSet<u32>,
    pub(super) used: HashSet<u32>,
    pub(super) lost: Budget,
}

/// Space in quarantine.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) row: QuarantineRow,
    pub(super) not_before_ms: u64,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) writer: Writer,
    pub(super) space: Space,
    pub(super) policy: Box<dyn Policy>,
    /// Their leases are those of the owners of locks.
    pub(super) pulls: BTreeMap<u64, PullRow>,
    pub(super) locks: Machine<Key>,
    /// Who is told of each pull's locks.
    pub(super) listeners: HashMap<u64, Listener>,
    /// How far holders of keys say that they have come.
    pub(super) progress: HashMap<Key, Progress>,
    pub(super) donors: BTreeMap<u64, DonorLease>,
    pub(super) nodes: HashMap<u64, Node>,
    pub(super) copies: Copies,
    pub(super) quarantine: Vec<Held>,
    freed_log: VecDeque<(u64, Hash)>,
    /// Newest generation that is no longer whole in the log.
    freed_floor: u64,
    pub(super) started_ms: u64,
    /// Nodes of before the start may still read until then.
    pub(super) nodes_unknown_until_ms: u64,
    seen_ms: u64,
    boot: u64,
    issued: u64,
    /// Something may have lost its last reference, or its last reader.
    pub(super) collect: bool,
    /// Reports of lost replicas by callers that are not registered nodes.
    pub(super) lost: Budget,
}

impl State {
    pub(super) fn new(
        writer: Writer,
        policy: Box<dyn Policy>,
        boot: u64,
        freed: u64,
        now_ms: u64,
    ) -> Self {
        Self {
            writer,
            space: Space::new(),
            policy,
            pulls: BTreeMap::new(),
            locks: Machine::new(boot << 32),
            listeners: HashMap::new(),
            progress: HashMap::new(),
            donors: BTreeMap::new(),
            nodes: HashMap::new(),
            copies: Copies::new(now_ms),
            quarantine: Vec::new(),
            freed_log: VecDeque::new(),
            freed_floor: freed,
            started_ms: now_ms,
            nodes_unknown_until_ms: now_ms,
            seen_ms: now_ms,
            boot,
            issued: 0,
            collect: true,
            lost: Budget::full(now_ms),
        }
    }

    /// A number that was never given before, on any start: used for pulls, tokens and nodes.
    pub(super) fn issue(&mut self) -> u64 {
        self.issued += 1;
        (self.boot << 32) | (self.issued & 0xffff_ffff)
    }

    /// Nobody can know anything from before.
    pub(super) fn first_boot(&self) -> bool {
        self.boot <= 1
    }

    pub(super) fn load_donor(&mut self, donor: DonorRow, timing: &Timing) {
        let now = self.started_ms;
        let lease = DonorLease {
            name: donor.name,
            epoch: donor.epoch,
            heard_ms: now,
            expires_ms: now + timing.donor_lease_ms + timing.grace_ms,
            live: donor.live,
            heard: false,
            draining: donor.draining,
            lost: Budget::full(now),
        };
        self.donors.insert(donor.id, lease);
    }

    pub(super) fn hold(&mut self, row: QuarantineRow, not_before_ms: u64) {
        self.quarantine.push(Held { row, not_before_ms });
    }

    /// Moves every lease on when nobody was listened to for `gap_ms`: the process was stopped, or
    /// the machine asleep, and the others' messages are still waiting.
    pub(super) fn catch_up(&mut self, now_ms: u64, gap_ms: u64) {
        let missed = now_ms.saturating_sub(self.seen_ms);
        self.seen_ms = self.seen_ms.max(now_ms);
        if missed <= gap_ms {
            return;
        }
        tracing::warn!(missed_ms = missed, "did not run for a while; leases go on");
        self.locks.move_on(missed);
        self.nodes
            .values_mut()
            .for_each(|node| node.expires_ms += missed);
        self.nodes_unknown_until_ms += missed;
        self.copies.catch_up(missed);
        for donor in self.donors.values_mut() {
            donor.expires_ms += missed;
            donor.heard_ms += missed;
        }
        self.quarantine
            .iter_mut()
            .for_each(|held| held.not_before_ms += missed);
    }

    /// Does in memory what a transaction did in the store; gives the index files to delete.
    pub(super) fn apply(&mut self, effects: Effects) -> Vec<Hash> {
        if effects.changes_places() {
            self.copies.look_again();
        }
        for task in &effects.ended {
            self.copies.under_way.remove(task);
        }
        for (place, book) in &effects.freed {
            self.space.free(place, *book);
        }
        for place in &effects.used {
            self.space.shift(place, Book::Reserved, Book::Used);
        }
        for (donor, region) in &effects.retired {
            self.quarantine
                .retain(|held| (held.row.place.donor, held.row.place.region) != (*donor, *region));
            if !self.space.remove_region(*donor, *region) {
                tracing::error!(donor, region, "a retired region is not empty");
            }
        }
        if let Some(generation) = effects.freed_generation() {
            self.freed_log
                .extend(effects.forget.iter().map(|digest| (generation, *digest)));
            while self.freed_log.len() > FREED_LOG {
                if let Some((generation, _)) = self.freed_log.pop_front() {
                    self.freed_floor = generation;
                }
            }
        }
        for (row, from, not_before_ms) in effects.held {
            self.space.shift(&row.place, from, Book::Quarantined);
            // Nodes of before a restart could know of any committed extent.
            let unknown = if row.generation > 0 {
                self.nodes_unknown_until_ms
            } else {
                0
            };
            self.hold(row, not_before_ms.max(unknown));
        }
        effects
            .inserted
            .iter()
            .for_each(|(pack, weight)| self.policy.inserted(*pack, *weight));
        // After them: a commit may make a pack live and its collection take the pack away again.
        effects
            .removed
            .iter()
            .for_each(|pack| self.policy.removed(*pack));
        effects.files
    }

    /// Everything of a donor that lies or is to lie somewhere: these extents, quarantine and copies.
    pub(super) fn places_of(&self, donor: u64, extents: &[ExtentRow]) -> Vec<Place> {
        let extents = extents.iter().map(|extent| extent.place);
        let waiting = self.quarantine.iter().map(|held| held.row.place);
        let copies = self.copies.under_way.values().map(|copy| copy.row.place);
        let all = extents.chain(waiting).chain(copies);
        all.filter(|place| place.donor == donor).collect()
    }

    /// What is in quarantine in a region.
    pub(super) fn waiting_in(&self, donor: u64, region: u32) -> Vec<Place> {
        let waiting = self.quarantine.iter().map(|held| held.row.place);
        waiting
            .filter(|place| (place.donor, place.region) == (donor, region))
            .collect()
    }

    /// Forgets the copies of a donor whose memory is lost; the store has done so.
    pub(super) fn drop_copies_of(&mut self, donor: u64) {
        let copies = &mut self.copies;
        copies
            .under_way
            .retain(|_, copy| copy.row.place.donor != donor);
        copies.look_again();
    }

    /// Packs freed after a generation; `None` when they are too many to tell.
    pub(super) fn freed_since(&self, generation: u64, most: usize) -> Option<Vec<Hash>> {
        if generation < self.freed_floor {
            return None;
        }
        let newer = self
            .freed_log
            .iter()
            .rev()
            .take_while(|(freed, _)| *freed > generation);
        let packs: Vec<Hash> = newer.take(most + 1).map(|(_, digest)| *digest).collect();
        (packs.len() <= most).then_some(packs)
    }

    /// Numbers of layers and images that some node holds open.
    pub(super) fn held_numbers(&self) -> HashSet<u32> {
        self.nodes
            .values()
            .flat_map(|node| node.held.iter().copied())
            .collect()
    }

    /// Numbers of layers that engines of some node have snapshots of.
    pub(super) fn used_numbers(&self) -> HashSet<u32> {
        self.nodes
            .values()
            .flat_map(|node| node.used.iter().copied())
            .collect()
    }

    /// The pull that a request names, when its lease lives.
    pub(super) fn pull(
        &self,
        reference: Option<&harbour_metad_client::v1::PullRef>,
        now_ms: u64,
    ) -> Result<u64, Error> {
        let reference =
            reference.ok_or_else(|| Error::Invalid("the request names no pull".into()))?;
        let gone = || {
            Error::Refused(format!(
                "pull {:x} is not under way: it expired, was aborted or was committed; begin again",
                reference.pull
            ))
        };
        let pull = self.pulls.get(&reference.pull).ok_or_else(gone)?;
        if pull.token != reference.token {
            return Err(Error::Refused(format!(
                "pull {:x} has another fencing token",
                reference.pull
            )));
        }
        if !self.locks.lives(pull.id, now_ms) {
            return Err(gone());
        }
        Ok(reference.pull)
    }
}
