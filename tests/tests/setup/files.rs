//! Configuration files as they are found on hosts.

/// A file, and what has to be true of it after a setup.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) engine: &'static str,
    /// `None` when there is no file.
    pub(crate) text: Option<String>,
    pub(crate) flags: &'static [&'static str],
    pub(crate) needles: &'static [&'static str],
    /// Parts of lines that have to go.
    pub(crate) gone: &'static [&'static str],
}

const OLD: &[&str] = &["--containerd-version", "1.6"];
const MIDDLE: &[&str] = &["--containerd-version", "1.7"];
const NEW: &[&str] = &["--containerd-version", "2.1"];
const NO_CHECK: &[&str] = &["--no-check"];

const OF_1: &[&str] = &[
    "[proxy_plugins.harbour]",
    "\"io.containerd.grpc.v1.cri\".containerd]",
    "snapshotter = \"harbour\"",
    "disable_snapshot_annotations = false",
];
const OF_2: &[&str] = &[
    "io.containerd.cri.v1.images",
    "snapshotter = \"harbour\"",
    "enable_remote_snapshot_annotations = \"true\"",
    "unpack_config",
];
const PLUGIN: &[&str] = &["[proxy_plugins.harbour]", "disabled_plugins = [\"cri\"]"];
const DAEMON: &[&str] = &[
    "\"containerd-snapshotter\": true",
    "\"storage-driver\": \"harbour\"",
];
const STORE: &[&str] = &["/mount/store\"", "driver = \"overlay\""];

/// Debian's own, for all its releases.
const DEBIAN: &str = r#"version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"#;

/// As Docker's packages have it: nothing but comments, and CRI turned off.
const DOCKER_PACKAGE: &str = "#   This file came with a package.\n\ndisabled_plugins = [\"cri\"]\n\n\
    #root = \"/var/lib/containerd\"\n#subreaper = true\n\n#[grpc]\n#  address = \"/run/containerd/containerd.sock\"\n";

/// The parts of what 1.7 prints as its defaults that matter, edited by somebody.
const FULL_1: &str = r#"disabled_plugins = []
imports = ["/etc/containerd/conf.d/*.toml"] # more of it
oom_score = 0
version = 2

[grpc]
  address = "/run/containerd/containerd.sock"
  uid = 0

