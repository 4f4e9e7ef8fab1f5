#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    time::Instant,
};

use tempfile::TempDir;

use super::*;
use crate::{
    shm::ShmTransport,
    transport::{Access, RegionId, Transport, TransportError, Write},
};

const MIB: u64 = 1 << 20;

fn config(dir: &TempDir) -> DonorConfig {
    DonorConfig {
        huge: HugePages::Never,
        ..DonorConfig::new("test", dir.path().join("donor"), 4 * MIB)
    }
}

fn start(config: &DonorConfig) -> Result<DonorServer, DonorError> {
    DonorServer::start(config.clone())
}

fn connect(server: &DonorServer) -> Result<ShmTransport, TransportError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    ShmTransport::connect(
        &server.config().socket,
        0,
        Access::ReadWrite,
        Token::NONE,
        deadline,
    )
}

#[test]
fn lends_what_can_be_lent() {
    let gib = 1024 * MIB;
    for (bytes, unit, regions, rest) in [
        (MIB, 0, 0, 0),
        (2 * MIB, 0, 0, 2 * MIB),
        (5 * MIB - 1, 0, 0, 4 * MIB),
        (100 * MIB, 16 * MIB, 6, 4 * MIB),
        (gib, 32 * MIB, 32, 0),
        (8 * gib, 256 * MIB, 32, 0),
        (10 * gib - MIB, 320 * MIB, 31, 318 * MIB),
        (1024 * gib, 32 * gib, 32, 0),
    ] {
        let mut wanted = vec![unit; regions];
        wanted.extend((rest > 0).then_some(rest));
        assert_eq!(DonorConfig::new("n", "s", bytes).regions, wanted, "{bytes}");
        assert!(wanted.len() <= 33);
    }
}

#[test]
fn configurations_that_make_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(&dir);
    for (change, says) in [
        (
            DonorConfig {
                regions: vec![],
                ..good.clone()
            },
            "donor test: 0 regions, must be 1 to 64",
        ),
        (
            DonorConfig {
                regions: vec![2 * MIB; 65],
                ..good.clone()
            },
            "donor test: 65 regions, must be 1 to 64",
        ),
        (
            DonorConfig {
                regions: vec![0],
                ..good.clone()
            },
            "a region of 0 bytes",
        ),
        (
            DonorConfig {
                regions: vec![2 * MIB, MIB],
                ..good.clone()
            },
            "a region of 1048576 bytes",
        ),
        (
            DonorConfig {
                regions: vec![1 << 47],
                ..good.clone()
            },
            "a region of 140737488355328 bytes",
        ),
        (
            DonorConfig {
                epoch: Some(0),
                ..good.clone()
            },
            "epoch 0 means none",
        ),
        (
            DonorConfig {
                max_connections: 0,
                ..good.clone()
            },
            "no connections at all",
        ),
        (
            DonorConfig {
                socket_mode: 0o1777,
                ..good.clone()
            },
            "beyond 0777",
        ),
        (
            DonorConfig::new("test", &good.socket, MIB),
            "0 regions, must be 1 to 64",
        ),
    ] {
        let error = start(&change).unwrap_err();
        assert!(matches!(error, DonorError::Config { .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(!good.socket.exists());
    }
    let long = DonorConfig {
        socket: dir.path().join("x".repeat(120)),
        ..good.clone()
    };
    let error = start(&long).unwrap_err();
    assert!(
        matches!(
            error,
            DonorError::Io {
                what: "naming the socket",
                ..
            }
        ),
        "{error:?}"
    );
    let nowhere = DonorConfig {
        socket: dir.path().join("no/such/dir"),
        ..good
    };
    assert!(matches!(
        start(&nowhere).unwrap_err(),
        DonorError::Io { .. }
    ));
}

#[test]
fn epochs_are_random_and_fit() {
    let epochs: Vec<_> = (0..100).map(|_| random_epoch().unwrap()).collect();
    assert!(
        epochs
            .iter()
            .all(|epoch| *epoch > 0 && *epoch <= i64::MAX as u64)
    );
    assert!(epochs.windows(2).all(|pair| pair[0] != pair[1]));
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        epoch: Some(7),
        ..config(&dir)
    })
    .unwrap();
    assert_eq!(server.epoch(), 7);
    assert_eq!(connect(&server).unwrap().epoch(), 7);
}

