//! The thread that keeps what is lent to what the host can spare.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use harbour_pool::{
    REGION_ALIGN_BYTES,
    donor::DonorServer,
    transport::{RegionId, RegionInfo},
};
use tokio::sync::Notify;

use super::{
    policy::{Decision, Limits, Policy, Reading, SAMPLE, Why},
    readings::Host,
};
use crate::size::Size;

/// A running keeper. Dropping it stops it.
#[derive(Debug)]
pub struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    leaving: AtomicBool,
    changed: Arc<Notify>,
}

impl Keeper {
    /// Starts it. `changed` is notified after regions went or came: metad is to be told then.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(
        server: Arc<DonorServer>,
        limits: Limits,
        changed: Arc<Notify>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            changed,
        });
        let mut host = Host::new(Path::new("/"));
        if !host.has_pressure() {
            tracing::info!(
                "this kernel does not say what waits for memory (no /proc/pressure): the donor goes by what is available alone"
            );
        }
        let run = {
            let shared = Arc::clone(&shared);
            move || shared.run(&server, limits, &mut host)
        };
        let thread = thread::Builder::new()
            .name("harbour-keeper".to_owned())
            .spawn(run)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on memory only goes back: this donor is leaving.
    pub fn leave(&self) {
        self.shared.leaving.store(true, Ordering::Release);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the thread that watches the host's memory panicked");
            }
        }
    }
}

impl Shared {
    fn run(&self, server: &DonorServer, limits: Limits, host: &mut Host) {
        let began = Instant::now();
        let mut policy = Policy::new(limits);
        let mut silent = false;
        while !self.stop.load(Ordering::Acquire) {
            match read(server, host, began) {
                Some(reading) => {
                    let decision = policy.decide(reading, began.elapsed());
                    self.act(server, decision, reading);
                }
                None if !silent => {
                    silent = true;
                    tracing::warn!(
                        "/proc/meminfo does not say what is available: lent memory is not given back under pressure"
                    );
                }
                None => {}
            }
            thread::park_timeout(SAMPLE);
        }
    }

    fn act(&self, server: &DonorServer, decision: Decision, reading: Reading) {
        match decision {
            Decision::Stay => {}
            Decision::Shrink { bytes, why } => {
                let began = Instant::now();
                let gone = server.retire(&cheapest(server.held(), bytes));
                if gone.is_empty() {
                    return;
                }
                self.changed.notify_one();
                tracing::warn!(
                    gave_back = %Size(gone.iter().map(|region| region.len).sum()),
                    regions = gone.len(),
                    ms = began.elapsed().as_millis() as u64,
                    available = %Size(reading.available),
                    why = match why {
                        Why::Floor => "the host would have less than it keeps",
                        Why::Stall => "something waits for memory",
                    },
                    "gave memory back"
                );
            }
            Decision::Grow { bytes } => {
                let len = bytes - bytes % REGION_ALIGN_BYTES;
                if len == 0 || self.leaving.load(Ordering::Acquire) {
                    return;
                }
                match server.extend(len) {
                    Ok(region) => {
                        self.changed.notify_one();
                        tracing::info!(len = %Size(region.len), "lends more");
                    }
                    Err(error) => tracing::debug!(%error, "cannot lend more now"),
                }
            }
        }
    }
}

fn read(server: &DonorServer, host: &mut Host, began: Instant) -> Option<Reading> {
    let regions = server.held();
    Some(Reading {
        available: host.available()?,
        stalled: host.stalled(began.elapsed()),
        lent: regions.iter().map(|(region, _)| region.len).sum(),
        held: regions.iter().map(|(_, held)| held).sum(),
    })
}

/// Regions of at least `bytes` together: first those that hold least, and of those the newest, so
/// that as little content as possible is lost.
fn cheapest(mut regions: Vec<(RegionInfo, u64)>, bytes: u64) -> Vec<RegionId> {
    regions.sort_by_key(|(region, held)| (*held, std::cmp::Reverse(region.id)));
    let mut sum = 0;
    let enough = regions.into_iter().take_while(|(region, _)| {
        let more = sum < bytes;
        sum += region.len;
        more
    });
    enough.map(|(region, _)| region.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_least_goes_first() {
        let regions = [(0, 4, 4), (1, 4, 0), (2, 8, 3), (5, 4, 0)].map(|(id, len, held)| {
            let info = RegionInfo {
                id: RegionId(id),
                len,
                huge_pages: false,
            };
            (info, held)
        });
        for (bytes, ids) in [
            (0, &[][..]),
            (1, &[5]),
            (4, &[5]),
            (5, &[5, 1]),
            (9, &[5, 1, 2]),
            (99, &[5, 1, 2, 0]),
        ] {
            let chosen = cheapest(regions.to_vec(), bytes);
            assert_eq!(
                chosen.iter().map(|id| id.0).collect::<Vec<_>>(),
                ids,
                "{bytes}"
            );
        }
    }
}
