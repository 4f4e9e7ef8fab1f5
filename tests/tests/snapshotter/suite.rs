//! containerd's cases for any snapshotter: each by its name there.

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use harbour::snapshotter::proto::v1::Kind;
use harbour_tests::cluster::{Cluster, Part};
use tonic::Code;

use super::{
    client::{Client, Mounted, code, labels},
    steps::{Step, apply, file, layered, look},
};

struct Scene {
    cluster: Cluster,
    client: Client,
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::start("64MiB").unwrap();
        let client = Client::connect(&cluster.run_dir());
        Self { cluster, client }
    }

    fn work(&self) -> PathBuf {
        self.cluster.dir().join("work")
    }

    /// A snapshot's directory, mounted.
    fn prepared(&self, key: &str, parent: &str) -> Mounted {
        let mounts = self.client.prepare(key, parent).unwrap();
        Mounted::new(&self.work().join(key), &mounts)
    }
}

fn kind(client: &Client, name: &str) -> (Kind, String) {
    let info = client.stat(name).unwrap();
    assert_eq!(info.name, name);
    (info.kind(), info.parent)
}

/// Basic
#[test]
fn snapshots_are_written_committed_shown_and_removed() {
    let scene = Scene::new();
    let client = &scene.client;
    let first = [
        file("foo", "foo\n", 0o777),
        Step::Dir("a", 0o755),
        Step::Dir("a/b", 0o755),
        Step::Dir("a/b/c", 0o755),
    ];
    let second = [
        file("bar", "bar\n", 0o777),
        file("foo", "bar\n", 0o777),
        Step::Remove("a/b"),
    ];
    let mounted = scene.prepared("preparing", "");
    apply(mounted.path(), &first);
    let expected = look(mounted.path());
    drop(mounted);
    client.commit("committed", "preparing").unwrap();
    assert_eq!(kind(client, "committed"), (Kind::Committed, String::new()));
    assert_eq!(code(client.stat("preparing")), Code::NotFound);
    let mounted = scene.prepared("next", "committed");
    assert_eq!(look(mounted.path()), expected);
    apply(mounted.path(), &second);
    let expected = look(mounted.path());
    drop(mounted);
    assert_eq!(kind(client, "next"), (Kind::Active, "committed".to_owned()));
    client.commit("committed-next", "next").unwrap();
    assert_eq!(
        kind(client, "committed-next"),
        (Kind::Committed, "committed".to_owned())
    );
    assert_eq!(code(client.stat("next")), Code::NotFound);
    let listed = client.list(&[]).unwrap();
    for name in ["committed", "committed-next"] {
        assert_eq!(listed[name], client.stat(name).unwrap());
    }
    let mounts = client.view("shown", "committed-next").unwrap();
    let mounted = Mounted::new(&scene.work().join("shown"), &mounts);
    assert_eq!(look(mounted.path()), expected);
    assert!(!expected.contains_key("a/b"));
    drop(mounted);
    client.remove("shown").unwrap();
    let refused = client.remove("committed").unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("remove"));
    client.remove("committed-next").unwrap();
    client.remove("committed").unwrap();
    assert!(client.list(&[]).unwrap().is_empty());
}

/// StatActive, StatCommitted, Transitivity, PrepareView, RemoveIntermediateSnapshot, Remove
#[test]
fn names_parents_and_kinds_are_as_they_should_be() {
    let scene = Scene::new();
    let client = &scene.client;
    let mounted = scene.prepared("a", "");
    fs::write(mounted.path().join("foo"), "foo\n").unwrap();
    assert_eq!(kind(client, "a"), (Kind::Active, String::new()));
    // Committed while it is mounted, as some clients do.
    client.commit("A", "a").unwrap();
    drop(mounted);
    assert_eq!(kind(client, "A"), (Kind::Committed, String::new()));
    drop(scene.prepared("b", "A"));
    client.commit("B", "b").unwrap();
    let parent = client.stat("B").unwrap().parent;
    assert_eq!(
        (
            parent.as_str(),
            client.stat(&parent).unwrap().parent.as_str()
        ),
        ("A", "")
    );

    // A key is taken once, whatever for.
    client.prepare("new", "A").unwrap();
    assert_eq!(code(client.view("new", "A")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("new", "A")), Code::AlreadyExists);
    client.view("seen", "A").unwrap();
    assert_eq!(code(client.view("seen", "A")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("x", "nobody")), Code::NotFound);
    assert_eq!(code(client.prepare("x", "new")), Code::InvalidArgument);
    assert_eq!(code(client.prepare("", "")), Code::InvalidArgument);
    assert_eq!(code(client.commit("x", "nobody")), Code::NotFound);
    assert_eq!(code(client.commit("x", "seen")), Code::FailedPrecondition);
    assert_eq!(code(client.commit("B", "new")), Code::AlreadyExists);
    assert_eq!(code(client.mounts("nobody")), Code::NotFound);
    assert_eq!(code(client.usage("nobody")), Code::NotFound);
    assert_eq!(code(client.remove("nobody")), Code::NotFound);

    // What is in the middle goes after what is on top.
    client.prepare("top", "B").unwrap();
    assert_eq!(code(client.remove("B")), Code::FailedPrecondition);
    for name in ["top", "B", "new", "seen", "A"] {
        client.remove(name).unwrap();
    }

    // Names are free again.
    client.prepare("committed-a", "").unwrap();
    client.commit("committed-1", "committed-a").unwrap();
    client.prepare("reuse", "committed-1").unwrap();
    client.remove("reuse").unwrap();
    client.view("reuse", "committed-1").unwrap();
    client.remove("reuse").unwrap();
    client.prepare("reuse", "").unwrap();
    client.remove("committed-1").unwrap();
    client.commit("committed-1", "reuse").unwrap();
}

