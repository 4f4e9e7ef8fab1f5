//! Reading a file that is to be edited, and putting another in its place in one step.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::failure::{self, Code};

/// The most that a configuration file may have.
const FILE_MAX: u64 = 4 << 20;

/// The mode of a file that was not there.
const NEW_MODE: u32 = 0o644;

/// A file as it was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Where it really is: links are followed, as the engine follows them.
    pub path: PathBuf,
    /// Its text; `None` when there is no file.
    pub text: Option<String>,
    /// Mode, owner and group of the file, or what a new one is to have.
    pub attributes: Attributes,
}

/// Mode and owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Found {
    /// Reads the file at `path`, which need not exist.
    ///
    /// # Errors
    /// Something else than a file of text of a few MiB.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let named = std::path::absolute(path)
            .with_context(|| format!("cannot resolve {}", path.display()))?;
        let path = match fs::canonicalize(&named) {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::symlink_metadata(&named).is_ok() {
                    return Err(failure::failure(
                        Code::Failed,
                        format!("{} is a link to nothing", named.display()),
                        "make what it points to, or take the link away",
                    ));
                }
                let attributes = Attributes {
                    mode: NEW_MODE,
                    uid: nix::unistd::geteuid().as_raw(),
                    gid: nix::unistd::getegid().as_raw(),
                };
                return Ok(Self {
                    path: named,
                    text: None,
                    attributes,
                });
            }
            Err(error) => return Err(unreadable(&named, error)),
        };
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let file = options.open(&path).map_err(|e| unreadable(&path, e))?;
        let meta = file.metadata().map_err(|e| unreadable(&path, e))?;
        anyhow::ensure!(meta.is_file(), "{} is not a file", path.display());
        let mut bytes = Vec::new();
        file.take(FILE_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| unreadable(&path, e))?;
        anyhow::ensure!(
            bytes.len() as u64 <= FILE_MAX,
            "{} has more than {FILE_MAX} bytes: that is no configuration file",
            path.display()
        );
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = 1 + error.as_bytes()[..valid]
                .iter()
                .filter(|b| **b == b'\n')
                .count();
            anyhow::anyhow!("{}, line {line}: not UTF-8", path.display())
        })?;
        Ok(Self {
            attributes: Attributes {
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
            },
            path,
            text: Some(text),
        })
    }

    /// The digest of what it holds; `None` when there is no file.
    pub fn digest(&self) -> Option<String> {
        self.text.as_deref().map(digest)
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Directories above it that are not there, the highest first.
    pub fn missing_dirs(&self) -> Vec<PathBuf> {
        let missing = self.dir().ancestors().take_while(|dir| !dir.exists());
        let mut missing: Vec<_> = missing.map(Path::to_owned).collect();
        missing.reverse();
        missing
    }
}

fn unreadable(path: &Path, error: io::Error) -> anyhow::Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let what = format!("cannot read {}: {error}", path.display());
    let next = if denied { "run it with sudo" } else { "" };
    failure::failure(Code::Failed, what, next)
}

/// A text's digest, for records.
pub fn digest(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// A new file beside the one it is to replace. What becomes nothing is taken away again.
#[derive(Debug)]
pub struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    made: Vec<PathBuf>,
    done: bool,
}

impl Staged {
    /// Writes `text` beside `found`, with that file's attributes and extended attributes, down to the disk.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn new(found: &Found, text: &str, attributes: Attributes) -> anyhow::Result<Self> {
        let mut staged = Self {
            temporary: temporary(&found.path),
            path: found.path.clone(),
            made: Vec::new(),
            done: false,
        };
        for dir in found.missing_dirs() {
            fs::create_dir(&dir).map_err(|error| unwritable(&dir, error))?;
            staged.made.push(dir);
        }
        staged
            .write(text, attributes)
            .map_err(|error| unwritable(&found.path, error))?;
        Ok(staged)
    }

    fn write(&self, text: &str, attributes: Attributes) -> io::Result<()> {
        // One that a process left that was killed here before.
        let _ = fs::remove_file(&self.temporary);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&self.temporary)?;
        file.write_all(text.as_bytes())?;
        let meta = file.metadata()?;
        if (meta.uid(), meta.gid()) != (attributes.uid, attributes.gid) {
            std::os::unix::fs::fchown(&file, Some(attributes.uid), Some(attributes.gid))?;
        }
        // After the owner, whose change clears some of its bits.
        file.set_permissions(fs::Permissions::from_mode(attributes.mode))?;
        copy_xattrs(&self.path, &self.temporary);
        file.sync_all()
    }

    /// Where the new file is for now.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Puts it in place: who opens the file sees all of the old one or all of the new one.
    ///
    /// # Errors
    /// A file system that refuses.
    pub fn commit(mut self) -> anyhow::Result<()> {
        fs::rename(&self.temporary, &self.path).map_err(|e| unwritable(&self.path, e))?;
        self.done = true;
        sync_dir(self.path.parent().unwrap_or(Path::new("/")));
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let _ = fs::remove_file(&self.temporary);
        for dir in self.made.iter().rev() {
            let _ = fs::remove_dir(dir);
        }
    }
}

fn unwritable(path: &Path, error: io::Error) -> anyhow::Error {
    let next = match error.kind() {
        io::ErrorKind::PermissionDenied => "run it with sudo",
        io::ErrorKind::ReadOnlyFilesystem => "say where it may be written with --config-file",
        _ => "",
    };
    failure::failure(
        Code::Failed,
        format!("cannot write {}: {error}", path.display()),
        next,
    )
}

/// A name beside `path` that no engine reads and that the next run knows to be its own.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.harbour-new"))
}

/// Labels of access control and the like; where they cannot be copied the directory's defaults stand.
fn copy_xattrs(from: &Path, to: &Path) {
    for name in xattr::list(from).into_iter().flatten() {
        if let Ok(Some(value)) = xattr::get(from, &name) {
            let _ = xattr::set(to, &name, &value);
        }
    }
}

/// Makes renames in a directory last; one that cannot be synced is no reason to fail.
pub fn sync_dir(dir: &Path) {
    let _ = File::open(dir).and_then(|dir| dir.sync_all());
}

/// Takes a file away that was not there before, and these directories where nothing else is in them.
///
/// # Errors
/// A directory that cannot be written to.
pub fn remove(path: &Path, dirs: &[PathBuf]) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(unwritable(path, error));
        }
        _ => {}
    }
    sync_dir(path.parent().unwrap_or(Path::new("/")));
    sweep(path, dirs);
    Ok(())
}

/// Takes away what a process that was killed has left beside `path`, and these directories where nothing is
/// in them.
pub fn sweep(path: &Path, dirs: &[PathBuf]) {
    let _ = fs::remove_file(temporary(path));
    for dir in dirs.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}
