//! Tars made to break out, to hang, or to eat memory.

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use harbour_image::source::SourceError;
use proptest::prelude::*;

use crate::{docker::Archive, fixture::Image, resolve, whole};

/// A header with raw name and link, its checksum right.
fn header(kind: tar::EntryType, name: &[u8], link: &[u8], size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn set_checksum(header: &mut [u8]) {
    let others = header[..148].iter().chain(&header[156..]);
    let sum: u32 = others.map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn save(dir: &Path, members: &[Vec<u8>]) -> String {
    let path = dir.join("bad.tar");
    let good = Archive::old(&Image::new("amd64", 1, 100), &["a:1"]).bytes();
    std::fs::write(&path, [members.concat(), good].concat()).unwrap();
    format!("docker-archive:{}", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_links_that_lead_out_are_refused() {
    use tar::EntryType::{Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    assert!(resolve(&save(dir.path(), &[])).await.is_ok());
    for (member, why) in [
        (header(Regular, b"../x", b"", 0), "leads out"),
        (header(Regular, b"/etc/passwd", b"", 0), "leads out"),
        (header(Regular, b"a/../../x", b"", 0), "leads out"),
        (header(Symlink, b"a", b"/etc/passwd", 0), "leads out"),
        (header(Symlink, b"a", b"../x", 0), "leads out"),
        (header(Symlink, b"a/b", b"../../x", 0), "leads out"),
        (header(Link, b"a/b", b"../x", 0), "leads out"),
        (header(Symlink, b"a", b"", 0), "no target"),
        (header(Regular, b"\xff\xfe", b"", 0), "not UTF-8"),
    ] {
        let error = resolve(&save(dir.path(), &[member])).await.unwrap_err();
        assert!(matches!(error, SourceError::Archive { .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn links_in_a_circle_and_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for target in ["layer.tar", "b", "missing"] {
        let image = Image::new("amd64", 1, 100);
        let mut archive = Archive::old(&image, &[]);
        archive.files.remove(0);
        let name = format!("{:064x}", 0);
        archive.links = vec![
            (format!("{name}/layer.tar"), target.to_owned()),
            (format!("{name}/b"), "layer.tar".to_owned()),
        ];
        let text = format!("docker-archive:{}", archive.save(dir.path()).display());
        let error = resolve(&text).await.unwrap_err();
        let circle = target != "missing";
        assert_eq!(
            whole(&error).contains("links lead"),
            circle,
            "{}",
            whole(&error)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_and_headers_that_lie_cost_little() {
    use tar::EntryType::{GNULongName, GNUSparse, Regular, XHeader};
    let dir = tempfile::tempdir().unwrap();
    let mut huge = header(Regular, b"x", b"", 0);
    // Base 256: 2^63 bytes.
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut huge);
    let mut letters = header(Regular, b"x", b"", 0);
    letters[124..130].copy_from_slice(b"zzzzzz");
    set_checksum(&mut letters);
    let pax = |record: &str| {
        let mut bytes = header(XHeader, b"x", b"", record.len() as u64);
        bytes.extend_from_slice(record.as_bytes());
        bytes.resize(1024, 0);
        bytes
    };
    let long = (0..20)
        .flat_map(|_| [header(GNULongName, b"x", b"", 1), vec![b'a'; 512]].concat())
        .collect();
    for (why, member) in [
        ("cut off", huge),
        ("cut off", header(Regular, b"x", b"", 1_000_000_000_000)),
        ("size is no number", letters),
        ("too long", header(GNULongName, b"x", b"", 1 << 30)),
        ("too many extension headers", long),
        ("too long", header(XHeader, b"x", b"", 1 << 30)),
        (
            "no number",
            [
                pax("29 size=99999999999999999999\n"),
                header(Regular, b"x", b"", 0),
            ]
            .concat(),
        ),
        (
            "impossible",
            [
                pax("29 size=18446744073709551615\n"),
                header(Regular, b"x", b"", 0),
            ]
            .concat(),
        ),
        ("PAX header is damaged", pax("nonsense")),
        ("sparse", header(GNUSparse, b"x", b"", 0)),
        ("not a tar", vec![1; 512]),
    ] {
        let start = Instant::now();
        let error = resolve(&save(dir.path(), &[member])).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Archive { .. }),
            "{why}: {error}"
        );
        assert!(error.to_string().contains(why), "{why}: {error}");
        assert!(start.elapsed() < Duration::from_secs(2), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_members_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let members: Vec<Vec<u8>> = (0..100_001)
        .map(|n| header(tar::EntryType::Regular, format!("f{n}").as_bytes(), b"", 0))
        .collect();
    let error = resolve(&save(dir.path(), &members)).await.unwrap_err();
    assert!(error.to_string().contains("too many"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_archives_and_files_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = Archive::old(&Image::new("amd64", 1, 5000), &["a:1"]).bytes();
    let path = dir.path().join("cut.tar");
    for len in [0, 1, 100, 511, 512, 700, 3000, 6000] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = resolve(&format!("docker-archive:{}", path.display()))
            .await
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Archive { .. }),
            "{len}: {error}"
        );
    }
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert!(made.success());
    for path in [fifo.as_path(), Path::new("/dev/zero"), dir.path()] {
        let error = resolve(&format!("docker-archive:{}", path.display()))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
    let error = resolve(&format!("docker-archive:{}/missing", dir.path().display()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), harbour_image::source::ErrorKind::Gone);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_cut_after_it_was_opened_fails_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = Archive::old(&Image::new("amd64", 1, 500_000), &["a:1"]).save(dir.path());
    let source = crate::open(&format!("docker-archive:{}", path.display()))
        .await
        .unwrap();
    let resolved = source.resolve(None).await.unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1000)
        .unwrap();
    assert!(crate::layer(&source, &resolved, 0).await.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn changed_bytes_give_an_error_or_the_same_image(changes in prop::collection::vec((0usize..20_000, any::<u8>()), 1..8)) {
        let image = Image::new("amd64", 1, 2000);
        let mut bytes = Archive::old(&image, &["a:1"]).bytes();
        let len = bytes.len();
        for (at, value) in changes {
            bytes[at % len] = value;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        runtime.block_on(async {
            let Ok(source) = crate::open(&format!("docker-archive:{}", path.display())).await else { return };
            let Ok(resolved) = source.resolve(None).await else { return };
            for number in 0..resolved.layers.len() {
                if let Ok(bytes) = crate::layer(&source, &resolved, number).await {
                    assert_eq!(harbour_image::digest::Digest::of(&bytes), resolved.layers[number].digest);
                }
            }
        });
    }
}