/// c1 committed, c2 on it, a1 active and v1 a view on c2, a2 and v2 on nothing.
fn six(client: &Client) -> [(&'static str, Kind, &'static str); 6] {
    client.prepare("c1-a", "").unwrap();
    client.commit("c1", "c1-a").unwrap();
    client.prepare("c2-a", "c1").unwrap();
    client.commit("c2", "c2-a").unwrap();
    client.prepare("a1", "c2").unwrap();
    client.prepare("a2", "").unwrap();
    client.view("v1", "c2").unwrap();
    client.view("v2", "").unwrap();
    [
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ]
}

fn now() -> (i64, i32) {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    (since.as_secs() as i64, since.subsec_nanos() as i32)
}

/// Update
#[test]
fn labels_are_changed_all_together_or_one_by_one() {
    let scene = Scene::new();
    let client = &scene.client;
    let before = now();
    for (name, kind, parent) in six(client) {
        let mut info = client.stat(name).unwrap();
        let time =
            |time: Option<prost_types::Timestamp>| time.map(|t| (t.seconds, t.nanos)).unwrap();
        let created = time(info.created_at);
        assert!(created >= before && created <= now(), "{name}");
        assert_eq!(time(info.updated_at), created);
        assert_eq!((info.kind(), info.parent.as_str()), (kind, parent));
        let all = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]);
        info.parent = "doesnotexist".to_owned();
        info.labels.clone_from(&all);
        let since = now();
        let info = client.update(info, &[]).unwrap();
        assert_eq!((time(info.created_at), &info.labels), (created, &all));
        assert!(time(info.updated_at) >= since && time(info.updated_at) <= now());
        assert_eq!(
            (info.kind(), info.parent.as_str(), info.name.as_str()),
            (kind, parent, name)
        );
        let mut some = info.clone();
        let pairs = [("l1", "updated"), ("l4", "v4")];
        some.labels = HashMap::from(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())));
        let info = client.update(some, &["labels.l1", "labels.l2"]).unwrap();
        assert_eq!(info.labels, labels(&[("l1", "updated"), ("l3", "v3")]));
        let mut other = info.clone();
        other.labels = labels(&[("l4", "v4")]);
        let info = client.update(other.clone(), &["labels"]).unwrap();
        assert_eq!(info.labels, other.labels);
        assert_eq!(client.stat(name).unwrap(), info);
        assert_eq!(
            code(client.update(info, &["parent"])),
            Code::InvalidArgument
        );
    }
}

