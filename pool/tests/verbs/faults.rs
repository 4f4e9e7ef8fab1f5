//! What only queue pairs have to bear.

use std::{
    fs,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use harbour_pool::{
    HugePages,
    token::Token,
    transport::{Access, Read, RegionId, TransportError, TransportKind, Write},
    verbs::Devices,
};
use nix::sys::signal::Signal;

use crate::{
    donors::{Process, Threaded, devices},
    suite::{self, Subject, read, soon, write},
};

const MIB: usize = 1 << 20;

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

#[test]
fn a_frozen_donor_goes_on_serving() {
    let donor = Process::new();
    let writer = donor.connect(0, Access::ReadWrite).unwrap();
    write(&*writer, 0, 0, &bytes(1, MIB)).unwrap();
    donor.signal(Signal::SIGSTOP);
    let got = read(&*writer, 0, 0, MIB);
    let put = write(&*writer, 0, 0, &bytes(2, MIB));
    let again = read(&*writer, 0, 0, MIB);
    donor.signal(Signal::SIGCONT);
    assert!(got.unwrap() == bytes(1, MIB));
    put.unwrap();
    assert!(again.unwrap() == bytes(2, MIB));
}

#[test]
fn a_process_that_is_killed_or_begins_anew_is_noticed() {
    suite::death(&Process::new(), TransportKind::Verbs);
    suite::epoch_change(&Process::new(), TransportKind::Verbs);
}

/// Nothing of a read may land in the caller's memory after its deadline, nor spoil what follows.
#[test]
fn a_missed_deadline_leaves_nothing_behind() {
    let donor = Process::new();
    let transport = donor.connect(0, Access::ReadWrite).unwrap();
    let (old, new) = (bytes(3, 4 * MIB), bytes(4, 4 * MIB));
    write(&*transport, 0, 0, &old).unwrap();
    let mut missed = 0;
    for round in 0..20_u64 {
        let mut into = vec![0x55; 4 * MIB];
        let deadline = Instant::now() + Duration::from_micros(50 + 150 * round);
        let batch = &mut [Read {
            region: RegionId(0),
            offset: 0,
            into: &mut into,
        }];
        match transport.read(batch, deadline) {
            Err(TransportError::Deadline) => missed += 1,
            other => other.unwrap(),
        }
        // The memory is the caller's again.
        into.fill(0xAA);
        let at = (round as usize * 4099) % (3 * MIB);
        assert!(
            read(&*transport, 0, at as u64, MIB).unwrap() == old[at..at + MIB],
            "round {round}"
        );
        assert!(into.iter().all(|byte| *byte == 0xAA), "round {round}");
    }
    assert!(missed > 0, "no deadline was short enough to be missed");
    // A write that missed it does not go on, and the connection is good for others.
    let deadline = Instant::now() + Duration::from_millis(2);
    let batch = [Write {
        region: RegionId(0),
        offset: 0,
        from: &new,
    }];
    let error = transport.write(&batch, deadline).unwrap_err();
    assert!(matches!(error, TransportError::Deadline), "{error:?}");
    thread::sleep(Duration::from_millis(50));
    let then = read(&*transport, 0, 0, 4 * MIB).unwrap();
    assert!(
        then.iter()
            .zip(old.iter().zip(&new))
            .all(|(got, (old, new))| got == old || got == new)
    );
    thread::sleep(Duration::from_millis(200));
    assert!(
        read(&*transport, 0, 0, 4 * MIB).unwrap() == then,
        "a write goes on after its deadline"
    );
    assert!(
        then[4 * MIB - 4096..] == old[4 * MIB - 4096..],
        "the deadline was not short enough"
    );
}

#[test]
fn the_write_token_is_what_writes() {
    let donor = Threaded::new();
    let mut place = donor.place();
    place.keys[1].write = None;
    let half = place.connect(0, Access::ReadWrite).unwrap();
    write(&half, 0, 0, &[7; 64]).unwrap();
    let error = write(&half, 1, 0, &[7; 64]).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
    assert_eq!(read(&half, 1, 0, 64).unwrap(), [0; 64]);
    // A region whose token is not held is not there.
    place.keys.pop();
    let one = place.connect(0, Access::Read).unwrap();
    assert_eq!(one.regions().len(), 1);
    let error = read(&one, 1, 0, 1).unwrap_err();
    assert!(
        matches!(error, TransportError::OutOfBounds { .. }),
        "{error:?}"
    );
    place.keys[0].read = Some(Token([1; 32]));
    let error = place.connect(0, Access::Read).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
}

#[test]
fn a_reader_without_a_device_for_it_is_told() {
    let donor = Threaded::new();
    let place = donor.place();
    let connect = |device| {
        harbour_pool::verbs::VerbsTransport::connect(
            place.peer,
            Some(device),
            0,
            Access::Read,
            &place.keys,
            soon(),
        )
    };
    let error = connect("rxe9").unwrap_err();
    let TransportError::Unreachable { source, .. } = error else {
        panic!("{error:?}")
    };
    assert!(source.to_string().contains("rxe9"), "{source}");
    // A donor that does not lend over RDMA says so, and there is still TCP.
    let plain = tempfile::tempdir().unwrap();
    let mut config = crate::donors::config(plain.path().join("donor"));
    config.rdma = Devices::Off;
    let server = harbour_pool::donor::DonorServer::start(config).unwrap();
    assert!(server.rdma_addresses().is_empty());
    let device = devices().1;
    let error = harbour_pool::verbs::VerbsTransport::connect(
        server.listening()[0],
        Some(&device),
        0,
        Access::Read,
        &server.keys(),
        soon(),
    )
    .unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error:?}");
}

