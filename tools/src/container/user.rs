//! Who a container's process runs as: an image names users, and its own files say which numbers these are.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

/// Most that is read of `/etc/passwd` and `/etc/group`.
const FILE_MAX: u64 = 4 << 20;

/// Numbers of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Groups that list the user, beside its own.
    pub groups: Vec<u32>,
    /// Its home directory, where its image has an entry for it.
    pub home: Option<String>,
}

/// Looks `named` (`user`, `uid`, `user:group`, `uid:gid`; nothing for root) up in the files of `root`.
/// A number needs no entry; a user's entry gives its group where none is named.
///
/// # Errors
/// A name that has no entry, or files that cannot be read.
pub fn look_up(root: &Path, named: &str) -> anyhow::Result<User> {
    let read = |name: &str| {
        read_below(root, Path::new(name)).map_err(|error| anyhow::anyhow!("/{name}: {error}"))
    };
    look_up_in(&read("etc/passwd")?, &read("etc/group")?, named)
}

fn look_up_in(passwd: &str, group: &str, named: &str) -> anyhow::Result<User> {
    let (user, wanted_group) = match named.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (named, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = entries(passwd).find(|fields| {
        let uid = fields.get(2);
        fields.first() == Some(&user) || (user.parse::<u32>().is_ok() && uid == Some(&user))
    });
    let field = |at: usize| entry.as_ref().and_then(|fields| fields.get(at).copied());
    let uid = match (user.parse().ok(), field(2).and_then(|uid| uid.parse().ok())) {
        // A name of digits means its entry, as for the engines.
        (_, Some(uid)) => uid,
        (Some(uid), None) => uid,
        (None, None) => anyhow::bail!("the image has no user {user:?} in its /etc/passwd"),
    };
    let gid = match wanted_group {
        None => field(3).and_then(|gid| gid.parse().ok()).unwrap_or(0),
        Some(wanted) => {
            let entry = entries(group).find(|fields| fields.first() == Some(&wanted));
            let listed = entry.and_then(|fields| fields.get(2)?.parse().ok());
            let Some(gid) = listed.or_else(|| wanted.parse().ok()) else {
                anyhow::bail!("the image has no group {wanted:?} in its /etc/group");
            };
            gid
        }
    };
    let name = field(0);
    let lists = |fields: &Vec<&str>| {
        let members = fields.get(3).copied().unwrap_or_default();
        name.is_some_and(|name| members.split(',').any(|member| member == name))
    };
    let groups = entries(group)
        .filter(lists)
        .filter_map(|fields| fields.get(2)?.parse().ok());
    Ok(User {
        uid,
        gid,
        groups: match wanted_group {
            None => groups.filter(|other| *other != gid).collect(),
            Some(_) => Vec::new(),
        },
        home: field(5).filter(|home| !home.is_empty()).map(str::to_owned),
    })
}

fn entries(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

/// Reads a file of an image: links in it stay inside of `root`, as they would for its own processes.
fn read_below(root: &Path, name: &Path) -> io::Result<String> {
    let dir = open(
        root,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    // No FIFO of an image keeps anybody waiting.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let file = match openat2(&dir, name, how) {
        Ok(file) => File::from(file),
        Err(nix::errno::Errno::ENOENT) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:\n7:x:70:71::/seven:\nbad\n";
    const GROUP: &str = "root:x:0:\nlog:x:4:other,web\nweb:x:34:web\nstaff:x:50:\n";

    #[test]
    fn users_are_looked_up_as_the_engines_do() {
        let user = |named| look_up_in(PASSWD, GROUP, named).unwrap();
        let numbers = |named| {
            let user = user(named);
            (user.uid, user.gid)
        };
        assert_eq!(numbers(""), (0, 0));
        assert_eq!(numbers("web"), (33, 34));
        assert_eq!(user("web").groups, [4]);
        assert_eq!(user("web").home.as_deref(), Some("/var/www"));
        assert_eq!(numbers("33"), (33, 34));
        assert_eq!(numbers("web:staff"), (33, 50));
        assert!(user("web:staff").groups.is_empty());
        assert_eq!(numbers("1000:2000"), (1000, 2000));
        assert_eq!(numbers("1000"), (1000, 0));
        assert_eq!(numbers("7"), (70, 71));
        assert!(look_up_in(PASSWD, GROUP, "nobody").is_err());
        assert!(look_up_in(PASSWD, GROUP, "web:nobody").is_err());
    }

    #[test]
    fn links_of_an_image_stay_inside_of_it() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/inner", root.path().join("etc/passwd")).unwrap();
        std::fs::write(root.path().join("inner"), "me:x:5:6::/:\n").unwrap();
        assert_eq!(look_up(root.path(), "me").unwrap().uid, 5);
        nix::unistd::mkfifo(&root.path().join("etc/group"), Mode::S_IRWXU).unwrap();
        assert!(look_up(root.path(), "me").is_err());
    }
}
