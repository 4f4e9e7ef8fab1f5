//! Leases of pulls: beginning, keeping, and giving back.

use harbour_metad_client::v1;

use super::{Around, Effects, Engine, state::State};
use crate::{
    error::{Error, text},
    locks::Request,
    store::{PullRow, Sync, Tx},
};

/// Pulls under way at a time.
const PULLS_MAX: usize = 1024;

/// How a pull ends, for the space that it still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its writer has said that it is done.
    Told,
    /// Nobody has heard of its writer, who may be late: not before this time.
    Silent { not_before_ms: u64 },
}

/// Takes away everything that is a pull's alone. Gives the packs that it held on to.
pub(super) fn end(
    tx: &Tx<'_>,
    effects: &mut Effects,
    pull: u64,
    how: End,
) -> Result<Vec<u64>, Error> {
    let pins = tx.pins_of(pull)?;
    for layer in tx.staged_layers(pull)? {
        tx.delete_layer(layer)?;
    }
    let not_before = match how {
        End::Told => None,
        End::Silent { not_before_ms } => Some(not_before_ms),
    };
    for extent in tx.extents_of_pull(pull)? {
        effects.free_reserved(tx, &extent, not_before)?;
    }
    tx.delete_pull(pull)?;
    Ok(pins)
}

impl Engine {
    /// Begins a pull.
    pub fn begin(&self, request: &v1::BeginRequest) -> Result<v1::PullLease, Error> {
        text(&request.what, 4096, "what is pulled")?;
        text(&request.host, 255, "the host's name")?;
        let mut state = self.lock();
        if state.pulls.len() >= PULLS_MAX {
            return Err(Error::Exhausted(format!(
                "{PULLS_MAX} pulls are under way, no more are allowed"
            )));
        }
        let row = PullRow {
            id: state.issue(),
            token: state.issue(),
            what: request.what.clone(),
            host: request.host.clone(),
            pid: request.pid,
            replicas: super::commit::replicas(request.replicas)?,
        };
        let request = Request::Open {
            owner: row.id,
            until_ms: self.now_ms() + self.options.timing.pull_lease_ms,
        };
        self.change_locked(
            &mut state,
            Sync::Process,
            Some(Around("begin.before", "begin.after")),
            |tx, _, claims| {
                claims.apply(request);
                tx.add_pull(&row)
            },
        )?;
        let lease = self.pull_lease(row.id, row.token);
        state.pulls.insert(row.id, row);
        Ok(lease)
    }

    /// Keeps a pull's lease.
    pub fn renew(&self, reference: &v1::PullRef) -> Result<v1::PullLease, Error> {
        let mut state = self.lock();
        let owner = self.keep(&mut state, reference)?;
        Ok(self.pull_lease(owner, reference.token))
    }

    /// Gives a pull that is under way a whole lease.
    pub(super) fn keep(&self, state: &mut State, reference: &v1::PullRef) -> Result<u64, Error> {
        let now_ms = self.now_ms();
        self.expire_pulls(state, now_ms)?;
        let owner = state.pull(Some(reference), now_ms)?;
        let until_ms = now_ms + self.options.timing.pull_lease_ms;
        state.set_lease(Request::Renew { owner, until_ms }, now_ms);
        Ok(owner)
    }

    fn pull_lease(&self, pull: u64, token: u64) -> v1::PullLease {
        let lease_ms = u32::try_from(self.options.timing.pull_lease_ms).unwrap_or(u32::MAX);
        v1::PullLease {
            pull,
            token,
            lease_ms,
        }
    }

    /// Gives everything of a pull back. One that is not under way has nothing, which is no error.
    pub fn abort(&self, reference: &v1::PullRef) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(pull) = state.pulls.get(&reference.pull) else {
            return Ok(());
        };
        if pull.token != reference.token {
            return Err(Error::Refused(format!(
                "pull {:x} has another fencing token",
                reference.pull
            )));
        }
        let reach = self.reach(&state);
        self.change_locked(
            &mut state,
            Sync::Process,
            Some(Around("abort.before", "abort.after")),
            |tx, effects, claims| {
                let owner = reference.pull;
                let packs = end(tx, effects, owner, End::Told)?;
                claims.apply(Request::Close { owner });
                super::collect::collect(tx, effects, &reach, packs)
            },
        )?;
        drop(state);
        self.tell_space_freed();
        Ok(())
    }

    /// Undoes the pulls whose leases ended by `now_ms`.
    pub(super) fn expire_pulls(&self, state: &mut State, now_ms: u64) -> Result<(), Error> {
        if state
            .locks
            .next_end_ms()
            .is_none_or(|end_ms| end_ms > now_ms)
        {
            return Ok(());
        }
        let around = Around("expire.before", "expire.after");
        self.change_locked(state, Sync::Process, Some(around), |_, _, claims| {
            claims.apply(Request::Tick);
            Ok(())
        })
    }
}
