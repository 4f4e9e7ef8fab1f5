//! One pull's lease at metad, and what is done under it.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::failpoint::Failpoints;
use harbour_image::{index::PackRef, object::ObjectId};
use harbour_metad_client::{Client, Error as ClientError, v1};
use tokio::runtime::Handle;

use super::{IngestError, packer::Place};
use crate::{link::Link, waiting};

/// Longest time for writing one pack into a donor's memory.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// Between attempts to reach a metad that has gone.
const AGAIN: Duration = Duration::from_millis(200);

/// Times that space for one pack is asked for when donors fail.
const STORE_TRIES: usize = 4;

/// Longest time for space to be found, which may have to be freed and let go of by readers.
pub const RESERVE_LIMIT: Duration = Duration::from_secs(40);

/// Everything that work under a lease needs. Cheap to clone; the last clone's drop ends renewal.
#[derive(Clone)]
pub struct Pull {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    link: Arc<Link>,
    handle: Handle,
    pull: v1::PullRef,
    /// The caller wants it to end.
    stopped: Arc<AtomicBool>,
    /// A part of it has failed.
    failed: AtomicBool,
    lost: Arc<AtomicBool>,
    failpoints: Failpoints,
    stored_bytes: AtomicU64,
    /// Donors that could not be written to: this pull asks for no more space on them.
    avoid: Mutex<BTreeSet<u64>>,
    replicas: u32,
    renewal: tokio::task::JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl Pull {
    /// Begins a pull of `what` and keeps its lease until the last clone is gone. `stopped` is the
    /// caller's way to end it early; `replicas` what is wanted of each pack, 0 for metad's default.
    pub async fn begin(
        client: Client,
        link: Arc<Link>,
        what: &str,
        replicas: u32,
        stopped: Arc<AtomicBool>,
        failpoints: Failpoints,
    ) -> Result<Self, IngestError> {
        let request = v1::BeginRequest {
            what: what.to_owned(),
            host: crate::config::host_name(),
            pid: std::process::id(),
            replicas,
        };
        let lease = waiting::for_metad(&stopped, || client.begin(request.clone())).await?;
        let pull = v1::PullRef {
            pull: lease.pull,
            token: lease.token,
        };
        let lost = Arc::new(AtomicBool::new(false));
        let renewal = tokio::spawn(renew(
            client.clone(),
            pull,
            lease.lease_ms,
            Arc::clone(&lost),
        ));
        failpoints.hit("pull.begun");
        Ok(Self {
            inner: Arc::new(Inner {
                client,
                link,
                handle: Handle::current(),
                pull,
                stopped,
                failed: AtomicBool::new(false),
                lost,
                failpoints,
                stored_bytes: AtomicU64::new(0),
                avoid: Mutex::default(),
                replicas,
                renewal,
            }),
        })
    }

    /// Begins another pull beside this one, with the same client, pool and way to be stopped.
    pub async fn again(&self, what: &str) -> Result<Self, IngestError> {
        let inner = &self.inner;
        let (client, link) = (inner.client.clone(), Arc::clone(&inner.link));
        Self::begin(
            client,
            link,
            what,
            inner.replicas,
            Arc::clone(&inner.stopped),
            inner.failpoints.clone(),
        )
        .await
    }

    /// The pull's number and fencing token.
    pub fn reference(&self) -> v1::PullRef {
        self.inner.pull
    }

    /// metad.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// The pool.
    pub fn link(&self) -> &Link {
        &self.inner.link
    }

    /// Asks metad until it answers: one that is just being started again is waited for as long as the
    /// lease lives. Only for what may be asked twice.
    pub async fn ask<T, F>(&self, call: impl Fn() -> F) -> Result<T, IngestError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        loop {
            match call().await {
                Err(error @ ClientError::Unavailable { .. }) => {
                    self.check()?;
                    tracing::debug!(%error, "metad has gone; asking again");
                    tokio::time::sleep(AGAIN).await;
                }
                other => return Ok(other?),
            }
        }
    }

