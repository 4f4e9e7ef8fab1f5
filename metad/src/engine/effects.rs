//! What follows from a transaction in memory, once it has committed.

use crate::{
    error::{Error, Hash},
    policy::Weight,
    space::{Book, Place},
    store::{Counter, ExtentRow, PackRow, QuarantineRow, Tx},
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
