//! Locks as the engine keeps them: the machine in memory, its claims in the store, and who is told.
//!
//! A pull is an owner of locks, and its lease is the owner's: when it ends, what the pull had reserved
//! and what it had claimed go in one transaction. The machine changes first and its changes are
//! written by the same transaction as what follows from them; when that fails the machine is built
//! again from the store. Nobody hears of anything before it has committed.
//!
//! A session that breaks is the first sign of its client's death, and the next in line should not
//! have to wait for a whole lease: it is shortened, and whole again when the pull is heard of. So are
//! the leases of pulls with claims that are found at a start.

pub(super) mod progress;

use std::collections::HashSet;

use harbour_metad_client::v1;
use tokio::sync::mpsc;

use super::{
    Around, Effects, Engine, Timing,
    collect::collect,
    pulls::{End, end},
    state::State,
};
use crate::{
    error::Error,
    locks::{Change, Key, Machine, Mode, News, OwnerId, Reply, Request},
    store::{PullRow, Sync, Tx},
};

/// What a session hears, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The answer to an [`Ask`].
    Reply {
        /// Its number.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// What became of a claim that waited.
    News {
        /// What was claimed.
        key: Key,
        /// The fencing token of the grant; `None` when the holder has committed.
        fence: Option<u64>,
    },
    /// Who holds what was claimed, and how far that one has come.
    Progress {
        /// What was claimed.
        key: Key,
        /// The holder's pull.
        pull: u64,
        /// Host of the holder.
        host: String,
        /// Process of the holder.
        pid: u32,
        /// Bytes it has done, and all; zeros when it has not said.
        bytes: (u64, u64),
    },
}

/// Where a pull's locks are told. There is one of a pull at a time: the newest.
#[derive(Debug)]
pub(super) struct Listener {
    session: u64,
    send: mpsc::Sender<Heard>,
}

/// A pull whose locks are listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pull: OwnerId,
    number: u64,
}

/// One wish of a session.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Whose.
    pub session: Session,
    /// Number that the answer will have.
    pub id: u64,
    /// What.
    pub wish: Wish,
}

/// What a session can ask.
#[derive(Clone, Debug)]
pub enum Wish {
    /// Claim a key, in line with `wait`.
    Acquire {
        /// What.
        key: Key,
        /// How.
        mode: Mode,
        /// In line when others hold it.
        wait: bool,
    },
    /// Give a key up, held or waited for.
    Release {
        /// What.
        key: Key,
    },
    /// Keep the pull's lease.
    Renew,
    /// Give everything up, and end the session.
    Close,
    /// Tell those in line for a key how far its holder has come.
    Progress {
        /// What.
        key: Key,
        /// Bytes done, and all.
        bytes: (u64, u64),
    },
}

/// The machine inside a transaction.
pub(super) struct Claims<'m> {
    machine: &'m mut Machine<Key>,
    now_ms: u64,
    changes: Vec<Change<Key>>,
    told: Vec<(OwnerId, Heard)>,
    touched: bool,
}

impl Claims<'_> {
    /// Serves a request. News of it are told when the transaction has committed.
    pub(super) fn apply(&mut self, request: Request<Key>) -> Reply {
        self.touched = true;
        let outcome = self.machine.apply(request, self.now_ms);
        self.changes.extend(outcome.changes);
        let news = outcome.news.into_iter();
        self.told
            .extend(news.map(|News { owner, key, fence }| (owner, Heard::News { key, fence })));
        outcome.reply
    }

    /// What a key was claimed for is done: gives up the claim, and tells who waited for it. Gives those.
    ///
    /// # Errors
    /// [`Error::Fenced`] when the key is not held under this token.
    pub(super) fn commit(
        &mut self,
        owner: OwnerId,
        key: &Key,
        fence: u64,
    ) -> Result<Vec<OwnerId>, Error> {
        let place = self.told.len();
        let request = Request::Commit {
            owner,
            key: key.clone(),
            fence,
        };
        // Looked at first: a refusal is no reason to build the machine again.
        let holds = self
            .machine
            .holds(owner, key, Mode::Exclusive, fence, self.now_ms);
        if !holds || self.apply(request) != Reply::Done {
            return Err(Error::Fenced(format!(
                "pull {owner:x} does not hold {key} under fencing token {fence}: another has taken \
                 over, or it was given up"
            )));
        }
        let told = self.told.iter().skip(place);
        let done = told.filter_map(|(waiting, heard)| match heard {
            Heard::News {
                key: done,
                fence: None,
            } => (done == key).then_some(*waiting),
            _ => None,
        });
        Ok(done.collect())
    }

    /// As [`Claims::apply`] for a session, which hears the reply before the news of what comes later.
    fn answer(&mut self, session: Session, id: u64, request: Request<Key>) {
        let place = self.told.len();
        let reply = self.apply(request);
        self.told
            .insert(place, (session.pull, Heard::Reply { id, reply }));
    }
}

