//! Directories of the overlay2 driver.
//!
//! `overlay2/ID` holds of each layer `diff`, `link`, `lower`, `work` and `committed`; `overlay2/l` short
//! names for all of them, because an overlay's options have to fit one page. In a directory of ours
//! `diff` is a link to the layer in the mount, and a file `harbour` says which layer it is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use harbour_image::digest::Digest;

use super::{
    files::{self, Scratch},
    root::DataRoot,
};

/// Characters of a short name, as the driver makes them.
const LINK_LEN: usize = 26;

/// Longest list of short names: more layers than an overlay takes, by far.
const LOWER_MAX: u64 = 64 << 10;

/// The file that says that a directory is ours; it holds the chain ID.
const MARK: &str = "harbour";

/// Directory of the driver for a layer of ours: always the same one, so that it is known again.
pub(super) fn cache_id(chain: &Digest) -> String {
    Digest::of(format!("harbour layer {chain}").as_bytes()).hex()
}

/// The short name of that directory.
fn short_name(cache_id: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = Digest::of(cache_id.as_bytes());
    let letter = |byte: &u8| char::from(LETTERS[usize::from(byte % 32)]);
    digest
        .as_bytes()
        .iter()
        .take(LINK_LEN)
        .map(letter)
        .collect()
}

/// A layer's directory, as those above it see it.
#[derive(Clone, Debug)]
pub(super) struct Below {
    /// Its short name.
    link: String,
    /// Where its content is, when it is ours.
    target: Option<PathBuf>,
}

/// Directories of a chain from its lowest layer on, to see what is below the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Stack {
    layers: Vec<Below>,
}

impl Stack {
    /// What the file `lower` of a layer with its content at `target` says. A layer that the chain has
    /// twice counts where it is highest: what it puts there covers what it put lower down, and the kernel
    /// takes no directory twice.
    fn lower(&self, target: Option<&Path>) -> String {
        let other = |below: &&Below| target.is_none() || below.target.as_deref() != target;
        let mut parts: Vec<String> = Vec::new();
        for below in self.layers.iter().rev().filter(other) {
            parts.push(format!("l/{}", below.link));
        }
        parts.join(":")
    }

    fn push(&mut self, below: Below) {
        if below.target.is_some() {
            self.layers.retain(|layer| layer.target != below.target);
        }
        self.layers.push(below);
    }
}

impl DataRoot {
    fn driver_dir(&self, cache_id: &str) -> PathBuf {
        self.driver().join(cache_id)
    }

    fn short_path(&self, link: &str) -> PathBuf {
        self.driver().join("l").join(link)
    }

    /// Puts a layer of Docker's own onto the stack.
    pub(super) fn stack_other(&self, stack: &mut Stack, cache_id: &str) -> anyhow::Result<()> {
        let path = self.driver_dir(cache_id).join("link");
        let link = files::read(&path, 256)?.with_context(|| {
            format!(
                "{} is missing: Docker's own layer is damaged",
                path.display()
            )
        })?;
        let link = String::from_utf8(link)
            .ok()
            .filter(|link| !link.contains([':', '/']));
        let link = link.with_context(|| format!("{} is damaged", path.display()))?;
        stack.push(Below { link, target: None });
        Ok(())
    }

    /// Makes the directory of a layer of ours, or mends it, and puts it onto the stack. Gives whether
    /// something had to be done.
    pub(super) fn ensure_driver_dir(
        &self,
        scratch: &Scratch,
        chain: &Digest,
        target: &Path,
        stack: &mut Stack,
    ) -> anyhow::Result<bool> {
        let id = cache_id(chain);
        let (dir, link) = (self.driver_dir(&id), short_name(&id));
        let lower = stack.lower(Some(target));
        let inside = Path::new("..").join(&id).join("diff");
        let is_link = |path: &Path, to: &Path| fs::read_link(path).is_ok_and(|at| at == to);
        let holds = |name: &str, text: &str| -> anyhow::Result<bool> {
            let found = files::read(&dir.join(name), LOWER_MAX)?;
            Ok(found.unwrap_or_default() == text.as_bytes())
        };
        let mut changed = false;
        let whole = holds(MARK, &chain.to_string())?
            && holds("link", &link)?
            && holds("lower", &lower)?
            && dir.join("work").is_dir();
        if !whole {
            let new = scratch.fresh();
            fill(&new, chain, target, &link, &lower)?;
            scratch.remove(&dir)?;
            scratch.rename(&new, &dir)?;
            changed = true;
        } else if !is_link(&dir.join("diff"), target) {
            scratch.link(target, &dir.join("diff"))?;
            changed = true;
        }
        let short = self.short_path(&link);
        if !is_link(&short, &inside) {
            scratch.link(&inside, &short)?;
            changed = true;
        }
        let target = Some(target.to_owned());
        stack.push(Below { link, target });
        Ok(changed)
    }

    /// Takes away the directory of a layer of ours.
    pub(super) fn remove_driver_dir(&self, scratch: &Scratch, id: &str) -> anyhow::Result<()> {
        scratch.remove(&self.short_path(&short_name(id)))?;
        scratch.remove(&self.driver_dir(id))
    }

    /// The chain whose layer a directory of the driver is, when it is ours.
    pub(super) fn our_chain(&self, cache_id: &str) -> anyhow::Result<Option<Digest>> {
        let text = files::read(&self.driver_dir(cache_id).join(MARK), 256)?;
        let text = text.and_then(|text| String::from_utf8(text).ok());
        Ok(text.and_then(|text| text.parse().ok()))
    }

    /// Every directory of the driver that is ours, with its chain, and for each short name that some
    /// other directory has below it.
    pub(super) fn driver_dirs(&self) -> anyhow::Result<Vec<DriverDir>> {
        let mut dirs = Vec::new();
        for id in files::names(&self.driver())? {
            if id == "l" {
                continue;
            }
            let lower = files::read(&self.driver_dir(&id).join("lower"), LOWER_MAX)?;
            let lower = String::from_utf8(lower.unwrap_or_default()).unwrap_or_default();
            let names = lower.split(':').filter_map(|part| part.strip_prefix("l/"));
            let lower = names.map(str::to_owned).collect();
            let chain = self.our_chain(&id)?;
            dirs.push(DriverDir { id, chain, lower });
        }
        Ok(dirs)
    }
}

/// A directory of the driver.
#[derive(Debug)]
pub(super) struct DriverDir {
    /// Its name.
    pub(super) id: String,
    /// Its chain, when it is ours.
    pub(super) chain: Option<Digest>,
    /// Short names of what is below it.
    pub(super) lower: Vec<String>,
}

impl DriverDir {
    /// The short name of a directory of ours.
    pub(super) fn short_name(&self) -> String {
        short_name(&self.id)
    }
}

fn fill(dir: &Path, chain: &Digest, target: &Path, link: &str, lower: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    files::make_dir(&dir.join("work"))?;
    let mode = fs::Permissions::from_mode(0o710);
    fs::set_permissions(dir, mode).with_context(|| format!("cannot write {}", dir.display()))?;
    symlink(target, dir.join("diff")).with_context(|| format!("cannot write {}", dir.display()))?;
    files::write(&dir.join("link"), link.as_bytes(), 0o644)?;
    files::write(&dir.join("committed"), b"", 0o600)?;
    files::write(&dir.join(MARK), chain.to_string().as_bytes(), 0o600)?;
    if !lower.is_empty() {
        files::write(&dir.join("lower"), lower.as_bytes(), 0o644)?;
    }
    Ok(())
}
