//! What is served equals what `umoci unpack` writes and what a kernel overlay of independently
//! extracted layers shows: through the merged directories, the layer directories, an overlay of
//! those, the EROFS files, the kernel's mount of them, and an overlay on that.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use harbour_tests::{
    cluster::{Cluster, Pulled},
    fixtures::{self, Judged, cache},
    overlay::Overlay,
    registry::Registry,
    shell,
    tree::{Links, Rules, Tree},
};
use nix::mount::{MntFlags, MsFlags};

/// Differences shown of each comparison.
const SHOWN: usize = 25;

fn same(what: &str, judge: &Tree, served: &Path, rules: &Rules) -> Tree {
    let tree = Tree::scan(served).unwrap_or_else(|e| panic!("{what}: {e:#}"));
    judge
        .compare(&tree, rules)
        .unwrap()
        .into_result(what, SHOWN)
        .unwrap_or_else(|e| panic!("{e:#}"));
    tree
}

/// An overlay counts links and subdirectories its own way, and gives directories that a layer only implies that layer's defaults.
fn overlay_rules(judged: &Judged) -> Rules {
    let implied: BTreeSet<_> = judged
        .layers
        .iter()
        .flat_map(|l| l.implied().unwrap())
        .collect();
    Rules {
        links: Links::Names,
        dir_links: false,
        loose_dirs: implied,
        ..Rules::default()
    }
}

/// Whether this kernel mounts EROFS from a file: 6.12 and later with EROFS built in or loaded.
fn kernel_has_fast_view() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 12)
        && fs::read_to_string("/proc/filesystems")
            .unwrap()
            .contains("\terofs\n")
}

/// All doors to one image against both judges. `umoci` is absent where umoci cannot read the image.
fn check_image(cluster: &Cluster, image: &Pulled, judged: &Judged, has_umoci: bool) {
    let rootfs = cluster.rootfs(image).unwrap();
    let extracted = Overlay::read_only(&judged.lowers()).unwrap();
    let extracted_tree = Tree::scan(&extracted.path()).unwrap().without_ghosts();
    let merged = same(
        "overlay of extracted layers, rootfs",
        &extracted_tree,
        &rootfs,
        &overlay_rules(judged),
    );
    let whole = if has_umoci {
        Tree::scan(&judged.umoci).unwrap()
    } else {
        merged
    };
    if has_umoci {
        same("umoci, rootfs", &whole, &rootfs, &Rules::default());
    }

    let layers: Vec<_> = judged
        .layers
        .iter()
        .map(|l| Tree::scan(&judged.layer(l)).unwrap())
        .collect();
    for (layer, tree) in judged.layers.iter().zip(&layers) {
        same(
            &format!("extracted, layer {}", layer.dir),
            tree,
            &cluster.layer(&layer.diff_id),
            &Rules::default(),
        );
    }
    let ours: Vec<PathBuf> = judged
        .layers
        .iter()
        .rev()
        .map(|l| cluster.layer(&l.diff_id))
        .collect();
    let overlay = Overlay::read_only(&ours).unwrap();
    same(
        "overlay of extracted layers, overlay of ours",
        &extracted_tree,
        &overlay.path(),
        &Rules::default(),
    );
    drop(overlay);

    check_erofs(cluster, image, judged);
    if !kernel_has_fast_view() {
        let status = cluster.json("status").unwrap();
        assert!(
            !status["node"]["fast_view"]
                .as_str()
                .unwrap()
                .starts_with("on"),
            "{status}"
        );
        assert_eq!(
            fs::read_dir(cluster.run_dir().join("view")).map_or(0, Iterator::count),
            0
        );
        return;
    }
    let view = cluster.view(&image.manifest).unwrap();
    same("rootfs, fast view", &whole, &view, &Rules::default());
    let container = Overlay::writable(std::slice::from_ref(&view)).unwrap();
    let rules = Rules {
        dir_links: false,
        ..Rules::default()
    };
    // With a directory above, the root is that one.
    let rules = Rules {
        loose_dirs: BTreeSet::from([Vec::new()]),
        ..rules
    };
    same(
        "rootfs, overlay on the fast view",
        &whole,
        &container.path(),
        &rules,
    );
    // The node mounts images; the file of a layer is as good a disk to whoever mounts it.
    let mounts: Vec<_> = judged
        .layers
        .iter()
        .map(|l| ErofsMount::new(&cluster.erofs(&l.diff_id)))
        .collect();
    for ((layer, tree), view) in judged.layers.iter().zip(&layers).zip(&mounts) {
        same(
            &format!("extracted, EROFS mount of layer {}", layer.dir),
            tree,
            view.0.path(),
            &Rules::default(),
        );
    }
    let views: Vec<PathBuf> = mounts.iter().rev().map(|m| m.0.path().to_owned()).collect();
    let overlay = Overlay::read_only(&views).unwrap();
    same(
        "overlay of extracted layers, overlay of EROFS mounts",
        &extracted_tree,
        &overlay.path(),
        &Rules::default(),
    );
}