impl Engine {
    /// Runs one transaction as [`Engine::change`] does, in which locks may change.
    pub(super) fn change_locked<T>(
        &self,
        state: &mut State,
        sync: Sync,
        around: Option<Around>,
        work: impl FnOnce(&Tx<'_>, &mut Effects, &mut Claims<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let now_ms = self.now_ms();
        let reach = self.reach(state);
        let mut machine = std::mem::replace(&mut state.locks, Machine::new(0));
        let mut claims = Claims {
            machine: &mut machine,
            now_ms,
            changes: Vec::new(),
            told: Vec::new(),
            touched: false,
        };
        let late = End::Silent {
            not_before_ms: now_ms + self.options.timing.pull_lease_ms,
        };
        let outcome = self.change(state, sync, around, |tx, effects| {
            let value = work(tx, effects, &mut claims)?;
            if let Some(packs) = write(tx, effects, &claims.changes, late)? {
                collect(tx, effects, &reach, packs)?;
            }
            Ok(value)
        });
        let Claims {
            changes,
            told,
            touched,
            ..
        } = claims;
        match outcome {
            Ok(value) => {
                state.locks = machine;
                state.forget_ended(&changes);
                state.tell(told);
                Ok(value)
            }
            Err(error) => {
                state.locks = match touched {
                    true => {
                        let until_ms = now_ms + self.options.timing.pull_lease_ms;
                        let lease = |pull, _| machine.until_ms(pull).unwrap_or(until_ms);
                        state.locks_of_store(machine.issued(), lease)?
                    }
                    false => machine,
                };
                Err(error)
            }
        }
    }

    /// Listens to a pull's locks, instead of who did before, and keeps its lease. The channel ends when
    /// the pull does, when another session takes its place, and when it is not emptied in time.
    ///
    /// # Errors
    /// [`Error::Refused`] when the pull is not under way.
    pub fn listen(
        &self,
        reference: &v1::PullRef,
        send: mpsc::Sender<Heard>,
    ) -> Result<Session, Error> {
        let mut state = self.lock();
        let pull = self.keep(&mut state, reference)?;
        let number = state.issue();
        let session = number;
        state.listeners.insert(pull, Listener { session, send });
        Ok(Session { pull, number })
    }

    /// Serves many wishes by one transaction; the answers go to the sessions. Wishes of sessions that
    /// are over are left out.
    ///
    /// # Errors
    /// When the store fails: then nothing was done and nobody was told.
    pub fn claim(&self, asks: Vec<Ask>) -> Result<(), Error> {
        let mut state = self.lock();
        let now_ms = self.now_ms();
        self.expire_pulls(&mut state, now_ms)?;
        let heard = |ask: &Ask| state.hears(ask.session);
        let asks: Vec<Ask> = asks.into_iter().filter(heard).collect();
        let until_ms = now_ms + self.options.timing.pull_lease_ms;
        let (mut closed, mut lines, mut reports) = (Vec::new(), Vec::new(), Vec::new());
        let mut requests = Vec::new();
        for Ask { session, id, wish } in asks {
            // What comes behind a farewell would be held by nobody.
            if closed.contains(&session) {
                continue;
            }
            match &wish {
                Wish::Close => closed.push(session),
                Wish::Acquire {
                    key, wait: true, ..
                } => lines.push((session.pull, key.clone())),
                Wish::Progress { key, bytes } => reports.push((session.pull, key.clone(), *bytes)),
                _ => {}
            }
            if let Some(request) = request(session.pull, wish, until_ms) {
                requests.push((session, id, request));
            }
        }
        // Reports alone change nothing that is written down.
        if !requests.is_empty() {
            self.change_locked(&mut state, Sync::Process, None, |_, _, claims| {
                for (session, id, request) in requests {
                    claims.answer(session, id, request);
                }
                Ok(())
            })?;
        }
        for (pull, key, bytes) in reports {
            state.report(pull, key, bytes);
        }
        for (pull, key) in lines {
            state.tell_holder(pull, &key);
        }
        state.hang_up(&closed);
        Ok(())
    }

    /// Ends sessions; their locks stay.
    pub fn hang_up(&self, sessions: &[Session]) {
        self.lock().hang_up(sessions);
    }

    /// A session broke that nobody had ended: its client is dead, or cut off. Its pull is undone soon,
    /// unless it is heard of.
    ///
    /// # Errors
    /// When the store fails: then the lease is as long as it was.
    pub fn broke(&self, session: Session) -> Result<(), Error> {
        let mut state = self.lock();
        if !state.hears(session) {
            return Ok(());
        }
        state.hang_up(&[session]);
        let now_ms = self.now_ms();
        self.expire_pulls(&mut state, now_ms)?;
        let owner = session.pull;
        if state.locks.lives(owner, now_ms) {
            let until_ms = now_ms + self.options.timing.broken_ms;
            state.set_lease(Request::Shorten { owner, until_ms }, now_ms);
        }
        Ok(())
    }

    /// All claims, in the order of keys and then of their turn.
    pub fn list_locks(&self) -> Vec<v1::Lock> {
        let now_ms = self.now_ms();
        let state = self.lock();
        let listed = state.locks.list();
        listed
            .map(|claim| {
                let pull = state.pulls.get(&claim.owner);
                let (done_bytes, total_bytes) = state.bytes_of(claim.owner, claim.key);
                v1::Lock {
                    key: claim.key.to_string(),
                    pull: claim.owner,
                    what: pull
                        .map_or_else(String::new, |pull| pull.what.chars().take(256).collect()),
                    host: pull.map_or_else(String::new, |pull| pull.host.clone()),
                    pid: pull.map_or(0, |pull| pull.pid),
                    exclusive: claim.mode == Mode::Exclusive,
                    fence: claim.fence.unwrap_or(0),
                    age_ms: now_ms.saturating_sub(claim.since_ms),
                    done_bytes,
                    total_bytes,
                }
            })
            .collect()
    }
}

/// What the machine is asked, unless the wish is none of its business.
fn request(owner: OwnerId, wish: Wish, until_ms: u64) -> Option<Request<Key>> {
    Some(match wish {
        Wish::Acquire { key, mode, wait } => Request::Acquire {
            owner,
            key,
            mode,
            wait,
        },
        Wish::Release { key } => Request::Release { owner, key },
        Wish::Renew => Request::Renew { owner, until_ms },
        Wish::Close => Request::ReleaseAll { owner },
        Wish::Progress { .. } => return None,
    })
}

/// Writes what changed, and undoes pulls of which nobody has heard: then it gives the packs that these
/// held on to.
fn write(
    tx: &Tx<'_>,
    effects: &mut Effects,
    changes: &[Change<Key>],
    late: End,
) -> Result<Option<Vec<u64>>, Error> {
    let mut packs: Option<Vec<u64>> = None;
    for change in changes {
        match change {
            Change::Put(row) => tx.put_claim(row)?,
            Change::Delete { ticket, .. } => tx.delete_claim(*ticket)?,
            Change::Ended {
                owner,
                silent: true,
            } => packs
                .get_or_insert_default()
                .extend(end(tx, effects, *owner, late)?),
            // Who closes it has undone it.
            Change::Ended { silent: false, .. } => {}
        }
    }
    Ok(packs)
}

impl State {
    /// Pulls and their claims as the store has them.
    pub(super) fn load_locks(&mut self, pulls: Vec<PullRow>, timing: &Timing) -> Result<(), Error> {
        self.pulls = pulls.into_iter().map(|pull| (pull.id, pull)).collect();
        let grace_ms = self.started_ms + timing.grace_ms;
        // All sessions broke. Others may be waiting for what is claimed.
        self.locks = self.locks_of_store(self.locks.issued(), |_, claims| match claims {
            true => grace_ms + timing.broken_ms,
            false => grace_ms + timing.pull_lease_ms,
        })?;
        Ok(())
    }

