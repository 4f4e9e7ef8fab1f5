//! Index files under `STATE/index/<hex>`: written whole to a temporary name, checked, synced,
//! renamed. A file with its final name is complete and right.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::error::{Error, Hash};

/// Bytes of index that one digest of the granule table stands for.
const GRANULE: usize = 16 << 10;

/// Largest index in bytes, without its table: ten million entries fit with room to spare.
pub(crate) const INDEX_MAX: u64 = 16 << 30;

/// The folder of index files.
#[derive(Debug)]
pub(crate) struct IndexFiles {
    folder: PathBuf,
    next: AtomicU64,
}

impl IndexFiles {
    pub(super) fn open(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        Ok(Self {
            folder: folder.into(),
            next: AtomicU64::new(0),
        })
    }

    /// Deletes what is not the file of a digest that `known` knows.
    pub(super) fn sweep(&self, known: impl Fn(&Hash) -> Result<bool, Error>) -> Result<(), Error> {
        for entry in fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
            let entry = entry.map_err(Error::io(&self.folder))?;
            let mut digest = [0; 32];
            let name = entry.file_name();
            let named = name
                .to_str()
                .is_some_and(|n| hex::decode_to_slice(n, &mut digest).is_ok());
            if !(named && known(&digest)?) {
                tracing::info!(file = %entry.path().display(), "deleting an index file that nothing names");
                fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
            }
        }
        Ok(())
    }

    /// Begins an index of `len` bytes.
    pub(crate) fn draft(&self, digest: Hash, len: u64) -> Result<IndexDraft, Error> {
        if len == 0 || len > INDEX_MAX {
            return Err(Error::Invalid(format!(
                "index of {len} bytes: 1 to {INDEX_MAX} are allowed"
            )));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .folder
            .join(format!("{}.{number}.part", hex::encode(digest)));
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        Ok(IndexDraft {
            digest,
            len,
            written: 0,
            table: Vec::new(),
            granule: blake3::Hasher::new(),
            file,
            temporary,
            path: self.path(&digest),
            folder: self.folder.clone(),
        })
    }

    /// At most `len` bytes from `offset`; `None` when there is no such index.
    pub(crate) fn read(
        &self,
        digest: &Hash,
        offset: u64,
        len: usize,
    ) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { path, source }),
        };
        let size = file.metadata().map_err(Error::io(&path))?.len();
        let want = size.saturating_sub(offset).min(len as u64) as usize;
        let mut content = vec![0; want];
        file.read_exact_at(&mut content, offset)
            .map_err(Error::io(&path))?;
        Ok(Some(content))
    }

    /// Deletes files whose rows have gone; one that is not there is no error.
    pub(crate) fn delete(&self, digests: &[Hash]) {
        for digest in digests {
            let path = self.path(digest);
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                // The next start sweeps it.
                tracing::warn!(file = %path.display(), %error, "cannot delete an index file");
            }
        }
    }

    fn path(&self, digest: &Hash) -> PathBuf {
        self.folder.join(hex::encode(digest))
    }
}

/// An index file that is being written. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub(crate) struct IndexDraft {
    digest: Hash,
    len: u64,
    written: u64,
    /// Digests of the whole granules seen so far; 32 bytes for 16 KiB of index.
    table: Vec<u8>,
    granule: blake3::Hasher,
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    folder: PathBuf,
}

impl IndexDraft {
    /// Length that the index is to have, without the table.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that the file is to have, with the table.
    pub(crate) fn total(&self) -> u64 {
        self.len + self.len.div_ceil(GRANULE as u64) * 32
    }

