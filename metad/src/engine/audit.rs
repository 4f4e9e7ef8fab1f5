//! A check of everything against everything, for tests and for doubts.

use std::collections::BTreeMap;

use super::Engine;
use crate::{
    error::Error,
    space::{Book, Books, Place, Space},
};

impl Engine {
    /// Compares the store with the free map: no two places overlap, every lent byte is in one
    /// book, and both sides have the same books. The text names what is wrong.
    pub fn audit(&self) -> Result<Result<Books, String>, Error> {
        let state = self.lock();
        let read = state.writer.read();
        let mut again = Space::new();
        for donor in read.donors()? {
            again.add_donor(
                donor.id,
                donor.regions.iter().map(|region| (region.id, region.len)),
            );
        }
        let mut places: BTreeMap<Place, Book> = BTreeMap::new();
        let mut twice = None;
        read.for_each_extent(|extent| {
            let book = if extent.pull.is_some() {
                Book::Reserved
            } else {
                Book::Used
            };
            if extent
                .pull
                .is_some_and(|pull| !state.pulls.contains_key(&pull))
            {
                twice = Some(format!("{extent:?} is of a pull that is not under way"));
            }
            if places.insert(extent.place, book).is_some() {
                twice = Some(format!("{extent:?} is there twice"));
            }
            Ok(())
        })?;
        let rows = read.quarantine()?;
        if rows.len() != state.quarantine.len() {
            twice = Some(format!(
                "{} in quarantine, {} in memory",
                rows.len(),
                state.quarantine.len()
            ));
        }
        for row in rows {
            if places.insert(row.place, Book::Quarantined).is_some() {
                twice = Some(format!("{row:?} is taken too"));
            }
        }
        if let Some(why) = twice {
            return Ok(Err(why));
        }
        for (place, book) in &places {
            if let Err(conflict) = again.claim(place, *book) {
                return Ok(Err(conflict.to_string()));
            }
        }
        let (stored, kept) = (again.books(), state.space.books());
        if stored != kept || !kept.balance() {
            return Ok(Err(format!(
                "the store has {stored:?}, the free map {kept:?}"
            )));
        }
        Ok(state.space.check().map(|()| kept))
    }
}
