//! The contract's services over the engine: messages in, calls on threads that may block, codes
//! and metrics out.

mod catalogue;
mod donors;
mod ingest;
mod locks;
mod nodes;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, watch};
use tonic::{Response, Status};

use crate::{engine::Engine, error::Error, metrics::Metrics};

/// Longest that a call waits for its turn.
const TURN_WAIT: Duration = Duration::from_secs(10);

/// Longest pause of a client inside of a stream that it sends.
const STREAM_WAIT: Duration = Duration::from_secs(15);

/// Calls that wait for the engine's lock at a time.
const WRITES: usize = 32;
/// Calls on the store's readers at a time.
const READS: usize = 32;
/// Heartbeats at a time: apart, so that a rush of pulls costs nobody a lease.
const LEASES: usize = 64;
/// Watches and sessions of locks at a time.
const WATCHES: usize = 4096;

/// Which queue a call waits in.
#[derive(Clone, Copy, Debug)]
enum Lane {
    Write,
    Read,
    Lease,
}

/// All services; clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    writes: Semaphore,
    reads: Semaphore,
    leases: Semaphore,
    watches: Arc<Semaphore>,
    desk: locks::Desk,
    /// Becomes true when the server stops: endless streams have to end then.
    closing: watch::Receiver<bool>,
}

impl Service {
    pub(crate) fn new(
        engine: Arc<Engine>,
        metrics: Arc<Metrics>,
        closing: watch::Receiver<bool>,
    ) -> std::io::Result<Self> {
        let desk = locks::Desk::open(engine.clone())?;
        let inner = Inner {
            engine,
            metrics,
            writes: Semaphore::new(WRITES),
            reads: Semaphore::new(READS),
            leases: Semaphore::new(LEASES),
            watches: Arc::new(Semaphore::new(WATCHES)),
            desk,
            closing,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Runs one call in its lane and counts it.
    async fn call<T: Send + 'static>(
        &self,
        method: &'static str,
        lane: Lane,
        work: impl FnOnce(&Arc<Engine>) -> Result<T, Error> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        self.counted(method, self.blocking(lane, work))
            .await
            .map(Response::new)
    }

    /// Counts an answer of any kind.
    async fn counted<T>(
        &self,
        method: &'static str,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        let start = Instant::now();
        let answer = answer.await;
        let code = answer
            .as_ref()
            .map_or_else(Status::code, |_| tonic::Code::Ok);
        self.inner.metrics.answered(method, code, start.elapsed());
        if let Err(status) = &answer
            && code == tonic::Code::Internal
        {
            tracing::error!(method, error = status.message(), "call failed");
        }
        answer
    }

    /// Runs `work` on a thread that may block, when its lane has room.
    async fn blocking<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce(&Arc<Engine>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Status> {
        let lane = match lane {
            Lane::Write => &self.inner.writes,
            Lane::Read => &self.inner.reads,
            Lane::Lease => &self.inner.leases,
        };
        let _turn = match tokio::time::timeout(TURN_WAIT, lane.acquire()).await {
            Ok(Ok(turn)) => turn,
            _ => {
                return Err(Status::resource_exhausted(
                    "metad is busy: too many calls at once",
                ));
            }
        };
        let engine = self.inner.engine.clone();
        match tokio::task::spawn_blocking(move || work(&engine)).await {
            Ok(answer) => answer.map_err(Status::from),
            Err(error) => Err(Status::internal(format!("the call did not end: {error}"))),
        }
    }
}

/// The next message of a client's stream, `None` at its end.
async fn next<T>(stream: &mut tonic::Streaming<T>) -> Result<Option<T>, Status> {
    match tokio::time::timeout(STREAM_WAIT, stream.message()).await {
        Ok(message) => message,
        Err(_) => Err(Status::deadline_exceeded(format!(
            "nothing came on the stream for {} s",
            STREAM_WAIT.as_secs()
        ))),
    }
}
