//! The real mount, by system calls. Needs root and `/dev/fuse`; without them it fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/real.rs"]
mod real;
#[path = "support/support.rs"]
mod support;
use support::{model, world};

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use harbour_fs::{
    Config,
    fastview::{self, FastViewError, Source},
    session::{self, MountConfig, MountError, Unmount},
};
use harbour_image::tree::{Kind, Tree};
use model::{Model, meta, noise};
use nix::mount::{MntFlags, MsFlags};
use real::{Real, compare, drop_caches, getdents, mounted, xattr};
use rustix::io::Errno;
use world::World;

#[test]
fn everything_is_as_in_the_tree_cold_and_warm() {
    let (real, layer_model, image_model, [layer, rootfs, _]) = mounted(500);
    for _ in 0..2 {
        compare(&layer, &layer_model, true);
        compare(&rootfs, &image_model, true);
        drop_caches();
        compare(&layer, &layer_model, true);
    }
    assert_eq!(
        xattr(&layer.join("opaque"), b"user.overlay.opaque").unwrap(),
        b"y"
    );
    assert_eq!(
        xattr(&layer.join("usr"), b"user.overlay.opaque"),
        Err(Errno::NODATA)
    );
    let why =
        String::from_utf8(xattr(&layer.join("marked"), b"user.harbour.why").unwrap()).unwrap();
    assert!(why.contains("\"objects\":1"), "{why}");
    let by_link = real.path("images/r/app/v1/layers/0/usr/bin/f4097");
    assert_eq!(fs::metadata(&by_link).unwrap().size(), 4097);
    assert_eq!(
        fs::canonicalize(by_link).unwrap(),
        layer.join("usr/bin/f4097")
    );
    let manifest = fs::read_to_string(real.path("images/r/app/v1/manifest.json")).unwrap();
    assert_eq!(manifest, "{\"manifest\":2}");
    let status: serde_json::Value =
        serde_json::from_slice(&fs::read(real.path(".status/status.json")).unwrap()).unwrap();
    assert!(status["reads"].as_u64().unwrap() > 0);
    let space = rustix::fs::statvfs(&layer).unwrap();
    assert!(space.f_blocks > 1000 && space.f_bfree == 0 && space.f_namemax == 255);
    let again = || -> u64 {
        std::thread::sleep(Duration::from_millis(600));
        let page = fs::read(real.path(".status/status.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&page).unwrap()["reads"]
            .as_u64()
            .unwrap()
    };
    let before = again();
    drop_caches();
    fs::read(layer.join("usr/bin/f65536")).unwrap();
    assert!(again() > before, "a status page is not kept");
    assert_eq!(real.fs.stats().failed, 0);
    let keep = File::open(layer.join("marked")).unwrap();
    assert!(real.fs.held().contains(&1));
    drop(keep);
    real.end();
}

#[test]
fn a_large_directory_is_listed_with_any_buffer_and_from_any_position() {
    let (real, _, _, [layer, ..]) = mounted(20_000);
    let large = layer.join("large");
    let names = |entries: &[real::Dirent]| -> BTreeSet<Vec<u8>> {
        entries.iter().map(|entry| entry.name.clone()).collect()
    };
    for room in [512, 4096, 1 << 20] {
        let whole = getdents(&large, room, 0);
        assert_eq!(whole.len(), 20_002, "room {room}");
        assert_eq!(names(&whole).len(), 20_002);
        for place in [0, 1, 2, 100, 1234, 19_999, 20_000] {
            let rest = getdents(&large, room, whole[place].next);
            assert_eq!(
                rest,
                whole[place + 1..],
                "room {room}, behind entry {place}"
            );
        }
    }
    drop_caches();
    let whole = getdents(&large, 600, 0);
    assert_eq!(names(&whole).len(), 20_002);
    real.end();
}

#[test]
fn programs_run_from_the_mount_and_many_read_at_once() {
    let world = World::new();
    let mut model = Model::new(4 << 20);
    let program = fs::read("/bin/sh").unwrap();
    model.file(Tree::ROOT, b"sh", meta(0o755), program, false);
    let big = noise(3, 24 << 20);
    model.file(Tree::ROOT, b"big", meta(0o644), big.clone(), false);
    let layer = world.layer(&mut model, 1, &[1]);
    let name = layer.diff_id.short();
    world.show(vec![], vec![layer]);
    let real = Real::new(&world, Config::default());
    let layer = real.path("layers").join(name);
    // Running a program is reading it through mmap.
    for _ in 0..2 {
        let out = Command::new(layer.join("sh"))
            .args(["-c", "echo $((6 * 7))"])
            .output()
            .unwrap();
        assert_eq!(
            (out.status.code(), &out.stdout[..]),
            (Some(0), &b"42\n"[..])
        );
        drop_caches();
    }
    std::thread::scope(|scope| {
        for seed in 0..8u64 {
            let (path, big) = (layer.join("big"), &big);
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                let mut state = seed + 1;
                let mut buffer = vec![0; 300_000];
                for _ in 0..60 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let offset = (state >> 20) as usize % (big.len() - 1);
                    let len = (state >> 44) as usize % buffer.len() + 1;
                    let len = len.min(big.len() - offset);
                    file.read_exact_at(&mut buffer[..len], offset as u64)
                        .unwrap();
                    assert!(
                        buffer[..len] == big[offset..offset + len],
                        "{len} bytes at {offset}"
                    );
                }
            });
        }
    });
    assert_eq!(real.fs.stats().wrong, 0);
    real.end();
}

