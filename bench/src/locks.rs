//! Locks of metad under a thousand clients, and what its catalogue's readers notice of them.
//!
//! Each client is a pull with a session of its own; it claims a key, waits until it has it, gives it up
//! and waits until that is done, at a steady pace. Each grant is written down before it is told. A reader
//! beside them asks for places, one question after the other, with and without them.

use std::{
    fs,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_metad_client::{
    Client, Endpoint, LockSession,
    v1::{self, LockOutcome, lock_event::Event},
};

use crate::{
    Common,
    command::{self, Daemon},
    report::{K_PER_S, MILLIS, Report},
    sandbox::Place,
};

/// metad.
pub(crate) const METAD: &str = "metad";
/// Its readers while nobody locks.
pub(crate) const IDLE: &str = "idle";
/// Its readers beside the clients.
pub(crate) const BUSY: &str = "under locks";
/// Lock and unlock pairs a second.
pub(crate) const PAIRS: &str = "pairs";
/// From the wish to the grant.
pub(crate) const GRANT: &str = "grant p99";
/// Readers of another metad on the same processors, which nobody locks.
pub(crate) const APART: &str = "apart";
/// One `Locate`, which is what nodes ask most.
const READ_MEDIAN: &str = "read median";
/// The same.
pub(crate) const READ: &str = "read p99";

const CLIENTS: u32 = 1000;
/// Connections that they share: what one connection carries is not what is measured.
const CONNECTIONS: u32 = 50;
/// Between the beginnings of two pairs of one client: a little more than 10,000 a second of all.
const PAUSE: Duration = Duration::from_millis(98);
/// Keys that clients choose from: now and then two want the same.
const KEYS: u64 = 4096;
/// Between two questions of the reader.
const READ_EVERY: Duration = Duration::from_millis(2);
const READY: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(20);

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(5);
    let time = Duration::from_secs(if common.quick { 1 } else { 10 });
    let clients = if common.quick { 50 } else { CLIENTS };
    let mut report = Report::new("locks", rounds, common.quick, &[IDLE]);
    report.settings.insert(
        "clients".to_owned(),
        format!("{clients}, a pair every {} ms each", PAUSE.as_millis()),
    );
    let (_metad, endpoint) = start(common, place, "locks")?;
    // Another one, for what a reader notices of the processors' other work alone.
    let (_apart, apart) = start(common, place, "apart")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut sessions = open(&endpoint, clients).await?;
        for round in 0..rounds {
            command::note(&format!("round {} of {rounds}: locks", round + 1));
            for (target, asked) in [(BUSY, &endpoint), (APART, &apart)] {
                let over = Arc::new(AtomicBool::new(false));
                let reading = reading(asked.clone(), Arc::clone(&over), Duration::MAX);
                let (grants, took);
                (sessions, grants, took) = turns(sessions, time).await?;
                over.store(true, Ordering::Relaxed);
                add_reads(&mut report, target, reading).await?;
                if target == BUSY {
                    let pairs = grants.len() as f64 / took.as_secs_f64() / 1e3;
                    report.add(PAIRS, "", METAD, K_PER_S, pairs);
                    report.add(GRANT, "", METAD, MILLIS, quantile(&grants, 99));
                }
            }
            // Afterwards: sessions of which nothing is heard end with their pulls' leases.
            let over = Arc::new(AtomicBool::new(false));
            let idle = reading(endpoint.clone(), over, time / 3);
            add_reads(&mut report, IDLE, idle).await?;
        }
        Ok(report)
    })
}

fn start(common: &Common, place: &Place, name: &str) -> anyhow::Result<(Daemon, Endpoint)> {
    let (run, state) = (place.short.join(name), place.work.join(name));
    for dir in [&run, &state] {
        fs::create_dir_all(dir)?;
    }
    let mut metad = Command::new(&common.harbour);
    metad.arg("metad").env_remove("HARBOUR_CONFIG");
    metad.arg("--run-dir").arg(&run);
    metad.arg("--state-dir").arg(&state);
    let socket = run.join("metad.sock");
    let log = place.work.join(format!("{name}.log"));
    let mut metad = Daemon::start(&mut metad, &log)?;
    metad.wait_ready(READY, || socket.exists())?;
    Ok((metad, Endpoint::Unix(socket)))
}

/// Waits for a reader's end, and reports what it found.
async fn add_reads(report: &mut Report, target: &str, reading: Reading) -> anyhow::Result<()> {
    let times = tokio::task::spawn_blocking(|| reading.join()).await?;
    let Ok(times) = times else {
        anyhow::bail!("the reader panicked");
    };
    let times = times?;
    report.add(READ_MEDIAN, "", target, MILLIS, quantile(&times, 50));
    report.add(READ, "", target, MILLIS, quantile(&times, 99));
    Ok(())
}

