//! Copies between two real donors, over shared memory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
};

use super::*;

const LEND: u64 = 8 << 20;

struct Pool {
    donors: Vec<DonorServer>,
    link: Link,
    _dir: tempfile::TempDir,
}

impl Pool {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let start = |name: &str| {
            let socket = dir.path().join(name);
            DonorServer::start(DonorConfig {
                huge: HugePages::Never,
                ..DonorConfig::new(name, socket, LEND)
            })
            .unwrap()
        };
        let donors = vec![start("a"), start("b"), start("c")];
        let link = Link::new(Access::ReadWrite, &Ways::default());
        link.learn(&messages(&donors));
        Self {
            donors,
            link,
            _dir: dir,
        }
    }

    fn extent(&self, donor: usize, offset: u64, len: u32) -> v1::Extent {
        v1::Extent {
            donor: donor as u64 + 1,
            epoch: self.donors[donor].epoch(),
            region: 0,
            offset,
            len,
        }
    }

    fn put(&self, extent: &v1::Extent, bytes: &[u8]) {
        self.link.write(extent, 0, bytes, soon()).unwrap();
    }

    fn get(&self, extent: &v1::Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.len as usize];
        let read = Read {
            region: RegionId(extent.region),
            offset: extent.offset,
            into: &mut bytes,
        };
        self.link
            .read(extent.donor, extent.epoch, &mut [read], soon())
            .unwrap();
        bytes
    }

    /// A task to copy a pack from some extents to the third donor.
    fn job(&self, pack: [u8; 32], len: u32, from: Vec<v1::Extent>) -> Job {
        let task = v1::CopyTask {
            task: 1,
            pack: pack.to_vec(),
            len,
            from,
            to: Some(self.extent(2, 4096, len)),
            ..Default::default()
        };
        Job {
            task,
            deadline: soon(),
        }
    }
}

fn messages(donors: &[DonorServer]) -> Vec<v1::Donor> {
    let numbered = (1..).zip(donors);
    numbered
        .map(|(id, donor)| v1::Donor {
            id,
            epoch: donor.epoch(),
            addresses: vec![donor.address()],
            ..Default::default()
        })
        .collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

type Objects = Vec<(ObjectId, u32, u32)>;

/// Three objects end to end, and the name of their pack.
fn pack() -> (Vec<u8>, Objects, [u8; 32]) {
    let parts = [vec![1; 100_000], vec![2; 7], vec![3; 40_000]];
    let mut objects = Vec::new();
    let mut bytes = Vec::new();
    for part in parts {
        objects.push((hash_object(&part).id, bytes.len() as u32, part.len() as u32));
        bytes.extend(part);
    }
    let name = pack_id(&objects).0;
    (bytes, objects, name)
}

#[test]
fn a_pack_is_copied_from_the_first_source_that_has_it() {
    let pool = Pool::new();
    let (bytes, objects, name) = pack();
    let len = bytes.len() as u32;
    let (wrong, good) = (pool.extent(0, 0, len), pool.extent(1, 8192, len));
    pool.put(&good, &bytes);
    let gone = v1::Extent { epoch: 1, ..good };
    let outside = v1::Extent {
        offset: LEND - 4096,
        ..good
    };
    let job = pool.job(name, len, vec![wrong, gone, outside, good]);
    let mut bad = Vec::new();
    transfer(&pool.link, &job, &objects, &mut bad).unwrap();
    assert_eq!(bad, [wrong], "only who gave other bytes is wrong");
    assert!(pool.get(&job.task.to.unwrap()) == bytes);
}

#[test]
fn one_flipped_bit_is_found_and_nothing_is_written() {
    let pool = Pool::new();
    let (mut bytes, objects, name) = pack();
    for at in [0, 99_999, 100_003, bytes.len() - 1] {
        bytes[at] ^= 0x10;
        let from = pool.extent(0, 0, bytes.len() as u32);
        pool.put(&from, &bytes);
        bytes[at] ^= 0x10;
        let job = pool.job(name, bytes.len() as u32, vec![from]);
        let mut bad = Vec::new();
        let error = transfer(&pool.link, &job, &objects, &mut bad).unwrap_err();
        assert!(matches!(error, CopyError::Sources(_)), "{error}");
        assert_eq!(bad, [from]);
        let to = pool.get(&job.task.to.unwrap());
        assert!(to.iter().all(|byte| *byte == 0), "bit {at}");
    }
}

#[test]
fn a_part_of_an_index_is_known_by_its_bytes() {
    let pool = Pool::new();
    let bytes = vec![9; 70_000];
    let from = pool.extent(0, 0, 70_000);
    pool.put(&from, &bytes);
    let name = *blake3::hash(&bytes).as_bytes();
    let job = pool.job(name, 70_000, vec![from]);
    transfer(&pool.link, &job, &[], &mut Vec::new()).unwrap();
    assert!(pool.get(&job.task.to.unwrap()) == bytes);
    let other = pool.job([7; 32], 70_000, vec![from]);
    assert!(transfer(&pool.link, &other, &[], &mut Vec::new()).is_err());
}

#[test]
fn tasks_that_make_no_sense_or_come_too_late_do_nothing() {
    let pool = Pool::new();
    let (bytes, objects, name) = pack();
    let len = bytes.len() as u32;
    let from = pool.extent(0, 0, len);
    pool.put(&from, &bytes);
    let good = || pool.job(name, len, vec![from]);
    let mut long = good();
    long.task.len = PACK_MAX as u32 + 1;
    let mut nowhere = good();
    nowhere.task.to = None;
    let mut shorter = good();
    shorter.task.to = Some(pool.extent(2, 0, len - 1));
    let mut nameless = good();
    nameless.task.pack.pop();
    let mut other_name = good();
    other_name.task.pack[0] ^= 1;
    for (job, what) in [
        (long, "too long"),
        (nowhere, "nowhere to"),
        (shorter, "another length"),
        (nameless, "a short name"),
        (other_name, "objects of another pack"),
    ] {
        let error = transfer(&pool.link, &job, &objects, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, CopyError::Task(_)), "{what}: {error}");
    }
    let mut late = good();
    late.deadline = Instant::now();
    assert!(transfer(&pool.link, &late, &objects, &mut Vec::new()).is_err());
    let untouched = pool.get(&pool.extent(2, 0, LEND as u32));
    assert!(untouched.iter().all(|byte| *byte == 0));
}

#[test]
fn objects_must_cover_a_pack_and_not_overlap() {
    let (bytes, objects, name) = pack();
    let name = PackId(name);
    assert!(whole(&name, &objects, &bytes));
    assert!(!whole(&name, &objects[..2], &bytes), "the end is nobody's");
    assert!(!whole(&name, &objects[1..], &bytes), "nor the beginning");
    assert!(!whole(&name, &objects, &bytes[..bytes.len() - 1]));
    let mut far = objects.clone();
    far[1].1 = u32::MAX;
    assert!(!whole(&name, &far, &bytes));
    let mut empty = objects;
    empty[1].2 = 0;
    assert!(!whole(&name, &empty, &bytes));
}