#[test]
fn every_change_is_refused_with_erofs() {
    let (real, _, _, [layer, ..]) = mounted(0);
    let file = layer.join("usr/bin/f4096");
    let dir = layer.join("usr");
    let new = dir.join("new");
    let refused: Vec<(&str, io::Result<()>)> = vec![
        ("create", File::create(&new).map(drop)),
        (
            "create in control",
            File::create(real.path("images/new")).map(drop),
        ),
        (
            "write",
            OpenOptions::new().write(true).open(&file).map(drop),
        ),
        (
            "append",
            OpenOptions::new().append(true).open(&file).map(drop),
        ),
        (
            "truncate",
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(&file)
                .map(drop),
        ),
        ("mkdir", fs::create_dir(&new)),
        ("rmdir", fs::remove_dir(layer.join("large"))),
        ("unlink", fs::remove_file(&file)),
        ("rename", fs::rename(&file, &new)),
        ("link", fs::hard_link(&file, &new)),
        ("symlink", symlink("x", &new)),
        (
            "chmod",
            fs::set_permissions(&file, fs::Permissions::from_mode(0o777)),
        ),
        ("chown", std::os::unix::fs::lchown(&file, Some(1), Some(1))),
        (
            "utimes",
            rustix::fs::utimensat(rustix::fs::CWD, &file, &now(), rustix::fs::AtFlags::empty())
                .map_err(Into::into),
        ),
        ("mknod", mknod(&new).map_err(Into::into)),
        (
            "setxattr",
            rustix::fs::setxattr(&file, "user.x", b"y", rustix::fs::XattrFlags::empty())
                .map_err(Into::into),
        ),
        (
            "removexattr",
            rustix::fs::removexattr(layer.join("marked"), "user.colour").map_err(Into::into),
        ),
        (
            "access",
            rustix::fs::access(&file, rustix::fs::Access::WRITE_OK).map_err(Into::into),
        ),
    ];
    for (what, result) in refused {
        let error = result
            .err()
            .unwrap_or_else(|| panic!("{what} was let through"));
        assert_eq!(
            error.raw_os_error(),
            Some(Errno::ROFS.raw_os_error()),
            "{what}: {error}"
        );
    }
    real.end();
}

fn now() -> rustix::fs::Timestamps {
    let time = rustix::fs::Timespec {
        tv_sec: 1,
        tv_nsec: 2,
    };
    rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn mknod(path: &Path) -> rustix::io::Result<()> {
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0)
}

/// Unmounts when it goes, so that the mount below can go too.
struct Over(PathBuf);

