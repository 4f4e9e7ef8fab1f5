//! Pages of 2 MiB for ordinary memory, as it is first written.
//!
//! A memfd gets pages of 4 KiB unless the host was told otherwise for all of its shared memory
//! (`transparent_hugepage/shmem_enabled`), which is not ours to do. But a process may ask for one
//! range at a time: one page is put there, then the kernel is asked to gather it. A GiB is then
//! given back to the host in 2 ms and not in 130, is mapped by 512 faults and not by 16,384, and is
//! written without taking pages one by one.

use std::{
    ops::Range,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{REGION_ALIGN_BYTES, signed, uninterrupted};
use crate::sys::Mapping;

/// Bytes that are asked for at once: each call has the kernel look through all of its processors'
/// lists, which is not to be paid for every 2 MiB.
const STEP_BYTES: u64 = 4 * REGION_ALIGN_BYTES;

/// Refusals in a row after which nothing more is asked: the kernel is too old (before 6.1), its
/// administrator denied it, or memory is in pieces. What was refused stays in ordinary pages.
const PATIENCE: u32 = 4;

/// Which parts of one region were asked for by this process.
#[derive(Debug)]
pub(super) struct Gathering {
    asked: Vec<AtomicBool>,
    refused: AtomicU32,
}

impl Gathering {
    pub(super) fn new(len: u64) -> Self {
        let steps = usize::try_from(len.div_ceil(STEP_BYTES)).unwrap_or(0);
        Self {
            asked: (0..steps).map(|_| AtomicBool::new(false)).collect(),
            refused: AtomicU32::new(0),
        }
    }

    /// Before `range` of the region of `len` bytes is written: gathers the steps in it that were not
    /// asked for before. Whether that works changes how fast things are, and nothing else.
    pub(super) fn prepare(&self, file: impl AsFd, mapping: &Mapping, len: u64, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for step in range.start / STEP_BYTES..range.end.div_ceil(STEP_BYTES) {
            if self.refused.load(Ordering::Relaxed) >= PATIENCE {
                return;
            }
            let asked = usize::try_from(step).ok().and_then(|at| self.asked.get(at));
            let Some(asked) = asked.filter(|asked| !asked.load(Ordering::Relaxed)) else {
                continue;
            };
            if asked.swap(true, Ordering::Relaxed) {
                continue;
            }
            let from = step * STEP_BYTES;
            self.gather(&file, mapping, from..(from + STEP_BYTES).min(len));
        }
    }

    fn gather(&self, file: impl AsFd, mapping: &Mapping, range: Range<u64>) {
        let starts = range.clone().step_by(REGION_ALIGN_BYTES as usize);
        for start in starts {
            // Where there is a page already this changes nothing. Without one there is nothing to
            // gather.
            let one =
                uninterrupted(|| fallocate(&file, FallocateFlags::empty(), signed(start)?, 1));
            if let Err(error) = one {
                tracing::debug!(%error, start, "no page for a huge one to begin with");
                return;
            }
        }
        let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end))
        else {
            return;
        };
        match mapping.gather(start..end) {
            Ok(()) => self.refused.store(0, Ordering::Relaxed),
            Err(error) => {
                let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::debug!(%error, ?range, refused, "ordinary pages are not gathered into huge ones");
            }
        }
    }
}
