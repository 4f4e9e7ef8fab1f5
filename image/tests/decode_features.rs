//! What each feature of tar becomes in the tree.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use harbour_image::tree::{Kind, Tree};
use support::*;

const ROOT: &str = ". d 755 0:0 0 implied";

/// Checks all lines but the root's, which must be the implied one unless given.
#[track_caller]
fn expect(tar: &[u8], want: &[&str]) {
    let mut got = lines_of(tar);
    if !want.first().is_some_and(|line| line.starts_with(". ")) {
        assert_eq!(got.remove(0), ROOT);
    }
    assert_eq!(got, want);
}

#[test]
fn every_kind_of_entry() {
    let device = |name, flag| Head {
        name,
        flag,
        mode: 0o600,
        device: (8, 17),
        ..Head::default()
    };
    let tar = Tar::new()
        .head(Head {
            name: b"./",
            flag: b'5',
            mode: 0o1777,
            uid: 5,
            gid: 6,
            mtime: 7,
            ..Head::default()
        })
        .dir("./d/", 0o2750)
        .with_data(
            Head {
                name: b"d/f",
                mode: 0o4755,
                uid: 1000,
                gid: 100,
                mtime: 9,
                ..Head::default()
            },
            b"hello",
        )
        .symlink("l", "../anything/../at all")
        .head(device(b"c", b'3'))
        .head(device(b"b", b'4'))
        .head(device(b"p", b'6'))
        .with_data(
            Head {
                name: b"seven",
                flag: b'7',
                ..Head::default()
            },
            b"x",
        )
        .hard("d/h", "./d/f")
        .hard("hl", "l")
        .file("empty", b"")
        .end();
    let hello = content(b"hello");
    expect(
        &tar,
        &[
            ". d 1777 5:6 7000000000",
            "b b 600 0:0 0 8,17",
            "c c 600 0:0 0 8,17",
            "d d 2750 0:0 0",
            &format!("d/f f 4755 1000:100 9000000000 {hello} #d/f"),
            &format!("d/h f 4755 1000:100 9000000000 {hello} #d/f"),
            &format!("empty f 644 0:0 0 {}", content(b"")),
            "hl l 777 0:0 0 -> ../anything/../at\\x20all #hl",
            "l l 777 0:0 0 -> ../anything/../at\\x20all #hl",
            "p p 600 0:0 0",
            &format!("seven f 644 0:0 0 {}", content(b"x")),
        ],
    );
}

#[test]
fn names_in_every_format() {
    let long = "n".repeat(120);
    let deep = format!("{}/{}", "p".repeat(110), "q".repeat(90));
    let (prefix, name) = (vec![b'p'; 110], vec![b'q'; 90]);
    let star = Head {
        prefix: &[b's'; 120],
        patches: vec![(508, b"tar\0".to_vec())],
        ..Head::default()
    };
    // Go before 1.8: a prefix under the GNU magic.
    let old_go = Head {
        prefix: b"old/go/prefix/with/letters",
        magic: GNU,
        ..Head::default()
    };
    let tar = Tar::new()
        .long(b'L', long.as_bytes())
        .file("ignored", b"")
        .head(Head {
            name: &name,
            prefix: &prefix,
            ..Head::default()
        })
        .head(Head {
            name: b"v7dir/",
            flag: 0,
            magic: V7,
            mode: 0o700,
            ..Head::default()
        })
        .head(Head {
            name: b"v7",
            flag: 0,
            magic: V7,
            prefix: b"no prefix here",
            ..Head::default()
        })
        .head(star)
        .head(old_go)
        .pax(b'x', &[("path", b"\xff\xfe/new\nline")])
        .file("ignored", b"")
        .pax(b'X', &[("path", b"solaris")])
        .file("ignored", b"")
        .long(b'L', b"not this")
        .pax(b'x', &[("path", b"pax first")])
        .file("ignored", b"")
        .long(b'K', "t".repeat(300).as_bytes())
        .symlink("longlink", "short")
        .pax(b'x', &[("linkpath", b"pax target")])
        .symlink("paxlink", "short")
        .head(Head {
            name: b"label",
            flag: b'V',
            ..Head::default()
        })
        .end();
    let lines = lines_of(&tar);
    let has = |start: &str| {
        assert!(
            lines.iter().any(|line| line.starts_with(start)),
            "{start}: {lines:#?}"
        )
    };
    has(&format!("{long} f "));
    has(&format!("{deep} f "));
    has("v7dir d 700 ");
    has("v7 f ");
    has(&format!("{}/f f ", "s".repeat(120)));
    has("old/go/prefix/with/letters/f f ");
    has("\\xff\\xfe/new\\x0aline f ");
    has("solaris f ");
    has("pax\\x20first f ");
    has(&format!("longlink l 777 0:0 0 -> {}", "t".repeat(300)));
    has("paxlink l 777 0:0 0 -> pax\\x20target");
    assert!(
        !lines
            .iter()
            .any(|line| line.contains("ignored") || line.contains("label"))
    );
}