/// One pull and its session for each client.
async fn open(endpoint: &Endpoint, clients: u32) -> anyhow::Result<Vec<LockSession>> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS.min(clients) {
        connections.push(Client::connect(endpoint, LIMIT).await?);
    }
    let mut sessions = Vec::new();
    for number in 0..clients {
        let client = &connections[(number % CONNECTIONS.min(clients)) as usize];
        let request = v1::BeginRequest {
            what: format!("client {number}"),
            host: "bench".to_owned(),
            pid: number,
            replicas: 0,
        };
        let lease = client.begin(request).await?;
        let pull = v1::PullRef {
            pull: lease.pull,
            token: lease.token,
        };
        sessions.push(client.lock_session(pull).await?);
    }
    Ok(sessions)
}

type Turns = (Vec<LockSession>, Vec<Duration>, Duration);

/// All clients take locks for so long: the time that each grant took.
async fn turns(sessions: Vec<LockSession>, time: Duration) -> anyhow::Result<Turns> {
    let started = Instant::now();
    let clients = sessions.len();
    let mut tasks = tokio::task::JoinSet::new();
    for (number, session) in sessions.into_iter().enumerate() {
        // Spread over the first period, as hosts that do not know each other are.
        let first = tokio::time::Instant::now() + PAUSE * number as u32 / clients as u32;
        tasks.spawn(turns_of(session, number as u64, first, started + time));
    }
    let (mut sessions, mut grants) = (Vec::new(), Vec::new());
    while let Some(done) = tasks.join_next().await {
        let (session, of) = done??;
        sessions.push(session);
        grants.extend(of);
    }
    Ok((sessions, grants, started.elapsed()))
}

async fn turns_of(
    mut session: LockSession,
    number: u64,
    first: tokio::time::Instant,
    end: Instant,
) -> anyhow::Result<(LockSession, Vec<Duration>)> {
    let mut tick = tokio::time::interval_at(first, PAUSE);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut choice = number;
    let mut grants = Vec::new();
    while Instant::now() < end {
        tick.tick().await;
        choice = choice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(number | 1);
        let key = format!("layer:{:064x}", (choice >> 33) % KEYS);
        let began = Instant::now();
        session.acquire(key.clone(), false, true).await?;
        wait(&mut session, LockOutcome::Held).await?;
        grants.push(began.elapsed());
        session.release(key).await?;
        wait(&mut session, LockOutcome::Done).await?;
    }
    // The pull lives on until the next round.
    session.renew().await?;
    wait(&mut session, LockOutcome::Done).await?;
    Ok((session, grants))
}

/// Waits until the only open wish is served.
async fn wait(session: &mut LockSession, wanted: LockOutcome) -> anyhow::Result<()> {
    let served = async {
        loop {
            match session.next().await? {
                Event::Reply(reply) if reply.outcome() == wanted => return Ok(()),
                Event::News(news) if news.fence > 0 => return Ok(()),
                Event::Reply(reply) if reply.outcome() == LockOutcome::Waiting => {}
                Event::Progress(_) => {}
                other => anyhow::bail!("metad says {other:?}"),
            }
        }
    };
    tokio::time::timeout(LIMIT, served)
        .await
        .context("a lock was not served in time")?
}

type Reading = std::thread::JoinHandle<anyhow::Result<Vec<Duration>>>;

/// A reader on a thread of its own: it does not wait for its turn among a thousand clients, which are
/// elsewhere in a cluster.
fn reading(endpoint: Endpoint, over: Arc<AtomicBool>, time: Duration) -> Reading {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(read(&endpoint, over, time))
    })
}

/// Asks for layers until it is over or `time` has passed.
async fn read(
    endpoint: &Endpoint,
    over: Arc<AtomicBool>,
    time: Duration,
) -> anyhow::Result<Vec<Duration>> {
    let client = Client::connect(endpoint, LIMIT).await?;
    let started = Instant::now();
    let mut tick = tokio::time::interval(READ_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut times = Vec::new();
    while !over.load(Ordering::Relaxed) && started.elapsed() < time {
        tick.tick().await;
        let request = v1::LocateRequest {
            packs: (0..16_u8).map(|n| vec![n; 32]).collect(),
        };
        let began = Instant::now();
        client.locate(request).await?;
        times.push(began.elapsed());
    }
    Ok(times)
}

/// So many of a hundred took at most this, in milliseconds.
fn quantile(times: &[Duration], of_100: usize) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    let at = times.len().saturating_sub(1) * of_100 / 100;
    times
        .get(at)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}
