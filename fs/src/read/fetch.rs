//! Brings stretches of packs into private memory and checks them, trying one thing after another.
//!
//! The rungs, for each pack on its own: the replicas that are remembered; the replicas that the
//! catalogue knows when it is asked anew; a refill, and the replicas after it. A replica fails by
//! an error or by bytes that do not pass the check, which are never looked at again. Replicas that
//! failed although the catalogue still lists them are reported as lost.

mod round;

use std::{
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use harbour_image::object::PackId;

use super::Outside;
use crate::{
    budget::Budget,
    source::{Extent, SourceError},
};

/// Longest wait for one batch from one donor: the others shall get their chance before the
/// operation's deadline.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Replicas of one pack that are tried on one rung.
const REPLICAS_MAX: usize = 8;

/// A stretch of a pack and its place in the memory that is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// Place of the pack in [`Errand::packs`].
    pub(crate) pack: usize,
    /// Offset in the pack in bytes.
    pub(crate) offset: u32,
    /// Offset in the memory in bytes.
    pub(crate) at: usize,
    /// Length in bytes.
    pub(crate) len: usize,
}

/// What is to be brought.
pub(crate) struct Errand<'a> {
    /// Number of the layer or image on whose behalf, for a refill.
    pub(crate) owner: u32,
    /// Packs by the number that the wants name.
    pub(crate) packs: &'a [PackId],
    /// Stretches, by increasing place in memory and not overlapping there.
    pub(crate) wants: &'a [Want],
    /// Whether a refill may be asked for.
    pub(crate) refill: bool,
}

/// Why an errand failed.
#[derive(Debug)]
pub(crate) enum Missed {
    /// The first rung was not enough, and the budget allows no other.
    Later,
    /// Everything was tried; this is what, and how each failed.
    Failed(String),
}

/// How far a pack has climbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rung {
    Known,
    Fresh,
    Refilled,
}

struct Pack {
    rung: Rung,
    replicas: Arc<[Extent]>,
    next: usize,
    /// Replicas of this rung and the one before that failed.
    failed: Vec<(Extent, String)>,
}

impl Pack {
    fn candidate(&self) -> Option<Extent> {
        self.replicas
            .get(self.next)
            .filter(|_| self.next < REPLICAS_MAX)
            .copied()
    }
}

struct Run<'a> {
    outside: &'a Outside,
    errand: &'a Errand<'a>,
    budget: Budget,
    packs: Vec<Pack>,
    tried: String,
}

impl Outside {
    /// Fills `arena` as `errand` says; `check` tells whether the bytes of a want (by its place in
    /// the list) are right. What `arena` holds after an error is not specified.
    pub(crate) fn fetch(
        &self,
        errand: &Errand<'_>,
        arena: &mut [u8],
        check: &dyn Fn(usize, &[u8]) -> bool,
    ) -> Result<(), Missed> {
        if errand.wants.is_empty() {
            return Ok(());
        }
        let mut run = Run {
            outside: self,
            errand,
            budget: Budget::current(),
            packs: Vec::with_capacity(errand.packs.len()),
            tried: String::new(),
        };
        run.look_up()?;
        let mut pending: Vec<usize> = (0..errand.wants.len()).collect();
        let mut first = true;
        while !pending.is_empty() {
            run.choose(&pending)?;
            pending = run.round(&pending, first, arena, check);
            first = false;
        }
        self.uses.note(self.catalogue.as_ref(), errand.packs);
        Ok(())
    }
}