    /// Takes the next bytes.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        if self.written + bytes.len() as u64 > self.total() {
            return Err(Error::Invalid(format!(
                "index {} of {} bytes and its table make {} bytes, more came",
                hex::encode(self.digest),
                self.len,
                self.total()
            )));
        }
        self.file
            .write_all(bytes)
            .map_err(Error::io(&self.temporary))?;
        while !bytes.is_empty() {
            if self.written >= self.len {
                self.check_table(bytes)?;
                self.written += bytes.len() as u64;
                return Ok(());
            }
            let in_granule = GRANULE - (self.written % GRANULE as u64) as usize;
            let left = usize::try_from(self.len - self.written).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(in_granule.min(left).min(bytes.len()));
            self.granule.update(now);
            self.written += now.len() as u64;
            if self.written.is_multiple_of(GRANULE as u64) || self.written == self.len {
                self.table
                    .extend_from_slice(self.granule.finalize().as_bytes());
                self.granule.reset();
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Compares what came of the table with what the content gives.
    fn check_table(&self, came: &[u8]) -> Result<(), Error> {
        let at = (self.written - self.len) as usize;
        if self.table.get(at..at + came.len()) == Some(came) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "index {}: a granule does not match its table",
            hex::encode(self.digest)
        )))
    }

    /// Checks length and digest and syncs the content.
    pub(crate) fn seal(&mut self) -> Result<(), Error> {
        if self.written != self.total() {
            return Err(Error::Invalid(format!(
                "index {} ended after {} of {} bytes",
                hex::encode(self.digest),
                self.written,
                self.total()
            )));
        }
        let digest = blake3::Hasher::new()
            .update(&self.len.to_le_bytes())
            .update(&self.table)
            .finalize();
        if digest != blake3::Hash::from_bytes(self.digest) {
            return Err(Error::Invalid(format!(
                "index {} has the digest {}",
                hex::encode(self.digest),
                digest.to_hex()
            )));
        }
        self.file.sync_all().map_err(Error::io(&self.temporary))
    }

    /// Gives a sealed file its name. The caller holds the engine's lock, so that nobody deletes
    /// an older file of that name at the same time.
    pub(crate) fn publish(self) -> Result<(), Error> {
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))?;
        File::open(&self.folder)
            .and_then(|f| f.sync_all())
            .map_err(Error::io(&self.folder))
    }
}

impl Drop for IndexDraft {
    fn drop(&mut self) {
        // After a rename there is nothing of this name, and that is fine.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Index, table and digest, made the plain way.
    pub(crate) fn sealed(len: usize) -> (Vec<u8>, Hash) {
        let index: Vec<u8> = (0..len).map(|i| (i * 13 % 251) as u8).collect();
        let table: Vec<u8> = index
            .chunks(GRANULE)
            .flat_map(|g| *blake3::hash(g).as_bytes())
            .collect();
        let mut named = (len as u64).to_le_bytes().to_vec();
        named.extend_from_slice(&table);
        let digest = *blake3::hash(&named).as_bytes();
        ([index, table].concat(), digest)
    }

    #[test]
    fn takes_any_cutting_and_refuses_any_flip() {
        let folder = tempfile::tempdir().unwrap();
        let files = IndexFiles::open(folder.path()).unwrap();
        for len in [1, GRANULE - 1, GRANULE, GRANULE + 1, 3 * GRANULE + 9] {
            let (content, digest) = sealed(len);
            for cut in [1000, GRANULE, 70_000] {
                let mut draft = files.draft(digest, len as u64).unwrap();
                content.chunks(cut).for_each(|c| draft.write(c).unwrap());
                draft.seal().unwrap();
                draft.publish().unwrap();
                assert_eq!(
                    files.read(&digest, 0, usize::MAX >> 1).unwrap().unwrap(),
                    content
                );
                files.delete(&[digest]);
            }
            for at in [0, len / 2, len - 1, len, content.len() - 1] {
                let mut bad = content.clone();
                bad[at] ^= 4;
                let mut draft = files.draft(digest, len as u64).unwrap();
                let outcome = draft.write(&bad).and_then(|()| draft.seal());
                assert!(matches!(outcome, Err(Error::Invalid(_))), "{len} {at}");
                assert!(!files.path(&digest).exists());
            }
            let mut short = files.draft(digest, len as u64).unwrap();
            short.write(&content[..content.len() - 1]).unwrap();
            assert!(short.seal().is_err());
            let mut long = files.draft(digest, len as u64).unwrap();
            assert!(long.write(&[content.clone(), vec![0]].concat()).is_err());
        }
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            0,
            "drafts leave nothing"
        );
    }

    #[test]
    fn sweep_keeps_what_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let files = IndexFiles::open(folder.path()).unwrap();
        for name in [
            hex::encode([1; 32]),
            hex::encode([2; 32]),
            "x".into(),
            format!("{}.0.part", hex::encode([1; 32])),
        ] {
            fs::write(folder.path().join(name), b"x").unwrap();
        }
        files.sweep(|digest| Ok(*digest == [1; 32])).unwrap();
        assert!(files.path(&[1; 32]).exists());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
