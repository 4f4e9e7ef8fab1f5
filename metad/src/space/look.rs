//! The map as it is, for those who compare it with something else.

use super::{Region, Space};

/// One region of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionLook {
    /// Its number.
    pub region: u32,
    /// Bytes of it that are lent, in whole units of [`super::ALIGN`].
    pub len: u64,
    /// Free bytes by offset: offset and length.
    pub holes: Vec<(u64, u64)>,
}

impl Space {
    /// All donors, open or not, by number.
    pub fn donors(&self) -> Vec<u64> {
        self.donors.keys().copied().collect()
    }

    /// Whether new places are given on a donor; `None` for one that is not known.
    pub fn is_open(&self, donor: u64) -> Option<bool> {
        self.donors.get(&donor).map(|donor| donor.open)
    }

    /// What fails together with a donor; `None` for one that is not known.
    pub fn domain(&self, donor: u64) -> Option<&str> {
        self.donors.get(&donor).map(|donor| donor.domain.as_str())
    }

    /// Regions of a donor by number; none for one that is not known.
    pub fn regions(&self, donor: u64) -> Vec<RegionLook> {
        let donor = self.donors.get(&donor);
        let look = |(number, region): (&u32, &Region)| RegionLook {
            region: *number,
            len: region.len(),
            holes: region.holes(),
        };
        donor.map_or_else(Vec::new, |donor| donor.regions.iter().map(look).collect())
    }
}