    /// The machine as the store has it. `lease` says when the lease of a pull ends, and is told whether
    /// the pull has claims.
    fn locks_of_store(
        &self,
        issued: u64,
        lease: impl Fn(OwnerId, bool) -> u64,
    ) -> Result<Machine<Key>, Error> {
        let claims = self.writer.read().claims()?;
        let claiming: HashSet<OwnerId> = claims.iter().map(|claim| claim.owner).collect();
        let pulls = self.pulls.keys();
        let pulls = pulls.map(|pull| (*pull, lease(*pull, claiming.contains(pull))));
        Machine::restore(issued, pulls, claims, self.started_ms)
            .map_err(|why| Error::Refused(format!("the database is inconsistent: {why}")))
    }

    /// Changes a lease. Those that are over by now have ended before, so that nothing is to be written.
    pub(super) fn set_lease(&mut self, request: Request<Key>, now_ms: u64) {
        let outcome = self.locks.apply(request, now_ms);
        debug_assert_eq!((outcome.reply, outcome.changes), (Reply::Done, Vec::new()));
    }

    /// Whether a session is the one that is told of its pull's locks.
    fn hears(&self, session: Session) -> bool {
        let listener = self.listeners.get(&session.pull);
        listener.is_some_and(|listener| listener.session == session.number)
    }

    fn hang_up(&mut self, sessions: &[Session]) {
        for session in sessions {
            if self.hears(*session) {
                self.listeners.remove(&session.pull);
            }
        }
    }

    fn forget_ended(&mut self, changes: &[Change<Key>]) {
        for change in changes {
            if let Change::Delete { key, owner, .. } = change
                && self.progress.get(key).is_some_and(|of| of.pull == *owner)
            {
                self.progress.remove(key);
            }
            let Change::Ended { owner, silent } = change else {
                continue;
            };
            self.listeners.remove(owner);
            if let Some(gone) = self.pulls.remove(owner)
                && *silent
            {
                let PullRow {
                    what, host, pid, ..
                } = gone;
                tracing::info!(pull = owner, what, host, pid, "pull expired");
            }
        }
    }

    /// Tells sessions. One that does not listen loses its session, and asks again in a new one.
    fn tell(&mut self, told: Vec<(OwnerId, Heard)>) {
        for (pull, heard) in told {
            let Some(listener) = self.listeners.get(&pull) else {
                continue;
            };
            if listener.send.try_send(heard).is_err() {
                self.listeners.remove(&pull);
            }
        }
    }
}