/// An EROFS file mounted by the kernel; unmounted when dropped.
struct ErofsMount(tempfile::TempDir);

impl ErofsMount {
    fn new(file: &Path) -> Self {
        let mount = Self(tempfile::tempdir().unwrap());
        nix::mount::mount(
            Some(file),
            mount.0.path(),
            Some("erofs"),
            MsFlags::MS_RDONLY,
            None::<&str>,
        )
        .unwrap();
        mount
    }
}

impl Drop for ErofsMount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn check_erofs(cluster: &Cluster, image: &Pulled, judged: &Judged) {
    let all = judged
        .layers
        .iter()
        .map(|l| cluster.erofs(&l.diff_id))
        .chain([cluster.erofs(&image.manifest)]);
    for file in all {
        shell::check("fsck.erofs", [&file], Duration::from_secs(120)).unwrap();
        shell::check(
            "dump.erofs",
            ["-s".as_ref(), file.as_os_str()],
            Duration::from_secs(60),
        )
        .unwrap();
    }
}

fn check_fixture(name: &str, lend: &str) {
    let judged = fixtures::judged(name).unwrap();
    let registry = Registry::with(&[name]).unwrap();
    let mut cluster = Cluster::start(lend).unwrap();
    let image = cluster.pull(&registry.image(name)).unwrap();
    assert_eq!(
        image.manifest, judged.manifest,
        "the manifest that was pulled"
    );
    assert_eq!(image.layers, judged.layers.len() as u64);
    check_image(&cluster, &image, &judged, name != "gnu");
    cluster.stop().unwrap();
}

