//! Changes of a directory, applied to a snapshot and to a plain directory beside it, which then have to be
//! the same.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, lchown},
    path::Path,
};

use super::client::{Client, Mounted};

/// One change, by path from the root.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    File(String, String, u32),
    Dir(&'static str, u32),
    Remove(&'static str),
    Chown(&'static str, u32),
    Link(&'static str, &'static str),
    Rename(&'static str, &'static str),
}

pub(crate) fn file(name: &str, content: &str, mode: u32) -> Step {
    Step::File(name.to_owned(), content.to_owned(), mode)
}

pub(crate) fn apply(root: &Path, steps: &[Step]) {
    for step in steps {
        match step {
            Step::File(name, content, mode) => {
                fs::write(root.join(name), content).unwrap();
                fs::set_permissions(root.join(name), fs::Permissions::from_mode(*mode)).unwrap();
            }
            Step::Dir(name, mode) => {
                fs::DirBuilder::new().create(root.join(name)).unwrap();
                fs::set_permissions(root.join(name), fs::Permissions::from_mode(*mode)).unwrap();
            }
            Step::Remove(name) => match fs::symlink_metadata(root.join(name)).unwrap().is_dir() {
                true => fs::remove_dir_all(root.join(name)).unwrap(),
                false => fs::remove_file(root.join(name)).unwrap(),
            },
            Step::Chown(name, owner) => {
                lchown(root.join(name), Some(*owner), Some(*owner)).unwrap();
            }
            Step::Link(from, to) => fs::hard_link(root.join(from), root.join(to)).unwrap(),
            Step::Rename(from, to) => fs::rename(root.join(from), root.join(to)).unwrap(),
        }
    }
}

/// Everything below `root` but times: mode, owners and content.
pub(crate) fn look(root: &Path) -> BTreeMap<String, (u32, u32, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = match meta.is_file() {
                true => fs::read(&path).unwrap(),
                false => Vec::new(),
            };
            let name = path.strip_prefix(root).unwrap().display().to_string();
            found.insert(name, (meta.mode(), meta.uid(), meta.gid(), content));
            if meta.is_dir() {
                left.push(path);
            }
        }
    }
    found
}

/// Applies each of `layers` to a snapshot on top of the one before and to a plain directory, and compares
/// before and after each; gives the last snapshot's name.
pub(crate) fn layered(client: &Client, work: &Path, name: &str, layers: &[Vec<Step>]) -> String {
    let flat = work.join(format!("{name}-flat"));
    fs::create_dir_all(&flat).unwrap();
    fs::DirBuilder::new()
        .mode(0o755)
        .recursive(true)
        .create(&flat)
        .unwrap();
    let mut parent = String::new();
    for (number, steps) in layers.iter().enumerate() {
        let key = format!("{name}-active-{number}");
        let mounts = client.prepare(&key, &parent).unwrap();
        let mounted = Mounted::new(&work.join(&key), &mounts);
        assert_eq!(look(mounted.path()), look(&flat), "{key} before");
        apply(&flat, steps);
        apply(mounted.path(), steps);
        assert_eq!(look(mounted.path()), look(&flat), "{key} after");
        drop(mounted);
        parent = format!("{name}-committed-{number}");
        client.commit(&parent, &key).unwrap();
    }
    let key = format!("{name}-view");
    let mounts = client.view(&key, &parent).unwrap();
    let mounted = Mounted::new(&work.join(&key), &mounts);
    assert_eq!(look(mounted.path()), look(&flat), "{key}");
    parent
}
