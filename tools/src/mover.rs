//! Copies of packs into this donor's memory, as metad asks for them.
//!
//! A task comes with the answer to a heartbeat: where the pack lies, where it is to lie here, and
//! what is in it. The pack is read one-sided from a donor that has it, every object of it is checked
//! against its digest, and only then it is written. A source that is wrong or gone means the next;
//! what became of the task is reported, and the answer to that brings more. metad never sees a byte.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use harbour_image::object::{ObjectId, PACK_MAX, PackId, hash_object};
use harbour_metad_client::{Client, Error as ClientError, v1};
use harbour_pool::transport::{Access, Read, RegionId, TransportError};
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    ingest::packer::pack_id,
    link::{Link, Ways},
};

/// Copies at the same time, each with a pack in memory.
const AT_ONCE: usize = 4;
/// Leases that wait to be looked at; a task of one that does not fit runs out at metad.
const LEASES_MAX: usize = 16;
/// Tasks that wait for their turn.
const WAITING_MAX: usize = 64;
/// Outcomes that wait to be reported.
const OUTCOMES_MAX: usize = 256;
/// Pause after a report that metad did not take.
const RETRY: Duration = Duration::from_millis(250);
/// Longest time that one source may take for one pack.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Objects that a pack can hold: one of each byte.
const OBJECTS_MAX: u32 = PACK_MAX as u32;

/// A hand that copies in the background. Dropping it stops what has not begun.
#[derive(Debug)]
pub struct Mover {
    leases: mpsc::Sender<Leased>,
}

#[derive(Debug)]
struct Leased {
    donor: v1::DonorRef,
    tasks: Vec<Job>,
    again: Option<Duration>,
}