impl Run<'_> {
    /// Finds the remembered replicas of every pack, asking once for all that are not remembered.
    fn look_up(&mut self) -> Result<(), Missed> {
        let locations = &self.outside.locations;
        let mut replicas: Vec<Option<Arc<[Extent]>>> = self
            .errand
            .packs
            .iter()
            .map(|pack| locations.get(pack))
            .collect();
        let unknown: Vec<usize> = (0..replicas.len())
            .filter(|pack| replicas[*pack].is_none())
            .collect();
        if !unknown.is_empty() {
            let ids: Vec<PackId> = unknown
                .iter()
                .map(|pack| self.errand.packs[*pack])
                .collect();
            let ticket = locations.ticket();
            match self.outside.catalogue.locate(&ids, false, self.attempt()) {
                Ok(answers) => {
                    for (pack, extents) in unknown.into_iter().zip(answers) {
                        let extents: Arc<[Extent]> = extents.into();
                        if !extents.is_empty() {
                            locations.put(ticket, self.errand.packs[pack], Arc::clone(&extents));
                        }
                        replicas[pack] = Some(extents);
                    }
                }
                Err(_) if self.budget.quick => return Err(Missed::Later),
                Err(error) => self.note("locate", &error),
            }
        }
        let packs = replicas.into_iter().map(|replicas| Pack {
            rung: Rung::Known,
            replicas: replicas.unwrap_or_default(),
            next: 0,
            failed: Vec::new(),
        });
        self.packs = packs.collect();
        Ok(())
    }

    /// Sees to it that every pack that is still wanted has a replica to try.
    fn choose(&mut self, pending: &[usize]) -> Result<(), Missed> {
        for &want in pending {
            let pack = self.errand.wants[want].pack;
            while self.packs[pack].candidate().is_none() {
                if self.budget.quick {
                    return Err(Missed::Later);
                }
                self.climb(pack)?;
            }
        }
        if self.budget.is_spent() {
            if self.budget.quick {
                return Err(Missed::Later);
            }
            return Err(self.give_up("deadline passed"));
        }
        Ok(())
    }

    /// Takes one pack to its next rung.
    fn climb(&mut self, pack: usize) -> Result<(), Missed> {
        if self.budget.is_spent() {
            return Err(self.give_up("deadline passed"));
        }
        let id = self.errand.packs[pack];
        match self.packs[pack].rung {
            Rung::Known => {
                self.locate_anew(pack);
                self.packs[pack].rung = Rung::Fresh;
            }
            Rung::Fresh => {
                self.report_lost(pack);
                if !self.errand.refill {
                    return Err(self.give_up("no replica left"));
                }
                self.outside.stats.refills.add(1);
                let deadline = self.budget.deadline;
                if let Err(error) = self.outside.refill.refill(self.errand.owner, &id, deadline) {
                    self.note("refill", &error);
                    return Err(self.give_up("no replica left"));
                }
                self.note_text(&format!("refill of pack {}: done", short(&id)));
                self.locate_anew(pack);
                self.packs[pack].rung = Rung::Refilled;
            }
            Rung::Refilled => {
                self.report_lost(pack);
                return Err(self.give_up("no replica left after a refill"));
            }
        }
        Ok(())
    }

    fn locate_anew(&mut self, pack: usize) {
        let id = self.errand.packs[pack];
        let locations = &self.outside.locations;
        let ticket = locations.ticket();
        let replicas: Arc<[Extent]> =
            match self.outside.catalogue.locate(&[id], true, self.attempt()) {
                Ok(answers) => answers.into_iter().next().unwrap_or_default().into(),
                Err(error) => {
                    self.note("locate anew", &error);
                    Arc::new([])
                }
            };
        if replicas.is_empty() {
            self.note_text(&format!("pack {}: no replica listed", short(&id)));
        }
        if !replicas.is_empty() {
            locations.put(ticket, id, Arc::clone(&replicas));
        }
        self.packs[pack].replicas = replicas;
        self.packs[pack].next = 0;
    }

    /// Tells of replicas that failed and are listed all the same.
    fn report_lost(&mut self, pack: usize) {
        let state = &mut self.packs[pack];
        let mut told: Vec<Extent> = Vec::new();
        for (extent, why) in std::mem::take(&mut state.failed) {
            if state.replicas.contains(&extent) && !told.contains(&extent) {
                self.outside
                    .catalogue
                    .report_lost(&self.errand.packs[pack], &extent, &why);
                told.push(extent);
            }
        }
        // A place that proved wrong must not be what the next read starts with.
        self.outside.locations.forget(&[self.errand.packs[pack]]);
    }

    /// Deadline of one attempt: never so late that nothing else could be tried.
    fn attempt(&self) -> Instant {
        let now = Instant::now();
        let left = self.budget.deadline.saturating_duration_since(now);
        if self.budget.quick {
            self.budget.deadline
        } else {
            now + (left / 2).min(ATTEMPT_MAX)
        }
    }

    fn note(&mut self, what: &str, error: &SourceError) {
        let text = crate::errno::chain(error);
        self.note_text(&format!("{what}: {text}"));
    }

    fn note_text(&mut self, text: &str) {
        const TRIED_MAX: usize = 4096;
        if self.tried.len() < TRIED_MAX {
            let comma = if self.tried.is_empty() { "" } else { "; " };
            // Writing to a String cannot fail.
            let _ = write!(self.tried, "{comma}{text}");
        }
    }

    fn give_up(&mut self, why: &str) -> Missed {
        self.note_text(why);
        Missed::Failed(std::mem::take(&mut self.tried))
    }
}

/// First digits of a pack's name, enough to find it in a log.
fn short(pack: &PackId) -> String {
    hex::encode(&pack.0[..6])
}
