//! What an audit found.

use std::{collections::BTreeMap, fmt::Debug};

use harbour_metad_client::v1;

/// Differences that are told one by one.
const TOLD_MAX: usize = 256;
/// Characters of one value.
const TEXT_MAX: usize = 400;

/// Differences, the first of them in words.
#[derive(Debug, Default)]
pub(super) struct Findings {
    told: Vec<v1::Difference>,
    found: u64,
}

impl Findings {
    /// Something is not as it should be.
    pub(super) fn differ(
        &mut self,
        what: impl Into<String>,
        stored: impl Into<String>,
        kept: impl Into<String>,
    ) {
        self.found += 1;
        if self.told.len() < TOLD_MAX {
            let short = |text: String| text.chars().take(TEXT_MAX).collect();
            self.told.push(v1::Difference {
                what: short(what.into()),
                stored: short(stored.into()),
                kept: short(kept.into()),
            });
        }
    }

    /// Two values should be the same.
    pub(super) fn same<T: PartialEq + Debug + ?Sized>(
        &mut self,
        what: impl FnOnce() -> String,
        stored: &T,
        kept: &T,
    ) {
        if stored != kept {
            self.differ(what(), format!("{stored:?}"), format!("{kept:?}"));
        }
    }

    /// Two maps should be the same; `shown` says what may be told of a value.
    pub(super) fn same_rows<V: PartialEq>(
        &mut self,
        kind: &str,
        stored: &BTreeMap<u64, V>,
        kept: &BTreeMap<u64, V>,
        shown: impl Fn(&V) -> String,
    ) {
        let none = || "none".to_owned();
        for (id, row) in stored {
            let other = kept.get(id);
            if other != Some(row) {
                let other = other.map_or_else(none, &shown);
                self.differ(format!("{kind} {id}"), shown(row), other);
            }
        }
        for (id, row) in kept {
            if !stored.contains_key(id) {
                self.differ(format!("{kind} {id}"), none(), shown(row));
            }
        }
    }

    /// The first differences, and how many there are.
    pub(super) fn told(self) -> (Vec<v1::Difference>, u64) {
        (self.told, self.found)
    }
}
