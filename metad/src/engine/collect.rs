//! Taking away what nothing refers to.

use std::collections::HashSet;

use super::{Around, Effects, Engine, state::State};
use crate::{
    error::Error,
    store::{Read, Sync, Tx},
};

/// What readers still hold.
#[derive(Debug)]
pub(super) struct Reach {
    /// Numbers that nodes have open.
    held: HashSet<u32>,
    /// Numbers of layers that engines have snapshots of.
    used: HashSet<u32>,
    /// Nodes of before a restart may hold more than is known.
    unknown: bool,
    /// Who was told to make a copy may still be writing until then.
    late_ms: u64,
}

impl Reach {
    fn holds(&self, number: u32) -> bool {
        self.unknown || self.held.contains(&number)
    }

    /// Whether somebody wants to open it again though no image refers to it.
    fn uses(&self, number: u32) -> bool {
        self.unknown || self.used.contains(&number)
    }
}

/// What a collection took out of sight or away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Collected {
    pub(super) images: u32,
    pub(super) layers: u32,
    pub(super) freed_bytes: u64,
}

/// Takes images without names and layers without images out of sight, and away when no reader
/// holds them; then packs, documents and indexes that lost their last reference. `packs` are
/// those that the caller's change may have made superfluous.
pub(super) fn collect(
    tx: &Tx<'_>,
    effects: &mut Effects,
    reach: &Reach,
    mut packs: Vec<u64>,
) -> Result<Collected, Error> {
    let mut done = Collected::default();
    for image in tx.nameless_images()? {
        tx.retire_image(image)?;
        done.images += 1;
    }
    for (layer, number) in tx.loose_layers()? {
        if !reach.uses(number) {
            tx.retire_layer(layer)?;
            done.layers += 1;
        }
    }
    if done.images + done.layers > 0 {
        effects.touch();
    }
    for (image, number) in tx.retired_images()? {
        if !reach.holds(number) {
            packs.extend(tx.packs_of_image(image)?);
            tx.delete_image(image)?;
        }
    }
    for (layer, number) in tx.retired_layers()? {
        if !reach.holds(number) {
            packs.extend(tx.packs_of_layer(layer)?);
            tx.delete_layer(layer)?;
        }
    }
    packs.sort_unstable();
    packs.dedup();
    for pack in packs {
        done.freed_bytes += drop_unwanted(tx, effects, pack, reach.late_ms)?;
    }
    tx.prune_documents()?;
    effects.files.extend(tx.prune_indexes()?);
    Ok(done)
}

/// Takes a pack away when nothing refers to it; gives the bytes that it took.
fn drop_unwanted(tx: &Tx<'_>, effects: &mut Effects, id: u64, late_ms: u64) -> Result<u64, Error> {
    if tx.pack_wanted(id)? {
        return Ok(0);
    }
    let Some(pack) = tx.pack_of(id)? else {
        return Ok(0);
    };
    let mut bytes = 0;
    for extent in tx.extents_of_pack(id)? {
        bytes += extent.place.held_bytes();
        effects.free_committed(tx, &pack, &extent)?;
    }
    for copy in tx.copies_of_pack(id)? {
        effects.drop_copy(tx, &copy, Some(late_ms))?;
    }
    tx.delete_pack(id)?;
    effects.removed.push(id);
    Ok(bytes)
}

/// Whether a round of [`collect`] would find anything.
fn worthwhile(read: &Read<'_>, reach: &Reach) -> Result<bool, Error> {
    let free = |retired: Vec<(u64, u32)>| retired.iter().any(|(_, number)| !reach.holds(*number));
    let loose = read.loose_layers()?;
    Ok(!read.nameless_images()?.is_empty()
        || loose.iter().any(|(_, number)| !reach.uses(*number))
        || free(read.retired_images()?)
        || free(read.retired_layers()?))
}

impl Engine {
    /// What readers hold now.
    pub(super) fn reach(&self, state: &State) -> Reach {
        let now_ms = self.now_ms();
        Reach {
            held: state.held_numbers(),
            used: state.used_numbers(),
            unknown: now_ms < state.nodes_unknown_until_ms,
            late_ms: now_ms + self.options.timing.longest_write_ms(),
        }
    }

    /// A round of collection, for what readers have let go of meanwhile.
    pub(super) fn collect_now(&self) -> Result<(), Error> {
        let mut state = self.lock();
        if !std::mem::take(&mut state.collect) {
            return Ok(());
        }
        let reach = self.reach(&state);
        // What is held for unknown nodes has to be looked at again.
        state.collect = reach.unknown;
        if !worthwhile(&state.writer.read(), &reach)? {
            return Ok(());
        }
        let around = Around("collect.before", "collect.after");
        self.change(&mut state, Sync::Process, Some(around), |tx, effects| {
            collect(tx, effects, &reach, Vec::new()).map(drop)
        })
    }
}
