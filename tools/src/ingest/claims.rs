//! What a pull claims at metad, so that each thing is done by one pull of the cluster.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use harbour_image::digest::Digest;
use harbour_metad_client::{Error as ClientError, LockSession, v1, v1::lock_event::Event};

use super::{IngestError, lease::Pull};

/// How often a session says that it lives; a third of the shortest lease of a pull that makes sense.
const RENEWED_EVERY: Duration = Duration::from_secs(1);

/// Between attempts to reach a metad that has gone.
const AGAIN: Duration = Duration::from_millis(200);

/// How often the holder of a claim tells how far it has come, and looks whether it is to stop.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// What became of a claim.
#[derive(Debug)]
pub(super) enum Said {
    /// It is this pull's, under this fencing token. May be said more than once.
    Held { key: String, fence: u64 },
    /// Another pull holds it: this one is in line.
    InLine { key: String },
    /// Another pull holds it, and has come so far.
    Elsewhere(v1::LockProgress),
    /// Another pull has done what it was claimed for.
    Committed { key: String },
}

/// The claims of one pull: a session of locks that is opened again when metad was away.
pub(super) struct Claims {
    lease: Pull,
    session: LockSession,
    /// What is held or waited for.
    wanted: BTreeSet<String>,
    /// Claims that metad has not answered, by the number of the question.
    asked: HashMap<u64, String>,
    renewed: Instant,
}

impl Claims {
    pub(super) async fn open(lease: &Pull) -> Result<Self, IngestError> {
        Ok(Self {
            lease: lease.clone(),
            session: lease.client().lock_session(lease.reference()).await?,
            wanted: BTreeSet::new(),
            asked: HashMap::new(),
            renewed: Instant::now(),
        })
    }

    /// Claims a key, in line with others; [`Claims::next`] tells what becomes of it.
    pub(super) async fn claim(&mut self, key: String) -> Result<(), IngestError> {
        self.wanted.insert(key.clone());
        match self.session.acquire(key.clone(), false, true).await {
            Ok(id) => {
                self.asked.insert(id, key);
                Ok(())
            }
            Err(error) => self.reopen(&error).await,
        }
    }

    /// Gives a key up.
    pub(super) async fn release(&mut self, key: &str) -> Result<(), IngestError> {
        self.forget(key);
        match self.session.release(key.to_owned()).await {
            Ok(_) => Ok(()),
            Err(error) => {
                // The new session does not give up what the old one held.
                self.reopen(&error).await?;
                self.session.release(key.to_owned()).await?;
                Ok(())
            }
        }
    }

    /// A commit has given this key up.
    pub(super) fn forget(&mut self, key: &str) {
        self.wanted.remove(key);
    }

    /// Tells those in line for a held key how far this pull has come.
    pub(super) fn report(&mut self, key: &str, done: u64, total: u64) {
        self.session.report(key.to_owned(), done, total);
    }

    /// To be called every [`TICK`]: keeps the session, and tells when the pull should end.
    pub(super) async fn tick(&mut self) -> Result<(), IngestError> {
        self.lease.check()?;
        if self.renewed.elapsed() < RENEWED_EVERY {
            return Ok(());
        }
        self.renewed = Instant::now();
        match self.session.renew().await {
            Ok(_) => Ok(()),
            Err(error) => self.reopen(&error).await,
        }
    }

    /// What is said next. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Said, IngestError> {
        loop {
            match self.session.next().await {
                Ok(event) => {
                    if let Some(said) = self.understand(event)? {
                        return Ok(said);
                    }
                }
                Err(error) => self.reopen(&error).await?,
            }
        }
    }

    /// Waits for `work` and keeps the claims meanwhile. Not for what ends the pull, and so the session.
    pub(super) async fn during<T>(
        &mut self,
        work: impl Future<Output = Result<T, IngestError>>,
    ) -> Result<T, IngestError> {
        let mut work = std::pin::pin!(work);
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                done = &mut work => return done,
                said = self.next() => drop(said?),
                _ = tick.tick() => self.tick().await?,
            }
        }
    }

    fn understand(&mut self, event: Event) -> Result<Option<Said>, IngestError> {
        let said = match event {
            Event::Reply(reply) => {
                let outcome = reply.outcome();
                let Some(key) = self.asked.remove(&reply.id) else {
                    return Ok(None);
                };
                match outcome {
                    v1::LockOutcome::Held => Said::Held {
                        key,
                        fence: reply.fence,
                    },
                    v1::LockOutcome::Waiting => Said::InLine { key },
                    v1::LockOutcome::TooMany => {
                        let why = "too many pulls wait for it, or this one claims too much";
                        return Err(IngestError::Limit(format!(
                            "{key} cannot be claimed: {why}"
                        )));
                    }
                    other => {
                        let other = other.as_str_name();
                        return Err(IngestError::Bug(format!("a claim on {key} gave {other}")));
                    }
                }
            }
            Event::News(news) if !self.wanted.contains(&news.key) => return Ok(None),
            Event::News(v1::LockNews { key, fence: 0 }) => {
                self.wanted.remove(&key);
                Said::Committed { key }
            }
            Event::News(v1::LockNews { key, fence }) => Said::Held { key, fence },
            Event::Progress(progress) => Said::Elsewhere(progress),
        };
        Ok(Some(said))
    }

    /// Opens another session after this one has ended, and claims again what is wanted: metad knows
    /// what this pull holds, and a repetition changes nothing. What was committed meanwhile comes back
    /// as held by this pull.
    async fn reopen(&mut self, why: &ClientError) -> Result<(), IngestError> {
        tracing::debug!(error = %why, "the session of locks ended; opening another");
        loop {
            // Metad that is away for longer than the lease ends this by the lease's loss.
            self.lease.check()?;
            match self.open_again().await {
                Ok(()) => return Ok(()),
                Err(
                    ClientError::Unavailable { .. }
                    | ClientError::Deadline { .. }
                    | ClientError::Exhausted { .. },
                ) => tokio::time::sleep(AGAIN).await,
                Err(error) => return Err(IngestError::LeaseLost(error.to_string())),
            }
        }
    }

    async fn open_again(&mut self) -> Result<(), ClientError> {
        let client = self.lease.client();
        let mut session = client.lock_session(self.lease.reference()).await?;
        let mut asked = HashMap::new();
        for key in &self.wanted {
            let id = session.acquire(key.clone(), false, true).await?;
            asked.insert(id, key.clone());
        }
        (self.session, self.asked) = (session, asked);
        Ok(())
    }
}

/// The key of a layer.
pub(super) fn layer_key(diff_id: &Digest) -> String {
    format!("layer:{}", hex::encode(diff_id.as_bytes()))
}

/// The key of an image.
pub(super) fn image_key(manifest: &Digest) -> String {
    format!("image:{}", hex::encode(manifest.as_bytes()))
}
