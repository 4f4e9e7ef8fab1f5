#![allow(clippy::unwrap_used)]
use super::*;

const SOCKET: &str = "/run/harbour/snapshotter.sock";

fn wanted(release: Release, cri: bool) -> Wanted<'static> {
    Wanted {
        release,
        socket: Path::new(SOCKET),
        cri,
    }
}

/// The file afterwards; a second edit changes nothing, and it says all that is wanted.
fn edited(before: &str, release: Release) -> String {
    let wanted = wanted(release, true);
    let after = edit(before, &wanted).unwrap().text;
    assert_eq!(edit(&after, &wanted).unwrap().text, after, "twice");
    let effective = Effective::of(Lines::of(&after).plain(), release).unwrap();
    assert_eq!(effective.lacks(&wanted), Vec::<String>::new(), "{after}");
    after
}

#[test]
fn a_new_file_has_what_each_release_reads() {
    let old = edited("", Release(1, 6));
    assert!(old.starts_with("version = 2\n"), "{old}");
    assert!(!old.contains("transfer") && !old.contains("exports"));
    let middle = edited("", Release(1, 7));
    assert!(middle.contains("transfer") && middle.contains("\"overlayfs\""));
    let new = edited("", Release(2, 1));
    assert!(new.starts_with("version = 3\n"), "{new}");
    assert!(new.contains(CRI_2) && !new.contains(CRI_1) && new.contains("exports"));
}

#[test]
fn what_is_there_stays() {
    // As Debian has it, for all releases.
    let before = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
        [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\" # here\n";
    for release in [Release(1, 6), Release(1, 7), Release(2, 1)] {
        let after = edited(before, release);
        assert!(after.starts_with(before), "{after}");
        // A version 2 file of 2.x stays one: it is taken under the new name.
        assert!(after.contains(if release.0 == 1 { CRI_1 } else { CRI_2 }));
    }
    let crlf = before.replace('\n', "\r\n");
    let after = edited(&crlf, Release(1, 7));
    assert!(after.starts_with(&crlf));
    assert_eq!(after.matches('\n').count(), after.matches("\r\n").count());
}

#[test]
fn values_change_in_place() {
    let before = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  \
        snapshotter = \"overlayfs\" # was it\n  disable_snapshot_annotations = true\n\
        [plugins.\"io.containerd.transfer.v1.local\"]\n  unpack_config = [{platform = \"linux/arm64\", \
        snapshotter = \"native\"}]\n";
    let after = edited(before, Release(1, 7));
    assert!(
        after.contains("  snapshotter = \"harbour\" # was it\n"),
        "{after}"
    );
    assert!(after.contains("  disable_snapshot_annotations = false\n"));
    assert!(after.contains("snapshotter = \"native\"}, {"), "{after}");
    let inline =
        "version = 2\nplugins = { \"io.containerd.internal.v1.opt\" = { path = \"/o\" } }\n";
    assert!(edited(inline, Release(1, 6)).contains("path = \"/o\""));
}

#[test]
fn docker_needs_the_plugin_alone() {
    // As Docker's own packages have it: of version 1, with CRI off.
    let before = "# theirs\n\ndisabled_plugins = [\"cri\"]\n\n#root = \"/var/lib/containerd\"\n";
    for release in [Release(1, 6), Release(1, 7), Release(2, 1)] {
        for cri in [true, false] {
            let edited = edit(before, &wanted(release, cri)).unwrap();
            assert!(
                edited
                    .text
                    .starts_with("# theirs\n\ndisabled_plugins = [\"cri\"]\n")
            );
            assert!(edited.text.contains("[proxy_plugins.harbour]"));
            assert!(!edited.text.contains("version") && !edited.text.contains("[plugins"));
            assert_eq!(edited.notes.len(), usize::from(cri));
        }
        let new = edit("", &wanted(release, false)).unwrap().text;
        assert!(
            new.starts_with("version = ") && !new.contains("[plugins"),
            "{new}"
        );
    }
}

#[test]
fn a_comment_at_the_top_stays_there() {
    let before = "# The file of this host.\n\n# How to reach it.\n[grpc]\naddress = \"/s\"\n";
    let after = edited(before, Release(1, 7));
    let top =
        "# The file of this host.\n\nversion = 2\n\n# How to reach it.\n[grpc]\naddress = \"/s\"\n";
    assert!(after.starts_with(top), "{after}");
    let after = edited("# none\n# yet", Release(2, 1));
    assert!(
        after.starts_with("# none\n# yet\nversion = 3\n\n["),
        "{after}"
    );
    let after = edited("version = 2\n# later\n", Release(1, 6));
    assert!(after.starts_with("version = 2\n# later\n\n["), "{after}");
}

#[test]
fn what_cannot_be_is_refused() {
    for (text, release, says) in [
        ("version = 2\n[grpc\n", Release(1, 7), "line 2"),
        ("version = 3\n", Release(1, 7), "version 3"),
        ("version = 4\n", Release(2, 1), "version 4"),
        ("version = \"2\"\n", Release(2, 1), "number"),
        ("[plugins.cri]\nx = 1\n", Release(1, 6), "version 1"),
        ("required_plugins = [\"cri\"]\n", Release(2, 1), "version 1"),
        (
            "version = 2\nplugins = 7\n",
            Release(1, 6),
            "plugins is no table",
        ),
        (
            "version = 2\nproxy_plugins = []\n",
            Release(1, 6),
            "proxy_plugins is no table",
        ),
    ] {
        let error = edit(text, &wanted(release, true)).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
}

#[test]
fn silent_fallbacks_are_seen() {
    let seen = |text: &str, release| {
        let effective = Effective::of(text, release).unwrap();
        effective.lacks(&wanted(release, true)).join("; ")
    };
    // The dump of a containerd 2.x that dropped what a version 2 file says under the old name.
    let dump = "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n\
        [proxy_plugins.harbour]\ntype = 'snapshot'\naddress = '/elsewhere.sock'\n";
    let lacks = seen(dump, Release(2, 1));
    assert!(lacks.contains("CRI use overlayfs"), "{lacks}");
    assert!(lacks.contains("/elsewhere.sock"), "{lacks}");
    assert!(lacks.contains("does not unpack"), "{lacks}");
    assert!(seen("version = 2\n", Release(1, 6)).contains("no snapshot plugin"));
}
