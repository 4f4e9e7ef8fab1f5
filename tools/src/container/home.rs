//! Where containers and mounts of images lie on this host: `STATE/containers/NAME` and `STATE/mounts/NAME`.
//!
//! A container's directory belongs to the processes that run it, `harbour` and the runtime, by a lock that
//! ends with the last of them: what killed ones left is taken away by the next `harbour run`. A mount's
//! belongs to whoever mounted it, until `harbour umount`.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

use super::overlay::{self, Upper};

/// Longest time in which a container's directory has no lock yet.
const MAKING_MAX: Duration = Duration::from_secs(60);

/// Longest name of a container.
const NAME_MAX: usize = 64;

/// Who runs a container: how the next one finds it, if it outlives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runner {
    /// The OCI runtime's program.
    pub runtime: PathBuf,
    /// Its state directory.
    pub root: PathBuf,
}

impl Runner {
    /// A call of the runtime.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(&self.root);
        command
    }

    /// Kills a container that may still be there, and has the runtime forget it.
    fn delete(&self, name: &std::ffi::OsStr) {
        let mut delete = self.command();
        delete.args(["delete", "--force"]).arg(name);
        let done = delete.stdout(Stdio::null()).stderr(Stdio::null()).status();
        // One that is not there is what was wanted.
        if let Err(error) = done {
            tracing::warn!(%error, ?name, "a container that was left cannot be deleted");
        }
    }
}

/// A directory with a writable layer in it.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    /// Held by a running container.
    _lock: Option<File>,
}

impl Home {
    /// A new container's, after those of dead processes were taken away.
    ///
    /// # Errors
    /// A name that is taken or cannot be one, or what the file system says.
    pub fn of_container(state: &Path, name: &str, runner: &Runner) -> anyhow::Result<Self> {
        check_name(name)?;
        let all = state.join("containers");
        fs::create_dir_all(&all).with_context(|| format!("cannot create {}", all.display()))?;
        sweep(&all);
        let mut home = Self::create(&all, name)?;
        let runner = serde_json::to_vec(runner)?;
        let (path, new) = (home.dir.join("lock"), home.dir.join("lock.new"));
        let why = || format!("cannot lock {}", path.display());
        let mut lock = File::create_new(&new).with_context(why)?;
        lock.write_all(&runner).with_context(why)?;
        lock.try_lock().with_context(why)?;
        // The runtime inherits it.
        fcntl(&lock, FcntlArg::F_SETFD(FdFlag::empty())).with_context(why)?;
        fs::rename(&new, &path).with_context(why)?;
        home._lock = Some(lock);
        Ok(home)
    }

    /// A new mount's, for `target`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn of_mount(state: &Path, target: &Path) -> anyhow::Result<Self> {
        let all = state.join("mounts");
        fs::create_dir_all(&all).with_context(|| format!("cannot create {}", all.display()))?;
        let home = Self::create(&all, &random_name())?;
        std::os::unix::fs::symlink(target, home.dir.join("target"))?;
        Ok(home)
    }

    /// That of the mount on `target`, if `harbour mount` made one for it.
    pub fn of_mounted(state: &Path, target: &Path) -> Option<Self> {
        let all = fs::read_dir(state.join("mounts")).ok()?;
        let mut homes = all.flatten().map(|entry| entry.path());
        let dir =
            homes.find(|dir| fs::read_link(dir.join("target")).is_ok_and(|at| at == target))?;
        Some(Self { dir, _lock: None })
    }

    fn create(all: &Path, name: &str) -> anyhow::Result<Self> {
        let dir = all.join(name);
        match fs::create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                anyhow::bail!("there is a container {name} already")
            }
            other => other.with_context(|| format!("cannot create {}", dir.display()))?,
        }
        for name in ["upper", "work", "rootfs"] {
            fs::create_dir(dir.join(name))?;
        }
        Ok(Self { dir, _lock: None })
    }

    /// The directory itself: a bundle, for a runtime.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a container's root is mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Its writable layer.
    pub fn upper(&self) -> Upper {
        Upper {
            upper: self.dir.join("upper"),
            work: self.dir.join("work"),
        }
    }

    /// Takes it away with all that was written.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(self) -> anyhow::Result<()> {
        remove(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}

/// A name that no other container has.
pub fn random_name() -> String {
    let random =
        std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
    format!("harbour-{random:016x}")
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let usable = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    anyhow::ensure!(
        begins_well && name.len() <= NAME_MAX && name.chars().all(usable),
        "{name:?} cannot be a container's name: letters, digits, '_', '.' and '-', at most {NAME_MAX}"
    );
    Ok(())
}

fn remove(dir: &Path) -> io::Result<()> {
    // Never below something that is mounted there still.
    match overlay::unmount(&dir.join("rootfs"), true) {
        Ok(()) => {}
        // Nothing is.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::remove_dir_all(dir)
}

/// Takes away what processes left that were killed.
fn sweep(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let dir = entry.path();
        let Ok(lock) = File::open(dir.join("lock")) else {
            // One that is being made has none yet, for a moment.
            let age = entry.metadata().and_then(|meta| meta.modified());
            if age.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > MAKING_MAX)) {
                take_away(&dir);
            }
            continue;
        };
        if lock.try_lock().is_err() {
            continue;
        }
        if let Ok(runner) = serde_json::from_reader::<_, Runner>(&lock) {
            runner.delete(&entry.file_name());
        }
        take_away(&dir);
    }
}

fn take_away(dir: &Path) {
    if let Err(error) = remove(dir) {
        tracing::warn!(dir = %dir.display(), %error, "what a container left cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_home_lives_as_long_as_who_runs_it() {
        let state = tempfile::tempdir().unwrap();
        let runner = Runner {
            runtime: "true".into(),
            root: state.path().to_owned(),
        };
        let new = |name: &str| Home::of_container(state.path(), name, &runner);
        let home = new("a").unwrap();
        assert!(new("a").is_err());
        let other = new("b").unwrap();
        assert!(home.dir().exists());
        // As after SIGKILL: the lock is gone and the directory is not.
        let dir = home.dir().to_owned();
        drop(home);
        assert!(dir.exists());
        new("c").unwrap();
        assert!(!dir.exists() && other.dir().exists());
        other.remove().unwrap();
        for bad in ["", ".", "../x", "a/b", "-a", &"a".repeat(65)] {
            assert!(new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mounts_home_is_found_by_its_target() {
        let state = tempfile::tempdir().unwrap();
        let target = Path::new("/somewhere/else");
        assert!(Home::of_mounted(state.path(), target).is_none());
        let home = Home::of_mount(state.path(), target).unwrap();
        let found = Home::of_mounted(state.path(), target).unwrap();
        assert_eq!(found.dir(), home.dir());
        found.remove().unwrap();
        assert!(Home::of_mounted(state.path(), target).is_none());
    }
}
