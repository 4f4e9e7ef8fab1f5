//! Brings stretches of packs into private memory and checks them, trying one thing after another.
//!
//! The rungs, for each pack on its own: the replicas that are remembered; the replicas that the
//! catalogue knows when it is asked anew; a refill, and the replicas after it, a few times where what it
//! brought was pushed out again; at last, those of
//! donors that were passed over because they do not answer, with all the time that is left. While a
//! refill is under way those donors are asked again every now and then: its source may be as silent
//! as they were, and they may have come to. A replica fails by an error or by bytes that do not pass
//! the check, which are never looked at again. Replicas that failed although the catalogue still
//! lists them are reported as lost, unless their donor was merely silent.
//!
//! Of several replicas, memory of this host comes first, then the donor that has lately been
//! fastest; what is equal takes turns. When one is later than usual another is asked beside it
//! ([`race`]).

mod race;
mod round;

use std::{
    fmt::Write as _,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use harbour_image::object::PackId;

pub(crate) use self::race::Hedging;
use self::round::Why;
use super::{Outside, pace::Standing};
use crate::{
    budget::Budget,
    source::{Extent, SourceError},
    stats::Donor,
};

/// Longest wait for one batch from one donor, and for an answer of the catalogue: a donor that is
/// frozen must not cost a reader more while anything else can be tried.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// The same once some donor of the same read did not answer: two that are silent must not cost twice.
const ATTEMPT_NEXT: Duration = Duration::from_millis(300);
/// On top of that, a batch has the time that it takes at this pace, in bytes a second.
const ATTEMPT_FLOOR: u64 = 4 << 20;
/// Longest wait once nothing else is left.
const LAST_MAX: Duration = Duration::from_secs(5);
/// A refill is waited for so long at a time; between, donors that did not answer are asked again.
const REFILL_TURN: Duration = Duration::from_secs(1);
/// The first time no longer than this when there are donors that only others found silent.
const REFILL_FIRST: Duration = Duration::from_millis(300);
/// Refills of one pack that one read waits for. What a refill brought may be pushed out again before it
/// is read, where pool and spool hold less than what is read from them.
const REFILLS_MAX: u32 = 8;
/// Replicas of one pack that are tried on one rung.
const REPLICAS_MAX: usize = 8;

/// An odd step whose upper half takes turns without a pattern that several readers could share.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

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
    Last,
}

struct Pack {
    rung: Rung,
    /// Best first.
    replicas: Arc<[Extent]>,
    /// Those of them that failed, by place.
    struck: [bool; REPLICAS_MAX],
    /// Whether the catalogue listed any when it was last asked.
    listed: bool,
    /// How often a refill was waited for.
    turns: u32,
    /// Refills that were done.
    refills: u32,
    /// Replicas whose donors do not answer: for when nothing else is left.
    spare: Vec<Extent>,
    /// Replicas of this rung and the one before that failed.
    failed: Vec<(Extent, Why)>,
}

impl Pack {
    /// Replicas that can still be tried, best first.
    fn open(&self) -> impl Iterator<Item = Extent> + '_ {
        let open = self.replicas.iter().zip(self.struck);
        open.filter(|(_, struck)| !struck)
            .map(|(extent, _)| *extent)
    }

    fn candidate(&self) -> Option<Extent> {
        self.open().next()
    }

    /// What to try beside the candidate.
    fn alternative(&self) -> Option<Extent> {
        // One of a donor that was set aside is better than none: it may have come to.
        self.open().nth(1).or_else(|| self.spare.first().copied())
    }

    /// Takes a replica that failed out of those to try; whether it was one.
    fn strike(&mut self, extent: &Extent) -> bool {
        let place = self.replicas.iter().position(|known| known == extent);
        let struck = place.and_then(|place| self.struck.get_mut(place));
        struck.is_some_and(|struck| !std::mem::replace(struck, true))
    }
}

