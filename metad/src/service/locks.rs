//! Sessions of locks.
//!
//! What sessions ask goes through one queue to one thread, which serves all that is there by one
//! transaction: a thousand clients cost few commits, and each waits for no more than one batch.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    thread,
    time::Duration,
};

use harbour_metad_client::v1;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};
use v1::{lock_event::Event, lock_request, locks_server::Locks};

use super::{Inner, Lane, Service, next};
use crate::{
    engine::{Ask, Engine, Heard, Session, Wish},
    error::Error,
    locks::{CLAIMS_PER_OWNER_MAX, Key, Mode, Reply},
};

/// Wishes that wait to be served, of all sessions.
const QUEUE: usize = 8192;
/// Wishes that are served by one transaction.
const BATCH: usize = 512;
/// What one session may have to read: news of all that it claims, and answers.
const UNREAD: usize = 2 * CLAIMS_PER_OWNER_MAX;
/// Longest that a wish waits for room in the queue.
const QUEUE_WAIT: Duration = Duration::from_secs(10);
/// Locks in one page of the list: of at most 2.5 KB each.
const PAGE: usize = 256;

type Pages = std::vec::IntoIter<Result<v1::LocksPage, Status>>;

/// What a session's client reads.
#[derive(Debug)]
pub(crate) struct Events {
    heard: mpsc::Receiver<Heard>,
    /// Until everything that was heard is read: dropping it ends the session's other half.
    hears: Option<oneshot::Sender<()>>,
    /// Why the session ended, when it was for a reason.
    ended: mpsc::Receiver<Status>,
}

impl tokio_stream::Stream for Events {
    type Item = Result<v1::LockEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.hears.is_some() {
            if let Some(heard) = ready!(self.heard.poll_recv(cx)) {
                return Poll::Ready(Some(Ok(event(heard))));
            }
            self.hears = None;
        }
        self.ended.poll_recv(cx).map(|status| status.map(Err))
    }
}

/// The queue to the thread that serves locks.
#[derive(Clone, Debug)]
pub(super) struct Desk {
    asks: mpsc::Sender<Ask>,
}

impl Desk {
    /// Starts the thread, which ends when the last clone of this is dropped.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn open(engine: Arc<Engine>) -> std::io::Result<Self> {
        let (asks, mut queue) = mpsc::channel(QUEUE);
        // While it waits it keeps nothing: a daemon that has stopped has let go of its state directory.
        let engine = Arc::downgrade(&engine);
        thread::Builder::new().name("locks".into()).spawn(move || {
            let mut batch = Vec::with_capacity(BATCH);
            while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                let sessions: Vec<Session> = batch.iter().map(|ask: &Ask| ask.session).collect();
                if let Err(error) = engine.claim(std::mem::take(&mut batch)) {
                    // They ask again, and hear what became of it.
                    engine.hang_up(&sessions);
                    let status = Status::from(error);
                    tracing::error!(error = status.message(), "locks could not be written down");
                }
            }
        })?;
        Ok(Self { asks })
    }

    async fn ask(&self, ask: Ask) -> Result<(), Status> {
        match self.asks.send_timeout(ask, QUEUE_WAIT).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Status::resource_exhausted(
                "metad is busy: too many locks are asked for at once",
            )),
        }
    }
}

#[tonic::async_trait]
impl Locks for Service {
    type SessionStream = Events;
    type ListStream = tokio_stream::Iter<Pages>;

