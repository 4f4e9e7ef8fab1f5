//! Locks: the session of a pull, and the list.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    Client, Error,
    v1::{self, lock_event::Event, lock_request::Wish},
};

/// Requests of one session that metad has not taken yet.
const UNSENT: usize = 256;

/// The locks of one pull. A client that is done with them says so with [`LockSession::close`], or ends
/// the pull. One that drops its session without a word is taken for dead: the pull ends two seconds
/// later, unless it is heard of in that time.
#[derive(Debug)]
pub struct LockSession {
    client: Client,
    requests: mpsc::Sender<v1::LockRequest>,
    events: Streaming<v1::LockEvent>,
    last_id: u64,
}

const SESSION: &str = "Locks.Session";

impl LockSession {
    /// Asks for something, and gives the number that the reply will have. Waits, for no longer than a
    /// call may take, while metad takes no more.
    ///
    /// # Errors
    /// [`Error::Deadline`]; [`Error::Unavailable`] when the session is over: [`Self::next`] says why.
    pub async fn ask(&mut self, wish: Wish) -> Result<u64, Error> {
        self.last_id += 1;
        let request = v1::LockRequest {
            pull: None,
            id: self.last_id,
            wish: Some(wish),
        };
        let timeout = self.client.timeout();
        match self.requests.send_timeout(request, timeout).await {
            Ok(()) => Ok(self.last_id),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(Error::Deadline {
                asked: SESSION,
                after: timeout,
            }),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(self.over()),
        }
    }

    /// Claims a key.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn acquire(&mut self, key: String, shared: bool, wait: bool) -> Result<u64, Error> {
        self.ask(Wish::Acquire(v1::AcquireLock { key, shared, wait }))
            .await
    }

    /// Gives a key up.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn release(&mut self, key: String) -> Result<u64, Error> {
        self.ask(Wish::Release(v1::ReleaseLock { key })).await
    }

    /// Tells those that wait for a key which this pull holds how far it has come, in bytes. Nothing
    /// answers, and nothing is said while metad takes no more.
    pub fn report(&mut self, key: String, done_bytes: u64, total_bytes: u64) {
        let progress = v1::ReportProgress {
            key,
            done_bytes,
            total_bytes,
        };
        let _full = self.requests.try_send(v1::LockRequest {
            pull: None,
            id: 0,
            wish: Some(Wish::Progress(progress)),
        });
    }

    /// Keeps the pull's lease, and the session.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn renew(&mut self) -> Result<u64, Error> {
        self.ask(Wish::Renew(v1::RenewLease {})).await
    }

    /// Ends the session well: what the pull holds or waits for is given up by the time this returns. The
    /// pull goes on.
    ///
    /// # Errors
    /// As [`Self::ask`] and [`Self::next`].
    pub async fn close(mut self) -> Result<(), Error> {
        let id = self.ask(Wish::Close(v1::CloseSession {})).await?;
        let timeout = self.client.timeout();
        let answered = async {
            loop {
                match self.next().await? {
                    Event::Reply(reply) if reply.id == id => return Ok(()),
                    _ => {}
                }
            }
        };
        let late = |_| Error::Deadline {
            asked: SESSION,
            after: timeout,
        };
        tokio::time::timeout(timeout, answered)
            .await
            .map_err(late)?
    }

    /// The next reply or news, waited for without a deadline. Safe to cancel.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the session is over, or metad has gone. Open another one and claim
    /// again what is still wanted: a repetition changes nothing. The pull may be over too, which opening
    /// then says.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            match self.events.message().await {
                Ok(Some(v1::LockEvent { event: Some(event) })) => return Ok(event),
                // One of a kind that only newer clients know.
                Ok(Some(v1::LockEvent { event: None })) => {}
                Ok(None) => return Err(self.over()),
                Err(status) => return Err(self.client.error(status, SESSION)),
            }
        }
    }

    fn over(&self) -> Error {
        let status = tonic::Status::unavailable("metad ended the session of locks");
        self.client.error(status, SESSION)
    }
}

impl Client {
    /// Opens the session of a pull's locks; one that the pull had ends.
    ///
    /// # Errors
    /// [`Error::Refused`] when the pull is not under way (any more).
    pub async fn lock_session(&self, pull: v1::PullRef) -> Result<LockSession, Error> {
        let (requests, stream) = mpsc::channel(UNSENT);
        let first = v1::LockRequest {
            pull: Some(pull),
            id: 0,
            wish: None,
        };
        // There is room: nothing else was sent.
        let _sent = requests.try_send(first);
        let mut service = self.locks();
        // The deadline is for the beginning only, so it does not travel with the request.
        let begin = service.session(ReceiverStream::new(stream));
        match tokio::time::timeout(self.timeout(), begin).await {
            Ok(Ok(events)) => Ok(LockSession {
                client: self.clone(),
                requests,
                events: events.into_inner(),
                last_id: 0,
            }),
            Ok(Err(status)) => Err(self.error(status, SESSION)),
            Err(_) => Err(Error::Deadline {
                asked: SESSION,
                after: self.timeout(),
            }),
        }
    }

    /// Who holds what and who waits, by key and turn.
    pub async fn list_locks(&self) -> Result<Vec<v1::Lock>, Error> {
        const ASKED: &str = "Locks.List";
        let timeout = self.timeout().max(Duration::from_secs(1));
        let collect = async {
            let mut service = self.locks();
            let mut pages = self
                .call(ASKED, timeout, v1::ListLocksRequest {}, |r| async move {
                    service.list(r).await
                })
                .await?;
            let mut locks = Vec::new();
            loop {
                match pages.message().await {
                    Ok(Some(page)) => locks.extend(page.locks),
                    Ok(None) => return Ok(locks),
                    Err(status) => return Err(self.error(status, ASKED)),
                }
            }
        };
        let late = |_| Error::Deadline {
            asked: ASKED,
            after: timeout,
        };
        tokio::time::timeout(timeout, collect).await.map_err(late)?
    }
}
