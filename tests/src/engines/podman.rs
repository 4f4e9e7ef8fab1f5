//! Podman, with stores of its own and images of ours below: the machine's, or that of another Debian
//! suite in a directory of its own.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use super::{NotHere, packages};
use crate::{
    fixtures, mounts,
    shell::{self, Output},
};

/// One `podman`, builds included.
const PODMAN_LIMIT: Duration = Duration::from_secs(120);
/// A whole suite from a slow mirror.
const FETCH_LIMIT: Duration = Duration::from_secs(900);

/// Enters the root directory `$1` in mount namespaces of its own, with the machine's kernel file systems
/// and the directories that are listed after it up to `--`, and runs what follows.
const ENTER: &str = r#"
root=$1; shift
mount --bind "$root" "$root"
for dir in proc sys dev; do mount --rbind /$dir "$root/$dir"; done
mount -t tmpfs tmpfs "$root/run"; mount -t tmpfs tmpfs "$root/tmp"
while [ "$1" != -- ]; do mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; shift; done
shift
cd "$root"; mkdir -p .old; pivot_root . .old; umount -l /.old; cd /
"#;

/// The unified hierarchy beside the old ones is more than crun takes.
const PLAIN_CGROUPS: &str = "umount -l /sys/fs/cgroup/unified\n";

/// Becomes the user `$1` of no privilege, whose files are in `$2`, in a mount namespace in which the mount
/// `$3` shows what is root's as that user's, and runs what follows `--`.
const BECOME: &str = r#"
user=$1 dir=$2 mount=$3 idmap=$4; shift 5
for file in passwd subuid subgid; do mount --bind "$dir/$file" /etc/$file; done
python3 -c "$idmap" "$mount" "$user" "$ranges"
set -- setpriv --reuid "$user" --regid "$user" --clear-groups "$@"
"#;

/// What `mount -o X-mount.idmap` does, which is not everywhere yet: mounts a directory over itself, with
/// its users 0 and 1… shown as the user and the range behind.
const IDMAP: &str = r#"
import ctypes, os, signal, struct, sys
path, user, ranges = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def check(value):
    if value < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
ready, done = os.pipe()
child = os.fork()
if child == 0:
    check(libc.unshare(0x10000000)); os.write(done, b"x"); signal.pause()
os.read(ready, 1)
try:
    for name in "uid_map", "gid_map":
        with open(f"/proc/{child}/{name}", "w") as file: file.write(f"0 {user} 1\n1 {ranges} 65536\n")
    space = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    tree = check(libc.syscall(428, -100, path.encode(), 0x88001))
    check(libc.syscall(442, tree, b"", 0x9000, struct.pack("QQQQ", 0x100000, 0, 0, space), 32))
    check(libc.syscall(429, tree, b"", -100, path.encode(), 4))
finally:
    os.kill(child, signal.SIGKILL)
"#;

/// A user that no machine has, and the first of the users that are its own.
const USER: u32 = 61_234;
const RANGES: u32 = 700_000_000;

/// Which Podman.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The machine's.
    Here,
    /// That of a suite of the Debian archive: its root directory.
    Root(PathBuf),
}

impl Which {
    /// The Podman of a suite, made with everything around it when it is not in the cache.
    ///
    /// # Errors
    /// [`NotHere`] when this machine's archive has no such suite.
    pub fn of_suite(suite: &str) -> Result<Self> {
        let cache = fixtures::cache().join("engines");
        fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
        let root = cache.join(format!("podman-{suite}"));
        let lock = File::create(cache.join(format!("podman-{suite}.lock")))?;
        let _turn = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        if !root.exists() {
            let fresh = tempfile::Builder::new()
                .prefix(".making.")
                .tempdir_in(&cache)?;
            let dir = fresh.path().join("root");
            let source = format!("deb {} {suite} main", packages::archive()?);
            let mut make = Command::new("mmdebstrap");
            make.args(["--quiet", "--variant=essential", "--mode=root"])
                .arg("--aptopt=Apt::Install-Recommends \"false\"")
                // Of a mirror, the state of some day will do.
                .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
                .arg("--include=podman,crun,runc,conmon,catatonit,ca-certificates,mount")
                .arg(suite)
                .arg(&dir)
                .arg(source);
            let made = shell::run(&mut make, FETCH_LIMIT)?;
            if !made.status.success() {
                let why = made.stderr.lines().last().unwrap_or_default().to_owned();
                return Err(NotHere(format!("no Debian {suite}: {why}")).into());
            }
            fs::rename(&dir, &root)?;
        }
        Ok(Self::Root(root))
    }
}

