//! What every transport keeps. One function per promise, over a donor of whatever kind.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use harbour_pool::transport::{
    Access, Read, RegionId, RegionInfo, Transport, TransportError, TransportKind, Write,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

mod standing;

pub use standing::*;

/// Lengths of the regions that a subject lends at first, in bytes.
pub const REGIONS: [u64; 2] = [4 << 20, 2 << 20];

/// A donor under test.
pub trait Subject: Send + Sync {
    /// Connects, as the transport's users do.
    fn connect(&self, epoch: u64, access: Access) -> Result<Arc<dyn Transport>, TransportError>;
    /// What the donor says that it lends: [`REGIONS`].
    fn regions(&self) -> Vec<RegionInfo>;
    /// Makes the donor take its memory back and lend as much again; gives the new epoch.
    fn renew(&self) -> u64;
    /// Ends the donor without ceremony.
    fn kill(&self);
}

/// One `#[test]` for every promise, over the subject that `$make` gives.
#[macro_export]
macro_rules! contract {
    ($name:ident, $kind:expr, $make:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            $crate::contract!(@cases $kind, $make;
                describes_itself, empty_batch, zero_lengths, bounds, overflow, moves_nothing_when_one_is_outside,
                all_of_a_region, overlapping_reads, writes_in_order, many_operations, seen_by_others,
                matches_a_model, readers_and_writers, deadline_in_the_past, read_only, wrong_epoch, any_epoch,
                epoch_change, death, outlives_its_siblings);
        }
    };
    (@cases $kind:expr, $make:expr; $($case:ident),*) => {
        $(
            #[test]
            fn $case() {
                let subject = $make;
                $crate::suite::$case(&subject, $kind);
            }
        )*
    };
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

