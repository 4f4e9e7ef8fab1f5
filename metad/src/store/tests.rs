#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;

#[test]
fn one_process_owns_a_state_directory() {
    let folder = tempfile::tempdir().unwrap();
    let first = Store::open(folder.path()).unwrap();
    let Err(Error::Refused(text)) = Store::open(folder.path()) else {
        panic!("opened twice")
    };
    assert!(text.contains("another metad"), "{text}");
    drop(first);
    Store::open(folder.path()).unwrap();
}

#[test]
fn a_newer_database_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    drop(Store::open(folder.path()).unwrap());
    let path = folder.path().join("metad.db");
    let other = Connection::open(&path).unwrap();
    other.pragma_update(None, "user_version", 99).unwrap();
    drop(other);
    let before = std::fs::read(&path).unwrap();
    let Err(Error::Refused(text)) = Store::open(folder.path()) else {
        panic!("opened")
    };
    assert!(text.contains("99") && text.contains("metad.db"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn what_is_no_database_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("metad.db"), vec![7; 8192]).unwrap();
    assert!(matches!(Store::open(folder.path()), Err(Error::Store(_))));
}

#[test]
fn readers_see_the_last_commit_and_do_not_wait_for_a_writer() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(folder.path()).unwrap();
    let seen = || {
        store
            .read(|read| read.counter(Counter::Generation))
            .unwrap()
    };
    writer
        .transaction(Sync::Process, |tx| {
            for turn in 1..=1000 {
                tx.add_pack(&[(turn % 251) as u8; 32].map(|b| b ^ (turn / 251) as u8), 1)
                    .ok();
                tx.bump(Counter::Generation, 1)?;
            }
            let start = std::time::Instant::now();
            assert_eq!(seen(), 0);
            assert!(start.elapsed() < Duration::from_secs(1));
            Ok(())
        })
        .unwrap();
    assert_eq!(seen(), 1000);
    let failed: Result<(), _> = writer.transaction(Sync::Full, |tx| {
        tx.bump(Counter::Generation, 1)?;
        Err(Error::Refused("on purpose".into()))
    });
    assert!(failed.is_err());
    assert_eq!(seen(), 1000, "nothing of a failed transaction stays");
}

#[test]
fn foreign_keys_hold() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, mut writer) = Store::open(folder.path()).unwrap();
    let outcome = writer.transaction(Sync::Process, |tx| tx.pin(1, 1));
    assert!(matches!(outcome, Err(Error::Store(_))));
}

#[test]
fn the_journal_stays_short_while_others_write_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut writer) = Store::open(folder.path()).unwrap();
    let journal = folder.path().join("metad.db-wal");
    let long = u64::from(checkpoint::LONG_PAGES.unsigned_abs()) * 4200;
    let mut write = |times: u32| {
        for _ in 0..times {
            let bumped = writer.transaction(Sync::Process, |tx| tx.bump(Counter::Number, 1));
            bumped.unwrap();
        }
        std::fs::metadata(&journal).unwrap().len()
    };
    // Each writes one page at least.
    let pages = checkpoint::LONG_PAGES.unsigned_abs();
    assert!(write(8 * pages) < 3 * long);
    // A reader that looks at what was before keeps it long, and no longer than that.
    store
        .read(|read| {
            read.counter(Counter::Number)?;
            assert!(write(4 * pages) > 3 * long);
            Ok(())
        })
        .unwrap();
    write(pages / 2);
    assert!(write(8 * pages) < 3 * long);
    let written = store.read(|read| read.counter(Counter::Number)).unwrap();
    drop((writer, store));
    let (store, _writer) = Store::open(folder.path()).unwrap();
    assert_eq!(
        store.read(|read| read.counter(Counter::Number)).unwrap(),
        written
    );
}