#[test]
fn numbers_in_every_form() {
    let big_uid = [&[0x80, 0, 0, 0][..], &4_000_000_000u32.to_be_bytes()].concat();
    let mut minus = vec![0xff; 12];
    minus[11] = 0xfe;
    let tar = Tar::new()
        .head(Head {
            name: b"gnu",
            patches: vec![(108, big_uid)],
            ..Head::default()
        })
        .head(Head {
            name: b"past",
            patches: vec![(136, minus)],
            ..Head::default()
        })
        .head(Head {
            name: b"blank",
            patches: vec![(108, b"        ".to_vec()), (136, vec![0; 12])],
            ..Head::default()
        })
        .head(Head {
            name: b"typebits",
            mode: 0o100_755,
            ..Head::default()
        })
        .pax(
            b'x',
            &[
                ("uid", b"4294967294"),
                ("gid", b"70000"),
                ("mtime", b"-1.25"),
                ("size", b"3"),
            ],
        )
        .head(Head {
            name: b"pax",
            size: 0,
            ..Head::default()
        })
        .data(b"abc")
        .pax(
            b'x',
            &[("SCHILY.devmajor", b"300"), ("SCHILY.devminor", b"70000")],
        )
        .head(Head {
            name: b"dev",
            flag: b'3',
            ..Head::default()
        })
        .end();
    let none = content(b"");
    expect(
        &tar,
        &[
            &format!("blank f 644 0:0 0 {none}"),
            "dev c 644 0:0 0 300,70000",
            &format!("gnu f 644 4000000000:0 0 {none}"),
            &format!("past f 644 0:0 -2000000000 {none}"),
            &format!("pax f 644 4294967294:70000 -1250000000 {}", content(b"abc")),
            &format!("typebits f 755 0:0 0 {none}"),
        ],
    );
}

#[test]
fn global_headers_apply_until_taken_back() {
    let tar = Tar::new()
        .pax(
            b'g',
            &[("comment", b"0123"), ("uid", b"7"), ("mtime", b"5.5")],
        )
        .file("a", b"")
        .pax(b'x', &[("uid", b"8"), ("mtime", b"")])
        .file("b", b"")
        .pax(b'g', &[("uid", b"")])
        .file("c", b"")
        .end();
    let none = content(b"");
    expect(
        &tar,
        &[
            &format!("a f 644 7:0 5500000000 {none}"),
            &format!("b f 644 8:0 0 {none}"),
            &format!("c f 644 0:0 5500000000 {none}"),
        ],
    );
}

#[test]
fn extended_attributes() {
    let acl = b"user::rw-,user:1000:r--,group::r--,mask::r--,other::---";
    let tar = Tar::new()
        .pax(
            b'x',
            &[
                ("SCHILY.xattr.user.a", b"1\n\0="),
                ("SCHILY.xattr.user.empty", b""),
                ("SCHILY.xattr.security.capability", &[1, 0, 0, 2]),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.whiteout", b"y"),
                ("SCHILY.xattr.com.apple.provenance", b"y"),
                ("LIBARCHIVE.xattr.user.b%20c", b"aGVsbG8"),
                ("LIBARCHIVE.xattr.user.a", b"aGVsbG8="),
            ],
        )
        .file("f", b"")
        .pax(
            b'x',
            &[
                ("SCHILY.acl.access", acl),
                ("SCHILY.acl.default", b"user:joe:r--"),
            ],
        )
        .dir("d", 0o750)
        .end();
    let (decoded, sink) = decode(&tar).unwrap();
    let acl = "system.posix_acl_access=\\x02\\x00\\x00\\x00\
        \\x01\\x00\\x06\\x00\\xff\\xff\\xff\\xff\\x02\\x00\\x04\\x00\\xe8\\x03\\x00\\x00\
        \\x04\\x00\\x04\\x00\\xff\\xff\\xff\\xff\\x10\\x00\\x04\\x00\\xff\\xff\\xff\\xff\
        \\x20\\x00\\x00\\x00\\xff\\xff\\xff\\xff";
    assert_eq!(
        lines(&decoded.tree, &sink)[1..],
        [
            format!("d d 750 0:0 0 {acl}"),
            format!(
                "f f 644 0:0 0 {} security.capability=\\x01\\x00\\x00\\x02 user.a=1\\x0a\\x00= \
             user.b\\x20c=hello user.empty=",
                content(b"")
            ),
        ]
    );
    let stats = &decoded.stats;
    assert_eq!(
        (
            stats.overlay_xattrs_dropped,
            stats.foreign_xattrs_dropped,
            stats.acls_ignored
        ),
        (2, 1, 1)
    );
}

