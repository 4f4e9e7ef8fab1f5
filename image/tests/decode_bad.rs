//! Layers that are wrong: each gets an error that names the layer, the entry and the fault.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "decode_support/support.rs"]
mod support;

use harbour_image::decode::Remedy;
use support::*;

#[test]
fn names() {
    let long = "x".repeat(300);
    let deep = "d/".repeat(2100);
    let cases: [(&[u8], &str); 13] = [
        (b"..", r#"entry "..": bad name: it has a component "..""#),
        (b"a/../../b", r#"has a component "..""#),
        (b"a/..", r#"has a component "..""#),
        (
            b"/etc/passwd",
            r#"entry "/etc/passwd": bad name: it is absolute"#,
        ),
        (b"//a", "it is absolute"),
        (b"a\0b", "it has a NUL byte"),
        (b"\xff\n/\0", r#"entry "\xff\n/\0": bad name"#),
        (long.as_bytes(), "a component is 300 bytes long"),
        (deep.as_bytes(), "it is 4200 bytes long, 4096 is the most"),
        (b".wh.", "a whiteout of nothing"),
        (b"d/.wh..", "a whiteout of nothing"),
        (b"d/.wh...", "a whiteout of nothing"),
        (b".wh.d/f", "begins with \".wh.\""),
    ];
    for (name, message) in cases {
        let tar = Tar::new().pax(b'x', &[("path", name)]).file("f", b"").end();
        refuse(&tar, Remedy::Rebuild, message);
    }
    refuse(
        &Tar::new().file("", b"").end(),
        Remedy::Rebuild,
        "bad name: it is empty",
    );
    refuse(
        &Tar::new().file("./", b"").end(),
        Remedy::Rebuild,
        "root of a layer must be a directory",
    );
    refuse(
        &Tar::new().file("f", b"").file("f/g/h", b"").end(),
        Remedy::Rebuild,
        r#"entry "f/g/h": "f" is not a directory"#,
    );
    refuse(
        &Tar::new()
            .hard("h", "later")
            .file("h/x", b"")
            .file("later", b"")
            .end(),
        Remedy::Rebuild,
        r#"entry "h/x": "h" is not a directory"#,
    );
}

#[test]
fn links() {
    let cases = [
        (
            Tar::new().symlink("l", "..").file("l/f", b""),
            r#"symbolic link "l", whose target "..""#,
        ),
        (
            Tar::new().symlink("a/l", "../../x").file("a/l/f", b""),
            r#"link "a/l", whose target "../../x" leaves"#,
        ),
        (
            Tar::new().symlink("l", "l").file("l/f", b""),
            r#"too many symbolic links, the last is "l""#,
        ),
        (
            Tar::new()
                .symlink("a", "b")
                .symlink("b", "a/x")
                .file("a/f", b""),
            "too many symbolic links",
        ),
        (
            Tar::new()
                .symlink("l", &"y".repeat(99))
                .pax(b'x', &[("linkpath", &[b'x'; 300])])
                .symlink("m", "")
                .file("m/f", b""),
            "300 bytes long",
        ),
        (
            Tar::new().symlink("l", ""),
            "bad symbolic link target: it is empty",
        ),
        (
            Tar::new()
                .pax(b'x', &[("linkpath", b"a\0b")])
                .symlink("l", ""),
            "it has a NUL byte",
        ),
        (
            Tar::new()
                .pax(b'x', &[("linkpath", &[b'x'; 4096])])
                .symlink("l", ""),
            "longer than 4095",
        ),
        (
            Tar::new().hard("h", "none"),
            r#"entry "h": hard link to "none", which is not in this layer"#,
        ),
        (
            Tar::new().hard("h", "no/such"),
            r#"hard link to "no/such", which is not"#,
        ),
        (
            Tar::new().file(".wh.w", b"").hard("h", "w"),
            r#"hard link to "w", which is not"#,
        ),
        (
            Tar::new().hard("a", "b").hard("b", "c").hard("c", "b"),
            "leads back to the link itself",
        ),
        (Tar::new().hard("a", "a"), "leads back to the link itself"),
        (
            Tar::new().dir("d", 0o755).hard("h", "d"),
            r#"hard link to "d", which is a directory"#,
        ),
        (
            Tar::new().hard("h", "d").dir("d", 0o755),
            r#"entry "h": hard link to "d", which is a directory"#,
        ),
        (Tar::new().hard("h", "."), "which is a directory"),
        (
            Tar::new().hard("h", "../x"),
            r#"bad hard link target: it has a component "..""#,
        ),
        (
            Tar::new().hard("h", "/x"),
            "bad hard link target: it is absolute",
        ),
        (
            Tar::new().hard("h", ""),
            "bad hard link target: it is empty",
        ),
        (
            Tar::new().symlink("s", "..").hard("h", "s/x"),
            "leaves the layer",
        ),
    ];
    for (tar, message) in cases {
        refuse(&tar.end(), Remedy::Rebuild, message);
    }
}

#[test]
fn links_that_lead_deeper_than_any_path() {
    let step = "x/".repeat(1000);
    let mut tar = Tar::new();
    let mut path = String::new();
    for _ in 0..3 {
        path.push_str("l/");
        tar = tar
            .pax(b'x', &[("linkpath", step.as_bytes())])
            .symlink(path.trim_end_matches('/'), "");
    }
    refuse(
        &tar.file(&format!("{path}f"), b"").end(),
        Remedy::Rebuild,
        "deeper than 2048 levels",
    );
}

#[test]
fn headers() {
    let mut broken = Head::default().block().to_vec();
    broken[0] ^= 1;
    let minus = vec![0xff; 12];
    let cases: Vec<(Tar, Remedy, &str)> = vec![
        (
            Tar(broken),
            Remedy::Refetch,
            "no tar header at byte 0: the checksum does not fit",
        ),
        (
            Tar(vec![b'x'; 1024]),
            Remedy::Refetch,
            "the checksum is not a number",
        ),
        (
            Tar::new().file("a", b"").raw(&[0; BLOCK]).file("b", b""),
            Remedy::Refetch,
            "no tar header at byte 512: a single block of zeros",
        ),
        (
            Tar::new().head(Head {
                flag: b'Z',
                ..Head::default()
            }),
            Remedy::Rebuild,
            "entry type 'Z' is not supported",
        ),
        (
            Tar::new().head(Head {
                flag: b'M',
                ..Head::default()
            }),
            Remedy::Rebuild,
            "entry type 'M'",
        ),
        (
            Tar::new().head(Head {
                patches: vec![(124, minus.clone())],
                ..Head::default()
            }),
            Remedy::Rebuild,
            "size is",
        ),
        (
            Tar::new().head(Head {
                patches: vec![(108, minus[..8].to_vec())],
                ..Head::default()
            }),
            Remedy::Rebuild,
            "uid is",
        ),
        (
            Tar::new().head(Head {
                patches: vec![(100, b"99".to_vec())],
                ..Head::default()
            }),
            Remedy::Rebuild,
            "mode is",
        ),
        (
            Tar::new().head(Head {
                flag: b'3',
                patches: vec![(329, b"rdev".to_vec())],
                ..Head::default()
            }),
            Remedy::Rebuild,
            "devmajor is",
        ),
        (
            Tar::new()
                .pax(b'x', &[("uid", b"4294967296")])
                .file("f", b""),
            Remedy::Rebuild,
            "uid is \"4294967296\", not a number that fits",
        ),
        (
            Tar::new().pax(b'x', &[("mtime", b"soon")]).file("f", b""),
            Remedy::Rebuild,
            "mtime is",
        ),
        (
            Tar::new().pax(b'g', &[("path", b"p")]).file("f", b""),
            Remedy::Rebuild,
            "global header gives name",
        ),
        (
            Tar::new()
                .with_data(
                    Head {
                        flag: b'x',
                        ..Head::default()
                    },
                    b"8 a=b",
                )
                .file("f", b""),
            Remedy::Rebuild,
            "bad PAX header",
        ),
        (
            Tar::new().pax(b'x', &[("path", b"p")]),
            Remedy::Refetch,
            "its extension header is there, it is not",
        ),
    ];
    for (tar, remedy, message) in cases {
        refuse(&tar.end(), remedy, message);
    }
}

#[test]
fn extended_attributes() {
    let long_name = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    let many: Vec<(String, Vec<u8>)> = (0..4)
        .map(|i| (format!("SCHILY.xattr.user.{i}"), vec![1; 50_000]))
        .collect();
    let many: Vec<(&str, &[u8])> = many
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_slice()))
        .collect();
    type Records<'a> = Vec<(&'a str, &'a [u8])>;
    let cases: [(Records<'_>, &str); 5] = [
        (vec![(&long_name, b"")], "the name is longer than 255 bytes"),
        (
            vec![("SCHILY.xattr.user.a\0b", b"")],
            "the name has a NUL byte",
        ),
        (
            vec![("SCHILY.xattr.user.v", &[7; 65536])],
            r#"attribute "user.v": the value is longer"#,
        ),
        (
            vec![("LIBARCHIVE.xattr.user.v", b"*")],
            r#"attribute "user.v": the value is not base64"#,
        ),
        (many, "all attributes together"),
    ];
    for (records, message) in cases {
        refuse(
            &Tar::new().pax(b'x', &records).file("f", b"").end(),
            Remedy::Rebuild,
            message,
        );
    }
}

#[test]
fn sparse_maps() {
    let gnu = |segments: &[(u64, u64)], size: u64, real_size: u64| {
        let mut patches = vec![(483, format!("{real_size:011o}\0").into_bytes())];
        for (place, (offset, len)) in segments.iter().enumerate() {
            patches.push((
                386 + place * 24,
                format!("{offset:011o}\0{len:011o}\0").into_bytes(),
            ));
        }
        Tar::new().head(Head {
            flag: b'S',
            size,
            magic: GNU,
            patches,
            ..Head::default()
        })
    };
    let v1 = |data: &[u8], size: &[u8]| {
        let keys: [(&str, &[u8]); 3] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", size),
        ];
        let mut blocks = data.to_vec();
        blocks.resize(data.len().next_multiple_of(BLOCK), 0);
        Tar::new().pax(b'x', &keys).file("f", &blocks)
    };
    let v0 = |keys: &[(&str, &[u8])], data: &[u8]| Tar::new().pax(b'x', keys).file("f", data);
    let cases = [
        (gnu(&[(0, 512), (100, 512)], 1024, 2000), "segments overlap"),
        (
            gnu(&[(1000, 1), (0, 1)], 2, 2000),
            "segments overlap or are out of order",
        ),
        (gnu(&[(0, 512)], 512, 100), "ends behind the file's end"),
        (
            gnu(&[(0, 512)], 100, 1000),
            "more or less than the entry's data",
        ),
        (
            Tar::new().head(Head {
                flag: b'S',
                ..Head::default()
            }),
            "not in GNU format",
        ),
        (v1(b"", b"10"), "the map is longer than the entry's data"),
        (v1(b"x\n", b"10"), "a line of the map is not a number"),
        (
            v1(b"123456789012345678901\n", b"10"),
            "a number in the map is too long",
        ),
        (v1(b"1\n18446744073709551615\n2\n", b"10"), "beyond 2^64"),
        (v1(b"1\n0\n5\n", b"x"), "a value is not a number"),
        (
            v0(
                &[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")],
                b"",
            ),
            "not known",
        ),
        (
            v0(&[("GNU.sparse.map", b"0,1")], b"x"),
            "real size is missing",
        ),
        (v0(&[("GNU.sparse.map", b"0")], b"x"), "not a list of pairs"),
        (
            v0(&[("GNU.sparse.numbytes", b"1")], b"x"),
            "a length has no offset",
        ),
        (
            v0(
                &[("GNU.sparse.offset", b"1"), ("GNU.sparse.offset", b"1")],
                b"x",
            ),
            "an offset has no length",
        ),
        (
            v0(
                &[
                    ("GNU.sparse.size", b"9"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.map", b"0,1"),
                ],
                b"x",
            ),
            "as many segments",
        ),
    ];
    for (tar, message) in cases {
        refuse(&tar.end(), Remedy::Rebuild, message);
    }
}