impl Over {
    fn overlay(lower: &str, at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let options = format!("lowerdir={lower}{options}");
        nix::mount::mount(
            Some("overlay"),
            &at,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        Self(at)
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn an_overlay_on_layers_hides_what_is_deleted_and_takes_changes() {
    let world = World::new();
    let mut bottom = Model::new(1 << 20);
    let dir = bottom.dir(Tree::ROOT, b"dir");
    for (at, name) in [
        (Tree::ROOT, "kept"),
        (Tree::ROOT, "deleted"),
        (dir, "hidden"),
    ] {
        bottom.file(
            at,
            name.as_bytes(),
            meta(0o644),
            name.as_bytes().to_vec(),
            false,
        );
    }
    let mut top = Model::new(1 << 20);
    top.add(Tree::ROOT, b"deleted", meta(0), Kind::Whiteout);
    let opaque = harbour_image::tree::Dir {
        opaque: true,
        ..Default::default()
    };
    let dir = top.add(Tree::ROOT, b"dir", meta(0o755), Kind::Dir(opaque));
    top.file(dir, b"seen", meta(0o644), b"seen".to_vec(), false);
    let layers = vec![
        world.layer(&mut bottom, 1, &[1]),
        world.layer(&mut top, 2, &[1]),
    ];
    let [low, high] = [layers[0].diff_id.short(), layers[1].diff_id.short()];
    world.show(vec![], layers);
    let real = Real::new(&world, Config::default());
    let lower = format!(
        "{}:{}",
        real.path("layers").join(&high).display(),
        real.path("layers").join(&low).display()
    );
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let (upper, work) = (scratch.path().join("up"), scratch.path().join("work"));
    fs::create_dir_all(&upper).unwrap();
    fs::create_dir_all(&work).unwrap();
    let more = format!(",upperdir={},workdir={}", upper.display(), work.display());
    let over = Over::overlay(&lower, real.dir.path().join("over"), &more);
    let names = |path: &Path| -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&over.0), ["dir", "kept"]);
    assert_eq!(names(&over.0.join("dir")), ["seen"]);
    assert!(!over.0.join("deleted").exists() && !over.0.join("dir/hidden").exists());
    let mut kept = OpenOptions::new()
        .append(true)
        .open(over.0.join("kept"))
        .unwrap();
    kept.write_all(b", changed").unwrap();
    drop(kept);
    assert_eq!(
        fs::read_to_string(over.0.join("kept")).unwrap(),
        "kept, changed"
    );
    assert_eq!(
        fs::read_to_string(real.path("layers").join(&low).join("kept")).unwrap(),
        "kept"
    );
    fs::rename(over.0.join("kept"), over.0.join("moved")).unwrap();
    assert_eq!(names(&over.0), ["dir", "moved"]);
    // For overlays without privilege the same marks go by another name.
    drop(over);
    let over = Over::overlay(&lower, real.dir.path().join("over"), ",userxattr");
    assert_eq!(names(&over.0), ["dir", "kept"]);
    assert_eq!(names(&over.0.join("dir")), ["seen"]);
    drop(over);
    real.end();
}

#[test]
fn content_comes_before_it_is_asked_for_and_is_right() {
    let world = World::new();
    let mut model = Model::new(1 << 20);
    let mut dirs = Vec::new();
    for dir in 0..12u32 {
        let id = model.dir(Tree::ROOT, format!("d{dir:02}").as_bytes());
        for file in 0..40u32 {
            let seed = u64::from(dir * 100 + file);
            let bytes = noise(seed, 100 + 311 * seed as usize % 9000);
            model.file(
                id,
                format!("f{file:02}").as_bytes(),
                meta(0o644),
                bytes,
                false,
            );
        }
        dirs.push(format!("d{dir:02}"));
    }
    let layer = world.layer(&mut model, 1, &[1]);
    let name = layer.diff_id.short();
    world.show(vec![], vec![layer]);
    let real = Real::new(&world, Config::default());
    let root = real.path("layers").join(name);
    let read = |dir: &str| {
        let mut sum = 0;
        for entry in fs::read_dir(root.join(dir)).unwrap() {
            sum += fs::read(entry.unwrap().path()).unwrap().len() as u64;
            // The kernel is not to be faster than the thread that brings what comes next.
            std::thread::sleep(Duration::from_millis(1));
        }
        sum
    };
    // Listing alone brings nothing.
    for dir in &dirs {
        assert_eq!(getdents(&root.join(dir), 8192, 0).len(), 42);
    }
    assert_eq!(real.fs.stats().ahead_bytes, 0);
    drop_caches();
    let all: u64 = dirs.iter().map(|dir| read(dir)).sum();
    let ahead = real.fs.stats().ahead_bytes;
    assert!(ahead > all / 2, "{ahead} of {all}");
    // What was brought is what is there.
    compare(&root, &model, true);
    assert_eq!(real.fs.stats().failed, 0);
    real.end();
}

#[test]
fn the_fast_view_is_the_same_tree() {
    let (real, layer_model, _, [layer, _, erofs]) = mounted(2000);
    let views = real.dir.path().join("view");
    let devices = MountConfig {
        opens: true,
        ..MountConfig::new(real.dir.path().join("devices"))
    };
    let devices = session::mount(Arc::clone(&real.fs), &devices).unwrap();
    let name = erofs.file_stem().unwrap().to_str().unwrap();
    let part = |suffix| {
        devices
            .mountpoint()
            .join(format!(".devices/{name}.{suffix}"))
    };
    let parts = Source::Parts {
        head: part("head"),
        bulk: part("bulk"),
    };
    let len = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(len(&part("bulk")) > 1 << 20);
    assert_eq!(len(&part("head")) + len(&part("bulk")), len(&erofs));
    for source in [Source::Whole(erofs.clone()), parts.clone()] {
        let at = views.join("one");
        match fastview::mount(&source, &at, 1024) {
            Ok(()) => {}
            Err(FastViewError::Unsupported(why)) => {
                panic!("this test needs a kernel with a fast view: {why}")
            }
            Err(error) => panic!(
                "{error}: {:?}",
                std::error::Error::source(&error).map(ToString::to_string)
            ),
        }
        compare(&at, &layer_model, true);
        drop_caches();
        compare(&at, &layer_model, true);
        let inode =
            |root: &Path| fs::metadata(root.join("usr/bin")).unwrap().ino() & ((1 << 40) - 1);
        assert_eq!(inode(&at), inode(&layer), "one nid behind both doors");
        let over = Over::overlay(
            &format!("{}:{}", at.display(), layer.display()),
            real.dir.path().join("over"),
            "",
        );
        assert!(!over.0.join("usr/deleted").exists());
        assert_eq!(fs::read(over.0.join("one name")).unwrap(), noise(5, 5000));
        drop(over);
        let listed = fastview::list(&views).unwrap();
        assert_eq!(
            listed
                .iter()
                .map(|mount| mount.target.clone())
                .collect::<Vec<_>>(),
            [at.canonicalize().unwrap()]
        );
        let below = if source == parts {
            &devices
        } else {
            &real.mounted
        };
        let busy = below.unmount(Unmount::Plain).unwrap_err();
        assert!(
            matches!(&busy, MountError::Unmount { source, .. } if source.kind() == io::ErrorKind::ResourceBusy)
        );
        fastview::unmount(&at, false).unwrap();
        assert!(!at.exists());
    }
    fastview::mount(&parts, &views.join("left"), 1024).unwrap();
    assert_eq!(fastview::clean(&views).unwrap(), 1);
    assert_eq!(fastview::list(&views).unwrap(), []);
    fastview::unmount(&views.join("never was"), false).unwrap();
    devices.unmount(Unmount::Plain).unwrap();
    assert_eq!(real.fs.stats().failed, 0);
    real.end();
}

#[test]
fn an_open_directory_is_used_on_after_the_kernel_forgot_what_is_in_it() {
    let (real, _, _, [layer, ..]) = mounted(0);
    let dir = File::open(layer.join("usr/bin")).unwrap();
    drop_caches();
    let below = rustix::fs::statat(&dir, "f100000", rustix::fs::AtFlags::empty()).unwrap();
    assert_eq!(below.st_size, 100_000);
    let up = rustix::fs::statat(&dir, "..", rustix::fs::AtFlags::empty()).unwrap();
    assert_eq!(up.st_ino, fs::metadata(layer.join("usr")).unwrap().ino());
    drop(dir);
    real.end();
}
