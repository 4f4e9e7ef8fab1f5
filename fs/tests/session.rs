//! The life of a mount: changes while it is there, faults, and its end. Needs root and `/dev/fuse`;
//! without them it fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/real.rs"]
mod real;
#[path = "support/support.rs"]
mod support;
use support::{model, world};

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    time::{Duration, Instant},
};

use harbour_fs::{
    Config,
    session::{self, MountConfig, MountError, Unmount},
};
use harbour_image::tree::Tree;
use model::{Model, meta, noise};
use nix::mount::MsFlags;
use real::{Real, drop_caches, mounted};
use rustix::io::Errno;
use world::{Fault, World};

#[test]
fn changes_of_the_catalogue_show_at_once_and_held_files_stay() {
    let world = World::new();
    let version = |text: &str| {
        let mut model = Model::new(1 << 20);
        model.file(
            Tree::ROOT,
            b"version",
            meta(0o644),
            text.as_bytes().to_vec(),
            false,
        );
        model
    };
    let one = world.image(("r", "app", "1"), &mut version("one"), 1, &[1]);
    world.show(vec![one], vec![]);
    // So long that only being told can make the kernel look again.
    let real = Real::new(
        &world,
        Config {
            control_ttl: Duration::from_secs(3600),
            ..Config::default()
        },
    );
    let path = real.path("images/r/app/1/rootfs/version");
    assert_eq!(fs::read_to_string(&path).unwrap(), "one");
    assert!(fs::metadata(real.path("images/r/app/2")).is_err());
    let held = File::open(&path).unwrap();
    let config = real.path("images/r/app/1/config.json");
    assert_eq!(fs::read_to_string(&config).unwrap(), "{\"config\":1}");

    let two = world.image(("r", "app", "1"), &mut version("two, longer"), 2, &[1]);
    let other = world.image(("r", "app", "2"), &mut version("other"), 30, &[1]);
    world.show(vec![two, other], vec![]);
    real.mounted.invalidate(&real.fs.snapshot_changed());
    assert_eq!(fs::read_to_string(&path).unwrap(), "two, longer");
    assert_eq!(fs::read_to_string(&config).unwrap(), "{\"config\":2}");
    assert_eq!(
        fs::read_to_string(real.path("images/r/app/2/rootfs/version")).unwrap(),
        "other"
    );
    assert_eq!(fs::read_dir(real.path("images/r/app")).unwrap().count(), 2);
    assert!(
        real.fs.held().contains(&1),
        "the open file holds the first image"
    );
    drop_caches();
    let mut text = [0; 3];
    held.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"one");
    drop(held);
    world.show(vec![], vec![]);
    real.mounted.invalidate(&real.fs.snapshot_changed());
    assert_eq!(fs::read_dir(real.path("images")).unwrap().count(), 0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !real.fs.held().is_empty() {
        assert!(
            Instant::now() < deadline,
            "still held: {:?}",
            real.fs.held()
        );
        drop_caches();
        std::thread::sleep(Duration::from_millis(50));
    }
    real.end();
}

#[test]
fn a_file_that_nobody_can_give_is_eio_and_disturbs_nothing_else() {
    let world = World::new();
    let mut good = Model::new(1 << 20);
    good.file(Tree::ROOT, b"good", meta(0o644), noise(1, 500_000), false);
    let mut bad = Model::new(1 << 20);
    for number in 0..12 {
        bad.file(
            Tree::ROOT,
            format!("bad{number}").as_bytes(),
            meta(0o644),
            noise(50 + number, 300_000),
            false,
        );
    }
    let layers = vec![
        world.layer(&mut good, 1, &[1]),
        world.layer(&mut bad, 2, &[2]),
    ];
    let [good_dir, bad_dir] = [layers[0].diff_id.short(), layers[1].diff_id.short()];
    world.show(vec![], layers);
    let config = Config {
        deadline: Duration::from_secs(3),
        quick: Duration::from_millis(50),
        ..Config::default()
    };
    let real = Real::new(&world, config);
    let (good_dir, bad_dir) = (
        real.path("layers").join(good_dir),
        real.path("layers").join(bad_dir),
    );
    assert_eq!(fs::read_dir(&bad_dir).unwrap().count(), 12);
    for number in 0..12 {
        fs::metadata(bad_dir.join(format!("bad{number}"))).unwrap();
    }
    // Its index is in memory; its content hangs.
    world.refuse_refills(true);
    world.fault(2, Some(Fault::Hang));
    std::thread::scope(|scope| {
        for number in 0..12 {
            let path = bad_dir.join(format!("bad{number}"));
            scope.spawn(move || {
                let start = Instant::now();
                let error = fs::read(path).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
                assert!(
                    start.elapsed() < Duration::from_secs(15),
                    "{:?}",
                    start.elapsed()
                );
            });
        }
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        assert_eq!(fs::read(good_dir.join("good")).unwrap(), noise(1, 500_000));
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
    });
    world.fault(2, Some(Fault::Flip));
    assert_eq!(
        fs::read(bad_dir.join("bad0")).unwrap_err().raw_os_error(),
        Some(Errno::IO.raw_os_error())
    );
    world.fault(2, None);
    assert_eq!(fs::read(bad_dir.join("bad0")).unwrap(), noise(50, 300_000));
    assert!(real.fs.stats().failed > 0 && real.fs.stats().deferred > 0);
    real.end();
}

