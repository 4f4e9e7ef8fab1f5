#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::{local::LocalDonor, transport::Access};

const LEN: usize = 4096;

fn faulty(schedule: Schedule) -> (Faulty, Arc<dyn Transport>) {
    let donor = LocalDonor::new("test", 3, &[LEN]);
    let inner: Arc<dyn Transport> = Arc::new(donor.connect(0, Access::ReadWrite).unwrap());
    (Faulty::new(Arc::clone(&inner), schedule), inner)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn read(transport: &dyn Transport, into: &mut [u8]) -> Result<(), TransportError> {
    transport.read(
        &mut [Read {
            region: RegionId(0),
            offset: 0,
            into,
        }],
        soon(),
    )
}

fn write(transport: &dyn Transport, offset: u64, from: &[u8]) -> Result<(), TransportError> {
    transport.write(
        &[Write {
            region: RegionId(0),
            offset,
            from,
        }],
        soon(),
    )
}

const SOME: Rates = Rates {
    out_of_bounds: 10,
    wrong_epoch: 20,
    unreachable: 30,
    refused: 40,
    deadline: 50,
    partial: 60,
    flip: 70,
    delay: 80,
    delay_max: Duration::from_millis(3),
};

#[test]
fn a_seed_replays() {
    for seed in [0, 1, 42, u64::MAX] {
        let run = || {
            let rates = Rates {
                delay_max: Duration::from_micros(10),
                ..SOME
            };
            let (faulty, _) = faulty(Schedule::seeded(seed, rates));
            let outcomes: Vec<_> = (0..500)
                .map(|_| {
                    let mut into = [0; 64];
                    let result = read(&faulty, &mut into).map_err(|error| error.to_string());
                    (result, into)
                })
                .collect();
            (outcomes, faulty.injected(), faulty.calls())
        };
        let first = run();
        assert_eq!(first, run(), "seed {seed}");
        assert_eq!(first.2, 500);
        assert!(!first.1.is_empty());
    }
    let faults = |seed| {
        (0..100)
            .map(|call| Schedule::seeded(seed, SOME).at(call))
            .collect::<Vec<_>>()
    };
    assert_ne!(faults(1), faults(2));
}

/// A seed that somebody wrote down must go on meaning the same.
#[test]
fn seeds_mean_the_same_for_ever() {
    let schedule = Schedule::seeded(42, SOME);
    let faults: Vec<_> = (0..2000)
        .filter(|call| schedule.at(*call) != Fault::None)
        .take(6)
        .collect();
    assert_eq!(faults, GOLDEN_CALLS);
}

const GOLDEN_CALLS: [u64; 6] = [0, 3, 6, 10, 11, 15];

#[test]
fn rates_are_kept() {
    let schedule = Schedule::seeded(7, SOME);
    let mut counts = [0_u32; 9];
    for call in 0..100_000 {
        let index = match schedule.at(call) {
            Fault::Fail(FaultKind::OutOfBounds) => 0,
            Fault::Fail(FaultKind::WrongEpoch) => 1,
            Fault::Fail(FaultKind::Unreachable) => 2,
            Fault::Fail(FaultKind::Refused) => 3,
            Fault::Fail(FaultKind::Deadline) => 4,
            Fault::Partial { .. } => 5,
            Fault::Flip { .. } => 6,
            Fault::Delay(delay) => {
                assert!(delay <= SOME.delay_max);
                7
            }
            Fault::None => 8,
        };
        counts[index] += 1;
    }
    for (count, rate) in counts
        .into_iter()
        .zip([10, 20, 30, 40, 50, 60, 70, 80, 640])
    {
        assert!(
            count.abs_diff(rate * 100) < 50 + rate * 10,
            "{count} for a rate of {rate}"
        );
    }
    let all = Rates {
        unreachable: 1000,
        ..Rates::default()
    };
    assert!(
        (0..1000)
            .all(|call| Schedule::seeded(1, all).at(call) == Fault::Fail(FaultKind::Unreachable))
    );
    assert!((0..1000).all(|call| Schedule::quiet().at(call) == Fault::None));
}

#[test]
fn errors_of_every_kind() {
    let kinds = [
        FaultKind::OutOfBounds,
        FaultKind::WrongEpoch,
        FaultKind::Unreachable,
        FaultKind::Refused,
        FaultKind::Deadline,
    ];
    let (faulty, _) = faulty(Schedule::quiet().script(kinds.map(Fault::Fail)));
    let mut into = [9; 8];
    let mut fail = || read(&faulty, &mut into).unwrap_err();
    assert!(matches!(
        fail(),
        TransportError::OutOfBounds {
            region: RegionId(0),
            offset: 0,
            len: 8
        }
    ));
    assert!(matches!(fail(), TransportError::WrongEpoch { wanted: 3, actual } if actual != 3));
    assert!(matches!(fail(), TransportError::Unreachable { .. }));
    assert!(matches!(fail(), TransportError::Refused { .. }));
    assert!(matches!(fail(), TransportError::Deadline));
    assert_eq!(into, [9; 8]);
    read(&faulty, &mut into).unwrap();
    assert_eq!(into, [0; 8]);
    assert_eq!(faulty.injected().len(), 5);
}

#[test]
fn one_bit_flips() {
    for bit in [0, 7, 8, 100, 511, 512, u64::MAX] {
        let (faulty, _) = faulty(Schedule::quiet().script([Fault::Flip { bit }; 2]));
        write(&faulty, 0, &[0xA5; 64]).unwrap();
        let (mut a, mut b) = ([0; 24], [0; 40]);
        let mut batch = [
            Read {
                region: RegionId(0),
                offset: 0,
                into: &mut a,
            },
            Read {
                region: RegionId(0),
                offset: 24,
                into: &mut b,
            },
        ];
        faulty.read(&mut batch, soon()).unwrap();
        let got = [&a[..], &b].concat();
        let wrong: u32 = got.iter().map(|byte| (byte ^ 0xA5).count_ones()).sum();
        assert_eq!(wrong, 1);
        assert_eq!(got[(bit % 512 / 8) as usize], 0xA5 ^ (1 << (bit % 8)));
        let mut into = [0; 64];
        read(&faulty, &mut into).unwrap();
        assert_eq!(into, [0xA5; 64], "the memory itself is good");
    }
    // With no bytes there is nothing to flip.
    let (faulty, _) = faulty(Schedule::quiet().script([Fault::Flip { bit: 5 }]));
    read(&faulty, &mut []).unwrap();
}

#[test]
fn partial_reads_leave_garbage() {
    let partial = Fault::Partial {
        kind: FaultKind::Refused,
        share: 0,
    };
    let (faulty, inner) = faulty(Schedule::quiet().script([partial]));
    write(&*inner, 0, &[5; 64]).unwrap();
    let mut into = [[0; 16]; 3];
    let mut batch: Vec<_> = into
        .iter_mut()
        .map(|into| Read {
            region: RegionId(0),
            offset: 0,
            into,
        })
        .collect();
    assert!(matches!(
        faulty.read(&mut batch, soon()),
        Err(TransportError::Refused { .. })
    ));
    assert_eq!(into[0], [5; 16]);
    assert_eq!(into[1], [[0; 8], [0xFF; 8]].concat()[..]);
    assert_eq!(into[2], [0; 16]);
}

#[test]
fn partial_writes_tear() {
    let partial = Fault::Partial {
        kind: FaultKind::Unreachable,
        share: 128,
    };
    let (faulty, inner) = faulty(Schedule::quiet().script([partial]));
    let at = |offset| Write {
        region: RegionId(0),
        offset,
        from: &[7; 8],
    };
    let error = faulty
        .write(&[at(0), at(8), at(16), at(24)], soon())
        .unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }));
    let mut into = [0; 32];
    read(&*inner, &mut into).unwrap();
    assert_eq!(into, [[7; 20].as_slice(), &[0; 12]].concat()[..]);
}