/// Walk, StatInWalk
#[test]
fn lists_are_filtered() {
    let scene = Scene::new();
    let client = &scene.client;
    client.prepare("a-np", "").unwrap();
    client.prepare("p-tmp", "").unwrap();
    client.commit("p", "p-tmp").unwrap();
    client.prepare("a", "p").unwrap();
    client.view("v", "p").unwrap();
    client.prepare("p-wl-tmp", "").unwrap();
    client
        .commit_with("p-wl", "p-wl-tmp", labels(&[("l", "1")]))
        .unwrap();
    client
        .prepare_with("a-wl", "p-wl", labels(&[("l", "2")]))
        .unwrap();
    client
        .view_with("v-wl", "p-wl", labels(&[("l", "3")]))
        .unwrap();
    client
        .prepare_with("a-np-wl", "", labels(&[("l", "2")]))
        .unwrap();
    let all = ["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"];
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &all),
        (&["labels.\"containerd.io/gc.root\"==now"], &all),
        (&["kind==active"], &["a", "a-np", "a-np-wl", "a-wl"]),
        (&["kind==view"], &["v", "v-wl"]),
        (&["kind==committed"], &["p", "p-wl"]),
        (&["labels.l"], &["a-np-wl", "a-wl", "p-wl", "v-wl"]),
        (&["kind==active,labels.l"], &["a-np-wl", "a-wl"]),
        (&["parent==p"], &["a", "v"]),
        (&["parent==\"\""], &["a-np", "a-np-wl", "p", "p-wl"]),
        (&["name~=-wl$"], &["a-np-wl", "a-wl", "p-wl", "v-wl"]),
        (&["kind==view", "name==p"], &["p", "v", "v-wl"]),
    ];
    for (filters, expected) in cases {
        let found = client.list(filters).unwrap();
        assert_eq!(
            found.keys().map(String::as_str).collect::<Vec<_>>(),
            *expected,
            "{filters:?}"
        );
        for (name, info) in found {
            assert_eq!(client.stat(&name).unwrap(), info);
        }
    }
    assert_eq!(code(client.list(&["kind==\"x"])), Code::InvalidArgument);
}