struct Run<'a> {
    outside: &'a Outside,
    errand: &'a Errand<'a>,
    budget: Budget,
    packs: Vec<Pack>,
    /// Donors and epochs that did not answer in time.
    silent: Vec<(u64, u64)>,
    /// Whether any did not: the next one that does not answer is not waited for as long.
    hurry: bool,
    /// How donors stood when this errand first asked.
    standings: Vec<((u64, u64), Standing)>,
    started: Instant,
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
            silent: Vec::new(),
            hurry: false,
            standings: Vec::new(),
            started: Instant::now(),
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
            match self.outside.catalogue.locate(&ids, false, self.question()) {
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
        for replicas in replicas {
            let replicas = replicas.unwrap_or_default();
            let (replicas, spare) = self.order(replicas);
            self.packs.push(Pack {
                rung: Rung::Known,
                replicas,
                struck: [false; REPLICAS_MAX],
                listed: false,
                turns: 0,
                refills: 0,
                spare,
                failed: Vec::new(),
            });
        }
        Ok(())
    }

    /// Replicas by whom to ask first, and those whose donors do not answer.
    fn order(&mut self, replicas: Arc<[Extent]>) -> (Arc<[Extent]>, Vec<Extent>) {
        if let [only] = &*replicas {
            return match self.standing(only).0 {
                Standing::Aside => (Arc::new([]), vec![*only]),
                Standing::Good | Standing::Late => (replicas, Vec::new()),
            };
        }
        let spread = self.outside.spread.fetch_add(SPREAD, Ordering::Relaxed);
        let mut good = Vec::with_capacity(replicas.len());
        let mut spare = Vec::new();
        for (place, extent) in replicas.iter().enumerate() {
            let (standing, donor) = self.standing(extent);
            if standing == Standing::Aside {
                spare.push(*extent);
                continue;
            }
            let turn = (spread >> 32).wrapping_add(place as u64) % replicas.len() as u64;
            good.push(((standing, !donor.local, donor.pace.rank(), turn), *extent));
        }
        good.sort_unstable_by_key(|(key, _)| *key);
        let good = good
            .into_iter()
            .take(REPLICAS_MAX)
            .map(|(_, extent)| extent);
        (good.collect(), spare)
    }

    /// How an extent's donor stands: asked once, as the answer may make this read its probe.
    fn standing(&mut self, extent: &Extent) -> (Standing, Arc<Donor>) {
        let key = (extent.donor, extent.epoch);
        let donor = self.donor(extent);
        if self.silent.contains(&key) {
            return (Standing::Aside, donor);
        }
        let known = self.standings.iter().find(|(donor, _)| *donor == key);
        let standing = match known {
            Some((_, standing)) => *standing,
            None => {
                let standing = donor.pace.standing(Instant::now());
                self.standings.push((key, standing));
                standing
            }
        };
        (standing, donor)
    }

    /// Takes the replicas of a donor that did not answer out of what is tried next.
    fn pass_over(&mut self, key: (u64, u64)) {
        if !self.silent.contains(&key) {
            self.silent.push(key);
        }
        // On the last rung there is nobody else: whoever is silent is asked until the time is over.
        for pack in self.packs.iter_mut().filter(|pack| pack.rung != Rung::Last) {
            let of_donor: Vec<Extent> = pack
                .open()
                .filter(|extent| (extent.donor, extent.epoch) == key)
                .collect();
            for extent in of_donor {
                pack.strike(&extent);
                pack.spare.push(extent);
            }
        }
    }

    /// The record of an extent's donor.
    fn donor(&self, extent: &Extent) -> Arc<Donor> {
        let pool = self.outside.pool.as_ref();
        self.outside.stats.donor(pool, extent.donor, extent.epoch)
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
                return self.refill(pack);
            }
            Rung::Refilled => {
                self.report_lost(pack);
                if self.packs[pack].refills < REFILLS_MAX {
                    return self.refill(pack);
                }
                return self.last(pack, "no replica left after a refill");
            }
            Rung::Last => return Err(self.give_up("no replica left")),
        }
        Ok(())
    }

    /// Waits for a refill, and in turns with that asks whoever may have come to meanwhile.
    fn refill(&mut self, pack: usize) -> Result<(), Missed> {
        let id = self.errand.packs[pack];
        let state = &mut self.packs[pack];
        let (first, listed) = (state.turns == 0, state.listed);
        state.turns += 1;
        if first {
            self.outside.stats.refills.add(1);
        }
        let untried = |extent: &Extent| !self.silent.contains(&(extent.donor, extent.epoch));
        let turn = if first && self.packs[pack].spare.iter().any(untried) {
            REFILL_FIRST
        } else {
            REFILL_TURN
        };
        let deadline = self.budget.deadline.min(Instant::now() + turn);
        let refill = &self.outside.refill;
        match refill.refill(self.errand.owner, &id, listed, deadline) {
            Ok(()) => {
                self.note_text(&format!("refill of pack {}: done", short(&id)));
                self.locate_anew(pack);
                let state = &mut self.packs[pack];
                state.rung = Rung::Refilled;
                state.refills += 1;
            }
            Err(SourceError::Deadline(_)) if !self.budget.is_spent() => {
                self.locate_anew(pack);
                let state = &mut self.packs[pack];
                if state.candidate().is_none() {
                    state.replicas = std::mem::take(&mut state.spare).into();
                    state.struck = [false; REPLICAS_MAX];
                }
            }
            Err(error) => {
                self.note("refill", &error);
                return self.last(pack, "no replica left");
            }
        }
        Ok(())
    }

    /// The last rung: donors that did not answer may have come to.
    fn last(&mut self, pack: usize, why: &str) -> Result<(), Missed> {
        let spare = std::mem::take(&mut self.packs[pack].spare);
        if spare.is_empty() {
            return Err(self.give_up(why));
        }
        let state = &mut self.packs[pack];
        state.replicas = spare.into();
        state.struck = [false; REPLICAS_MAX];
        state.rung = Rung::Last;
        self.note_text(why);
        Ok(())
    }

    fn locate_anew(&mut self, pack: usize) {
        let id = self.errand.packs[pack];
        let locations = &self.outside.locations;
        let ticket = locations.ticket();
        let replicas: Arc<[Extent]> =
            match self.outside.catalogue.locate(&[id], true, self.question()) {
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
        let listed = !replicas.is_empty();
        let (replicas, spare) = self.order(replicas);
        let state = &mut self.packs[pack];
        state.listed = listed;
        state.replicas = replicas;
        state.struck = [false; REPLICAS_MAX];
        if listed {
            state.spare = spare;
        }
    }

    /// Tells of replicas that failed and are listed all the same.
    fn report_lost(&mut self, pack: usize) {
        let state = &mut self.packs[pack];
        let mut told: Vec<Extent> = Vec::new();
        for (extent, why) in std::mem::take(&mut state.failed) {
            // A frozen donor still has what it had.
            if !why.silent && state.replicas.contains(&extent) && !told.contains(&extent) {
                self.outside
                    .catalogue
                    .report_lost(&self.errand.packs[pack], &extent, &why.text);
                told.push(extent);
            }
        }
        // A place that proved wrong must not be what the next read starts with.
        self.outside.locations.forget(&[self.errand.packs[pack]]);
    }

    /// Deadline of one question to the catalogue.
    fn question(&self) -> Instant {
        self.attempt(0, ATTEMPT_MAX)
    }

    /// Deadline of one batch of `len` bytes from one donor.
    fn batch_deadline(&self, len: usize) -> Instant {
        let wait = if self.hurry {
            ATTEMPT_NEXT
        } else {
            ATTEMPT_MAX
        };
        self.attempt(len, wait)
    }

    /// Deadline of one attempt at `len` bytes that may take `wait` beside their transfer: never so
    /// late that nothing else could be tried, if there is anything else.
    fn attempt(&self, len: usize, wait: Duration) -> Instant {
        let now = Instant::now();
        let left = self.budget.deadline.saturating_duration_since(now);
        if self.budget.quick {
            self.budget.deadline
        } else if self.packs.iter().any(|pack| pack.rung == Rung::Last) {
            now + left.min(LAST_MAX)
        } else {
            let transfer = Duration::from_millis(len as u64 * 1000 / ATTEMPT_FLOOR);
            now + (left / 2).min(wait + transfer)
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
