//! Entries of the layer database: `image/overlay2/layerdb/sha256/CHAIN`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use harbour_image::digest::Digest;

use super::{
    driver::{self, Stack},
    files::{self, Scratch},
    record::{Record, chains},
    root::DataRoot,
};

/// Largest of the small files of an entry.
const SMALL_MAX: u64 = 4 << 10;

/// What keeps the way to a layer's tar stream.
const TAR_SPLIT: &str = "tar-split.json.gz";

impl DataRoot {
    /// Where a layer's way to its tar stream is kept, by its diff ID, until its layers link to it.
    pub(super) fn tar_split(&self, diff_id: &Digest) -> PathBuf {
        let name = format!("{}.json.gz", diff_id.hex());
        self.own().join("tar-split").join(name)
    }

    fn entry(&self, chain: &Digest) -> PathBuf {
        self.layers().join(chain.hex())
    }

    fn entry_text(&self, chain: &Digest, name: &str) -> anyhow::Result<Option<String>> {
        let text = files::read(&self.entry(chain).join(name), SMALL_MAX)?;
        Ok(text.and_then(|text| String::from_utf8(text).ok()))
    }

    /// The driver's directory of a layer that Docker knows, or will.
    pub(super) fn cache_of(&self, chain: &Digest) -> anyhow::Result<Option<String>> {
        let id = self.entry_text(chain, "cache-id")?;
        // It becomes part of a path.
        Ok(id.filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric())))
    }

    /// Whether that layer is ours.
    pub(super) fn is_our_layer(&self, chain: &Digest) -> anyhow::Result<bool> {
        Ok(self
            .cache_of(chain)?
            .is_some_and(|id| id == driver::cache_id(chain)))
    }

    /// Bytes of a layer's files, where Docker knows them already.
    pub(super) fn size_of(&self, chain: &Digest) -> anyhow::Result<Option<u64>> {
        let text = self.entry_text(chain, "size")?;
        Ok(text.and_then(|text| text.trim().parse().ok()))
    }

    /// Makes the layers of an image that Docker does not have, and mends ours. Gives how many there was
    /// something to do for.
    pub(super) fn ensure_layers(
        &self,
        scratch: &Scratch,
        record: &Record,
        step: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        let diff_ids = record.diff_ids()?;
        let (mut stack, mut parent, mut changed) = (Stack::default(), None, 0);
        for ((chain, diff_id), layer) in chains(&diff_ids).iter().zip(&diff_ids).zip(&record.layers)
        {
            match self.cache_of(chain)? {
                Some(id) if id != driver::cache_id(chain) => self.stack_other(&mut stack, &id)?,
                found => {
                    let target = record.mount.join("layers").join(diff_id.short());
                    let mut new = self.ensure_driver_dir(scratch, chain, &target, &mut stack)?;
                    step()?;
                    if found.is_none() {
                        let entry =
                            self.new_entry(scratch, chain, diff_id, layer.size_bytes, parent)?;
                        scratch.remove(&self.entry(chain))?;
                        scratch.rename(&entry, &self.entry(chain))?;
                        new = true;
                    }
                    new |= self.ensure_tar_split(scratch, chain, diff_id)?;
                    changed += usize::from(new);
                    step()?;
                }
            }
            parent = Some(chain);
        }
        Ok(changed)
    }

    fn new_entry(
        &self,
        scratch: &Scratch,
        chain: &Digest,
        diff_id: &Digest,
        size: u64,
        parent: Option<&Digest>,
    ) -> anyhow::Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let new = scratch.fresh();
        files::make_dir(&new)?;
        // As Docker has them.
        let why = || format!("cannot write {}", new.display());
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).with_context(why)?;
        let put = |name: &str, text: String| files::write(&new.join(name), text.as_bytes(), 0o644);
        put("cache-id", driver::cache_id(chain))?;
        put("diff", diff_id.to_string())?;
        put("size", size.to_string())?;
        if let Some(parent) = parent {
            put("parent", parent.to_string())?;
        }
        Ok(new)
    }

    fn ensure_tar_split(
        &self,
        scratch: &Scratch,
        chain: &Digest,
        diff_id: &Digest,
    ) -> anyhow::Result<bool> {
        let (kept, path) = (self.tar_split(diff_id), self.entry(chain).join(TAR_SPLIT));
        if path.exists() || !kept.exists() {
            return Ok(false);
        }
        let new = scratch.fresh();
        let why = || format!("cannot write {}", path.display());
        fs::hard_link(&kept, &new).with_context(why)?;
        scratch.rename(&new, &path)?;
        Ok(true)
    }

    /// Whether Docker could make the tar stream of a layer again.
    pub(super) fn has_tar_split(&self, chain: &Digest) -> bool {
        self.entry(chain).join(TAR_SPLIT).exists()
    }

    /// Takes a layer of ours away: first out of the database, so that none is there without its content.
    pub(super) fn remove_layer(&self, scratch: &Scratch, chain: &Digest) -> anyhow::Result<()> {
        if self.is_our_layer(chain)? {
            scratch.remove(&self.entry(chain))?;
        }
        self.remove_driver_dir(scratch, &driver::cache_id(chain))
    }

    /// Chains of all layers in the database.
    pub(super) fn all_layers(&self) -> anyhow::Result<Vec<Digest>> {
        let names = files::names(&self.layers())?;
        let parse = |name: &String| format!("sha256:{name}").parse().ok();
        Ok(names.iter().filter_map(parse).collect())
    }

    /// Diff ID and parent of a layer in the database.
    pub(super) fn layer_facts(
        &self,
        chain: &Digest,
    ) -> anyhow::Result<(Option<Digest>, Option<Digest>)> {
        let digest = |name: &str| -> anyhow::Result<Option<Digest>> {
            let text = self.entry_text(chain, name)?;
            Ok(text.and_then(|text| text.trim().parse().ok()))
        };
        Ok((digest("diff")?, digest("parent")?))
    }

    /// Layers on which containers stand.
    pub(super) fn below_containers(&self) -> anyhow::Result<BTreeSet<Digest>> {
        let mounts = self.images().join("layerdb/mounts");
        let mut below = BTreeSet::new();
        for name in files::names(&mounts)? {
            let text = files::read(&mounts.join(name).join("parent"), SMALL_MAX)?;
            let text = String::from_utf8(text.unwrap_or_default()).unwrap_or_default();
            below.extend(text.trim().parse::<Digest>().ok());
        }
        Ok(below)
    }
}

/// Bytes of the files in a layer's directory, as Docker counts them: a file with several names once, and
/// what links say.
pub(super) fn size_of(dir: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let (mut seen, mut size, mut dirs) = (BTreeSet::new(), 0, vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
                continue;
            }
            let meta = entry.metadata()?;
            if meta.nlink() < 2 || seen.insert(meta.ino()) {
                size += meta.len();
            }
        }
    }
    Ok(size)
}