    /// Runs `future` from a thread that is not the runtime's.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.inner.handle.block_on(future)
    }

    /// Passes a named step, where a test may end the process.
    pub fn step(&self, name: &'static str) {
        self.inner.failpoints.hit(name);
    }

    /// Bytes written to the pool so far.
    pub fn stored_bytes(&self) -> u64 {
        self.inner.stored_bytes.load(Ordering::Relaxed)
    }

    /// An error when the pull should not go on.
    pub fn check(&self) -> Result<(), IngestError> {
        let inner = &self.inner;
        if inner.stopped.load(Ordering::Relaxed) || inner.failed.load(Ordering::Relaxed) {
            return Err(IngestError::Cancelled);
        }
        if self.inner.lost.load(Ordering::Relaxed) {
            return Err(IngestError::LeaseLost("metad did not renew it".into()));
        }
        Ok(())
    }

    /// Makes all work under this lease end soon, and nothing else of the caller's.
    pub fn stop(&self) {
        self.inner.failed.store(true, Ordering::Relaxed);
    }

    /// Where the pool has these objects, in order; at most 8192.
    pub fn find_objects(&self, ids: &[ObjectId]) -> Result<Vec<Option<Place>>, IngestError> {
        let request = v1::FindObjectsRequest {
            pull: Some(self.inner.pull),
            objects: ids.iter().map(|id| id.0.to_vec()).collect(),
        };
        let reply = self.wait(self.ask(|| self.inner.client.find_objects(request.clone())))?;
        if reply.objects.len() != ids.len() {
            return Err(IngestError::Bug(
                "metad answered for another number of objects".into(),
            ));
        }
        reply
            .objects
            .into_iter()
            .map(|object| {
                if !object.found {
                    return Ok(None);
                }
                let pack = super::layer::pack_ref(&object.pack, object.pack_len)?;
                Ok(Some(Place {
                    pack,
                    offset: object.offset,
                }))
            })
            .collect()
    }

    /// Puts one pack into the pool, unless it is there; tells whether it had to be written. A donor
    /// that fails does not matter while another one takes a replica; metad makes up for it later.
    pub fn store_pack(&self, pack: &PackRef, bytes: &[u8]) -> Result<bool, IngestError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let reserved = self.reserve_one(pack)?;
            self.step("pull.reserved");
            if reserved.present {
                return Ok(false);
            }
            let failed = self.write_all(&reserved.extents, 0, bytes);
            let written = reserved.extents.len() - failed.len();
            let last = self.give_back(&pack.id.0, failed)?;
            match last {
                Some(error) if written == 0 && tries >= STORE_TRIES => return Err(error),
                _ if written == 0 => self.check()?,
                _ => break,
            }
        }
        self.step("pull.stored");
        self.inner
            .stored_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(true)
    }

    fn reserve_one(&self, pack: &PackRef) -> Result<v1::Reserved, IngestError> {
        let request = v1::ReserveRequest {
            pull: Some(self.inner.pull),
            packs: vec![v1::PackWanted {
                pack: pack.id.0.to_vec(),
                len: pack.len,
            }],
            avoid: self.avoided(),
        };
        // A full pool frees space first, and readers have to let go of it.
        let client = self.inner.client.with_timeout(RESERVE_LIMIT);
        let reply = self.wait(self.ask(|| client.reserve(request.clone())))?;
        self.inner.link.learn(&reply.donors);
        let reserved = reply.packs.into_iter().next();
        reserved
            .filter(|reserved| reserved.present || !reserved.extents.is_empty())
            .ok_or_else(|| IngestError::Bug("metad reserved another number of packs".into()))
    }

    /// Donors that could not be written to.
    pub fn avoided(&self) -> Vec<u64> {
        let avoid = self.inner.avoid.lock();
        let avoid = avoid.unwrap_or_else(PoisonError::into_inner);
        avoid.iter().copied().collect()
    }

    /// Writes `bytes` at `offset` of every extent, at the same time when there are several; gives
    /// those that failed, and why.
    pub fn write_all(
        &self,
        extents: &[v1::Extent],
        offset: u32,
        bytes: &[u8],
    ) -> Vec<(v1::Extent, IngestError)> {
        let write = |extent: &v1::Extent| {
            let outcome = self.write(extent, offset, bytes);
            outcome.err().map(|error| (*extent, error))
        };
        let [first, others @ ..] = extents else {
            return Vec::new();
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = others
                .iter()
                .map(|extent| (extent, scope.spawn(move || write(extent))))
                .collect();
            let mut failed: Vec<_> = write(first).into_iter().collect();
            for (extent, other) in others {
                let panicked = || IngestError::Bug("a writing thread panicked".into());
                failed.extend(other.join().unwrap_or_else(|_| Some((*extent, panicked()))));
            }
            failed
        })
    }

    /// Tells metad which extents of a pack could not be written, so that they are never taken for
    /// replicas, and avoids their donors from now on. Gives the last error.
    pub fn give_back(
        &self,
        pack: &[u8; 32],
        failed: Vec<(v1::Extent, IngestError)>,
    ) -> Result<Option<IngestError>, IngestError> {
        let (extents, mut errors): (Vec<_>, Vec<_>) = failed.into_iter().unzip();
        let Some(last) = errors.pop() else {
            return Ok(None);
        };
        let why = crate::node::refill::chain(&last);
        tracing::warn!(why, "a replica could not be written; its donor is avoided");
        {
            let avoid = self.inner.avoid.lock();
            let mut avoid = avoid.unwrap_or_else(PoisonError::into_inner);
            avoid.extend(extents.iter().map(|extent| extent.donor));
        }
        let request = v1::GiveBackRequest {
            pull: Some(self.inner.pull),
            pack: pack.to_vec(),
            extents,
            why,
        };
        self.wait(self.inner.client.give_back(request))?;
        Ok(Some(last))
    }

    /// Writes `bytes` at `offset` of an extent that is reserved for this pull.
    pub fn write(&self, extent: &v1::Extent, offset: u32, bytes: &[u8]) -> Result<(), IngestError> {
        self.inner
            .link
            .write(extent, offset, bytes, Instant::now() + WRITE_LIMIT)
            .map_err(|source| IngestError::Pool {
                donor: extent.donor,
                source,
            })
    }

    /// Gives everything back. Best effort: the lease's end does the same.
    pub async fn abort(&self) {
        self.inner.renewal.abort();
        if let Err(error) = self.inner.client.abort(self.inner.pull).await {
            tracing::debug!(%error, "the pull could not be aborted; its lease will run out");
        }
    }
}

/// Renews at a third of the lease until it is lost.
async fn renew(client: Client, pull: v1::PullRef, lease_ms: u32, lost: Arc<AtomicBool>) {
    let lease = Duration::from_millis(u64::from(lease_ms.max(300)));
    let mut good = Instant::now();
    loop {
        tokio::time::sleep(lease / 3).await;
        match client.renew(pull).await {
            Ok(_) => good = Instant::now(),
            Err(ClientError::Unavailable { .. } | ClientError::Deadline { .. })
                if good.elapsed() < lease => {}
            Err(error) => {
                tracing::warn!(%error, "the lease of this pull is lost");
                lost.store(true, Ordering::Relaxed);
                return;
            }
        }
    }
}
