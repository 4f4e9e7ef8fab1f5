#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, sync::atomic::AtomicBool};

use tempfile::TempDir;

use super::*;
use crate::{
    HugePages,
    donor::DonorConfig,
    shm::{ShmTransport, frames::Token},
    transport::{Access, Transport, TransportError, Write},
};

const MIB: u64 = 1 << 20;

fn config(dir: &TempDir) -> DonorConfig {
    DonorConfig {
        huge: HugePages::Never,
        ..DonorConfig::new("test", dir.path().join("donor"), 4 * MIB)
    }
}

fn start(config: &DonorConfig) -> Result<DonorServer, DonorError> {
    DonorServer::start(config.clone())
}

fn connect(server: &DonorServer) -> Result<ShmTransport, TransportError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let socket = &server.config().socket;
    ShmTransport::connect(socket, 0, Access::ReadWrite, Token::NONE, deadline)
}

/// What a reader of region `id` gets, once it was told of the last change.
fn reads(reader: &ShmTransport, id: u32) -> Result<u8, TransportError> {
    let mut into = [0xEE];
    let mut batch = [crate::transport::Read {
        region: RegionId(id),
        offset: 4096,
        into: &mut into,
    }];
    reader.read(&mut batch, Instant::now() + Duration::from_secs(10))?;
    Ok(into[0])
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !so() {
        assert!(Instant::now() < limit, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn fill(writer: &ShmTransport, id: u32, with: u8) {
    let batch = [Write {
        region: RegionId(id),
        offset: 0,
        from: &[with; 8192],
    }];
    let deadline = Instant::now() + Duration::from_secs(10);
    writer.write(&batch, deadline).unwrap();
}

#[test]
fn regions_go_and_come_under_one_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        regions: vec![2 * MIB; 3],
        ..config(&dir)
    })
    .unwrap();
    let (reader, epoch) = (connect(&server).unwrap(), server.epoch());
    let kept = server.shared.lent.read().clone().unwrap();
    for id in 0..3 {
        fill(&reader, id, 7 + id as u8);
    }
    let gone = server.retire(&[RegionId(1), RegionId(9)]);
    assert_eq!(gone.iter().map(|info| info.id.0).collect::<Vec<_>>(), [1]);
    let file = fs::File::from(kept.regions[1].memory.read_only().unwrap());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert_eq!(blocks, 0, "though a reader maps it and this test holds it");
    until("the reader is told", || reader.regions().len() == 2);
    assert!(matches!(
        reads(&reader, 1),
        Err(TransportError::OutOfBounds { .. })
    ));
    assert_eq!(
        (reads(&reader, 0).unwrap(), reads(&reader, 2).unwrap()),
        (7, 9)
    );
    assert_eq!(server.retire(&[RegionId(1)]), [], "it is gone already");

    let more = server.extend(4 * MIB).unwrap();
    assert_eq!(
        (more.id, more.len),
        (RegionId(3), 4 * MIB),
        "no id comes twice"
    );
    until("the reader is told", || reader.regions().len() == 3);
    assert_eq!(reader.regions(), server.regions());
    fill(&reader, 3, 1);
    assert_eq!(reads(&connect(&server).unwrap(), 3).unwrap(), 1);
    assert_eq!((server.epoch(), reader.epoch()), (epoch, epoch));
    assert_eq!(server.stats().accepted, 2, "no reader had to connect again");
}

#[test]
fn a_donor_that_gave_all_back_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&config(&dir)).unwrap();
    let reader = connect(&server).unwrap();
    assert_eq!(server.retire(&[RegionId(0)]).len(), 1);
    until("the reader is told", || reader.regions().is_empty());
    let error = connect(&server).unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error:?}"
    );
    server.extend(2 * MIB).unwrap();
    until("the reader is told", || reader.regions().len() == 1);
    fill(&reader, 1, 5);
    assert_eq!(reads(&connect(&server).unwrap(), 1).unwrap(), 5);
}

