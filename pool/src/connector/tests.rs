#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use parking_lot::Mutex;

use super::*;
use crate::{
    donor::{DonorConfig, DonorServer},
    faulty::{Fault, FaultKind, Faulty, Schedule},
    local::LocalDonor,
    memory::HugePages,
    transport::RegionId,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn endpoint(donor: u64, epoch: u64) -> Endpoint {
    Endpoint {
        donor,
        epoch,
        addresses: vec![format!("test:{donor}")],
        keys: Vec::new(),
    }
}

fn read(connector: &Connector, endpoint: &Endpoint) -> Result<[u8; 4], TransportError> {
    let mut into = [0; 4];
    connector.read(
        endpoint,
        &mut [Read {
            region: RegionId(0),
            offset: 0,
            into: &mut into,
        }],
        soon(),
    )?;
    Ok(into)
}

/// Dials one local donor, counts, takes its time, and wraps each connection in faults.
#[derive(Debug)]
struct TestDialer {
    donor: Arc<LocalDonor>,
    dials: AtomicU32,
    takes: Duration,
    /// Schedules of the first connections; the others have no faults.
    schedules: Mutex<Vec<Schedule>>,
    /// It is time to look for a faster way.
    again: AtomicBool,
}

impl TestDialer {
    fn new(takes: Duration, schedules: Vec<Schedule>) -> Arc<Self> {
        let donor = LocalDonor::new("test", 1, &[4096]);
        Arc::new(Self {
            donor,
            dials: AtomicU32::new(0),
            takes,
            schedules: Mutex::new(schedules),
            again: AtomicBool::new(false),
        })
    }

    fn dials(&self) -> u32 {
        self.dials.load(Ordering::Relaxed)
    }
}

impl Dial for TestDialer {
    fn dial(
        &self,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<Arc<dyn Transport>, TransportError> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        thread::sleep(
            self.takes
                .min(deadline.saturating_duration_since(Instant::now())),
        );
        in_time(deadline)?;
        // Donors from 100 up have no epochs: as many as a test wants.
        let epoch = if endpoint.donor < 100 {
            endpoint.epoch
        } else {
            0
        };
        let inner = Arc::new(self.donor.connect(epoch, Access::ReadWrite)?);
        let mut schedules = self.schedules.lock();
        let schedule = if schedules.is_empty() {
            Schedule::quiet()
        } else {
            schedules.remove(0)
        };
        Ok(Arc::new(Faulty::new(inner, schedule)))
    }

    fn again(&self, _donor: u64) -> bool {
        self.again.swap(false, Ordering::Relaxed)
    }
}

/// Looking for a faster way keeps nobody waiting, and what is no faster is not taken.
#[test]
fn a_faster_way_is_looked_for_beside_the_one_there_is() {
    let dialer = TestDialer::new(Duration::from_millis(300), vec![]);
    let connector = connector(&dialer, |_| {});
    read(&connector, &endpoint(1, 1)).unwrap();
    let first = connector.connection(&endpoint(1, 1), soon()).unwrap();
    dialer.again.store(true, Ordering::Relaxed);
    let start = Instant::now();
    read(&connector, &endpoint(1, 1)).unwrap();
    assert!(start.elapsed() < Duration::from_millis(200));
    let limit = soon();
    while dialer.dials() < 2 {
        assert!(Instant::now() < limit, "nobody looks");
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(400));
    let then = connector.connection(&endpoint(1, 1), soon()).unwrap();
    assert!(Arc::ptr_eq(&first, &then), "it is as slow as the other");
    assert_eq!(dialer.dials(), 2);
    // What is faster takes its place, unless somebody else has.
    let fast = connector.dial.dial(&endpoint(1, 1), soon()).unwrap();
    connector
        .cache
        .replace((1, 1), &first, Arc::clone(&fast), &[]);
    connector.cache.replace((1, 1), &first, first.clone(), &[]);
    let then = connector.connection(&endpoint(1, 1), soon()).unwrap();
    assert!(Arc::ptr_eq(&fast, &then));
}

fn connector(dialer: &Arc<TestDialer>, change: impl FnOnce(&mut ConnectorConfig)) -> Connector {
    let mut config = ConnectorConfig::default();
    change(&mut config);
    Connector::new(Arc::clone(dialer) as Arc<dyn Dial>, config)
}

#[test]
fn one_attempt_serves_all_who_wait() {
    let dialer = TestDialer::new(Duration::from_millis(50), vec![]);
    let connector = connector(&dialer, |_| {});
    let barrier = Barrier::new(16);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                barrier.wait();
                assert_eq!(read(&connector, &endpoint(1, 1)).unwrap(), [0; 4]);
            });
        }
    });
    assert_eq!(dialer.dials(), 1);
    assert_eq!(connector.kind(1), Some(TransportKind::Local));
    assert_eq!(connector.kind(2), None);
}