#[test]
fn describes_what_it_lends() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        regions: vec![2 * MIB, 6 * MIB],
        ..config(&dir)
    })
    .unwrap();
    let region = |id, len| RegionInfo {
        id: RegionId(id),
        len,
        huge_pages: false,
    };
    assert_eq!(server.regions(), [region(0, 2 * MIB), region(1, 6 * MIB)]);
    assert_eq!(connect(&server).unwrap().regions(), server.regions());
    assert_eq!(
        server.address(),
        format!("shm:{}/donor", dir.path().display())
    );
}

#[test]
fn one_donor_per_socket() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(&config(&dir)).unwrap();
    let error = start(&config(&dir)).unwrap_err();
    assert!(
        matches!(&error, DonorError::InUse(path) if *path == first.config().socket),
        "{error:?}"
    );
    connect(&first).unwrap();
    first.stop();
    assert!(!dir.path().join("donor").exists());
    start(&config(&dir)).unwrap();
}

#[test]
fn sockets_of_the_dead_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("donor");
    // A socket whose process is gone without having removed it.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = start(&config(&dir)).unwrap();
    connect(&server).unwrap();
}

#[test]
fn sockets_of_the_living_and_other_files_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("donor");
    let other = UnixListener::bind(&path).unwrap();
    assert!(matches!(
        start(&config(&dir)).unwrap_err(),
        DonorError::InUse(_)
    ));
    drop(other);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert!(matches!(
        start(&config(&dir)).unwrap_err(),
        DonorError::NotASocket(_)
    ));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    assert!(matches!(
        start(&config(&dir)).unwrap_err(),
        DonorError::NotASocket(_)
    ));
}

#[test]
fn only_its_own_socket_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&config(&dir)).unwrap();
    let path = server.config().socket.clone();
    // Not a second socket: a file system may give that the inode number of the first.
    fs::rename(&path, dir.path().join("moved")).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    server.stop();
    assert!(path.exists());
}

#[test]
fn sockets_have_their_mode() {
    for mode in [0o600, 0o660, 0o666] {
        let dir = tempfile::tempdir().unwrap();
        let _server = start(&DonorConfig {
            socket_mode: mode,
            ..config(&dir)
        })
        .unwrap();
        let got = fs::metadata(dir.path().join("donor"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(got & 0o777, mode);
    }
}

#[test]
fn a_new_epoch_gives_memory_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&config(&dir)).unwrap();
    let lent = server.shared.lent.read().clone().unwrap();
    let transport = connect(&server).unwrap();
    let batch = [Write {
        region: RegionId(0),
        offset: 0,
        from: &[1; 8192],
    }];
    transport
        .write(&batch, Instant::now() + Duration::from_secs(10))
        .unwrap();
    let before = server.epoch();
    let epoch = server.renew(&[2 * MIB, 2 * MIB]).unwrap();
    assert_ne!(epoch, before);
    assert_eq!(server.epoch(), epoch);
    assert_eq!(server.regions().len(), 2);
    // The reader still maps it, and this test still holds it.
    let file = fs::File::from(lent.regions[0].memory.read_only().unwrap());
    assert_eq!(
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()),
        0
    );
    assert_eq!(connect(&server).unwrap().epoch(), epoch);
}

#[test]
fn a_new_epoch_that_fails_lends_nothing_until_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let server = start(&DonorConfig {
        populate: true,
        ..config(&dir)
    })
    .unwrap();
    let before = server.epoch();
    assert!(matches!(
        server.renew(&[]).unwrap_err(),
        DonorError::Config { .. }
    ));
    assert_eq!(server.epoch(), before, "a wrong wish changes nothing");
    connect(&server).unwrap();
    let error = server.renew(&[1 << 46]).unwrap_err();
    assert!(matches!(error, DonorError::Memory { .. }), "{error:?}");
    assert_ne!(server.epoch(), before);
    assert_eq!(server.regions(), []);
    assert!(matches!(
        connect(&server).unwrap_err(),
        TransportError::Unreachable { .. }
    ));
    let epoch = server.renew(&[2 * MIB]).unwrap();
    assert_eq!(connect(&server).unwrap().epoch(), epoch);
}

#[test]
fn stopping_leaves_no_thread_and_no_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    // Descriptors of this donor alone: other tests of this process come and go.
    let ours = || {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        let links = links.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|link| link.starts_with(dir.path())).count()
    };
    let server = start(&config(&dir)).unwrap();
    assert!(server.is_running());
    let reader = connect(&server).unwrap();
    assert_eq!(ours(), 1, "the lock");
    let shared = Arc::downgrade(&server.shared);
    server.stop();
    assert_eq!(ours(), 0);
    assert!(
        shared.upgrade().is_none(),
        "the thread still holds what was lent"
    );
    drop(reader);
}