pub fn read(
    transport: &dyn Transport,
    region: u32,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, TransportError> {
    let mut into = vec![0xEE; len];
    transport.read(
        &mut [Read {
            region: RegionId(region),
            offset,
            into: &mut into,
        }],
        soon(),
    )?;
    Ok(into)
}

pub fn write(
    transport: &dyn Transport,
    region: u32,
    offset: u64,
    from: &[u8],
) -> Result<(), TransportError> {
    transport.write(
        &[Write {
            region: RegionId(region),
            offset,
            from,
        }],
        soon(),
    )
}

fn writer(subject: &dyn Subject) -> Arc<dyn Transport> {
    subject.connect(0, Access::ReadWrite).unwrap()
}

fn reader(subject: &dyn Subject) -> Arc<dyn Transport> {
    subject.connect(0, Access::Read).unwrap()
}

/// Bytes that differ from place to place and seed to seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

pub fn describes_itself(subject: &dyn Subject, kind: TransportKind) {
    let lens: Vec<_> = subject
        .regions()
        .iter()
        .map(|region| (region.id.0, region.len))
        .collect();
    assert_eq!(lens, [(0, REGIONS[0]), (1, REGIONS[1])]);
    let transport = reader(subject);
    assert_eq!(transport.kind(), kind);
    assert_ne!(transport.epoch(), 0);
    assert_eq!(transport.epoch(), reader(subject).epoch());
}

pub fn empty_batch(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let past = Instant::now() - Duration::from_secs(1);
    for deadline in [soon(), past] {
        transport.read(&mut [], deadline).unwrap();
        transport.write(&[], deadline).unwrap();
    }
    subject.kill();
    transport.read(&mut [], past).unwrap();
    transport.write(&[], past).unwrap();
}

pub fn zero_lengths(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    for (region, offset, inside) in [
        (0, 0, true),
        (0, REGIONS[0], true),
        (1, REGIONS[1], true),
        (0, REGIONS[0] + 1, false),
        (0, u64::MAX, false),
        (2, 0, false),
        (u32::MAX, 0, false),
    ] {
        let got = read(&*transport, region, offset, 0);
        assert_eq!(got.is_ok(), inside, "read of {region} at {offset}: {got:?}");
        let put = write(&*transport, region, offset, &[]);
        assert_eq!(
            put.is_ok(),
            inside,
            "write of {region} at {offset}: {put:?}"
        );
    }
}

pub fn bounds(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let end = REGIONS[1];
    for (region, offset, len) in [
        (1, end, 1),
        (1, end - 1, 2),
        (1, 0, end as usize + 1),
        (1, end + 1, 1),
        (0, REGIONS[0] - 1, 2),
        (2, 0, 1),
        (7, 0, 1),
        (u32::MAX, 0, 1),
    ] {
        let bytes = vec![1; len];
        for error in [
            read(&*transport, region, offset, len).unwrap_err(),
            write(&*transport, region, offset, &bytes).unwrap_err(),
        ] {
            let TransportError::OutOfBounds {
                region: r,
                offset: o,
                len: l,
            } = error
            else {
                panic!("region {region} {offset}..+{len}: {error:?}")
            };
            assert_eq!((r, o, l), (RegionId(region), offset, len as u64));
        }
    }
    // And the bytes just inside.
    write(&*transport, 1, end - 1, &[7]).unwrap();
    assert_eq!(read(&*transport, 1, end - 1, 1).unwrap(), [7]);
}

pub fn overflow(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    for offset in [
        u64::MAX,
        u64::MAX - 1,
        u64::MAX - 15,
        1 << 63,
        (1 << 63) - 1,
        u64::from(u32::MAX) << 32,
    ] {
        let error = read(&*transport, 0, offset, 16).unwrap_err();
        assert!(
            matches!(error, TransportError::OutOfBounds { .. }),
            "{offset}: {error:?}"
        );
        let error = write(&*transport, 0, offset, &[1; 16]).unwrap_err();
        assert!(
            matches!(error, TransportError::OutOfBounds { .. }),
            "{offset}: {error:?}"
        );
    }
}

pub fn moves_nothing_when_one_is_outside(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let bytes = pattern(1, 4096);
    let good = Write {
        region: RegionId(0),
        offset: 0,
        from: &bytes,
    };
    let bad = Write {
        region: RegionId(1),
        offset: REGIONS[1] - 1,
        from: &bytes,
    };
    let worse = Write {
        region: RegionId(9),
        offset: 5,
        from: &bytes,
    };
    let error = transport.write(&[good, bad, worse], soon()).unwrap_err();
    assert!(
        matches!(error, TransportError::OutOfBounds { region: RegionId(1), offset, len: 4096 } if offset == bad.offset)
    );
    assert_eq!(read(&*transport, 0, 0, 4096).unwrap(), vec![0; 4096]);
    let (mut first, mut second) = ([0x55; 16], [0x55; 16]);
    let mut batch = [
        Read {
            region: RegionId(0),
            offset: 0,
            into: &mut first,
        },
        Read {
            region: RegionId(0),
            offset: REGIONS[0] - 15,
            into: &mut second,
        },
    ];
    transport.read(&mut batch, soon()).unwrap_err();
    assert_eq!((first, second), ([0x55; 16], [0x55; 16]));
}

pub fn all_of_a_region(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    for (region, len) in [(0, REGIONS[0] as usize), (1, REGIONS[1] as usize)] {
        assert!(
            read(&*transport, region, 0, len).unwrap() == vec![0; len],
            "new memory is zero"
        );
        let bytes = pattern(u64::from(region) + 9, len);
        write(&*transport, region, 0, &bytes).unwrap();
        assert!(read(&*transport, region, 0, len).unwrap() == bytes);
    }
}

pub fn overlapping_reads(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let bytes = pattern(3, 8192);
    write(&*transport, 0, 100, &bytes).unwrap();
    let mut into = [[0; 4096]; 3];
    let [a, b, c] = &mut into;
    let mut batch = [
        Read {
            region: RegionId(0),
            offset: 100,
            into: a,
        },
        Read {
            region: RegionId(0),
            offset: 1100,
            into: b,
        },
        Read {
            region: RegionId(0),
            offset: 100,
            into: c,
        },
    ];
    transport.read(&mut batch, soon()).unwrap();
    assert_eq!(into[0], bytes[..4096]);
    assert_eq!(into[1], bytes[1000..5096]);
    assert_eq!(into[2], bytes[..4096]);
}

pub fn writes_in_order(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let (ones, twos, threes) = ([1; 100], [2; 50], [3; 10]);
    let at = |offset, from| Write {
        region: RegionId(1),
        offset,
        from,
    };
    transport
        .write(&[at(0, &ones), at(25, &twos), at(70, &threes)], soon())
        .unwrap();
    let mut expected = ones.to_vec();
    expected[25..75].copy_from_slice(&twos);
    expected[70..80].copy_from_slice(&threes);
    assert_eq!(read(&*transport, 1, 0, 100).unwrap(), expected);
}

pub fn many_operations(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let bytes = pattern(4, 1 << 20);
    let chunk = |index: usize| Write {
        region: RegionId((index % 2) as u32),
        offset: (index as u64 / 2) * 97,
        from: &bytes[index * 97..(index + 1) * 97],
    };
    let batch: Vec<_> = (0..10_000).map(chunk).collect();
    transport.write(&batch, soon()).unwrap();
    let mut into = vec![[0; 97]; batch.len()];
    let reads = into.iter_mut().zip(&batch);
    let mut reads: Vec<_> = reads
        .map(|(into, write)| Read {
            region: write.region,
            offset: write.offset,
            into,
        })
        .collect();
    transport.read(&mut reads, soon()).unwrap();
    for (index, (got, write)) in into.iter().zip(&batch).enumerate() {
        assert_eq!(got, write.from, "operation {index}");
    }
}

pub fn seen_by_others(subject: &dyn Subject, _: TransportKind) {
    let (writer, reader, other) = (writer(subject), reader(subject), self::writer(subject));
    for round in 0..50 {
        let bytes = pattern(round, 5000);
        write(&*writer, 0, round * 333, &bytes).unwrap();
        assert_eq!(
            read(&*reader, 0, round * 333, 5000).unwrap(),
            bytes,
            "round {round}"
        );
        write(&*other, 0, round * 333 + 10, &bytes[..20]).unwrap();
        assert_eq!(
            read(&*reader, 0, round * 333 + 10, 20).unwrap(),
            bytes[..20],
            "round {round}"
        );
    }
}

pub fn matches_a_model(subject: &dyn Subject, _: TransportKind) {
    let (writer, reader) = (writer(subject), reader(subject));
    let op = (0..3_u32, 0..REGIONS[0] + 64, 0..70_000_usize, any::<u64>());
    let ops = prop::collection::vec((op, any::<bool>()), 1..24);
    let mut model = REGIONS.map(|len| vec![0_u8; len as usize]);
    let config = Config {
        cases: 32,
        failure_persistence: None,
        ..Config::default()
    };
    let run = |ops: Vec<((u32, u64, usize, u64), bool)>| {
        for ((region, offset, len, seed), is_write) in ops {
            let range = usize::try_from(offset).unwrap();
            let range = range..range + len;
            let held = model
                .get_mut(region as usize)
                .and_then(|bytes| bytes.get_mut(range));
            if is_write {
                let bytes = pattern(seed, len);
                let put = write(&*writer, region, offset, &bytes);
                prop_assert_eq!(put.is_ok(), held.is_some());
                if let Some(held) = held {
                    held.copy_from_slice(&bytes);
                }
            } else {
                let got = read(&*reader, region, offset, len).ok();
                prop_assert!(
                    got.as_deref() == held.as_deref(),
                    "region {region} {offset}..+{len}"
                );
            }
        }
        Ok(())
    };
    // The memory keeps what earlier cases wrote, and so does the model: no shrinking across them.
    let run = std::cell::RefCell::new(run);
    TestRunner::new(config)
        .run(&ops, |ops| (run.borrow_mut())(ops))
        .unwrap();
}

pub fn readers_and_writers(subject: &dyn Subject, _: TransportKind) {
    const LEN: usize = 64 << 10;
    let shared = reader(subject);
    thread::scope(|scope| {
        for side in 0..2_u8 {
            let transport = writer(subject);
            scope.spawn(move || {
                for round in 0..100_u8 {
                    // Region 1 is fought over, region 0 is divided.
                    write(&*transport, 1, 0, &vec![side * 100 + round % 100 + 1; LEN]).unwrap();
                    let own = pattern(u64::from(round), 4096);
                    let at = u64::from(side) * (1 << 20);
                    write(&*transport, 0, at, &own).unwrap();
                    assert_eq!(read(&*transport, 0, at, 4096).unwrap(), own);
                }
            });
        }
        for _ in 0..2 {
            let shared = Arc::clone(&shared);
            scope.spawn(move || {
                for _ in 0..200 {
                    let bytes = read(&*shared, 1, 0, LEN).unwrap();
                    assert!(
                        bytes.iter().all(|byte| *byte <= 200),
                        "a byte that nobody wrote"
                    );
                }
            });
        }
    });
    let last = read(&*shared, 1, 0, LEN).unwrap();
    assert!(
        last.iter().all(|byte| *byte == 100 || *byte == 200),
        "the last writes are whole"
    );
}

pub fn deadline_in_the_past(subject: &dyn Subject, _: TransportKind) {
    let transport = writer(subject);
    let past = Instant::now() - Duration::from_millis(1);
    let mut into = [0x55; 8];
    let mut batch = [Read {
        region: RegionId(0),
        offset: 0,
        into: &mut into,
    }];
    assert!(matches!(
        transport.read(&mut batch, past),
        Err(TransportError::Deadline)
    ));
    assert_eq!(into, [0x55; 8]);
    let batch = [Write {
        region: RegionId(0),
        offset: 0,
        from: &[1; 8],
    }];
    assert!(matches!(
        transport.write(&batch, past),
        Err(TransportError::Deadline)
    ));
    assert_eq!(read(&*transport, 0, 0, 8).unwrap(), [0; 8]);
}