macro_rules! images {
    ($($name:ident: $lend:literal,)*) => {
        $(#[test] fn $name() { check_fixture(stringify!($name), $lend); })*
    };
}

images! {
    base: "512MiB",
    python: "512MiB",
    app: "512MiB",
    web: "512MiB",
    science: "3GiB",
    many: "512MiB",
    odd: "512MiB",
    wide: "512MiB",
    gnu: "512MiB",
    zstd: "512MiB",
    mixed: "512MiB",
}

#[test]
fn docker_schema_2_and_archives_give_the_same_tree() {
    let judged = fixtures::judged("app").unwrap();
    fixtures::build(&["docker", "archives"]).unwrap();
    let registry = Registry::with(&["docker"]).unwrap();
    let cluster = Cluster::start("512MiB").unwrap();
    let umoci = Tree::scan(&judged.umoci).unwrap();
    let archives = cache().join("archives");
    let oci = cache().join("oci");
    for (n, reference) in [
        registry.image("docker"),
        format!(
            "docker-archive:{}",
            archives.join("app-docker.tar").display()
        ),
        format!("oci-archive:{}", archives.join("app-oci.tar").display()),
        format!("oci:{}:app", oci.display()),
    ]
    .iter()
    .enumerate()
    {
        let image = cluster.pull(reference).unwrap();
        same(
            reference,
            &umoci,
            &cluster.rootfs(&image).unwrap(),
            &Rules::default(),
        );
        assert!(
            image.stored_bytes == 0 || n == 0,
            "{reference}: its layers were in the pool already"
        );
    }
}

#[test]
fn layers_that_images_share_are_fetched_once() {
    let registry = Registry::with(&["python", "app"]).unwrap();
    let cluster = Cluster::start("512MiB").unwrap();
    let python = cluster.pull(&registry.image("python")).unwrap();
    let app = cluster.pull(&registry.image("app")).unwrap();
    assert_eq!((python.fetched, app.fetched), (2, 1), "{python:?} {app:?}");
    let again = cluster.pull(&registry.image("app")).unwrap();
    assert_eq!(
        (again.fetched, again.fetched_bytes, again.stored_bytes),
        (0, 0, 0),
        "{again:?}"
    );
}

#[test]
fn a_container_can_write_above_either_door() {
    let registry = Registry::with(&["app"]).unwrap();
    let judged = fixtures::judged("app").unwrap();
    let cluster = Cluster::start("512MiB").unwrap();
    let image = cluster.pull(&registry.image("app")).unwrap();
    cluster.rootfs(&image).unwrap();
    let mut doors = vec![
        judged
            .layers
            .iter()
            .rev()
            .map(|l| cluster.layer(&l.diff_id))
            .collect::<Vec<_>>(),
    ];
    if kernel_has_fast_view() {
        doors.push(vec![cluster.view(&image.manifest).unwrap()]);
    }
    for lowers in doors {
        let overlay = Overlay::writable(&lowers).unwrap();
        let top = overlay.path();
        fs::write(top.join("app/new"), b"new").unwrap();
        fs::remove_file(top.join("etc/issue")).unwrap();
        fs::rename(top.join("app/main.py"), top.join("app/moved.py")).unwrap();
        let grown = fs::OpenOptions::new()
            .append(true)
            .open(top.join("etc/passwd"))
            .unwrap();
        std::io::Write::write_all(&mut &grown, b"x:x:1:1::/:/\n").unwrap();
        drop(grown);
        assert!(!top.join("etc/issue").exists() && !top.join("app/main.py").exists());
        assert!(
            fs::read_to_string(top.join("etc/passwd"))
                .unwrap()
                .ends_with("x:x:1:1::/:/\n")
        );
        assert_eq!(
            fs::read(top.join("app/moved.py")).unwrap(),
            fs::read(judged.umoci.join("app/main.py")).unwrap()
        );
        let output = shell::check(
            "chroot",
            [top.to_str().unwrap(), "python3", "/app/moved.py"],
            Duration::from_secs(60),
        );
        // The program opens /etc/issue, which was taken away above.
        assert!(format!("{:#}", output.unwrap_err()).contains("/etc/issue"));
        fs::write(top.join("etc/issue"), b"again").unwrap();
        let output = shell::check(
            "chroot",
            [top.to_str().unwrap(), "python3", "/app/moved.py"],
            Duration::from_secs(60),
        )
        .unwrap();
        assert!(
            output.text().contains("\"issue\": \"again\""),
            "{}",
            output.text()
        );
    }
}

/// Whoever may not read `trusted.*` mounts overlays with `userxattr`.
#[test]
fn an_overlay_without_privileges_sees_opaque_directories() {
    let judged = fixtures::judged("app").unwrap();
    let registry = Registry::with(&["app"]).unwrap();
    let cluster = Cluster::start("512MiB").unwrap();
    let image = cluster.pull(&registry.image("app")).unwrap();
    cluster.rootfs(&image).unwrap();
    let ours: Vec<PathBuf> = judged
        .layers
        .iter()
        .rev()
        .map(|l| cluster.layer(&l.diff_id))
        .collect();
    let overlay = Overlay::with_user_attributes(&ours).unwrap();
    let names: Vec<_> = fs::read_dir(overlay.path().join("usr/share/doc"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["README.app"]);
    assert!(!overlay.path().join("etc/debian_version").exists());
    assert!(overlay.path().join("usr/bin/python3").exists());
}