#[test]
fn bytes_go_in_and_out() {
    let dialer = TestDialer::new(Duration::ZERO, vec![]);
    let connector = connector(&dialer, |_| {});
    let batch = [Write {
        region: RegionId(0),
        offset: 0,
        from: b"word",
    }];
    connector.write(&endpoint(1, 1), &batch, soon()).unwrap();
    assert_eq!(&read(&connector, &endpoint(1, 1)).unwrap(), b"word");
    connector.read(&endpoint(9, 9), &mut [], soon()).unwrap();
    connector.write(&endpoint(9, 9), &[], soon()).unwrap();
    assert_eq!(dialer.dials(), 1, "an empty batch needs no connection");
}

#[test]
fn a_connection_that_died_is_made_again_once() {
    let dialer = TestDialer::new(
        Duration::ZERO,
        vec![Schedule::quiet().die_at(2), Schedule::quiet().die_at(1)],
    );
    let connector = connector(&dialer, |config| {
        config.backoff_min = Duration::from_secs(600)
    });
    for (call, dials) in [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3)] {
        read(&connector, &endpoint(1, 1)).unwrap();
        assert_eq!(dialer.dials(), dials, "call {call}");
    }
    // One that is dead from the start is not tried again: the donor is set aside.
    let dialer = TestDialer::new(Duration::ZERO, vec![Schedule::quiet().die_at(0)]);
    let connector = self::connector(&dialer, |config| {
        config.backoff_min = Duration::from_secs(600);
        config.backoff_max = Duration::from_secs(600);
    });
    for _ in 0..3 {
        let error = read(&connector, &endpoint(1, 1)).unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
    }
    assert_eq!(dialer.dials(), 1);
}

#[test]
fn errors_of_the_caller_keep_the_connection() {
    let dialer = TestDialer::new(Duration::ZERO, vec![]);
    let connector = connector(&dialer, |_| {});
    let mut into = [0; 4];
    let mut batch = [Read {
        region: RegionId(0),
        offset: 5000,
        into: &mut into,
    }];
    for _ in 0..3 {
        let error = connector
            .read(&endpoint(1, 1), &mut batch, soon())
            .unwrap_err();
        assert!(
            matches!(error, TransportError::OutOfBounds { .. }),
            "{error:?}"
        );
        let error = connector
            .read(&endpoint(1, 1), &mut batch, Instant::now())
            .unwrap_err();
        assert!(matches!(error, TransportError::Deadline), "{error:?}");
    }
    assert_eq!(dialer.dials(), 1);
}

