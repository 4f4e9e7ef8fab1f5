//! One round of reads: batches by donor, cut into windows, checked as they come.

use std::{sync::Arc, time::Instant};

use harbour_pool::transport::{Read, TransportError};

use super::{Run, Want, short};
use crate::{source::Extent, stats::Donor};

impl Run<'_> {
    /// Reads everything in `pending` from the chosen replicas; gives what failed.
    pub(super) fn round(
        &mut self,
        pending: &[usize],
        first: bool,
        arena: &mut [u8],
        check: &dyn Fn(usize, &[u8]) -> bool,
    ) -> Vec<usize> {
        let mut failed = Vec::new();
        let mut failures: Vec<(usize, Extent, Why)> = Vec::new();
        for group in self.groups(pending, first) {
            let donor =
                self.outside
                    .stats
                    .donor(self.outside.pool.as_ref(), group.donor, group.epoch);
            let mut usable = true;
            for window in self.windows(&group.wants, donor.local) {
                let bad = if usable {
                    self.read_window(&donor, &group, &window, arena, check, &mut usable)
                } else {
                    // Whatever it was, waiting for it once a round is enough.
                    let skip = |want: usize| {
                        Some((
                            want,
                            self.packs[self.errand.wants[want].pack].candidate()?,
                            None,
                        ))
                    };
                    window.into_iter().filter_map(skip).collect()
                };
                self.hurry |= bad
                    .iter()
                    .any(|(.., why)| why.as_ref().is_some_and(|why| why.silent));
                for (want, extent, why) in bad {
                    failures.extend(why.map(|why| (self.errand.wants[want].pack, extent, why)));
                    failed.push(want);
                }
            }
        }
        let mut silent: Vec<(u64, u64)> = Vec::new();
        for (pack, extent, why) in failures {
            if why.silent {
                silent.push((extent.donor, extent.epoch));
            } else if !self.packs[pack].strike(&extent) {
                continue;
            }
            let kind = self.donor(&extent);
            let id = short(&self.errand.packs[pack]);
            self.note_text(&format!(
                "pack {id} at donor {} ({}): {}",
                extent.donor, kind.kind, why.text
            ));
            self.packs[pack].failed.push((extent, why));
        }
        for donor in silent {
            self.pass_over(donor);
        }
        // One that was raced failed twice.
        failed.sort_unstable();
        failed.dedup();
        failed
    }

    /// The wants of `pending` by donor. After the first round also by pack, so that one bad place
    /// cannot spoil the batch of another.
    fn groups(&self, pending: &[usize], first: bool) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for &want in pending {
            let pack = self.errand.wants[want].pack;
            let Some(extent) = self.packs[pack].candidate() else {
                continue;
            };
            let same = |group: &&mut Group| {
                group.donor == extent.donor
                    && group.epoch == extent.epoch
                    && (first || group.pack == pack)
            };
            match groups.iter_mut().rev().find(same) {
                Some(group) => group.wants.push(want),
                None => {
                    groups.push(Group {
                        donor: extent.donor,
                        epoch: extent.epoch,
                        pack,
                        wants: vec![want],
                    });
                }
            }
        }
        groups
    }

    /// Cuts a group so that copy and check of one cut meet in the processor's cache; only for
    /// memory of this host, where a batch costs nothing by itself.
    fn windows(&self, wants: &[usize], local: bool) -> Vec<Vec<usize>> {
        if !local {
            return vec![wants.to_vec()];
        }
        let mut windows: Vec<Vec<usize>> = Vec::new();
        let mut room = 0;
        for &want in wants {
            let len = self.errand.wants[want].len;
            match windows.last_mut() {
                Some(window) if len <= room => window.push(want),
                _ => {
                    windows.push(vec![want]);
                    room = self.outside.config.piece_bytes;
                }
            }
            room = room.saturating_sub(len);
        }
        windows
    }

    /// One batch and its checks; gives the wants that failed, where, and why. Clears `usable` when
    /// it was the donor and not the bytes.
    fn read_window(
        &self,
        donor: &Arc<Donor>,
        group: &Group,
        window: &[usize],
        arena: &mut [u8],
        check: &dyn Fn(usize, &[u8]) -> bool,
        usable: &mut bool,
    ) -> Vec<Failure> {
        let mut bad = Vec::new();
        let mut good: Vec<(usize, Extent)> = Vec::with_capacity(window.len());
        for &want in window {
            let Want {
                pack, offset, len, ..
            } = self.errand.wants[want];
            let Some(extent) = self.packs[pack].candidate() else {
                continue;
            };
            if u64::from(offset) + len as u64 > u64::from(extent.len) {
                bad.push((
                    want,
                    extent,
                    Some(Why::place("replica is shorter than the pack")),
                ));
            } else {
                good.push((want, extent));
            }
        }
        // With one replica, or memory of this host, there is nothing to race and nothing to pay.
        if !donor.local && good.iter().any(|(want, _)| self.has_alternative(*want)) {
            let first = (donor, group.donor, group.epoch);
            if let Some(failed) = self.race(first, &good, arena, check) {
                *usable = failed.is_empty();
                bad.extend(failed);
                return bad;
            }
        }
        let len = self.bytes_of(&good);
        let mut batch = self.batch(&good, arena);
        let start = (!donor.local).then(Instant::now);
        let result = self.outside.pool.read(
            group.donor,
            group.epoch,
            &mut batch,
            self.batch_deadline(len),
        );
        drop(batch);
        match (&result, start) {
            (Ok(()), None) => donor.pace.cleared(),
            (_, start) => donor.note(len, start.unwrap_or(self.started), &result),
        }
        if let Err(error) = result {
            *usable = false;
            let why = Why::of(&error);
            bad.extend(
                good.into_iter()
                    .map(|(want, extent)| (want, extent, Some(why.clone()))),
            );
            return bad;
        }
        let mut bytes = 0;
        for (want, extent) in good {
            let Want { at, len, .. } = self.errand.wants[want];
            bytes += len as u64;
            if !check(want, &arena[at..at + len]) {
                self.outside.stats.wrong.add(1);
                bad.push((want, extent, Some(Why::wrong())));
            }
        }
        donor.bytes.add(bytes);
        bad
    }

    /// Whether another replica of a want's pack is known.
    fn has_alternative(&self, want: usize) -> bool {
        let pack = self.errand.wants[want].pack;
        self.packs[pack].alternative().is_some()
    }

    /// Bytes of these wants together.
    pub(super) fn bytes_of(&self, wants: &[(usize, Extent)]) -> usize {
        wants
            .iter()
            .map(|(want, _)| self.errand.wants[*want].len)
            .sum()
    }

    /// One read per stretch that is contiguous both in the region and in memory.
    fn batch<'m>(&self, good: &[(usize, Extent)], arena: &'m mut [u8]) -> Vec<Read<'m>> {
        let mut plan: Vec<(Extent, u64, usize, usize)> = Vec::with_capacity(good.len());
        for &(want, extent) in good {
            let Want {
                offset, at, len, ..
            } = self.errand.wants[want];
            let from = extent.offset + u64::from(offset);
            match plan.last_mut() {
                Some((last, start, place, so_far))
                    if last.region == extent.region
                        && *start + *so_far as u64 == from
                        && *place + *so_far == at =>
                {
                    *so_far += len;
                }
                _ => plan.push((extent, from, at, len)),
            }
        }
        let mut rest = arena;
        let mut passed = 0;
        let mut batch = Vec::with_capacity(plan.len());
        for (extent, offset, at, len) in plan {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(at - passed);
            let (into, tail) = tail.split_at_mut(len);
            rest = tail;
            passed = at + len;
            batch.push(Read {
                region: extent.region,
                offset,
                into,
            });
        }
        batch
    }
}

/// A want, where it failed, and why (nothing when it was not tried).
pub(super) type Failure = (usize, Extent, Option<Why>);

/// How a replica failed.
#[derive(Clone, Debug)]
pub(super) struct Why {
    pub(super) text: String,
    /// Its donor did not answer in time: no word on the replica.
    pub(super) silent: bool,
}

impl Why {
    pub(super) fn of(error: &TransportError) -> Self {
        Self {
            text: crate::errno::chain(error),
            silent: matches!(error, TransportError::Deadline),
        }
    }

    pub(super) fn silent() -> Self {
        Self::of(&TransportError::Deadline)
    }

    pub(super) fn wrong() -> Self {
        Self::place("wrong bytes")
    }

    fn place(text: &str) -> Self {
        Self {
            text: text.into(),
            silent: false,
        }
    }
}

struct Group {
    donor: u64,
    epoch: u64,
    pack: usize,
    wants: Vec<usize>,
}
