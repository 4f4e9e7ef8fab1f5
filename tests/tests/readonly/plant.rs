//! The tree that the checks run on.

use harbour_tests::layers::Entry;

/// Length of `file`.
pub const FILE_BYTES: usize = 2_500_123;
/// Entries of `dir`.
pub const DIR_ENTRIES: usize = 700;

/// Byte `at` of `file`.
pub fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 11) as u8
}

/// One layer of it.
pub fn layer() -> Vec<Entry> {
    let owned = |entry: Entry, mode, owner| Entry {
        mode,
        uid: owner,
        gid: owner,
        ..entry
    };
    let mut all = vec![
        Entry::dir("."),
        Entry::file("file", (0..FILE_BYTES).map(pattern).collect::<Vec<_>>()),
        Entry::hard("second", "file"),
        Entry::file("empty", ""),
        owned(Entry::file("root-only", "root\n"), 0o600, 0),
        owned(Entry::file("of-1000", "user\n"), 0o640, 1000),
        owned(Entry::file("group-reads", "group\n"), 0o040, 1000),
        owned(
            Entry::file("script", "#!/bin/sh\necho ran as $(id -u)\n"),
            0o755,
            0,
        ),
        owned(Entry::file("setuid", "#!/bin/sh\n"), 0o4755, 0),
        Entry {
            xattrs: vec![(b"user.mark".to_vec(), b"value".to_vec())],
            ..Entry::file("marked", "m\n")
        },
        Entry::symlink("link", "file"),
        Entry::symlink("dir-link", "dir"),
        Entry::symlink("dangling", "nowhere"),
        Entry::symlink("loop", "loop"),
        Entry {
            kind: b'6',
            ..Entry::file("fifo", "")
        },
        Entry {
            kind: b'3',
            device: (1, 3),
            mode: 0o666,
            ..Entry::file("null", "")
        },
        Entry::dir("dir"),
        Entry::dir("empty-dir"),
        owned(Entry::dir("closed"), 0o700, 0),
        Entry::file("closed/inside", "inside\n"),
        owned(Entry::dir("no-search"), 0o744, 0),
        Entry::file("no-search/inside", "inside\n"),
        owned(Entry::dir("sticky"), 0o1777, 0),
        Entry::file("n".repeat(255), "255\n"),
    ];
    all.extend((0..DIR_ENTRIES).map(|n| Entry::file(format!("dir/entry-{n:04}"), n.to_string())));
    all
}
