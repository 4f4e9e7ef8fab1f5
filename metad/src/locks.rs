//! Locks under leases, with fencing tokens: a state machine that knows no clock, no socket and no
//! store.
//!
//! After Wharf (SoCC'18), which locks its metadata by layer: an operation locks the keys that it
//! touches and no more, shared or exclusive. A key's claims are served in the order in which they
//! were made, so nobody waits for ever behind those who came later. An owner has a lease that it
//! keeps by renewing; when it ends, all that the owner held or waited for is released, and the next
//! are granted what they wait for. Each grant has a fencing token that no other grant has or will
//! have, and that is larger than those of all grants before it. A commit carries it, and
//! [`Machine::holds`] says whether it still counts: an owner that was taken for dead and comes back is
//! told so, whatever its own clock says.
//!
//! [`Machine::apply`] is all of it: a request and the time in, the reply and what to write down out. The
//! caller makes that durable before anybody hears of it.
//!
//! An owner that holds a key must not wait for another before it is done with the first, or two of them
//! can wait for each other: a layer is fetched, committed and released whatever its host waits for
//! meanwhile.

mod key;
mod machine;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use key::{Key, KeyError};
pub use machine::{CLAIMS_PER_KEY_MAX, CLAIMS_PER_OWNER_MAX, Machine};

/// Who claims: a pull, by its number.
pub type OwnerId = u64;

/// How a key is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// With others who hold it so.
    Shared,
    /// Alone.
    Exclusive,
}

/// What an owner can ask.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request<K> {
    /// Begin a lease that ends at `until_ms`.
    Open {
        /// A number that was never an owner's.
        owner: OwnerId,
        /// When it ends, in the machine's time.
        until_ms: u64,
    },
    /// Keep the lease until `until_ms`; never makes it shorter.
    Renew {
        /// Whose.
        owner: OwnerId,
        /// When it ends now.
        until_ms: u64,
    },
    /// End the lease no later than at `until_ms`, unless it is renewed: the owner may be dead.
    Shorten {
        /// Whose.
        owner: OwnerId,
        /// When it ends at the latest, in the machine's time.
        until_ms: u64,
    },
    /// Claim a key: at once, or in turn with `wait`. A repetition changes nothing and is answered with
    /// what became of the claim.
    Acquire {
        /// Who.
        owner: OwnerId,
        /// What.
        key: K,
        /// How.
        mode: Mode,
        /// Stand in line when others hold it.
        wait: bool,
    },
    /// Give a key up, held or waited for.
    Release {
        /// Who.
        owner: OwnerId,
        /// What.
        key: K,
    },
    /// Give up every key, held or waited for, and keep the lease.
    ReleaseAll {
        /// Who.
        owner: OwnerId,
    },
    /// What the key was claimed for is done and written down: gives it up, and sends those that wait
    /// for it away with the news, for there is nothing left to do.
    Commit {
        /// Who.
        owner: OwnerId,
        /// What, held exclusively.
        key: K,
        /// Under which token.
        fence: u64,
    },
    /// End the lease and give up everything.
    Close {
        /// Whose.
        owner: OwnerId,
    },
    /// Nothing but the time: leases that are over end.
    Tick,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// Done: a lease began or went on, a key was given up, an owner ended, time passed.
    Done,
    /// The key is held, with this fencing token.
    Held {
        /// Larger than that of every grant before.
        fence: u64,
    },
    /// In line behind so many claims.
    Waiting {
        /// Those that hold the key, and those that wait and came before.
        ahead: usize,
    },
    /// Others hold it, or wait for it, and waiting was not asked for.
    Busy,
    /// The owner's lease is over, or never began.
    Gone,
    /// The owner lives and does not hold the key under that token: it was taken over meanwhile.
    Fenced,
    /// The owner claims the key already, in the other mode. Changing it in place could wait for ever.
    OtherMode,
    /// The owner has as many claims as it may have, or the key has.
    TooMany,
}

/// A claim on a key, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row<K> {
    /// What.
    pub key: K,
    /// Who.
    pub owner: OwnerId,
    /// How.
    pub mode: Mode,
    /// Its place in line: lower is earlier.
    pub ticket: u64,
    /// Set once it is granted.
    pub fence: Option<u64>,
}

/// What has to be durable before the reply, or news of a grant, leaves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change<K> {
    /// A claim is new or was granted.
    Put(Row<K>),
    /// A claim is no more.
    Delete {
        /// What.
        key: K,
        /// Whose.
        owner: OwnerId,
        /// Its place in line.
        ticket: u64,
    },
    /// An owner's lease ended: by itself, or because it said so.
    Ended {
        /// Whose.
        owner: OwnerId,
        /// Nobody has heard of it: it may be late.
        silent: bool,
    },
}

/// What became of a claim that waited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct News<K> {
    /// Whose.
    pub owner: OwnerId,
    /// What.
    pub key: K,
    /// The fencing token of the grant; `None` when the holder has committed and nothing is to be done.
    pub fence: Option<u64>,
}

/// All that follows from one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome<K> {
    /// For who asked.
    pub reply: Reply,
    /// To be written, in this order.
    pub changes: Vec<Change<K>>,
    /// For those who waited.
    pub news: Vec<News<K>>,
}

/// A claim and its age, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<'a, K> {
    /// What.
    pub key: &'a K,
    /// Who.
    pub owner: OwnerId,
    /// How.
    pub mode: Mode,
    /// Set once it is granted.
    pub fence: Option<u64>,
    /// When it was granted, else when it was made; in the machine's time, which begins anew with the
    /// process.
    pub since_ms: u64,
}
