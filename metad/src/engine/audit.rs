//! Everything against everything: what the store has, counted again, and what is in memory.
//!
//! Both are of one instant: under the engine's lock memory is copied and a reader's snapshot begun;
//! the counting itself happens outside of it, and pulls go on meanwhile. Under the lock nothing is
//! half done: memory follows each transaction before the lock is given up.

mod compare;
mod findings;

use std::collections::{BTreeMap, HashSet};

use harbour_metad_client::v1;

use super::{Engine, state::State};
use crate::{
    error::Error,
    space::{Books, Space},
    store::{CopyRow, Counter, PullRow, QuarantineRow},
};
use findings::Findings;

/// What memory has, copied.
#[derive(Debug)]
struct Kept {
    space: Space,
    donors: BTreeMap<u64, KeptDonor>,
    quarantine: BTreeMap<u64, QuarantineRow>,
    copies: BTreeMap<u64, CopyRow>,
    pulls: BTreeMap<u64, PullRow>,
    /// Packs that the policy knows.
    ranked: Vec<u64>,
    /// Layers that engines have snapshots of, which may be in sight without an image.
    used: HashSet<u32>,
    /// So may others, until the next collection.
    collects: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct KeptDonor {
    name: String,
    epoch: u64,
    live: bool,
    draining: bool,
}

impl Kept {
    fn of(state: &State) -> Self {
        let donor = |(id, lease): (&u64, &super::state::DonorLease)| {
            let kept = KeptDonor {
                name: lease.name.clone(),
                epoch: lease.epoch,
                live: lease.live,
                draining: lease.draining,
            };
            (*id, kept)
        };
        let copies = state.copies.under_way.iter();
        let held = state.quarantine.iter();
        Self {
            space: state.space.clone(),
            donors: state.donors.iter().map(donor).collect(),
            quarantine: held.map(|held| (held.row.id, held.row)).collect(),
            copies: copies.map(|(id, copy)| (*id, copy.row)).collect(),
            pulls: state.pulls.clone(),
            ranked: state.policy.known(),
            used: state.used_numbers(),
            collects: state.collect,
        }
    }
}

impl Engine {
    /// Counts everything again from the store and compares it with what is in memory.
    ///
    /// # Errors
    /// [`Error::Exhausted`] while another audit is under way. A difference is no error: it is what
    /// was asked for.
    pub fn audit(&self) -> Result<v1::AuditReply, Error> {
        let Some(_alone) = self.auditing.try_lock() else {
            return Err(Error::Exhausted(
                "another audit is under way: ask again when it is done".into(),
            ));
        };
        let began_ms = self.now_ms();
        let (count, kept) = self.store.read(|read| {
            let state = self.lock();
            // The first question of a transaction begins its snapshot.
            read.counter(Counter::Generation)?;
            let kept = Kept::of(&state);
            drop(state);
            Ok((read.recount()?, kept))
        })?;
        let mut findings = Findings::default();
        let books = compare::all(&count, &kept, &mut findings);
        let (differences, found) = findings.told();
        if found > 0 {
            tracing::error!(found, "the books differ from a recount of the store");
        }
        Ok(v1::AuditReply {
            differences,
            found,
            stored: Some(message(&books.stored)),
            kept: Some(message(&kept.space.books())),
            donors: books.donors,
            counted: compare::counted(&count),
            generation: count.generation,
            took_ms: self.now_ms().saturating_sub(began_ms),
        })
    }
}

fn message(books: &Books) -> v1::Books {
    v1::Books {
        lent_bytes: books.lent,
        free_bytes: books.free,
        reserved_bytes: books.reserved,
        used_bytes: books.used,
        quarantined_bytes: books.quarantined,
    }
}