[plugins]

  [plugins."io.containerd.gc.v1.scheduler"]
    pause_threshold = 0.02

  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.example.org/pause:3.9"   # ours

    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      disable_snapshot_annotations = true
      snapshotter = "overlayfs"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes]

        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
          runtime_type = "io.containerd.runc.v2"
          snapshotter = ""

          [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            SystemdCgroup = true # for the kubelet

  [plugins."io.containerd.transfer.v1.local"]
    config_path = ""

    [[plugins."io.containerd.transfer.v1.local".unpack_config]]
      differ = ""
      platform = "linux/amd64"
      snapshotter = "overlayfs"

[proxy_plugins]

[timeouts]
  "io.containerd.timeout.bolt.open" = "0s"
"#;

/// The same of 2.1.
const FULL_2: &str = r#"version = 3
root = '/var/lib/containerd'
imports = []

[grpc]
  address = '/run/containerd/containerd.sock'

[plugins]
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'
    disable_snapshot_annotations = true
    max_concurrent_downloads = 3

    [plugins.'io.containerd.cri.v1.images'.pinned_images]
      sandbox = 'registry.example.org/pause:3.10'

  [plugins.'io.containerd.transfer.v1.local']
    max_concurrent_downloads = 3
    config_path = ''

[timeouts]
  'io.containerd.timeout.bolt.open' = '0s'
"#;

const DAEMON_JSON: &str = "{\n    \"log-driver\": \"json-file\",\n    \"log-opts\": { \"max-size\": \"10m\" },\n    \
    \"features\": {\n        \"buildkit\": true\n    },\n    \"insecure-registries\": [\"192.0.2.1:5000\"]\n}\n";

const STORAGE_CONF: &str = r#"# This file is the configuration of all tools that use containers/storage.

[storage]

# Default Storage Driver, Must be set for proper operation.
driver = "overlay"

# Temporary storage location
runroot = "/run/containers/storage"
graphroot = "/srv/containers"

[storage.options]
# Paths to stores that are only read.
additionalimagestores = [
  "/usr/lib/containers/storage",
  "/srv/shared", # of the other host
]

[storage.options.overlay]
mountopt = "nodev,metacopy=on"
"#;

/// All of them.
pub(crate) fn cases() -> Vec<Case> {
    let case = |engine, name, text: Option<&str>, flags, needles, gone| Case {
        name,
        engine,
        text: text.map(str::to_owned),
        flags,
        needles,
        gone,
    };
    let none: &[&str] = &[];
    let crlf = |text: &str| text.replace('\n', "\r\n");
    let was: &[&str] = &["overlayfs", "disable_snapshot_annotations = true"];
    let quoted: &[&str] = &[
        "snapshotter = 'overlayfs'",
        "disable_snapshot_annotations = true",
    ];
    let mut cases = vec![
        case("containerd", "no file, 1.6", None, OLD, OF_1, none),
        case("containerd", "no file, 1.7", None, MIDDLE, OF_1, none),
        case("containerd", "no file, 2.1", None, NEW, OF_2, none),
        case("containerd", "empty", Some(""), MIDDLE, OF_1, none),
        case(
            "containerd",
            "comments alone",
            Some("# none yet"),
            NEW,
            OF_2,
            none,
        ),
        case("containerd", "Debian's, 1.6", Some(DEBIAN), OLD, OF_1, none),
        case(
            "containerd",
            "Debian's, 1.7",
            Some(DEBIAN),
            MIDDLE,
            OF_1,
            none,
        ),
        case("containerd", "Debian's, 2.1", Some(DEBIAN), NEW, OF_2, none),
        case(
            "containerd",
            "Docker's, 1.7",
            Some(DOCKER_PACKAGE),
            MIDDLE,
            PLUGIN,
            none,
        ),
        case(
            "containerd",
            "Docker's, 2.1",
            Some(DOCKER_PACKAGE),
            NEW,
            PLUGIN,
            none,
        ),
        case(
            "containerd",
            "defaults of 1.6",
            Some(FULL_1),
            OLD,
            OF_1,
            was,
        ),
        case(
            "containerd",
            "defaults of 1.7",
            Some(FULL_1),
            MIDDLE,
            OF_1,
            was,
        ),
        case(
            "containerd",
            "defaults of 2.1",
            Some(FULL_2),
            NEW,
            OF_2,
            quoted,
        ),
        case("docker", "no file", None, MIDDLE, DAEMON, none),
        case("docker", "empty", Some("{}"), MIDDLE, DAEMON, &["{}"]),
        case(
            "docker",
            "with others",
            Some(DAEMON_JSON),
            MIDDLE,
            DAEMON,
            &["true", "5000"],
        ),
        case("podman", "no file", None, NO_CHECK, STORE, none),
        case("podman", "empty", Some(""), NO_CHECK, STORE, none),
        case(
            "podman",
            "with stores",
            Some(STORAGE_CONF),
            NO_CHECK,
            STORE,
            none,
        ),
    ];
    // As an editor of another system leaves them.
    for (engine, name, text, flags, needles) in [
        ("containerd", "Debian's, CRLF", DEBIAN, MIDDLE, OF_1),
        ("docker", "CRLF", DAEMON_JSON, MIDDLE, DAEMON),
        ("podman", "CRLF", STORAGE_CONF, NO_CHECK, STORE),
    ] {
        let text = crlf(text);
        let gone: &[&str] = &["\"buildkit\"", "5000"];
        cases.push(case(engine, name, Some(&text), flags, needles, gone));
    }
    cases
}
