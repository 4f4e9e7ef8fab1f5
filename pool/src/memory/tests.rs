#![allow(clippy::unwrap_used, clippy::expect_used)]

use nix::sys::uio::{pread, pwrite};

use super::*;
use crate::sys::Mapping;

const MIB: u64 = 1 << 20;

fn ordinary(len: u64) -> Memory {
    Memory::new(len, HugePages::Never, false).unwrap()
}

#[test]
fn lengths() {
    for len in [
        0,
        1,
        MIB,
        2 * MIB - 1,
        2 * MIB + 1,
        3 * MIB,
        u64::MAX,
        1 << 63,
    ] {
        let error = Memory::new(len, HugePages::Never, false).unwrap_err();
        assert!(
            matches!(error, MemoryError::Length(wrong) if wrong == len),
            "{error:?}"
        );
    }
    assert_eq!(ordinary(6 * MIB).len(), 6 * MIB);
}

#[test]
fn keeps_its_size_and_its_seals() {
    let memory = ordinary(2 * MIB);
    let seals = fcntl(&memory, FcntlArg::F_GET_SEALS).unwrap();
    let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    assert!(SealFlag::from_bits_retain(seals).contains(wanted));
    for len in [0, MIB, 4 * MIB] {
        let error = memory.file.set_len(len).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
    let more = fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE));
    assert_eq!(
        more,
        Err(Errno::EPERM),
        "nobody may seal it against its writers"
    );
    assert!(
        memory.write_at(&[1], 2 * MIB).is_err(),
        "nor grow it by writing"
    );
}

#[test]
fn a_reading_descriptor_cannot_write() {
    let memory = ordinary(2 * MIB);
    memory.write_at(b"kept", 0).unwrap();
    let fd = memory.read_only().unwrap();
    assert_eq!(pwrite(&fd, &[1], 0), Err(Errno::EBADF));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&fd, punch, 0, 4096), Err(Errno::EBADF));
    let received = Memory::received(fd, 2 * MIB).unwrap();
    let error = Mapping::new(&received, true).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let mut into = [0; 4];
    assert!(
        Mapping::new(&received, false)
            .unwrap()
            .copy_out(0, &mut into)
    );
    assert_eq!(&into, b"kept");
}

