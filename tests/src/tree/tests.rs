#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, lchown, symlink},
    path::Path,
};

use rustix::fs::{
    AtFlags, CWD, Mode, Timespec, Timestamps, XattrFlags, lsetxattr, mkfifoat, utimensat,
};

use super::*;

fn plant(root: &Path) {
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("d/file"), vec![7_u8; 3_000_000]).unwrap();
    fs::hard_link(root.join("d/file"), root.join("d/second")).unwrap();
    fs::write(root.join("lone"), b"lone").unwrap();
    symlink("lone", root.join("link")).unwrap();
    mkfifoat(CWD, root.join("fifo"), Mode::from_raw_mode(0o600)).unwrap();
    for name in ["d/file", "lone", "link", "fifo", "d", ""] {
        settle(&root.join(name), 1_700_000_000, 5);
    }
}

fn settle(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec {
        tv_sec: secs,
        tv_nsec: nanos,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn differences(change: impl Fn(&Path), rules: &Rules) -> Vec<String> {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    plant(a.path());
    plant(b.path());
    change(b.path());
    let (a, b) = (Tree::scan(a.path()).unwrap(), Tree::scan(b.path()).unwrap());
    a.compare(&b, rules)
        .unwrap()
        .differences
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn equal_trees_are_equal() {
    assert_eq!(differences(|_| {}, &Rules::default()), Vec::<String>::new());
}

#[test]
fn every_kind_of_difference_is_told() {
    type Change = fn(&Path);
    let cases: &[(&str, Change)] = &[
        ("/lone: mode 0o100644 against 0o100600", |r| {
            fs::set_permissions(r.join("lone"), fs::Permissions::from_mode(0o600)).unwrap();
        }),
        ("/lone: uid 0 against 12", |r| {
            lchown(r.join("lone"), Some(12), None).unwrap()
        }),
        ("/link: gid 0 against 13", |r| {
            lchown(r.join("link"), None, Some(13)).unwrap()
        }),
        (
            "/fifo: mtime (1700000000, 5) against (1700000000, 6)",
            |r| settle(&r.join("fifo"), 1_700_000_000, 6),
        ),
        ("/: mtime (1700000000, 5) against (0, 5)", |r| {
            settle(r, 0, 5)
        }),
        ("/link: target \"lone\" against \"Lone\"", |r| {
            fs::remove_file(r.join("link")).unwrap();
            symlink("Lone", r.join("link")).unwrap();
        }),
        ("/lone: xattr user.x none against \"1\"", |r| {
            lsetxattr(r.join("lone"), "user.x", b"1", XattrFlags::CREATE).unwrap();
        }),
        ("/d/file: bytes differ from offset 2500000", |r| {
            let mut bytes = vec![7_u8; 3_000_000];
            bytes[2_500_000] = 8;
            fs::write(r.join("d/file"), bytes).unwrap();
        }),
        ("/lone: size 4 against 5", |r| {
            fs::write(r.join("lone"), b"lone!").unwrap()
        }),
        ("/d/second: nlink 2 against 1", |r| {
            fs::remove_file(r.join("d/second")).unwrap();
            fs::write(r.join("d/second"), vec![7_u8; 3_000_000]).unwrap();
        }),
        ("/d: nlink 2 against 3", |r| {
            fs::create_dir(r.join("d/sub")).unwrap()
        }),
        ("/new: only in ", |r| fs::write(r.join("new"), b"").unwrap()),
        ("/lone: only in ", |r| {
            fs::remove_file(r.join("lone")).unwrap()
        }),
        ("/lone: type \"file\" against \"directory\"", |r| {
            fs::remove_file(r.join("lone")).unwrap();
            fs::create_dir(r.join("lone")).unwrap();
        }),
    ];
    for (wanted, change) in cases {
        let found = differences(change, &Rules::default());
        assert!(
            found.iter().any(|f| f.starts_with(wanted)),
            "wanted {wanted:?} among {found:#?}"
        );
    }
}

#[test]
fn hard_links_made_elsewhere_are_told_by_their_group() {
    let found = differences(
        |r| {
            fs::remove_file(r.join("d/second")).unwrap();
            fs::hard_link(r.join("lone"), r.join("d/second")).unwrap();
        },
        &Rules::default(),
    );
    assert!(
        found.iter().any(|f| f.contains("hard-link group")),
        "{found:#?}"
    );
}

#[test]
fn rules_overlook_no_more_than_they_say() {
    let change = |r: &Path| {
        lsetxattr(r.join("lone"), "user.skip", b"1", XattrFlags::CREATE).unwrap();
        fs::set_permissions(r.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    };
    let rules = Rules {
        ignored_xattrs: BTreeSet::from([b"user.skip".to_vec()]),
        loose_dirs: BTreeSet::from([b"d".to_vec()]),
        ..Rules::default()
    };
    assert_eq!(differences(change, &rules), Vec::<String>::new());
    assert_eq!(differences(change, &Rules::default()).len(), 2);
}

#[test]
fn names_count_instead_of_links_when_asked() {
    // A name outside the tree raises nlink without being seen.
    let outside = tempfile::tempdir().unwrap();
    let change = |r: &Path| fs::hard_link(r.join("lone"), outside.path().join("x")).unwrap();
    assert_eq!(
        differences(change, &Rules::default()),
        ["/lone: nlink 1 against 2"]
    );
    fs::remove_file(outside.path().join("x")).unwrap();
    assert_eq!(
        differences(
            change,
            &Rules {
                links: Links::Names,
                ..Rules::default()
            }
        ),
        Vec::<String>::new()
    );
}