#[test]
fn threads_share_a_connection() {
    let donor = Threaded::new();
    let transport = donor.connect(0, Access::ReadWrite).unwrap();
    let whole = bytes(5, 4 * MIB);
    write(&*transport, 0, 0, &whole).unwrap();
    thread::scope(|scope| {
        // More threads than queue pairs: the others wait for theirs.
        for thread in 0..12_usize {
            let (transport, whole) = (Arc::clone(&transport), &whole);
            scope.spawn(move || {
                for round in 0..10 {
                    let at = (thread * 331_777 + round * 65_537) % (3 * MIB);
                    let got = read(&*transport, 0, at as u64, 200_000).unwrap();
                    assert!(
                        got == whole[at..at + 200_000],
                        "thread {thread} round {round}"
                    );
                }
            });
        }
    });
}

/// A cable that is pulled: nobody says goodbye.
#[test]
fn a_silent_network_ends_in_time_and_heals() {
    let donor = Process::new();
    let transport = donor.connect(0, Access::ReadWrite).unwrap();
    write(&*transport, 0, 0, &[3; 4096]).unwrap();
    let link = |state| {
        let done = Command::new("ip")
            .args(["link", "set", "veth1", state])
            .status()
            .unwrap();
        assert!(done.success());
    };
    link("down");
    let start = Instant::now();
    let short = transport.read(
        &mut [Read {
            region: RegionId(0),
            offset: 0,
            into: &mut [0; 4096],
        }],
        start + Duration::from_millis(300),
    );
    let took = start.elapsed();
    link("up");
    assert!(
        matches!(
            short,
            Err(TransportError::Deadline | TransportError::Unreachable { .. })
        ),
        "{short:?}"
    );
    assert!(took < Duration::from_millis(600), "{took:?}");
    let address = format!("{}/24", fs::read_to_string("/run/veth1").unwrap().trim());
    let _there = Command::new("ip")
        .args(["address", "replace", &address, "dev", "veth1"])
        .status()
        .unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        match read(&*transport, 0, 0, 4096) {
            Ok(got) => break assert_eq!(got, [3; 4096]),
            Err(error) => assert!(Instant::now() < limit, "{error:?}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn huge_pages_are_lent() {
    let count = "/proc/sys/vm/nr_hugepages";
    fs::write(count, "16").unwrap();
    let donor = Threaded::with(|config| config.huge = HugePages::Require);
    assert!(donor.regions().iter().all(|region| region.huge_pages));
    suite::all_of_a_region(&donor, TransportKind::Verbs);
    drop(donor);
    fs::write(count, "0").unwrap();
}

#[test]
fn a_donor_takes_no_part_in_a_read() {
    const LEN: usize = 64 << 20;
    let donor = Process::lending(&[LEN as u64]);
    let writer = donor.connect(0, Access::ReadWrite).unwrap();
    let whole = bytes(6, MIB);
    for at in (0..LEN).step_by(MIB) {
        write(&*writer, 0, at as u64, &whole).unwrap();
    }
    // The device's own counter of packets.
    let packets = || -> u64 {
        let path = format!(
            "/sys/class/infiniband/{}/ports/1/hw_counters/rcvd_pkts",
            devices().1
        );
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    };
    let (ticks, before) = (donor.ticks(), packets());
    let start = Instant::now();
    for at in (0..LEN).step_by(MIB) {
        assert!(read(&*writer, 0, at as u64, MIB).unwrap() == whole);
    }
    let took = start.elapsed();
    let (after, moved) = (donor.ticks(), packets() - before);
    println!("64 MiB read in {took:?}, {moved} packets, donor's ticks {ticks:?} -> {after:?}");
    assert_eq!(after, ticks, "the donor's process had processor time");
    assert!(moved as usize >= LEN / 4096, "{moved} packets");
}
