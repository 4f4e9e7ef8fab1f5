//! The machine.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Debug,
};

use super::{Change, Listed, Mode, News, Outcome, OwnerId, Reply, Request, Row};

/// Claims on one key at a time.
pub const CLAIMS_PER_KEY_MAX: usize = 4096;
/// Claims of one owner at a time: an image's layers, and room.
pub const CLAIMS_PER_OWNER_MAX: usize = 2048;

/// Owners, their leases, and who holds what. Cloned only by who checks it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine<K: Ord> {
    owners: BTreeMap<OwnerId, Owner<K>>,
    /// Leases by their end.
    ends: BTreeSet<(u64, OwnerId)>,
    /// Claims by their ticket; those that are granted come first. A key that nobody claims is not here.
    keys: BTreeMap<K, VecDeque<Claim>>,
    /// The newest ticket or fencing token.
    issued: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Owner<K: Ord> {
    until_ms: u64,
    keys: BTreeSet<K>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Claim {
    owner: OwnerId,
    mode: Mode,
    ticket: u64,
    fence: Option<u64>,
    since_ms: u64,
}

/// What is gathered while a request is served.
struct Log<K> {
    changes: Vec<Change<K>>,
    news: Vec<News<K>>,
}

impl<K: Ord + Clone + Debug> Machine<K> {
    /// One that nobody owns anything of. Tickets and fencing tokens begin above `issued`: whoever
    /// starts again after a crash gives a number that none of before has reached.
    pub fn new(issued: u64) -> Self {
        Self {
            owners: BTreeMap::new(),
            ends: BTreeSet::new(),
            keys: BTreeMap::new(),
            issued,
        }
    }

    /// What was written down, and when each lease ends, which should leave its owner the time to be
    /// heard again.
    ///
    /// # Errors
    /// When no machine can have written that: the text says why.
    pub fn restore(
        issued: u64,
        owners: impl IntoIterator<Item = (OwnerId, u64)>,
        rows: impl IntoIterator<Item = Row<K>>,
        now_ms: u64,
    ) -> Result<Self, String> {
        let mut machine = Self::new(issued);
        for (owner, until_ms) in owners {
            machine.open(owner, until_ms);
        }
        for row in rows {
            let number = row.fence.unwrap_or(0).max(row.ticket);
            let Some(owner) = machine.owners.get_mut(&row.owner) else {
                return Err(format!("{row:?} is of an owner that is not there"));
            };
            if !owner.keys.insert(row.key.clone()) || number > issued {
                return Err(format!("{row:?} is there twice, or from the future"));
            }
            machine.keys.entry(row.key).or_default().push_back(Claim {
                owner: row.owner,
                mode: row.mode,
                ticket: row.ticket,
                fence: row.fence,
                since_ms: now_ms,
            });
        }
        for claims in machine.keys.values_mut() {
            claims.make_contiguous().sort_by_key(|claim| claim.ticket);
        }
        machine.check()?;
        Ok(machine)
    }

    /// Serves a request at `now_ms`, after ending the leases that are over by then. The machine has
    /// changed when this returns; when what changed cannot be written down, build it again from
    /// what is.
    pub fn apply(&mut self, request: Request<K>, now_ms: u64) -> Outcome<K> {
        let mut log = Log {
            changes: Vec::new(),
            news: Vec::new(),
        };
        self.expire(now_ms, &mut log);
        let reply = match request {
            Request::Tick => Reply::Done,
            Request::Open { owner, until_ms } => self.open(owner, until_ms),
            Request::Renew { owner, until_ms } => self.renew(owner, until_ms),
            Request::Shorten { owner, until_ms } => self.shorten(owner, until_ms),
            Request::Acquire {
                owner,
                key,
                mode,
                wait,
            } => self.acquire(owner, key, mode, wait, now_ms, &mut log),
            Request::Release { owner, key } => self.release(owner, &key, now_ms, &mut log),
            Request::ReleaseAll { owner } => self.release_all(owner, now_ms, &mut log),
            Request::Commit { owner, key, fence } => {
                self.commit(owner, &key, fence, now_ms, &mut log)
            }
            Request::Close { owner } => {
                self.end(&[owner], false, now_ms, &mut log);
                Reply::Done
            }
        };
        Outcome {
            reply,
            changes: log.changes,
            news: log.news,
        }
    }

    /// The owner's lease lives.
    pub fn lives(&self, owner: OwnerId, now_ms: u64) -> bool {
        let owner = self.owners.get(&owner);
        owner.is_some_and(|owner| owner.until_ms > now_ms)
    }

    /// The owner holds the key under this token, and its lease lives: what it commits counts.
    pub fn holds(&self, owner: OwnerId, key: &K, mode: Mode, fence: u64, now_ms: u64) -> bool {
        let granted =
            |claim: &Claim| (claim.owner, claim.mode, claim.fence) == (owner, mode, Some(fence));
        let claims = self.keys.get(key);
        claims.is_some_and(|claims| claims.iter().any(granted)) && self.lives(owner, now_ms)
    }

    /// When an owner's lease ends.
    pub fn until_ms(&self, owner: OwnerId) -> Option<u64> {
        self.owners.get(&owner).map(|owner| owner.until_ms)
    }

    /// When the next lease ends.
    pub fn next_end_ms(&self) -> Option<u64> {
        self.ends.first().map(|(until_ms, _)| *until_ms)
    }

    /// Moves the end of every lease on: nobody was listened to for so long.
    pub fn move_on(&mut self, missed_ms: u64) {
        let moved = |until_ms: u64| until_ms.saturating_add(missed_ms);
        for owner in self.owners.values_mut() {
            owner.until_ms = moved(owner.until_ms);
        }
        let ends = std::mem::take(&mut self.ends);
        self.ends.extend(
            ends.into_iter()
                .map(|(until_ms, owner)| (moved(until_ms), owner)),
        );
    }

    /// All claims, by key and in the order in which they are served.
    pub fn list(&self) -> impl Iterator<Item = Listed<'_, K>> {
        self.keys.iter().flat_map(|(key, claims)| {
            claims.iter().map(move |claim| Listed {
                key,
                owner: claim.owner,
                mode: claim.mode,
                fence: claim.fence,
                since_ms: claim.since_ms,
            })
        })
    }

    /// The newest ticket or fencing token.
    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// Those whose leases have not ended.
    pub fn owners(&self) -> impl Iterator<Item = OwnerId> {
        self.owners.keys().copied()
    }

    /// Who holds a key.
    pub fn holders(&self, key: &K) -> impl Iterator<Item = OwnerId> {
        let claims = self.keys.get(key).into_iter().flatten();
        claims
            .take_while(|claim| claim.fence.is_some())
            .map(|claim| claim.owner)
    }

    /// Who waits for a key, in turn.
    pub fn waiting(&self, key: &K) -> impl Iterator<Item = OwnerId> {
        let claims = self.keys.get(key).into_iter().flatten();
        claims
            .skip_while(|claim| claim.fence.is_some())
            .map(|claim| claim.owner)
    }

    /// What must always be true.
    ///
    /// # Errors
    /// What is not.
    pub fn check(&self) -> Result<(), String> {
        let mut claimed: BTreeMap<OwnerId, BTreeSet<K>> = BTreeMap::new();
        for (key, claims) in &self.keys {
            check_claims(claims).map_err(|why| format!("{key:?}: {why}: {claims:?}"))?;
            for claim in claims {
                if !claimed.entry(claim.owner).or_default().insert(key.clone()) {
                    return Err(format!("{key:?}: owner {} claims twice", claim.owner));
                }
            }
        }
        for (id, owner) in &self.owners {
            if claimed.remove(id).unwrap_or_default() != owner.keys {
                return Err(format!("owner {id} does not claim {:?}", owner.keys));
            }
        }
        let ends: BTreeSet<_> = self
            .owners
            .iter()
            .map(|(id, owner)| (owner.until_ms, *id))
            .collect();
        if !claimed.is_empty() || ends != self.ends {
            return Err(format!(
                "{claimed:?} have no owner, or {ends:?} are not the leases"
            ));
        }
        Ok(())
    }

    fn open(&mut self, owner: OwnerId, until_ms: u64) -> Reply {
        if self.owners.contains_key(&owner) {
            return self.renew(owner, until_ms);
        }
        self.ends.insert((until_ms, owner));
        let keys = BTreeSet::new();
        self.owners.insert(owner, Owner { until_ms, keys });
        Reply::Done
    }

    fn renew(&mut self, id: OwnerId, until_ms: u64) -> Reply {
        self.set_end(id, |end_ms| end_ms.max(until_ms))
    }

    fn shorten(&mut self, id: OwnerId, until_ms: u64) -> Reply {
        self.set_end(id, |end_ms| end_ms.min(until_ms))
    }

    fn set_end(&mut self, id: OwnerId, end: impl FnOnce(u64) -> u64) -> Reply {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Reply::Gone;
        };
        self.ends.remove(&(owner.until_ms, id));
        owner.until_ms = end(owner.until_ms);
        self.ends.insert((owner.until_ms, id));
        Reply::Done
    }

    fn acquire(
        &mut self,
        id: OwnerId,
        key: K,
        mode: Mode,
        wait: bool,
        now_ms: u64,
        log: &mut Log<K>,
    ) -> Reply {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Reply::Gone;
        };
        let claims = self.keys.get(&key);
        let count = claims.map_or(0, VecDeque::len);
        let known = claims.and_then(|claims| claims.iter().position(|claim| claim.owner == id));
        if let Some((at, claim)) = known.and_then(|at| Some((at, claims?.get(at)?))) {
            return match claim.fence {
                _ if claim.mode != mode => Reply::OtherMode,
                Some(fence) => Reply::Held { fence },
                None => Reply::Waiting { ahead: at },
            };
        }
        // Nobody overtakes: who comes when others wait gets in line, even where the holders would
        // have it.
        let free = claims.is_none_or(|claims| {
            claims
                .iter()
                .all(|claim| claim.fence.is_some() && compatible(claim.mode, mode))
        });
        if !free && !wait {
            return Reply::Busy;
        }
        if count >= CLAIMS_PER_KEY_MAX || owner.keys.len() >= CLAIMS_PER_OWNER_MAX {
            return Reply::TooMany;
        }
        owner.keys.insert(key.clone());
        self.issued += 1;
        let claim = Claim {
            owner: id,
            mode,
            ticket: self.issued,
            fence: free.then_some(self.issued),
            since_ms: now_ms,
        };
        log.changes.push(Change::Put(row(&key, &claim)));
        let reply = match claim.fence {
            Some(fence) => Reply::Held { fence },
            None => Reply::Waiting { ahead: count },
        };
        self.keys.entry(key).or_default().push_back(claim);
        reply
    }

    fn release(&mut self, id: OwnerId, key: &K, now_ms: u64, log: &mut Log<K>) -> Reply {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Reply::Gone;
        };
        // One that is not there was given up before: a repetition.
        if owner.keys.remove(key) {
            self.withdraw(id, key, log);
            self.serve(key, now_ms, log);
        }
        Reply::Done
    }

    fn release_all(&mut self, id: OwnerId, now_ms: u64, log: &mut Log<K>) -> Reply {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Reply::Gone;
        };
        for key in std::mem::take(&mut owner.keys) {
            self.withdraw(id, &key, log);
            self.serve(&key, now_ms, log);
        }
        Reply::Done
    }

    fn commit(&mut self, id: OwnerId, key: &K, fence: u64, now_ms: u64, log: &mut Log<K>) -> Reply {
        if !self.owners.contains_key(&id) {
            return Reply::Gone;
        }
        if !self.holds(id, key, Mode::Exclusive, fence, now_ms) {
            return Reply::Fenced;
        }
        // What the end of other leases made of these claims just now is no news any more.
        log.news.retain(|news| news.key != *key);
        for Claim { owner, ticket, .. } in self.keys.remove(key).into_iter().flatten() {
            if let Some(owner) = self.owners.get_mut(&owner) {
                owner.keys.remove(key);
            }
            let key = key.clone();
            log.changes.push(Change::Delete {
                key: key.clone(),
                owner,
                ticket,
            });
            if owner != id {
                let fence = None;
                log.news.push(News { owner, key, fence });
            }
        }
        Reply::Done
    }

    fn expire(&mut self, now_ms: u64, log: &mut Log<K>) {
        let over = self
            .ends
            .iter()
            .take_while(|(until_ms, _)| *until_ms <= now_ms);
        let over: Vec<OwnerId> = over.map(|(_, owner)| *owner).collect();
        self.end(&over, true, now_ms, log);
    }

    /// Ends owners, all of them before anything is granted: none of them is served any more.
    fn end(&mut self, ids: &[OwnerId], silent: bool, now_ms: u64, log: &mut Log<K>) {
        let mut touched = BTreeSet::new();
        for id in ids {
            let Some(owner) = self.owners.remove(id) else {
                continue;
            };
            self.ends.remove(&(owner.until_ms, *id));
            for key in owner.keys {
                self.withdraw(*id, &key, log);
                touched.insert(key);
            }
            log.changes.push(Change::Ended { owner: *id, silent });
        }
        for key in touched {
            self.serve(&key, now_ms, log);
        }
    }

    /// Takes a claim away.
    fn withdraw(&mut self, id: OwnerId, key: &K, log: &mut Log<K>) {
        let Some(claims) = self.keys.get_mut(key) else {
            return;
        };
        let Some(at) = claims.iter().position(|claim| claim.owner == id) else {
            return;
        };
        if let Some(Claim { ticket, .. }) = claims.remove(at) {
            log.changes.push(Change::Delete {
                key: key.clone(),
                owner: id,
                ticket,
            });
        }
        if claims.is_empty() {
            self.keys.remove(key);
        }
        // Granted by the same request as the lease before it ended: no news any more.
        log.news.retain(|news| news.owner != id || news.key != *key);
    }

    /// Grants what can be granted of a key, in the order of tickets.
    fn serve(&mut self, key: &K, now_ms: u64, log: &mut Log<K>) {
        let mut before: Option<Mode> = None;
        for claim in self.keys.get_mut(key).into_iter().flatten() {
            if claim.fence.is_none() {
                if before.is_some_and(|mode| !compatible(mode, claim.mode)) {
                    return;
                }
                self.issued += 1;
                claim.fence = Some(self.issued);
                claim.since_ms = now_ms;
                log.changes.push(Change::Put(row(key, claim)));
                log.news.push(News {
                    owner: claim.owner,
                    key: key.clone(),
                    fence: claim.fence,
                });
            }
            // Those that are granted are one exclusive or all shared.
            before = Some(claim.mode);
        }
    }
}