#[test]
fn a_donor_that_fails_is_left_alone_for_longer_and_longer() {
    let dialer = TestDialer::new(Duration::ZERO, vec![]);
    let connector = connector(&dialer, |config| {
        config.backoff_min = Duration::from_millis(20);
        config.backoff_max = Duration::from_millis(60);
    });
    dialer.donor.stop();
    let mut gaps = Vec::new();
    let mut last = Instant::now();
    while gaps.len() < 5 {
        let before = dialer.dials();
        let error = read(&connector, &endpoint(1, 1)).unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
        if dialer.dials() > before {
            gaps.push(last.elapsed());
            last = Instant::now();
        }
        thread::sleep(Duration::from_millis(1));
    }
    for (gap, least) in gaps.iter().zip([0, 20, 40, 60, 60]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
    dialer.donor.renew(1, &[4096]);
    let limit = soon();
    while read(&connector, &endpoint(1, 1)).is_err() {
        assert!(Instant::now() < limit);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn refusals_and_old_epochs_are_remembered() {
    let refused = Schedule::quiet().script([Fault::Fail(FaultKind::Refused)]);
    let dialer = TestDialer::new(Duration::ZERO, vec![refused]);
    let connector = connector(&dialer, |_| {});
    for _ in 0..3 {
        assert!(matches!(
            read(&connector, &endpoint(1, 1)),
            Err(TransportError::Refused { .. })
        ));
    }
    assert_eq!(dialer.dials(), 1);
    for _ in 0..3 {
        let error = read(&connector, &endpoint(2, 8)).unwrap_err();
        assert!(
            matches!(
                error,
                TransportError::WrongEpoch {
                    wanted: 8,
                    actual: 1
                }
            ),
            "{error:?}"
        );
    }
    assert_eq!(dialer.dials(), 2);
    // Another epoch of the same donor is another matter.
    read(&connector, &endpoint(2, 1)).unwrap();
    connector.forget(1);
    read(&connector, &endpoint(1, 1)).unwrap();
}

#[test]
fn attempts_have_their_own_limit() {
    let dialer = TestDialer::new(Duration::from_secs(3600), vec![]);
    let connector = connector(&dialer, |config| {
        config.connect_timeout = Duration::from_millis(30)
    });
    let start = Instant::now();
    let error = read(&connector, &endpoint(1, 1)).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(9));
    // And a caller with less time takes nobody else's chance.
    let dialer = TestDialer::new(Duration::from_millis(50), vec![]);
    let connector = self::connector(&dialer, |_| {});
    let hurry = Instant::now() + Duration::from_millis(5);
    let error = connector.connection(&endpoint(1, 1), hurry).unwrap_err();
    assert!(matches!(error, TransportError::Deadline), "{error:?}");
    read(&connector, &endpoint(1, 1)).unwrap();
}

#[test]
fn waiters_keep_their_deadline() {
    let dialer = TestDialer::new(Duration::from_millis(300), vec![]);
    let connector = connector(&dialer, |_| {});
    thread::scope(|scope| {
        scope.spawn(|| read(&connector, &endpoint(1, 1)).unwrap());
        while dialer.dials() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let hurry = Instant::now() + Duration::from_millis(20);
        let error = connector.connection(&endpoint(1, 1), hurry).unwrap_err();
        assert!(matches!(error, TransportError::Deadline), "{error:?}");
    });
    assert_eq!(dialer.dials(), 1);
}

#[test]
fn connections_are_bounded_and_the_unused_go_first() {
    let dialer = TestDialer::new(Duration::ZERO, vec![]);
    let connector = connector(&dialer, |config| config.max_connections = 3);
    for donor in [100, 101, 102, 100, 103, 100] {
        read(&connector, &endpoint(donor, 1)).unwrap();
    }
    let held = |donor| connector.kind(donor).is_some();
    assert_eq!(
        [held(100), held(101), held(102), held(103)],
        [true, false, true, true]
    );
    assert_eq!(dialer.dials(), 4);
    thread::scope(|scope| {
        for donor in 200..220 {
            let connector = &connector;
            scope.spawn(move || read(connector, &endpoint(donor, 1)).unwrap());
        }
    });
    assert_eq!((100..300).filter(|donor| held(*donor)).count(), 3);
}

#[test]
fn addresses() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = DonorConfig::new("test", dir.path().join("donor"), 2 << 20);
    config.huge = HugePages::Never;
    let server = DonorServer::start(config.clone()).unwrap();
    let connector = Connector::by_address(Access::ReadWrite, Token::NONE, Preference::Auto);
    let at = |addresses: &[&str]| Endpoint {
        donor: 1,
        epoch: server.epoch(),
        addresses: addresses
            .iter()
            .map(|address| (*address).to_owned())
            .collect(),
        keys: Vec::new(),
    };
    for unknown in [
        &[][..],
        &["tcp:127.0.0.1:1"],
        &["shm"],
        &["shmm:/x"],
        &["/run/x"],
    ] {
        let error = read(
            &connector,
            &Endpoint {
                donor: 2,
                ..at(unknown)
            },
        )
        .unwrap_err();
        assert!(
            matches!(error, TransportError::Unreachable { .. }),
            "{error:?}"
        );
        connector.forget(2);
    }
    let both = at(&["verbs:there", &server.address()]);
    assert_eq!(read(&connector, &both).unwrap(), [0; 4]);
    assert_eq!(connector.kind(1), Some(TransportKind::Shm));
    // The donor starts anew: the old epoch says so, the new one works at once.
    server.stop();
    let server = DonorServer::start(config).unwrap();
    let limit = soon();
    loop {
        assert!(Instant::now() < limit);
        match read(&connector, &both) {
            Err(TransportError::WrongEpoch { actual, .. }) => {
                break assert_eq!(actual, server.epoch());
            }
            // Until the end of the old connection has come through.
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error:?}"),
        }
    }
    let fresh = Endpoint {
        epoch: server.epoch(),
        ..both
    };
    assert_eq!(read(&connector, &fresh).unwrap(), [0; 4]);
}