/// A Podman; its containers, images and mounts are gone when this is dropped.
#[derive(Debug)]
pub struct Podman {
    which: Which,
    dir: TempDir,
    runtime: &'static str,
    mount: PathBuf,
    rootless: bool,
}

impl Podman {
    /// One that reads images from the mount of a node.
    pub fn new(which: Which, mount: &Path) -> Result<Self> {
        // A path for each of 120 layers has to fit into one page of mount options.
        let dir = tempfile::Builder::new()
            .prefix("p.")
            .rand_bytes(4)
            .tempdir_in("/tmp")?;
        symlink(mount.join("store"), dir.path().join("s"))?;
        let home = dir.path().join("home/.config/containers");
        fs::create_dir_all(&home)?;
        fs::write(
            home.join("policy.json"),
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        )?;
        let podman = Self {
            which,
            dir,
            runtime: "runc",
            mount: mount.to_owned(),
            rootless: false,
        };
        podman.stores(Some("s"), None)?;
        fs::write(
            podman.path("registries.conf"),
            "unqualified-search-registries = []\n",
        )?;
        // Not every root may raise limits.
        fs::write(
            podman.path("containers.conf"),
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\nnetns = \"none\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n",
        )?;
        Ok(podman)
    }

    /// The same with another runtime.
    #[must_use]
    pub fn with_runtime(mut self, runtime: &'static str) -> Self {
        self.runtime = runtime;
        self
    }

    /// The same as a user without privileges, who has a range of users to give to containers.
    ///
    /// # Errors
    /// [`NotHere`] when a program or file is missing that this needs.
    pub fn rootless(mut self) -> Result<Self> {
        for needed in ["/usr/bin/newuidmap", "/etc/subuid", "/etc/subgid"] {
            if !Path::new(needed).exists() {
                return Err(NotHere(format!("{needed} is missing (package uidmap)")).into());
            }
        }
        let users = fs::read_to_string("/etc/passwd")?;
        let home = self.path("home");
        let line = format!("hrl:x:{USER}:{USER}::{}:/bin/sh\n", home.display());
        fs::write(self.path("passwd"), users + &line)?;
        for file in ["subuid", "subgid"] {
            fs::write(self.path(file), format!("hrl:{RANGES}:65536\n"))?;
        }
        fs::create_dir_all(self.path("run"))?;
        let owner = format!("{USER}:{USER}");
        let dir = self.dir.path().as_os_str();
        shell::check("chown", ["-R".as_ref(), owner.as_ref(), dir], PODMAN_LIMIT)?;
        self.rootless = true;
        Ok(self)
    }