#[test]
fn only_its_owner_may_open_it_again() {
    let mode = ordinary(2 * MIB)
        .file
        .metadata()
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn discarded_bytes_are_zero_and_their_pages_free() {
    let memory = Memory::new(8 * MIB, HugePages::Never, true).unwrap();
    let held = |memory: &Memory| memory.file.metadata().unwrap().blocks() * 512;
    assert_eq!(held(&memory), 8 * MIB);
    memory.write_at(&vec![7; 8 << 20], 0).unwrap();
    for (range, left) in [
        (0..2 * MIB, 6 * MIB),
        (0..2 * MIB, 6 * MIB),
        (6 * MIB..u64::MAX, 4 * MIB),
        (5 * MIB..5 * MIB, 4 * MIB),
        (9 * MIB..10 * MIB, 4 * MIB),
    ] {
        memory.discard(range.clone()).unwrap();
        assert_eq!(held(&memory), left, "{range:?}");
    }
    let mut into = [1; 2];
    pread(&memory, &mut into, 2 * MIB as i64 - 1).unwrap();
    assert_eq!(into, [0, 7]);
}

#[test]
fn memory_is_taken_when_asked_to() {
    assert_eq!(ordinary(4 * MIB).file.metadata().unwrap().blocks(), 0);
    let error = Memory::new(1 << 50, HugePages::Never, true).unwrap_err();
    assert!(
        matches!(error, MemoryError::TooLittle { wanted, .. } if wanted == 1 << 50),
        "{error:?}"
    );
}

#[test]
fn huge_pages_are_had_or_said_not_to_be() {
    // No host has as many.
    let error = Memory::new(1 << 46, HugePages::Require, false).unwrap_err();
    assert!(
        matches!(error, MemoryError::NoHugePages { len, .. } if len == 1 << 46),
        "{error:?}"
    );
    assert!(
        !Memory::new(1 << 46, HugePages::Auto, false)
            .unwrap()
            .huge_pages()
    );
    // A host has some or none; either way the two modes agree.
    let required = Memory::new(2 * MIB, HugePages::Require, false);
    match required {
        Ok(memory) => huge_memory_works(&memory),
        Err(error) => assert!(
            matches!(error, MemoryError::NoHugePages { .. }),
            "{error:?}"
        ),
    }
}

fn huge_memory_works(memory: &Memory) {
    assert!(memory.huge_pages());
    let mapping = Mapping::new(memory, true).unwrap();
    assert!(mapping.copy_in(MIB as usize, &[3; 64]));
    let received = Memory::received(memory.read_only().unwrap(), 2 * MIB).unwrap();
    assert!(received.huge_pages());
    let mut into = [0; 64];
    assert!(
        Mapping::new(&received, false)
            .unwrap()
            .copy_out(MIB as usize, &mut into)
    );
    assert_eq!(into, [3; 64]);
}

#[test]
fn mappings_check_their_bounds() {
    let memory = ordinary(2 * MIB);
    let len = 2 << 20;
    let (read, write) = (
        Mapping::new(&memory, false).unwrap(),
        Mapping::new(&memory, true).unwrap(),
    );
    for (offset, bytes, inside) in [
        (0, 0, true),
        (len, 0, true),
        (0, len, true),
        (len - 1, 1, true),
        (len, 1, false),
        (len + 1, 0, false),
        (1, len, false),
        (usize::MAX, 1, false),
        (usize::MAX - 1, 4, false),
    ] {
        let mut buffer = vec![0; bytes];
        assert_eq!(
            read.copy_out(offset, &mut buffer),
            inside,
            "{offset}..+{bytes}"
        );
        assert_eq!(write.copy_in(offset, &buffer), inside, "{offset}..+{bytes}");
        assert!(
            !read.copy_in(offset, &buffer),
            "a mapping for reading is not written"
        );
    }
}

#[test]
fn a_mapping_sees_what_the_file_is_given() {
    let memory = ordinary(2 * MIB);
    let mapping = Mapping::new(&memory, false).unwrap();
    for round in 1..=20_u8 {
        let at = usize::from(round) * 3001;
        memory.write_at(&[round; 5000], at as u64).unwrap();
        let mut into = [0; 5000];
        assert!(mapping.copy_out(at, &mut into));
        assert_eq!(into, [round; 5000]);
    }
}

/// KiB of this memory's mappings in this process that are pages of 2 MiB, after the kernel's
/// own account.
fn huge_kib(memory: &Memory) -> u64 {
    let inode = format!(" {} ", memory.file.metadata().unwrap().ino());
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut ours, mut sum) = (false, 0);
    for line in maps.lines() {
        if line.contains("/memfd:") || line.contains("-xp ") {
            ours = line.contains(&inode);
        }
        if let Some(kib) = line.strip_prefix("ShmemPmdMapped:").filter(|_| ours) {
            let kib = kib.trim().trim_end_matches(" kB");
            sum += kib.parse::<u64>().unwrap();
        }
    }
    sum
}

/// Whether this kernel gathers pages when it is asked to.
fn kernel_gathers() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    version >= (6, 1) && setting.is_ok_and(|setting| !setting.contains("[deny]"))
}

#[test]
fn what_is_about_to_be_written_gets_huge_pages_and_keeps_its_bytes() {
    let memory = ordinary(32 * MIB);
    let mapping = Mapping::new(&memory, true).unwrap();
    // Pages that another process wrote before.
    for page in [0, 3, 511, 512, 2047] {
        memory
            .write_at(&[page as u8 | 1; 4096], page * 4096)
            .unwrap();
    }
    memory.prepare(&mapping, 5 * MIB..5 * MIB);
    assert_eq!(huge_kib(&memory), 0, "nothing was asked for");
    memory.prepare(&mapping, 5 * MIB..5 * MIB + 1);
    let huge = if kernel_gathers() { 8192 } else { 0 };
    assert_eq!(huge_kib(&memory), huge, "the 8 MiB around it");
    let mut page = [0; 4096];
    for at in 0..2048 {
        let written = [0, 3, 511, 512, 2047].contains(&at);
        let byte = if written { at as u8 | 1 } else { 0 };
        assert!(mapping.copy_out(at * 4096, &mut page));
        assert_eq!(page, [byte; 4096], "page {at}");
    }
    memory.prepare(&mapping, 7 * MIB..32 * MIB);
    assert_eq!(huge_kib(&memory), huge * 4);
    memory.discard(0..32 * MIB).unwrap();
    assert_eq!(memory.held(), 0);
    assert!(mapping.copy_out(0, &mut page));
    assert_eq!(page, [0; 4096], "gone, also for who maps it");
}

#[test]
fn a_refused_request_changes_nothing() {
    let memory = ordinary(4 * MIB);
    let mapping = Mapping::new(&memory, false).unwrap();
    assert!(
        mapping.gather(0..2 << 20).is_err(),
        "there is no page to gather"
    );
    assert!(mapping.gather(2 << 20..6 << 20).is_err(), "outside");
    assert_eq!(memory.held(), 0);
}
