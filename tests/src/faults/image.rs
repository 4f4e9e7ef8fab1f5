//! The image that is read: programs, files that fio wrote and can check, and files with their sums.

use std::{collections::BTreeMap, fs, path::Path, process::Command, sync::Arc, time::Duration};

use anyhow::Result;

use super::plan::Dice;
use crate::{
    layers::{Entry, Layout, digest, programs},
    shell,
};

/// Files that fio reads, each a layer of its own.
pub(super) const FIO_FILES: [&str; 2] = ["fio/a", "fio/b"];
/// Length of each.
pub(super) const FIO_FILE_MIB: u32 = 12;
/// Blocks that fio checks, in bytes.
pub(super) const FIO_BLOCK: u32 = 16 << 10;
/// What fio ends each block with so that it can be checked.
pub(super) const FIO_VERIFY: &str = "--verify=crc32c";
/// Files that the container reads: how many and how long.
const FILES: usize = 32;
const FILE_BYTES: usize = 256 << 10;
/// What the container's script needs.
const PROGRAMS: [&str; 4] = ["/bin/bash", "/usr/bin/sha256sum", "/bin/dd", "/bin/sleep"];
const LIMIT: Duration = Duration::from_secs(60);
/// Name of the image in the layout.
pub(super) const TAG: &str = "faults";

/// What is in it.
#[derive(Clone, Debug)]
pub(super) struct Content {
    /// Bytes of the files that are checked, by path from the image's root.
    pub(super) files: Arc<BTreeMap<String, Vec<u8>>>,
}

/// Writes the image into a new layout in `dir`.
pub(super) fn make(dir: &Path) -> Result<(Layout, Content)> {
    let mut layout = Layout::create(&dir.join("layout"))?;
    let mut files = BTreeMap::new();
    let mut layers = vec![programs(&PROGRAMS)?];
    for name in FIO_FILES {
        let bytes = fio_file(&dir.join("written-by-fio"), name)?;
        layers.push(vec![Entry::dir("fio"), Entry::file(name, bytes.clone())]);
        files.insert(name.to_owned(), bytes);
    }
    let (mut entries, mut sums) = (vec![Entry::dir("data")], String::new());
    for number in 0..FILES {
        let (name, bytes) = (format!("data/{number}"), noise(number as u64));
        sums += &format!("{}  /{name}\n", digest(&bytes).replace("sha256:", ""));
        entries.push(Entry::file(name.clone(), bytes.clone()));
        files.insert(name, bytes);
    }
    entries.push(Entry::file("sums", sums));
    entries.extend(["proc", "dev"].map(Entry::dir));
    layers.push(entries);
    layout.image(TAG, &layers)?;
    let files = Arc::new(files);
    Ok((layout, Content { files }))
}

fn noise(seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let words = std::iter::repeat_with(|| dice.roll().to_le_bytes());
    words.take(FILE_BYTES / 8).flatten().collect()
}

fn fio_file(path: &Path, name: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("fio");
    // It leaves a file of what it wrote where it runs, unless told not to.
    command.args(["--name=write", "--rw=write", "--do_verify=0", FIO_VERIFY]);
    command.arg("--verify_state_save=0");
    command.arg(format!("--bs={FIO_BLOCK}"));
    command.arg(format!("--size={FIO_FILE_MIB}m"));
    command.arg(format!("--randseed={}", name.len()));
    command.arg(format!("--filename={}", path.display()));
    shell::run(&mut command, LIMIT)?.ok()?;
    let bytes = fs::read(path)?;
    fs::remove_file(path)?;
    Ok(bytes)
}