#[test]
fn later_entries_win_as_in_an_extraction() {
    let f = |data: &[u8]| content(data);
    // Over a file: the other hard link keeps the old one.
    expect(
        &Tar::new()
            .file("a", b"1")
            .hard("b", "a")
            .file("a", b"2")
            .end(),
        &[
            &format!("a f 644 0:0 0 {}", f(b"2")),
            &format!("b f 644 0:0 0 {}", f(b"1")),
        ],
    );
    // A directory over a directory keeps children.
    expect(
        &Tar::new()
            .dir("d", 0o755)
            .file("d/x", b"")
            .dir("d/", 0o700)
            .end(),
        &["d d 700 0:0 0", &format!("d/x f 644 0:0 0 {}", f(b""))],
    );
    // Anything else over a directory replaces all of it, and a directory made anew is empty, in
    // lower layers, too.
    expect(
        &Tar::new().file("d/x/y", b"").symlink("d", "e").end(),
        &["d l 777 0:0 0 -> e"],
    );
    expect(
        &Tar::new()
            .file("d/x/y", b"")
            .file("d", b"")
            .dir("d", 0o755)
            .file("d/z", b"")
            .end(),
        &[
            "d d 755 0:0 0 opaque",
            &format!("d/z f 644 0:0 0 {}", f(b"")),
        ],
    );
    // The directory that neighbours share must not be remembered past its replacement.
    expect(
        &Tar::new()
            .file("d/x", b"")
            .symlink("d", "e")
            .file("d/y", b"")
            .end(),
        &[
            "d l 777 0:0 0 -> e",
            "e d 755 0:0 0 implied",
            &format!("e/y f 644 0:0 0 {}", f(b"")),
        ],
    );
}

#[test]
fn parents_are_made_and_links_to_them_followed() {
    let none = content(b"");
    expect(
        &Tar::new().file("a/b/c", b"").dir("a", 0o700).end(),
        &[
            "a d 700 0:0 0",
            "a/b d 755 0:0 0 implied",
            &format!("a/b/c f 644 0:0 0 {none}"),
        ],
    );
    expect(
        &Tar::new()
            .symlink("lib", "usr/lib")
            .symlink("abs", "/usr")
            .dir("usr/lib", 0o711)
            .symlink("usr/lib/up", "../share/.//x")
            .file("lib/one", b"")
            .file("abs/lib/up/two", b"")
            .end(),
        &[
            "abs l 777 0:0 0 -> /usr",
            "lib l 777 0:0 0 -> usr/lib",
            "usr d 755 0:0 0 implied",
            "usr/lib d 711 0:0 0",
            &format!("usr/lib/one f 644 0:0 0 {none}"),
            "usr/lib/up l 777 0:0 0 -> ../share/.//x",
            "usr/share d 755 0:0 0 implied",
            "usr/share/x d 755 0:0 0 implied",
            &format!("usr/share/x/two f 644 0:0 0 {none}"),
        ],
    );
}

#[test]
fn hard_links_may_come_before_their_targets() {
    let x = content(b"x");
    expect(
        &Tar::new()
            .hard("a", "b")
            .hard("b", "d/c")
            .file("d/c", b"x")
            .hard("e", "a")
            .end(),
        &[
            &format!("a f 644 0:0 0 {x} #a"),
            &format!("b f 644 0:0 0 {x} #a"),
            "d d 755 0:0 0 implied",
            &format!("d/c f 644 0:0 0 {x} #a"),
            &format!("e f 644 0:0 0 {x} #a"),
        ],
    );
    // A later entry of the link's name takes its place.
    expect(
        &Tar::new().hard("a", "nothing").file("a", b"x").end(),
        &[&format!("a f 644 0:0 0 {x}")],
    );
    // Through a symbolic link to the directory, and to itself, which GNU tar writes at times.
    expect(
        &Tar::new()
            .symlink("l", "d")
            .file("d/f", b"x")
            .hard("h", "l/f")
            .hard("h", "h")
            .end(),
        &[
            "d d 755 0:0 0 implied",
            &format!("d/f f 644 0:0 0 {x} #d/f"),
            &format!("h f 644 0:0 0 {x} #d/f"),
            "l l 777 0:0 0 -> d",
        ],
    );
}