#[test]
fn delays_end_at_the_deadline() {
    let long = Fault::Delay(Duration::from_secs(3600));
    let (faulty, _) =
        faulty(Schedule::quiet().script([long, long, Fault::Delay(Duration::from_millis(20))]));
    let start = Instant::now();
    let deadline = start + Duration::from_millis(30);
    let mut into = [1; 4];
    let mut batch = [Read {
        region: RegionId(0),
        offset: 0,
        into: &mut into,
    }];
    assert!(matches!(
        faulty.read(&mut batch, deadline),
        Err(TransportError::Deadline)
    ));
    let batch = [Write {
        region: RegionId(0),
        offset: 0,
        from: &[1],
    }];
    assert!(matches!(
        faulty.write(&batch, deadline),
        Err(TransportError::Deadline)
    ));
    assert!(start.elapsed() < Duration::from_secs(60));
    let start = Instant::now();
    read(&faulty, &mut into).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn the_dead_stay_dead() {
    let (faulty, _) = faulty(Schedule::quiet().die_at(2));
    let mut into = [0; 4];
    for call in 0..10 {
        assert_eq!(read(&faulty, &mut into).is_ok(), call < 2);
    }
    faulty.read(&mut [], soon()).unwrap();
}

#[test]
fn memory_of_faults_is_bounded() {
    let rates = Rates {
        refused: 1000,
        ..Rates::default()
    };
    let (faulty, _) = faulty(Schedule::seeded(1, rates));
    for _ in 0..5000 {
        write(&faulty, 0, &[1]).unwrap_err();
    }
    let injected = faulty.injected();
    assert_eq!(
        (injected.len(), injected[0].0, faulty.calls()),
        (4096, 904, 5000)
    );
}
