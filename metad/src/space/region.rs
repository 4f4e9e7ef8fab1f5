//! The free bytes of one region: by offset, to join neighbours, and by length, to find a fit.

use std::collections::{BTreeMap, BTreeSet};

/// Free map of a region.
#[derive(Clone, Debug)]
pub(super) struct Region {
    len: u64,
    by_offset: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
}

impl Region {
    /// A region that is all free.
    pub(super) fn new(len: u64) -> Self {
        let mut region = Self {
            len,
            by_offset: BTreeMap::new(),
            by_len: BTreeSet::new(),
        };
        if len > 0 {
            region.insert(0, len);
        }
        region
    }

    /// Smallest hole of at least `want` bytes, the lowest of equals: length and offset.
    pub(super) fn best_fit(&self, want: u64) -> Option<(u64, u64)> {
        self.by_len.range((want, 0)..).next().copied()
    }

    /// Takes exactly these bytes; `false`, and nothing changed, when one of them is not free.
    pub(super) fn take_at(&mut self, offset: u64, len: u64) -> bool {
        let Some((&start, &hole)) = self.by_offset.range(..=offset).next_back() else {
            return false;
        };
        let (Some(end), hole_end) = (offset.checked_add(len), start + hole) else {
            return false;
        };
        if end > hole_end {
            return false;
        }
        self.remove(start, hole);
        if start < offset {
            self.insert(start, offset - start);
        }
        if end < hole_end {
            self.insert(end, hole_end - end);
        }
        true
    }

    /// Makes bytes free that were taken, joining them with free neighbours.
    pub(super) fn give_back(&mut self, offset: u64, len: u64) {
        let (mut start, mut end) = (offset, offset + len);
        if let Some((&before, &hole)) = self.by_offset.range(..offset).next_back()
            && before + hole == offset
        {
            self.remove(before, hole);
            start = before;
        }
        if let Some(&hole) = self.by_offset.get(&end) {
            self.remove(end, hole);
            end += hole;
        }
        self.insert(start, end - start);
    }

    /// Free bytes by offset: offset and length.
    pub(super) fn holes(&self) -> Vec<(u64, u64)> {
        let holes = self.by_offset.iter();
        holes.map(|(offset, len)| (*offset, *len)).collect()
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn free_bytes(&self) -> u64 {
        self.by_offset.values().sum()
    }

    /// Holes are inside, apart from each other, and the same in both maps.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut last = None;
        for (&offset, &len) in &self.by_offset {
            if len == 0 || offset + len > self.len || last.is_some_and(|end| offset <= end) {
                return Err(format!(
                    "hole {offset}+{len} of {} after {last:?}",
                    self.len
                ));
            }
            if !self.by_len.contains(&(len, offset)) {
                return Err(format!("hole {offset}+{len} is not found by length"));
            }
            last = Some(offset + len);
        }
        if self.by_len.len() != self.by_offset.len() {
            return Err(format!(
                "{} holes by length, {} by offset",
                self.by_len.len(),
                self.by_offset.len()
            ));
        }
        Ok(())
    }

    fn insert(&mut self, offset: u64, len: u64) {
        self.by_offset.insert(offset, len);
        self.by_len.insert((len, offset));
    }

    fn remove(&mut self, offset: u64, len: u64) {
        self.by_offset.remove(&offset);
        self.by_len.remove(&(len, offset));
    }
}
