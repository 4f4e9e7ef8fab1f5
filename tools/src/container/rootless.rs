//! Containers of people who are not root: in a user namespace of their own.
//!
//! Files of an image belong to root and others who do not exist in there, so they show as nobody's: what
//! everybody may read and run, the container may; what only its owner may, it may not. `unshare` and
//! `newuidmap` (util-linux, uidmap) make the namespace, as for rootless engines.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Component, Path, PathBuf},
    process::Command,
};

use oci_spec::runtime::Spec;

use crate::failure::{self, Code};

/// Set for the call of this program inside.
const INSIDE: &str = "HARBOUR_ROOTLESS";

/// Whether user IDs here are not those of the host.
pub fn inside() -> bool {
    // The first namespace maps all of them to themselves.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let words: Vec<&str> = map.split_whitespace().collect();
    !words.is_empty() && words != ["0", "0", "4294967295"]
}

/// Whether a user ID exists here.
pub fn exists(uid: u32) -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    covers(&map, uid)
}

fn covers(map: &str, uid: u32) -> bool {
    map.lines().any(|line| {
        let words: Vec<u64> = line
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let uid = u64::from(uid);
        matches!(words[..], [first, _, count] if uid >= first && uid - first < count)
    })
}

/// Becomes the same call inside a new user namespace, as its root. Comes back only with an error.
///
/// # Errors
/// No `unshare`, or a host that does not let its users have namespaces.
pub fn enter() -> anyhow::Error {
    if std::env::var_os(INSIDE).is_some() {
        let what = "the user namespace was made, and this is not its root";
        return failure::failure(Code::Failed, what, "run it with sudo");
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return error.into(),
    };
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--propagation",
        "slave",
    ]);
    if has_range() {
        unshare.arg("--map-auto");
    }
    unshare
        .arg("--")
        .arg(program)
        .args(std::env::args_os().skip(1));
    unshare.env(INSIDE, "1");
    if std::env::var_os("HARBOUR_STATE_DIR").is_none() {
        unshare.env("HARBOUR_STATE_DIR", state());
    }
    let error = unshare.exec();
    failure::failure(
        Code::Failed,
        format!("cannot run unshare: {error}"),
        "install util-linux and uidmap, or run it with sudo",
    )
}

/// Whether this user may have more IDs than one: a line in /etc/subuid, and the program that looks at it.
fn has_range() -> bool {
    let uid = nix::unistd::getuid();
    let name = nix::unistd::User::from_uid(uid)
        .ok()
        .flatten()
        .map(|user| user.name);
    let owner = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let first = line.split(':').next().unwrap_or_default();
            first == uid.to_string() || name.as_deref() == Some(first)
        })
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|dir| dir.join("newuidmap").is_file());
    there && owner("/etc/subuid") && owner("/etc/subgid")
}

/// Where containers of this user keep what they write (XDG Base Directory specification).
fn state() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|dir| Path::new(dir).is_absolute());
    let data = set("XDG_DATA_HOME").map(PathBuf::from);
    let home = || set("HOME").map(|home| Path::new(&home).join(".local/share"));
    let own = || std::env::temp_dir().join(format!("harbour-{}", nix::unistd::getuid()));
    data.or_else(home)
        .map_or_else(own, |dir| dir.join("harbour"))
}

/// A place in a container's root that something is to be mounted on and that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// From the root.
    path: PathBuf,
    is_file: bool,
}

/// Where the runtime would have to make something in directories that are nobody's, which it may not. What is
/// below a link is left to it.
pub fn missing(spec: &Spec, rootfs: &Path) -> Vec<Missing> {
    let mounts = spec.mounts().iter().flatten();
    let missing = mounts.filter_map(|mount| {
        let inside = |part: &Component<'_>| matches!(part, Component::Normal(_));
        let path: PathBuf = mount.destination().components().filter(inside).collect();
        let mut at = rootfs.to_owned();
        for part in path.components() {
            at.push(part);
            match fs::symlink_metadata(&at) {
                Ok(meta) if meta.is_symlink() => return None,
                Ok(_) => {}
                Err(_) => {
                    let source = mount.source().as_deref();
                    let is_file = mount.typ().as_deref() == Some("bind")
                        && source.is_some_and(|source| !source.is_dir());
                    return Some(Missing { path, is_file });
                }
            }
        }
        None
    });
    missing.collect()
}

/// Makes them in the writable layer, which is this user's own.
///
/// # Errors
/// What the file system says.
pub fn make(missing: &[Missing], upper: &Path) -> io::Result<()> {
    for Missing { path, is_file } in missing {
        let at = upper.join(path);
        match (is_file, at.parent()) {
            (true, Some(parent)) => {
                fs::create_dir_all(parent)?;
                drop(File::create(&at)?);
            }
            _ => fs::create_dir_all(&at)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::covers;

    #[test]
    fn ids_are_looked_up_in_the_map() {
        let map = "         0       1000          1\n         1     100000      65536\n";
        for (uid, there) in [(0, true), (1, true), (65_536, true), (65_537, false)] {
            assert_eq!(covers(map, uid), there, "{uid}");
        }
        assert!(!covers("", 0) && !covers("x y z", 0));
    }
}