#[test]
fn a_way_that_is_closed_leads_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = DonorConfig::new("test", dir.path().join("donor"), 2 << 20);
    config.huge = HugePages::Never;
    config.listen = vec!["127.0.0.1:0".parse().unwrap()];
    let server = DonorServer::start(config).unwrap();
    let tcp = crate::tcp::address_of(server.listening()[0], false);
    let here = crate::host::address_of(&crate::host::id().unwrap());
    let there = crate::host::address_of("another host");
    let nowhere = format!("shm:{}", dir.path().join("nowhere").display());
    let kind = |preference, addresses: &[&str]| {
        let connector = Connector::by_address(Access::Read, Token::NONE, preference);
        let endpoint = Endpoint {
            donor: 1,
            epoch: server.epoch(),
            addresses: addresses.iter().map(|at| (*at).to_owned()).collect(),
            keys: server.keys(),
        };
        read(&connector, &endpoint)?;
        Ok::<_, TransportError>(connector.kind(1).unwrap())
    };
    let (shm, auto) = (server.address(), Preference::Auto);
    let only = Preference::Only;
    for (preference, addresses, expected) in [
        (auto, [tcp.as_str(), &shm, &here], TransportKind::Shm),
        (auto, [&shm, &tcp, &there], TransportKind::Tcp),
        (auto, [&nowhere, &tcp, &here], TransportKind::Tcp),
        (
            only(TransportKind::Tcp),
            [&shm, &tcp, &here],
            TransportKind::Tcp,
        ),
    ] {
        assert_eq!(
            kind(preference, &addresses).unwrap(),
            expected,
            "{addresses:?}"
        );
    }
    let error = kind(only(TransportKind::Verbs), &[&shm, &tcp]).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
}

#[test]
fn a_region_that_is_new_to_the_connection_takes_a_new_one() {
    let dialer = TestDialer::new(Duration::ZERO, vec![]);
    let connector = connector(&dialer, |_| {});
    let knowing = |regions: &[u32]| Endpoint {
        keys: regions
            .iter()
            .map(|region| RegionKey {
                region: RegionId(*region),
                read: Some(Token([1; 32])),
                write: None,
            })
            .collect(),
        ..endpoint(5, 1)
    };
    for (regions, dials) in [(&[0][..], 1), (&[0], 1), (&[0, 1], 2), (&[1], 2), (&[], 2)] {
        read(&connector, &knowing(regions)).unwrap();
        assert_eq!(dialer.dials(), dials, "{regions:?}");
    }
}