/// LayerFileupdate, RemoveDirectoryInLowerLayer, Chown, DirectoryPermissionOnCommit, DeletedFilesInChildSnapshot,
/// MoveFileFromLowerLayer, Rename
#[test]
fn layers_on_layers_are_what_one_directory_would_be() {
    let scene = Scene::new();
    let (client, work) = (&scene.client, scene.work());
    let update = [
        vec![
            Step::Dir("etc", 0o700),
            file("etc/hosts", "mydomain 10.0.0.1", 0o644),
            file("etc/profile", "PATH=/usr/bin", 0o644),
        ],
        vec![
            file("etc/hosts", "mydomain 10.0.0.2", 0o644),
            file("etc/profile", "PATH=/usr/bin", 0o666),
            Step::Dir("root", 0o700),
            file("root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
        ],
    ];
    for round in 0..3 {
        layered(client, &work, &format!("update-{round}"), &update);
    }
    let hidden = [
        vec![Step::Dir("lib", 0o700), file("lib/hidden", "", 0o644)],
        vec![
            Step::Remove("lib"),
            Step::Dir("lib", 0o700),
            file("lib/not-hidden", "", 0o644),
        ],
        vec![file("lib/newfile", "", 0o644)],
    ];
    layered(client, &work, "hidden", &hidden);
    let tree = ["opt", "opt/a", "opt/a/b"];
    let mut below: Vec<Step> = tree.iter().map(|dir| Step::Dir(dir, 0o700)).collect();
    below.push(file("opt/a/b/file.txt", "hello", 0o644));
    let mut above: Vec<Step> = tree.iter().map(|dir| Step::Chown(dir, 1)).collect();
    above.push(Step::Chown("opt/a/b/file.txt", 1));
    layered(client, &work, "chown", &[below, above]);
    let mut below: Vec<Step> = ["dir1", "dir2", "dir3", "dir4", "dir5"]
        .map(|dir| Step::Dir(dir, 0o700))
        .to_vec();
    below.extend([file("dir4/f1", "...", 0o644), file("dir5/f1", "...", 0o644)]);
    below.extend(["dir1", "dir2", "dir3", "dir5", "dir5/f1"].map(|name| Step::Chown(name, 1)));
    let middle = vec![
        Step::Chown("dir2", 0),
        Step::Remove("dir3"),
        Step::Chown("dir4", 1),
        Step::Chown("dir4/f1", 1),
    ];
    let above = vec![
        Step::Dir("dir3", 0o700),
        Step::Chown("dir3", 1),
        Step::Remove("dir5"),
        Step::Dir("dir5", 0o700),
        Step::Chown("dir5", 1),
    ];
    layered(client, &work, "permission", &[below, middle, above]);
    let deleted = [
        vec![
            file("foo", "foo\n", 0o777),
            file("foobar", "foobar\n", 0o777),
        ],
        vec![Step::Remove("foobar")],
        vec![],
    ];
    layered(client, &work, "deleted", &deleted);
    let moved = [
        vec![
            Step::Dir("dir1", 0o700),
            file("dir1/f1", "Hello", 0o644),
            Step::Dir("dir2", 0o700),
            file("dir2/f2", "...", 0o644),
        ],
        vec![
            Step::Dir("dir3", 0o700),
            file("dir3/f1", "Hello", 0o644),
            Step::Remove("dir1"),
            Step::Link("dir2/f2", "dir3/f2"),
            Step::Remove("dir2/f2"),
        ],
    ];
    layered(client, &work, "moved", &moved);
    // Directories of lower layers cannot be renamed in an overlay without redirect_dir, which containerd's
    // own case leaves out for overlayfs too.
    let renamed = [
        vec![
            Step::Dir("somefiles", 0o700),
            file("somefiles/f1", "was here first!", 0o644),
            file("somefiles/f2", "nothing interesting", 0o644),
        ],
        vec![
            file("somefiles/f1-overwrite", "new content 1", 0o644),
            Step::Rename("somefiles/f1-overwrite", "somefiles/f1"),
            Step::Rename("somefiles/f2", "somefiles/f3"),
        ],
    ];
    layered(client, &work, "renamed", &renamed);
}

/// ViewReadonly, RootPermission
#[test]
fn views_cannot_be_written_and_roots_can_be_entered() {
    let scene = Scene::new();
    let client = &scene.client;
    let mounted = scene.prepared("a", "");
    assert_eq!(fs::metadata(mounted.path()).unwrap().mode() & 0o7777, 0o755);
    drop(mounted);
    client.commit("c", "a").unwrap();
    let mounts = client.view("v", "c").unwrap();
    let mounted = Mounted::new(&scene.work().join("v"), &mounts);
    assert!(fs::write(mounted.path().join("file"), "x").is_err());
    drop(mounted);
    client.remove("v").unwrap();
    client.remove("c").unwrap();
}

/// 128LayersMount
#[test]
fn a_hundred_and_twenty_eight_layers_are_mounted() {
    let scene = Scene::new();
    let mut layers = vec![vec![
        file("bottom", "way at the bottom\n", 0o777),
        file("overwriteme", "FIRST!\n", 0o777),
        Step::Dir("addhere", 0o755),
        Step::Dir("onlyme", 0o755),
        file("onlyme/bottom", "bye!\n", 0o777),
    ]];
    layers.extend((1..=127).map(|n| {
        vec![
            file("overwriteme", &format!("{n} WAS HERE!\n"), 0o777),
            file(&format!("addhere/file-{n}"), "same\n", 0o755),
            Step::Remove("onlyme"),
            Step::Dir("onlyme", 0o755),
            file(&format!("onlyme/file-{n}"), "only me!\n", 0o777),
        ]
    }));
    layered(&scene.client, &scene.work(), "layer", &layers);
}

/// In place of CloseTwice, which is about a client in the same process: the service is killed again and
/// again, and has everything that it was told.
#[test]
fn snapshots_outlive_the_service() {
    let mut scene = Scene::new();
    let expected = six(&scene.client);
    let mounted = scene.prepared("full", "c2");
    fs::write(mounted.path().join("file"), [7; 100_000]).unwrap();
    drop(mounted);
    let listed = scene.client.list(&[]).unwrap();
    for _ in 0..3 {
        scene.cluster.kill(Part::Node).unwrap();
        scene.cluster.start_part(Part::Node, None).unwrap();
        scene.cluster.wait_ready().unwrap();
        scene.client = Client::connect(&scene.cluster.run_dir());
        assert_eq!(scene.client.list(&[]).unwrap(), listed);
    }
    let client = &scene.client;
    let usage = client.usage("full").unwrap();
    assert!(
        usage.inodes == 1 && (100_000..200_000).contains(&usage.size),
        "{usage:?}"
    );
    let mounts = client.mounts("full").unwrap();
    let mounted = Mounted::new(&scene.work().join("again"), &mounts);
    assert_eq!(
        fs::read(mounted.path().join("file")).unwrap().len(),
        100_000
    );
    drop(mounted);
    client.commit("done", "full").unwrap();
    assert_eq!(client.usage("done").unwrap(), usage);
    client.cleanup().unwrap();
    for (name, ..) in expected
        .iter()
        .rev()
        .chain([&("done", Kind::Committed, "")])
    {
        if *name != "c2" && *name != "c1" {
            client.remove(name).unwrap();
        }
    }
    client.remove("c2").unwrap();
    client.remove("c1").unwrap();
    let left = scene.cluster.dir().join("state/snapshotter/snapshots");
    assert_eq!(fs::read_dir(left).unwrap().count(), 0);
}