#[derive(Debug)]
struct Job {
    task: v1::CopyTask,
    deadline: Instant,
}

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("the task makes no sense: {0}")]
    Task(String),
    #[error("no source gave it: {0}")]
    Sources(String),
    #[error("it cannot be written here")]
    Write(#[source] TransportError),
    #[error("its objects are not known")]
    Objects(#[source] ClientError),
}

impl Mover {
    /// Begins to wait for tasks. Must be called inside a tokio runtime.
    pub fn start(client: &Client, ways: &Ways) -> Self {
        let (leases, receiver) = mpsc::channel(LEASES_MAX);
        let link = Arc::new(Link::new(Access::ReadWrite, ways));
        tokio::spawn(run(client.clone(), link, receiver));
        Self { leases }
    }

    /// Takes the tasks out of a lease that was asked for at `asked`.
    pub fn take(&self, epoch: u64, lease: &v1::DonorLease, asked: Instant) {
        if lease.tasks.is_empty() && lease.ask_again_ms == 0 {
            return;
        }
        if self.leases.try_send(leased(epoch, lease, asked)).is_err() {
            tracing::warn!("copies cannot be taken on at the moment; metad plans them anew");
        }
    }
}

fn leased(epoch: u64, lease: &v1::DonorLease, asked: Instant) -> Leased {
    let job = |task: &v1::CopyTask| Job {
        deadline: asked + Duration::from_millis(u64::from(task.lease_ms)),
        task: task.clone(),
    };
    let again = Duration::from_millis(u64::from(lease.ask_again_ms));
    Leased {
        donor: v1::DonorRef {
            id: lease.id,
            epoch,
        },
        tasks: lease.tasks.iter().map(job).collect(),
        again: (lease.ask_again_ms > 0).then_some(again),
    }
}

/// What is under way.
struct Work {
    client: Client,
    link: Arc<Link>,
    donor: v1::DonorRef,
    waiting: VecDeque<Job>,
    /// Tasks that wait or run: metad may name one twice.
    known: HashSet<u64>,
    running: JoinSet<v1::CopyOutcome>,
    outcomes: Vec<v1::CopyOutcome>,
    /// When metad is asked for more.
    again: Option<Instant>,
}

async fn run(client: Client, link: Arc<Link>, mut leases: mpsc::Receiver<Leased>) {
    let mut work = Work {
        client,
        link,
        donor: v1::DonorRef::default(),
        waiting: VecDeque::new(),
        known: HashSet::new(),
        running: JoinSet::new(),
        outcomes: Vec::new(),
        again: None,
    };
    loop {
        work.begin();
        let idle = work.running.is_empty();
        let again = work.again;
        tokio::select! {
            lease = leases.recv() => match lease {
                Some(lease) => work.take(lease),
                None => return,
            },
            Some(done) = work.running.join_next(), if !idle => work.ended(done),
            () = sleep_until(again), if again.is_some() => work.report().await,
        }
        while let Some(done) = work.running.try_join_next() {
            work.ended(done);
        }
        if !work.outcomes.is_empty() && work.again.is_none() {
            work.report().await;
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl Work {
    fn take(&mut self, lease: Leased) {
        if lease.donor.epoch != self.donor.epoch {
            // What was to be written lies in memory that is lent no more.
            for job in self.waiting.drain(..) {
                self.known.remove(&job.task.task);
            }
            self.outcomes.clear();
        }
        self.donor = lease.donor;
        for job in lease.tasks {
            if self.waiting.len() < WAITING_MAX && self.known.insert(job.task.task) {
                self.waiting.push_back(job);
            }
        }
        if let Some(pause) = lease.again {
            self.again.get_or_insert(Instant::now() + pause);
        }
    }

    /// Starts as many as may run.
    fn begin(&mut self) {
        while self.running.len() < AT_ONCE {
            let Some(job) = self.waiting.pop_front() else {
                return;
            };
            if job.deadline <= Instant::now() {
                self.known.remove(&job.task.task);
                continue;
            }
            self.link.learn(&job.task.donors);
            let (client, link) = (self.client.clone(), Arc::clone(&self.link));
            self.running.spawn(copy(client, link, job));
        }
    }

    fn ended(&mut self, done: Result<v1::CopyOutcome, tokio::task::JoinError>) {
        match done {
            Ok(outcome) => {
                self.known.remove(&outcome.task);
                if self.outcomes.len() < OUTCOMES_MAX {
                    self.outcomes.push(outcome);
                }
            }
            Err(error) => tracing::error!(%error, "a copy ended badly"),
        }
    }

    /// Tells what is done, and takes what is to be done next.
    async fn report(&mut self) {
        self.again = None;
        let asked = Instant::now();
        let request = v1::CopiedReport {
            donor: Some(self.donor),
            outcomes: self.outcomes.clone(),
        };
        match self.client.donor_copied(request).await {
            Ok(lease) => {
                self.outcomes.clear();
                self.take(leased(self.donor.epoch, &lease, asked));
            }
            Err(ClientError::Unavailable { .. } | ClientError::Deadline { .. }) => {
                self.again = Some(Instant::now() + RETRY);
            }
            Err(error) => {
                tracing::warn!(%error, "metad does not take a report of copies");
                self.outcomes.clear();
            }
        }
    }
}

/// Makes one copy, whatever comes of it.
async fn copy(client: Client, link: Arc<Link>, job: Job) -> v1::CopyOutcome {
    let task = job.task.task;
    let mut bad = Vec::new();
    let outcome = match objects(&client, &job.task).await {
        Ok(objects) => {
            let blocking = tokio::task::spawn_blocking(move || {
                let outcome = transfer(&link, &job, &objects, &mut bad);
                (outcome, bad)
            });
            match blocking.await {
                Ok((outcome, wrong)) => {
                    bad = wrong;
                    outcome
                }
                Err(error) => {
                    bad = Vec::new();
                    Err(CopyError::Task(error.to_string()))
                }
            }
        }
        Err(error) => Err(error),
    };
    let why = outcome
        .as_ref()
        .err()
        .map(|error| crate::node::refill::chain(error));
    if let Some(why) = &why {
        tracing::warn!(task, why, "a copy was not made");
    }
    v1::CopyOutcome {
        task,
        ok: why.is_none(),
        why: why.unwrap_or_default(),
        bad,
    }
}

/// All objects of a pack, by offset; none for a part of an index.
async fn objects(
    client: &Client,
    task: &v1::CopyTask,
) -> Result<Vec<(ObjectId, u32, u32)>, CopyError> {
    let mut listed = task.objects.clone();
    if task.object_count > OBJECTS_MAX {
        return Err(CopyError::Task(format!("{} objects", task.object_count)));
    }
    while (listed.len() as u32) < task.object_count {
        let request = v1::ListObjectsRequest {
            pack: task.pack.clone(),
            from: listed.len() as u32,
        };
        let reply = client.list_objects(request).await;
        let reply = reply.map_err(CopyError::Objects)?;
        if reply.objects.is_empty() {
            return Err(CopyError::Task("some of its objects are not listed".into()));
        }
        listed.extend(reply.objects);
    }
    let parsed = listed.iter().map(|object| {
        let id: [u8; 32] = object.object.as_slice().try_into().ok()?;
        Some((ObjectId(id), object.offset, object.len))
    });
    parsed
        .collect::<Option<_>>()
        .ok_or_else(|| CopyError::Task("a digest that is not 32 bytes".into()))
}

/// Reads from the first source that gives the pack, and writes it here. Names sources whose bytes
/// were wrong.
fn transfer(
    link: &Link,
    job: &Job,
    objects: &[(ObjectId, u32, u32)],
    bad: &mut Vec<v1::Extent>,
) -> Result<(), CopyError> {
    let task = &job.task;
    let name: [u8; 32] = task
        .pack
        .as_slice()
        .try_into()
        .map_err(|_| CopyError::Task("a pack's name that is not 32 bytes".into()))?;
    let to = task
        .to
        .filter(|to| to.len == task.len && task.len > 0 && task.len as usize <= PACK_MAX)
        .ok_or_else(|| CopyError::Task("no place of the pack's length".into()))?;
    if !objects.is_empty() && pack_id(objects).0 != name {
        return Err(CopyError::Task(
            "its objects do not make up its name".into(),
        ));
    }
    let mut bytes = vec![0; task.len as usize];
    let mut why = Vec::new();
    for from in &task.from {
        if Instant::now() >= job.deadline {
            why.push("the task's time is over".to_owned());
            break;
        }
        let read = Read {
            region: RegionId(from.region),
            offset: from.offset,
            into: &mut bytes,
        };
        let limit = job.deadline.min(Instant::now() + READ_LIMIT);
        if let Err(error) = link.read(from.donor, from.epoch, &mut [read], limit) {
            why.push(format!("donor {}: {error}", from.donor));
            continue;
        }
        if !whole(&PackId(name), objects, &bytes) {
            why.push(format!("donor {}: other bytes", from.donor));
            bad.push(*from);
            continue;
        }
        return link
            .write(&to, 0, &bytes, job.deadline)
            .map_err(CopyError::Write);
    }
    Err(CopyError::Sources(why.join("; ")))
}

/// Whether `bytes` are the pack: every byte of it belongs to an object, and every object is what its
/// digest says.
fn whole(name: &PackId, objects: &[(ObjectId, u32, u32)], bytes: &[u8]) -> bool {
    if objects.is_empty() {
        return *blake3::hash(bytes).as_bytes() == name.0;
    }
    let mut end = 0;
    for (id, offset, len) in objects {
        let start = *offset as usize;
        let Some(object) = bytes.get(start..start.saturating_add(*len as usize)) else {
            return false;
        };
        if start != end || object.is_empty() || hash_object(object).id != *id {
            return false;
        }
        end += object.len();
    }
    end == bytes.len()
}

#[cfg(test)]
mod tests;
