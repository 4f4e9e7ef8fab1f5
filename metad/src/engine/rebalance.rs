//! Evening the load: packs move from the fullest donors to the emptiest.
//!
//! It begins when some donor's fill is more than [`BEGIN_PERCENT`] of the mean away from the mean,
//! and goes on until all are within [`END_PERCENT`]: the gap between the two keeps it from starting
//! again over the next pull. A pack only moves where its donor is still no emptier afterwards than
//! the other, so no pack goes back and forth.

use super::{Engine, copies::Copy, plan::busy, reserve::PACK_MAX, state::State};
use crate::{error::Error, space::held, store::Read};

/// Distance from the mean, in parts of it, at which moving begins.
const BEGIN_PERCENT: u64 = 20;
/// And at which it ends.
const END_PERCENT: u64 = 8;
/// Below this part of what is lent nothing is worth moving.
const LEAST_PERCENT: u64 = 1;
/// Packs that are looked at for one that can move between two donors.
const LOOKED_AT: u32 = 64;

/// How full a donor is, with what is on its way to and from it.
#[derive(Clone, Copy, Debug)]
struct Fill {
    donor: u64,
    used: u64,
    lent: u64,
}

impl Fill {
    /// Millionths.
    fn ratio(&self) -> u64 {
        ratio(self.used, self.lent)
    }
}

fn ratio(used: u64, lent: u64) -> u64 {
    let ppm = u128::from(used) * 1_000_000 / u128::from(lent.max(1));
    u64::try_from(ppm).unwrap_or(u64::MAX)
}

/// Whether one of `fills` is `percent` of the mean or more away from it.
fn uneven(fills: &[Fill], mean: u64, percent: u64) -> bool {
    fills
        .iter()
        .any(|fill| fill.ratio().abs_diff(mean) * 100 > mean * percent)
}

impl Engine {
    /// Plans moves, when there are any and nothing is missing that should be copied first.
    pub(super) fn plan_moves(
        &self,
        state: &mut State,
        planned: &mut Vec<Copy>,
    ) -> Result<(), Error> {
        if state.copies.behind {
            return Ok(());
        }
        loop {
            let fills = fills(state, planned);
            let used: u64 = fills.iter().map(|fill| fill.used).sum();
            let lent: u64 = fills.iter().map(|fill| fill.lent).sum();
            let mean = ratio(used, lent);
            let percent = if state.copies.rebalancing {
                END_PERCENT
            } else {
                BEGIN_PERCENT
            };
            let worth = fills.len() > 1
                && used * 100 > lent * LEAST_PERCENT
                && uneven(&fills, mean, percent);
            if !worth {
                state.copies.rebalancing = false;
                return Ok(());
            }
            if state.copies.allowance < u64::from(PACK_MAX) {
                (state.copies.rebalancing, state.copies.behind) = (true, true);
                return Ok(());
            }
            match self.plan_move(state, &fills, planned)? {
                Some(copy) => {
                    state.copies.rebalancing = true;
                    planned.push(copy);
                }
                None => {
                    // Waiting for donors that have enough to do is no reason to stop.
                    let waits = !busy(state, planned).is_empty();
                    state.copies.rebalancing = waits;
                    state.copies.behind = waits;
                    return Ok(());
                }
            }
        }
    }

    /// One move, from the fullest donor that has a pack for the emptiest that takes it.
    fn plan_move(
        &self,
        state: &mut State,
        fills: &[Fill],
        planned: &[Copy],
    ) -> Result<Option<Copy>, Error> {
        let mut order = fills.to_vec();
        order.sort_by_key(|fill| (fill.ratio(), fill.donor));
        let busy = busy(state, planned);
        for from in order.iter().rev() {
            for to in &order {
                if to.ratio() >= from.ratio() {
                    break;
                }
                if busy.contains(&to.donor) {
                    continue;
                }
                let chosen = pick(
                    state,
                    &state.writer.read(),
                    from,
                    to,
                    planned,
                    self.now_ms(),
                )?;
                let Some((pack, len)) = chosen else {
                    continue;
                };
                if let Some(place) = state.space.reserve_on(to.donor, len) {
                    return Ok(Some(self.planned(state, pack, place, Some(from.donor))));
                }
            }
        }
        Ok(None)
    }
}

/// A pack that may move between two donors, and its length.
fn pick(
    state: &State,
    read: &Read<'_>,
    from: &Fill,
    to: &Fill,
    planned: &[Copy],
    now_ms: u64,
) -> Result<Option<(u64, u32)>, Error> {
    for (_, pack) in read.movable(from.donor, to.donor, LOOKED_AT)? {
        let taken = planned.iter().any(|copy| copy.row.pack == pack);
        if taken || state.copies.set_aside(pack, now_ms) {
            continue;
        }
        let Some(row) = read.pack_of(pack)? else {
            continue;
        };
        let bytes = held(row.len);
        if ratio(to.used + bytes, to.lent) > ratio(from.used.saturating_sub(bytes), from.lent) {
            continue;
        }
        let others: Vec<u64> = read
            .extents_of_pack(pack)?
            .iter()
            .map(|extent| extent.place.donor)
            .filter(|donor| *donor != from.donor)
            .collect();
        let worse = state.space.shares_domain(to.donor, &others)
            && !state.space.shares_domain(from.donor, &others);
        if !worse {
            return Ok(Some((pack, row.len)));
        }
    }
    Ok(None)
}

fn fills(state: &State, planned: &[Copy]) -> Vec<Fill> {
    let open = state.space.open_donors().into_iter();
    let copies = || state.copies.under_way.values().chain(planned);
    open.filter_map(|donor| {
        let books = state.space.donor_books(donor)?;
        let to = copies().filter(|copy| copy.row.place.donor == donor);
        let from = copies().filter(|copy| copy.moved_from == Some(donor));
        let coming: u64 = to.map(|copy| copy.row.place.held_bytes()).sum();
        let going: u64 = from.map(|copy| copy.row.place.held_bytes()).sum();
        Some(Fill {
            donor,
            used: (books.used + coming).saturating_sub(going),
            lent: books.lent,
        })
    })
    .filter(|fill| fill.lent > 0)
    .collect()
}