    /// Has it read images from a store in its directory, and layers from the mount's layer store.
    pub fn stores(&self, images: Option<&str>, layers: Option<&Path>) -> Result<()> {
        let mut text = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{graph}\"\nrootless_storage_path = \"{graph}\"\n\
             runroot = \"{}\"\n[storage.options]\n",
            self.path("r").display(),
            graph = self.path("g").display(),
        );
        if let Some(images) = images {
            let store = self.path(images);
            text.push_str(&format!(
                "additionalimagestores = [\"{}\"]\n",
                store.display()
            ));
        }
        if let Some(layers) = layers {
            text.push_str(&format!(
                "additionallayerstores = [\"{}:ref\"]\n",
                layers.display()
            ));
        }
        Ok(fs::write(self.path("storage.conf"), text)?)
    }

    /// Where it keeps what is its own.
    pub fn graph(&self) -> PathBuf {
        self.path("g")
    }

    /// A directory that it sees.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// First two numbers of its version.
    pub fn version(&self) -> Result<String> {
        let said = self.ok(&["version", "--format", "{{.Client.Version}}"])?;
        let text = said.text().trim().to_owned();
        Ok(text.split(['+', '-']).next().unwrap_or_default().to_owned())
    }

    /// Runs it to its end, whatever that is.
    pub fn run(&self, words: &[&str]) -> Result<Output> {
        shell::run(&mut self.command(words), PODMAN_LIMIT)
    }

    /// Runs it; it has to succeed.
    pub fn ok(&self, words: &[&str]) -> Result<Output> {
        self.run(words)?.ok()
    }

    /// What it prints on standard output.
    pub fn says(&self, words: &[&str]) -> Result<String> {
        Ok(self.ok(words)?.text().trim().to_owned())
    }

    /// Names of the images that it lists, with whether they are read-only.
    pub fn images(&self) -> Result<Vec<String>> {
        let format = "{{.Repository}}:{{.Tag}} {{.ReadOnly}}";
        let said = self.says(&["images", "--format", format])?;
        let mut lines: Vec<_> = said.lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mixed = Path::new("/sys/fs/cgroup/unified").exists();
        let apart = self.runtime == "crun" && mixed;
        let mut script = String::from("set -e\n");
        let mut words_first: Vec<PathBuf> = Vec::new();
        if let Which::Root(root) = &self.which {
            script.push_str(ENTER);
            words_first.push(root.clone());
            words_first.push(self.dir.path().to_owned());
            let top = self.mount.parent().unwrap_or(&self.mount);
            words_first.push(top.to_owned());
            words_first.push("--".into());
        }
        if self.rootless {
            script.push_str(&format!("ranges={RANGES}\n{BECOME}"));
            let words = [
                USER.to_string().into(),
                self.dir.path().to_owned(),
                self.mount.clone(),
            ];
            words_first.extend(words);
            words_first.extend([IDMAP, "--"].map(PathBuf::from));
        }
        if apart {
            script.push_str(PLAIN_CGROUPS);
        }
        script.push_str("exec \"$@\"\n");
        let mut command = match apart || self.rootless || self.which != Which::Here {
            true => {
                let mut command = Command::new("unshare");
                command.args(["--mount", "--propagation", "private", "bash", "-c"]);
                command.arg(script).arg("enter").args(words_first);
                command.arg("podman");
                command
            }
            false => Command::new("podman"),
        };
        command.args(["--runtime", self.runtime]).args(words);
        for (name, file) in [
            ("CONTAINERS_CONF", "containers.conf"),
            ("CONTAINERS_STORAGE_CONF", "storage.conf"),
            ("CONTAINERS_REGISTRIES_CONF", "registries.conf"),
            ("HOME", "home"),
        ] {
            command.env(name, self.path(file));
        }
        command
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .env_remove("TMPDIR")
            .env_remove("XDG_RUNTIME_DIR");
        if self.rootless {
            command.env("XDG_RUNTIME_DIR", self.path("run"));
        }
        command
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"]);
        if self.rootless {
            self.end_pause();
        }
        if let Err(error) = mounts::detach_below(self.dir.path()) {
            eprintln!("leftover mounts: {error:#}");
        }
    }
}

impl Podman {
    /// Ends the process that holds the namespaces of a user's Podman.
    fn end_pause(&self) {
        let file = self.path("run/libpod/tmp/pause.pid");
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Ok(process) = text.trim().parse::<i32>()
            && process > 1
        {
            // It may be gone already.
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
    }
}