fn compatible(one: Mode, other: Mode) -> bool {
    (one, other) == (Mode::Shared, Mode::Shared)
}

fn row<K: Clone>(key: &K, claim: &Claim) -> Row<K> {
    Row {
        key: key.clone(),
        owner: claim.owner,
        mode: claim.mode,
        ticket: claim.ticket,
        fence: claim.fence,
    }
}

/// What must be true of one key's claims.
fn check_claims(claims: &VecDeque<Claim>) -> Result<(), &'static str> {
    if claims.is_empty() {
        return Err("a key that nobody claims");
    }
    if !claims.iter().is_sorted_by(|a, b| a.ticket < b.ticket) {
        return Err("not in the order of tickets");
    }
    let granted = claims
        .iter()
        .take_while(|claim| claim.fence.is_some())
        .count();
    let (held, waiting) = claims.as_slices();
    let mut later = held.iter().chain(waiting).skip(granted);
    if later.any(|claim| claim.fence.is_some()) {
        return Err("one was overtaken");
    }
    let exclusive = |claim: &Claim| claim.mode == Mode::Exclusive;
    if granted > 1 && claims.iter().take(granted).any(exclusive) {
        return Err("held by others beside an exclusive holder");
    }
    let next = claims.get(granted).map(|claim| claim.mode);
    let could = match next {
        None => false,
        Some(Mode::Exclusive) => granted == 0,
        Some(Mode::Shared) => !claims.iter().take(granted).any(exclusive),
    };
    if could {
        return Err("one waits that could be served");
    }
    Ok(())
}
