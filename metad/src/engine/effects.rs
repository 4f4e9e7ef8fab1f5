//! What follows from a transaction in memory, once it has committed.

use crate::{
    error::{Error, Hash},
    policy::Weight,
    space::{Book, Place},
    store::{CopyRow, Counter, ExtentRow, PackRow, QuarantineRow, Tx},
};

/// Gathered inside a transaction, applied after it. Dropped with a transaction that fails.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) freed: Vec<(Place, Book)>,
    pub(super) used: Vec<Place>,
    /// Row, the book it comes from, and when it may be released at the earliest.
    pub(super) held: Vec<(QuarantineRow, Book, u64)>,
    pub(super) inserted: Vec<(u64, Weight)>,
    pub(super) removed: Vec<u64>,
    /// Packs that readers must forget.
    pub(super) forget: Vec<Hash>,
    /// Copies that are over, however they went.
    pub(super) ended: Vec<u64>,
    /// Regions that are lent no longer: their places are freed by the same effects.
    pub(super) retired: Vec<(u64, u32)>,
    /// Index files that nothing names any more.
    pub(super) files: Vec<Hash>,
    freed_generation: Option<u64>,
    touched: bool,
    generation: Option<u64>,
}

impl Effects {
    /// Readers have to look again.
    pub(super) fn touch(&mut self) {
        self.touched = true;
    }

    /// The freeing generation of this transaction; one for all that it frees.
    pub(super) fn freeing(&mut self, tx: &Tx<'_>) -> Result<u64, Error> {
        if let Some(generation) = self.freed_generation {
            return Ok(generation);
        }
        let generation = tx.bump(Counter::Freed, 1)?;
        self.freed_generation = Some(generation);
        Ok(generation)
    }

    /// Takes a committed extent away; its space waits for readers.
    pub(super) fn free_committed(
        &mut self,
        tx: &Tx<'_>,
        pack: &PackRow,
        extent: &ExtentRow,
    ) -> Result<(), Error> {
        let generation = self.freeing(tx)?;
        tx.delete_extent(extent.id)?;
        self.held
            .push((tx.add_quarantine(generation, &extent.place)?, Book::Used, 0));
        self.forget.push(pack.digest);
        self.touch();
        Ok(())
    }

    /// Takes a reserved extent away, at once or, when its writer may be late, not before a time.
    pub(super) fn free_reserved(
        &mut self,
        tx: &Tx<'_>,
        extent: &ExtentRow,
        not_before_ms: Option<u64>,
    ) -> Result<(), Error> {
        tx.delete_extent(extent.id)?;
        match not_before_ms {
            None => self.freed.push((extent.place, Book::Reserved)),
            Some(at) => self
                .held
                .push((tx.add_quarantine(0, &extent.place)?, Book::Reserved, at)),
        }
        Ok(())
    }

    /// Makes a reserved extent a replica.
    pub(super) fn commit(&mut self, tx: &Tx<'_>, extent: &ExtentRow) -> Result<(), Error> {
        tx.commit_extent(extent.id)?;
        self.used.push(extent.place);
        let bytes = extent.place.held_bytes();
        self.inserted
            .push((extent.pack, Weight { bytes, cost: bytes }));
        self.touch();
        Ok(())
    }

    /// Ends a copy that was not made. Its space is free at once, or not before a time when the donor
    /// may still be writing to it.
    pub(super) fn drop_copy(
        &mut self,
        tx: &Tx<'_>,
        copy: &CopyRow,
        not_before_ms: Option<u64>,
    ) -> Result<(), Error> {
        tx.delete_copy(copy.id)?;
        self.ended.push(copy.id);
        match not_before_ms {
            None => self.freed.push((copy.place, Book::Reserved)),
            Some(at) => {
                let row = tx.add_quarantine(0, &copy.place)?;
                self.held.push((row, Book::Reserved, at));
            }
        }
        Ok(())
    }

    /// Makes a copy a replica.
    pub(super) fn commit_copy(&mut self, tx: &Tx<'_>, copy: &CopyRow) -> Result<(), Error> {
        let alone = !tx
            .extents_of_pack(copy.pack)?
            .iter()
            .any(|extent| extent.pull.is_none());
        if alone {
            let bytes = copy.place.held_bytes();
            self.inserted
                .push((copy.pack, Weight { bytes, cost: bytes }));
        }
        tx.delete_copy(copy.id)?;
        tx.add_replica(copy.pack, &copy.place)?;
        self.ended.push(copy.id);
        self.used.push(copy.place);
        self.touch();
        Ok(())
    }

    /// Whether replicas came or went, or donors or images did.
    pub(super) fn changes_places(&self) -> bool {
        self.touched
    }

    /// Last thing in the transaction: gives the new generation of the catalogue its number.
    pub(super) fn seal(&mut self, tx: &Tx<'_>) -> Result<(), Error> {
        if self.touched && self.generation.is_none() {
            self.generation = Some(tx.bump(Counter::Generation, 1)?);
        }
        Ok(())
    }

    /// As [`Effects::seal`], for an answer that tells the generation.
    pub(super) fn sealed_generation(&mut self, tx: &Tx<'_>) -> Result<u64, Error> {
        self.seal(tx)?;
        match self.generation {
            Some(generation) => Ok(generation),
            None => tx.counter(Counter::Generation),
        }
    }

    pub(super) fn freed_generation(&self) -> Option<u64> {
        self.freed_generation
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.generation
    }
}