#[test]
fn growing_has_its_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        regions: vec![2 * MIB; MAX_REGIONS - 1],
        ..config(&dir)
    })
    .unwrap();
    let reader = connect(&server).unwrap();
    for wrong in [0, MIB, 1 << 47] {
        let error = server.extend(wrong).unwrap_err();
        assert!(matches!(error, DonorError::Config { .. }), "{error:?}");
    }
    server.extend(2 * MIB).unwrap();
    let error = server.extend(2 * MIB).unwrap_err();
    assert!(error.to_string().contains("64 regions are lent"), "{error}");
    until("the reader is told", || {
        reader.regions().len() == MAX_REGIONS
    });
    server.retire(&[RegionId(5), RegionId(60)]);
    assert_eq!(server.extend(2 * MIB).unwrap().id, RegionId(64));
    until("the reader is told", || {
        reader.regions() == server.regions()
    });
}

/// One thread reads and writes all the time, others connect, while regions go and come: reads give
/// what was written, zeros, or OutOfBounds.
#[test]
fn readers_go_on_while_regions_go_and_come() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        regions: vec![2 * MIB; 4],
        ..config(&dir)
    })
    .unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let reader = connect(&server).unwrap();
                    let mut good = 0_u64;
                    while !over.load(Ordering::Relaxed) {
                        for info in reader.regions() {
                            match reads(&reader, info.id.0) {
                                Ok(byte) => {
                                    assert!(byte == 0 || byte == info.id.0 as u8, "{byte}");
                                    good += 1;
                                }
                                Err(TransportError::OutOfBounds { .. }) => {}
                                Err(other) => panic!("{other:?}"),
                            }
                        }
                    }
                    good
                })
            })
            .collect();
        let writer = connect(&server).unwrap();
        for _ in 0..60 {
            let added = server.extend(2 * MIB).unwrap();
            until("the writer is told", || reads(&writer, added.id.0).is_ok());
            fill(&writer, added.id.0, added.id.0 as u8);
            let oldest = server.regions()[0].id;
            assert_eq!(server.retire(&[oldest]).len(), 1);
        }
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
    assert_eq!(server.stats().turned_away, 0);
}

#[test]
fn locked_memory_is_taken_at_once_and_given_back_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        lock: true,
        ..config(&dir)
    })
    .unwrap();
    let lent = server.shared.lent.read().clone().unwrap();
    let file = fs::File::from(lent.regions[0].memory.read_only().unwrap());
    let held = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    // 4 MiB are within what every process may lock here: the usual limit is 8 MiB.
    assert!(lent.regions[0].locked.lock().is_some());
    assert_eq!(held(), 4 * MIB);
    server.retire(&[RegionId(0)]);
    assert_eq!(held(), 0);
}

/// Everything goes back while a reader maps and reads it. How long that takes is printed, and bound
/// only loosely here: the kernel's page size decides (`HARBOUR_GIVE_BACK_MIB` for more than 256).
#[test]
fn everything_goes_back_while_a_reader_reads() {
    let asked = std::env::var("HARBOUR_GIVE_BACK_MIB").ok();
    let mib: u64 = asked.map_or(256, |mib| mib.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        regions: crate::donor::region_lens(mib * MIB),
        ..config(&dir)
    })
    .unwrap();
    let (reader, soon) = (connect(&server).unwrap(), Duration::from_secs(60));
    let step = vec![7; 2 << 20];
    for info in reader.regions() {
        let mut into = step.clone();
        for offset in (0..info.len).step_by(step.len()) {
            let (region, deadline) = (info.id, Instant::now() + soon);
            let write = Write {
                region,
                offset,
                from: &step,
            };
            reader.write(&[write], deadline).unwrap();
            let into = &mut into;
            let read = crate::transport::Read {
                region,
                offset,
                into,
            };
            reader.read(&mut [read], deadline).unwrap();
        }
    }
    assert_eq!(
        server.held().iter().map(|(_, held)| held).sum::<u64>(),
        mib * MIB
    );
    let all: Vec<_> = server.regions().iter().map(|info| info.id).collect();
    let (began, over) = (Instant::now(), AtomicBool::new(false));
    let took = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for id in &all {
                    match reads(&reader, id.0) {
                        Ok(byte) => assert!(byte == 0 || byte == 7, "{byte}"),
                        Err(error) => assert!(matches!(error, TransportError::OutOfBounds { .. })),
                    }
                }
            }
        });
        server.retire(&all);
        let took = began.elapsed();
        over.store(true, Ordering::Relaxed);
        took
    });
    eprintln!("gave {mib} MiB back in {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}