    async fn session(
        &self,
        request: Request<Streaming<v1::LockRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.counted("Locks.Session", self.begin_session(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn list(
        &self,
        _: Request<v1::ListLocksRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let locks = self
            .call("Locks.List", Lane::Read, |engine| Ok(engine.list_locks()))
            .await?
            .into_inner();
        let pages: Vec<_> = locks
            .chunks(PAGE)
            .map(|locks| {
                Ok(v1::LocksPage {
                    locks: locks.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(tokio_stream::iter(pages)))
    }
}

impl Service {
    async fn begin_session(
        &self,
        mut stream: Streaming<v1::LockRequest>,
    ) -> Result<Events, Status> {
        let first = next(&mut stream)
            .await?
            .ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        let pull = first
            .pull
            .ok_or_else(|| Status::invalid_argument("the first message names no pull"))?;
        let turn = self.inner.watches.clone().try_acquire_owned();
        let turn = turn.map_err(|_| Status::resource_exhausted("too many sessions"))?;
        let (send, heard) = mpsc::channel(UNREAD);
        let session = self
            .blocking(Lane::Lease, move |engine| engine.listen(&pull, send))
            .await?;
        let (end, ended) = mpsc::channel(1);
        let (hears, over) = oneshot::channel();
        let mut closing = self.inner.closing.clone();
        let service = self.clone();
        tokio::spawn(async move {
            let _turn = turn;
            let Inner { desk, engine, .. } = &*service.inner;
            let idle = Duration::from_millis(engine.timing().pull_lease_ms);
            let asking = asking(desk, session, first, stream, idle);
            let outcome = tokio::select! {
                outcome = asking => outcome,
                _ = closing.wait_for(|closing| *closing) => Ok(Ending::Ours),
                // The engine has ended it, which it knows; or nobody reads any more.
                _ = over => Ok(Ending::Broken),
            };
            match outcome {
                Ok(Ending::Closed) => {}
                Ok(Ending::Ours) => engine.hang_up(&[session]),
                Ok(Ending::Broken) => service.session_broke(session).await,
                Err(status) => {
                    // There is room for one.
                    let _told = end.try_send(status);
                    engine.hang_up(&[session]);
                }
            }
        });
        Ok(Events {
            heard,
            hears: Some(hears),
            ended,
        })
    }

    async fn session_broke(&self, session: Session) {
        let told = self.blocking(Lane::Lease, move |engine| engine.broke(session));
        if let Err(status) = told.await {
            tracing::warn!(error = status.message(), "a broken session was not noted");
            self.inner.engine.hang_up(&[session]);
        }
    }
}

/// How a session ended, other than by a fault in what it asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Its client said so: the desk ends it when it has answered.
    Closed,
    /// Its client has gone without a word.
    Broken,
    /// This daemon ends it.
    Ours,
}

/// Passes on what a session asks, until it has nothing more to ask.
async fn asking(
    desk: &Desk,
    session: Session,
    first: v1::LockRequest,
    mut stream: Streaming<v1::LockRequest>,
    idle: Duration,
) -> Result<Ending, Status> {
    let mut request = first;
    loop {
        if let Some(wish) = request.wish {
            let (id, wish) = (request.id, wish_of(wish)?);
            let last = matches!(wish, Wish::Close);
            desk.ask(Ask { session, id, wish }).await?;
            if last {
                return Ok(Ending::Closed);
            }
        }
        request = match tokio::time::timeout(idle, stream.message()).await {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None) | Err(_)) => return Ok(Ending::Broken),
            Err(_) => {
                let text = format!("nothing came on the session for {} s", idle.as_secs());
                return Err(Status::deadline_exceeded(text));
            }
        };
    }
}

fn wish_of(wish: lock_request::Wish) -> Result<Wish, Status> {
    let key = |text: &str| {
        text.parse::<Key>()
            .map_err(|error| Status::from(Error::Invalid(error.to_string())))
    };
    Ok(match wish {
        lock_request::Wish::Acquire(acquire) => Wish::Acquire {
            key: key(&acquire.key)?,
            mode: match acquire.shared {
                true => Mode::Shared,
                false => Mode::Exclusive,
            },
            wait: acquire.wait,
        },
        lock_request::Wish::Release(release) => Wish::Release {
            key: key(&release.key)?,
        },
        lock_request::Wish::Renew(_) => Wish::Renew,
        lock_request::Wish::Close(_) => Wish::Close,
        lock_request::Wish::Progress(progress) => Wish::Progress {
            key: key(&progress.key)?,
            bytes: (progress.done_bytes, progress.total_bytes),
        },
    })
}

fn event(heard: Heard) -> v1::LockEvent {
    let event = match heard {
        Heard::Reply { id, reply } => Event::Reply(answer(id, &reply)),
        Heard::News { key, fence } => Event::News(v1::LockNews {
            key: key.to_string(),
            fence: fence.unwrap_or(0),
        }),
        Heard::Progress {
            key,
            pull,
            host,
            pid,
            bytes: (done_bytes, total_bytes),
        } => Event::Progress(v1::LockProgress {
            key: key.to_string(),
            pull,
            host,
            pid,
            done_bytes,
            total_bytes,
        }),
    };
    v1::LockEvent { event: Some(event) }
}

fn answer(id: u64, reply: &Reply) -> v1::LockReply {
    let (outcome, fence, ahead) = match reply {
        Reply::Done => (v1::LockOutcome::Done, 0, 0),
        Reply::Held { fence } => (v1::LockOutcome::Held, *fence, 0),
        Reply::Waiting { ahead } => (v1::LockOutcome::Waiting, 0, *ahead),
        Reply::Busy => (v1::LockOutcome::Busy, 0, 0),
        Reply::OtherMode => (v1::LockOutcome::OtherMode, 0, 0),
        Reply::TooMany => (v1::LockOutcome::TooMany, 0, 0),
        // A session ends with its owner, and commits do not come this way.
        Reply::Gone | Reply::Fenced => (v1::LockOutcome::Unspecified, 0, 0),
    };
    v1::LockReply {
        id,
        outcome: outcome.into(),
        fence,
        ahead: u32::try_from(ahead).unwrap_or(u32::MAX),
    }
}