#[test]
fn whiteouts_and_opaque_marks() {
    let none = content(b"");
    let overlay_form = Head {
        name: b"dev00",
        flag: b'3',
        ..Head::default()
    };
    let (decoded, sink) = decode(
        &Tar::new()
            .file(".wh.gone", b"")
            .file("d/.wh.gone", b"some data")
            .file("d/.wh.gone", b"")
            .file("d/.wh..wh..opq", b"")
            .file("real", b"")
            .file(".wh.real", b"")
            .file(".wh.real2", b"")
            .file("real2", b"")
            .dir("dir", 0o700)
            .file(".wh.dir", b"")
            .file(".wh.dir2", b"")
            .dir("dir2", 0o700)
            .file(".wh.implied", b"")
            .file("implied/x", b"")
            .file("implied2/x", b"")
            .file(".wh.implied2", b"")
            .file(".wh..wh.aufs", b"")
            .dir(".wh..wh.plnk", 0o700)
            .file(".wh..wh.plnk/1.2", b"data")
            .head(overlay_form)
            .file(".wh..wh..opq", b"")
            .end(),
    )
    .unwrap();
    assert_eq!(
        lines(&decoded.tree, &sink),
        [
            ". d 755 0:0 0 opaque implied".to_owned(),
            "d d 755 0:0 0 opaque implied".to_owned(),
            "d/gone whiteout".to_owned(),
            "dev00 whiteout".to_owned(),
            "dir d 700 0:0 0 opaque".to_owned(),
            "dir2 d 700 0:0 0 opaque".to_owned(),
            "gone whiteout".to_owned(),
            "implied d 755 0:0 0 opaque".to_owned(),
            format!("implied/x f 644 0:0 0 {none}"),
            "implied2 d 755 0:0 0 opaque".to_owned(),
            format!("implied2/x f 644 0:0 0 {none}"),
            format!("real f 644 0:0 0 {none}"),
            format!("real2 f 644 0:0 0 {none}"),
        ]
    );
    assert_eq!(decoded.stats.aufs_skipped, 3);
}

#[test]
fn content_is_cut_at_multiples_of_an_object() {
    const MIB: usize = 1 << 20;
    let bytes = |len: usize| -> Vec<u8> { (0..len).map(|i| (i % 251 + 1) as u8).collect() };
    for len in [1, 4095, MIB - 1, MIB, MIB + 1, 3 * MIB + 17] {
        let data = bytes(len);
        let (decoded, sink) = decode(&Tar::new().file("pad", b"x").file("f", &data).end()).unwrap();
        let Kind::Dir(root) = &decoded.tree.node(Tree::ROOT).kind else {
            panic!()
        };
        let Kind::File(content) = &decoded.tree.node(root.entries[&b"f"[..]]).kind else {
            panic!()
        };
        assert_eq!(content.runs.len(), len.div_ceil(MIB));
        assert!(content.runs.iter().all(|run| run.offset % MIB as u64 == 0));
        assert_eq!(sink.content(content), data);
        let mut part = [0; 100];
        sink.read_at(content, len as u64 / 2, &mut part);
        let half = len / 2;
        let want: Vec<u8> = data[half..]
            .iter()
            .copied()
            .chain([0; 100])
            .take(100)
            .collect();
        assert_eq!(part[..], want);
    }
    // A MiB of zeros between data is a hole.
    let data = [bytes(MIB), vec![0; MIB], bytes(10)].concat();
    let (decoded, _) = decode(&Tar::new().file("f", &data).end()).unwrap();
    assert_eq!(
        (decoded.stats.objects, decoded.stats.zero_bytes),
        (2, MIB as u64)
    );
    assert_eq!(decoded.stats.logical_bytes, data.len() as u64);
}

#[test]
fn an_archive_may_lack_its_end() {
    let whole = Tar::new().file("a", b"x");
    for tail in [0, BLOCK, 2 * BLOCK, 20 * BLOCK, 2 * BLOCK + 100] {
        let tar = [&whole.0[..], &vec![0; tail]].concat();
        assert_eq!(lines_of(&tar).len(), 2, "{tail}");
    }
    // What follows the end is not looked at, but belongs to the diff ID (checked in `decode`).
    let tar = [whole.end(), b"garbage".to_vec()].concat();
    assert_eq!(lines_of(&tar).len(), 2);
    assert_eq!(lines_of(b"").len(), 1);
}

#[test]
fn absolute_names_only_on_request() {
    let tar = Tar::new()
        .file("/ko-app/x", b"")
        .hard("/h", "/ko-app/x")
        .end();
    assert!(decode(&tar).is_err());
    let options = harbour_image::decode::DecodeOptions {
        strip_absolute: true,
        ..Default::default()
    };
    let (decoded, sink) = decode_with(&tar, &options).unwrap();
    assert_eq!(lines(&decoded.tree, &sink).len(), 4);
}