#[test]
fn unmounting_is_refused_while_in_use_and_can_be_forced() {
    let (real, _, _, [layer, ..]) = mounted(0);
    let file = File::open(layer.join("marked")).unwrap();
    let busy = real.mounted.unmount(Unmount::Plain).unwrap_err();
    assert!(matches!(busy, MountError::Unmount { .. }), "{busy}");
    assert!(real.mounted.is_alive());
    assert!(
        fs::metadata(layer.join("usr")).is_ok(),
        "a refused unmount changes nothing"
    );
    real.mounted.unmount(Unmount::Force).unwrap();
    assert!(!real.mounted.is_alive());
    assert!(fs::metadata(&layer).is_err());
    drop_caches();
    let mut byte = [0];
    assert!(file.read_exact_at(&mut byte, 0).is_err());
}

#[test]
fn a_lazy_unmount_serves_who_is_inside_to_the_end() {
    let (real, _, _, [layer, ..]) = mounted(0);
    let file = File::open(layer.join("marked")).unwrap();
    real.mounted.unmount(Unmount::Lazy).unwrap();
    assert!(fs::metadata(&layer).is_err());
    let mut content = vec![0; 20_000];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content == noise(9, 20_000));
    drop(file);
    let deadline = Instant::now() + Duration::from_secs(20);
    while real.mounted.is_alive() {
        assert!(
            Instant::now() < deadline,
            "the session did not end with its last user"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_dead_mount_is_cleared_and_a_live_one_is_not_touched() {
    let world = World::new();
    world.show(vec![], vec![]);
    let real = Real::new(&world, Config::default());
    let second = session::mount(
        world.fs(Config::default()),
        &MountConfig::new(real.path("")),
    );
    assert!(matches!(second, Err(MountError::Taken(_))), "{second:?}");
    assert!(real.mounted.is_alive());

    let place = real.dir.path().join("dead");
    fs::create_dir(&place).unwrap();
    for _ in 0..2 {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        nix::mount::mount(
            Some("x"),
            &place,
            Some("fuse.harbour"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        drop(device);
        if fs::metadata(&place).unwrap_err().raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) {
            break;
        }
    }
    let again = session::mount(world.fs(Config::default()), &MountConfig::new(&place)).unwrap();
    assert_eq!(fs::read_dir(place.join("images")).unwrap().count(), 0);
    drop(again);
    assert_eq!(
        fs::read_dir(&place).unwrap().count(),
        0,
        "dropping unmounts"
    );
    let file = real.dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let refused = session::mount(world.fs(Config::default()), &MountConfig::new(&file));
    assert!(
        matches!(refused, Err(MountError::Place { .. })),
        "{refused:?}"
    );
    let read_ahead = {
        let dev = fs::metadata(real.path("")).unwrap().dev();
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap()
    };
    assert_eq!(read_ahead.trim(), "2048");
    let capabilities = real.mounted.capabilities();
    for wanted in [
        "FUSE_DO_READDIRPLUS",
        "FUSE_PARALLEL_DIROPS",
        "FUSE_CACHE_SYMLINKS",
        "FUSE_POSIX_ACL",
    ] {
        assert!(capabilities.contains(&wanted), "{capabilities:?}");
    }
    real.end();
}
