//! `faulty`: a transport that fails the way donors and networks do, from a seed.
//!
//! What happens at call number n is a pure function of the [`Schedule`] and n, so a failing run is
//! replayed by its seed alone wherever calls come in the same order.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::transport::{Read, RegionId, Transport, TransportError, TransportKind, Write, in_time};

mod schedule;

pub use schedule::{Fault, FaultKind, Rates, Schedule};

/// Injected faults that are remembered.
const MAX_REMEMBERED: usize = 4096;

/// A transport with faults. It passes the whole contract with [`Schedule::quiet`].
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Transport>,
    schedule: Schedule,
    calls: AtomicU64,
    injected: Mutex<VecDeque<(u64, Fault)>>,
}

impl Faulty {
    /// Wraps `inner`. The seed is logged, and stands in the `Debug` form.
    pub fn new(inner: Arc<dyn Transport>, schedule: Schedule) -> Self {
        tracing::info!(seed = schedule.seed(), "faults are on");
        Self {
            inner,
            schedule,
            calls: AtomicU64::new(0),
            injected: Mutex::default(),
        }
    }

    /// The schedule, to replay it.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Calls so far, empty batches not counted.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Number and fault of the last calls that had one, oldest first; no more than 4096.
    pub fn injected(&self) -> Vec<(u64, Fault)> {
        self.injected.lock().iter().copied().collect()
    }

    /// The fault of this call.
    fn next(&self) -> (u64, Fault) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let fault = self.schedule.at(call);
        if fault != Fault::None {
            let mut injected = self.injected.lock();
            if injected.len() == MAX_REMEMBERED {
                injected.pop_front();
            }
            injected.push_back((call, fault));
        }
        (call, fault)
    }

    fn error(&self, kind: FaultKind, first: (RegionId, u64, usize)) -> TransportError {
        let address = || format!("faulty:{:#x}", self.schedule.seed());
        match kind {
            FaultKind::OutOfBounds => {
                let (region, offset, len) = first;
                TransportError::OutOfBounds {
                    region,
                    offset,
                    len: len as u64,
                }
            }
            FaultKind::WrongEpoch => {
                let wanted = self.inner.epoch();
                TransportError::WrongEpoch {
                    wanted,
                    actual: wanted ^ 1 << 62,
                }
            }
            FaultKind::Unreachable => TransportError::Unreachable {
                address: address(),
                source: io::ErrorKind::ConnectionReset.into(),
            },
            FaultKind::Refused => TransportError::Refused {
                address: address(),
                reason: "an injected fault".to_owned(),
            },
            FaultKind::Deadline => TransportError::Deadline,
        }
    }
}

impl Transport for Faulty {
    fn read(&self, batch: &mut [Read<'_>], deadline: Instant) -> Result<(), TransportError> {
        let Some(first) = batch
            .first()
            .map(|read| (read.region, read.offset, read.into.len()))
        else {
            return self.inner.read(batch, deadline);
        };
        match self.next().1 {
            Fault::None => self.inner.read(batch, deadline),
            Fault::Delay(delay) => {
                wait(delay, deadline)?;
                self.inner.read(batch, deadline)
            }
            Fault::Fail(kind) => Err(self.error(kind, first)),
            Fault::Partial { kind, share } => {
                let share = batch.len().min(usize::from(share) * batch.len() / 256 + 1);
                let (done, rest) = batch.split_at_mut(share);
                self.inner.read(done, deadline)?;
                // The one that was under way holds some of its bytes and garbage after them.
                if let Some(read) = rest.first_mut().or(done.last_mut()) {
                    let half = read.into.len() / 2;
                    read.into
                        .iter_mut()
                        .skip(half)
                        .for_each(|byte| *byte = !*byte);
                }
                Err(self.error(kind, first))
            }
            Fault::Flip { bit } => {
                self.inner.read(batch, deadline)?;
                flip(batch, bit);
                Ok(())
            }
        }
    }

    fn write(&self, batch: &[Write<'_>], deadline: Instant) -> Result<(), TransportError> {
        let Some(first) = batch
            .first()
            .map(|write| (write.region, write.offset, write.from.len()))
        else {
            return self.inner.write(batch, deadline);
        };
        match self.next().1 {
            // Bits flip on the way to the reader only: memory that a writer was told is good stays
            // good, so that tests know what it holds.
            Fault::None | Fault::Flip { .. } => self.inner.write(batch, deadline),
            Fault::Delay(delay) => {
                wait(delay, deadline)?;
                self.inner.write(batch, deadline)
            }
            Fault::Fail(kind) => Err(self.error(kind, first)),
            Fault::Partial { kind, share } => {
                let share = usize::from(share) * batch.len() / 256;
                let (done, rest) = batch.split_at(share);
                self.inner.write(done, deadline)?;
                if let Some(torn) = rest.first() {
                    let from = torn.from.get(..torn.from.len() / 2).unwrap_or_default();
                    self.inner.write(&[Write { from, ..*torn }], deadline)?;
                }
                Err(self.error(kind, first))
            }
        }
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn kind(&self) -> TransportKind {
        self.inner.kind()
    }
}

/// Sleeps, but not beyond the deadline.
fn wait(delay: Duration, deadline: Instant) -> Result<(), TransportError> {
    thread::sleep(delay.min(deadline.saturating_duration_since(Instant::now())));
    in_time(deadline)
}

/// Flips one bit of all that was read.
fn flip(batch: &mut [Read<'_>], bit: u64) {
    let total: u64 = batch.iter().map(|read| read.into.len() as u64).sum();
    let Some(bit) = bit.checked_rem(total * 8) else {
        return;
    };
    let mut at = bit / 8;
    for read in batch {
        let len = read.into.len() as u64;
        if at < len {
            let byte = usize::try_from(at)
                .ok()
                .and_then(|at| read.into.get_mut(at));
            if let Some(byte) = byte {
                *byte ^= 1 << (bit % 8);
            }
            return;
        }
        at -= len;
    }
}

#[cfg(test)]
mod tests;
