//! Images in local files: OCI layouts as directory or tar, and `docker save` archives.
//!
//! Nothing is unpacked to disk. A tar is read once for where its members lie ([`tar_index`]), and
//! blobs are then read in place by offset. What an archive says is never used as a path of the
//! host: names are looked up in the archive's own list alone.

pub(crate) mod docker;
pub(crate) mod oci;
pub(crate) mod tar_index;
mod unpack;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use self::tar_index::TarIndex;
pub(crate) use self::unpack::open_archive;
use super::{blob::BlobSink, error::SourceError, options::ArchiveOptions};
use crate::{digest::Digest, manifest::Compression};

/// Bytes of a blob that are read at a time.
const CHUNK: usize = 1 << 20;

/// What [`detect`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A directory with an OCI layout.
    OciLayout,
    /// A tar with an OCI layout.
    OciArchive,
    /// A tar as `docker save` writes it.
    DockerArchive,
}

/// Finds out what is at `path` by its content.
///
/// An archive with both descriptions, as newer `docker save` writes it, counts as Docker's: that
/// one gives the image's full name.
pub(crate) fn detect(path: &Path) -> Result<Found, SourceError> {
    let metadata = fs::metadata(path).map_err(|e| SourceError::io(path, "read its type", e))?;
    if metadata.is_dir() {
        return if path.join("oci-layout").is_file() {
            Ok(Found::OciLayout)
        } else {
            let reason = "this directory is no OCI layout: it has no file oci-layout";
            Err(SourceError::archive(path, reason))
        };
    }
    let file = open_regular(path)?;
    let names = match sniff(&file, 0, path)? {
        Compression::None => TarIndex::of_file(&file, path)?,
        compression => {
            let limit = ArchiveOptions::default().unpacked_max;
            TarIndex::of_stream(unpack::decoder(&file, compression, path)?.take(limit), path)?
        }
    };
    if names.contains("manifest.json") {
        Ok(Found::DockerArchive)
    } else if names.contains("oci-layout") {
        Ok(Found::OciArchive)
    } else {
        let reason = "this archive holds no image: it has neither manifest.json nor oci-layout";
        Err(SourceError::archive(path, reason))
    }
}

/// Files of one source by name.
#[derive(Debug)]
pub(crate) enum Store {
    /// Members of a tar.
    Tar {
        file: Arc<File>,
        path: PathBuf,
        index: TarIndex,
    },
    /// Files below a directory, given without links.
    Dir { root: PathBuf },
}

/// A run of bytes in an open file.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    file: Arc<File>,
    offset: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    path: PathBuf,
}

impl Store {
    /// Opens the tar at `path`, unpacking it first if it is compressed.
    pub(crate) fn tar(path: &Path, options: &ArchiveOptions) -> Result<Self, SourceError> {
        let file = open_archive(path, options)?;
        let index = TarIndex::of_file(&file, path)?;
        Ok(Self::Tar {
            file: Arc::new(file),
            path: path.to_owned(),
            index,
        })
    }

    /// The directory at `path`.
    pub(crate) fn dir(path: &Path) -> Result<Self, SourceError> {
        let root = fs::canonicalize(path).map_err(|e| SourceError::io(path, "open it", e))?;
        Ok(Self::Dir { root })
    }

    /// The archive or directory.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Tar { path, .. } => path,
            Self::Dir { root } => root,
        }
    }

    /// The file called `name`, a relative path made of plain components.
    pub(crate) fn open(&self, name: &str) -> Result<Slice, SourceError> {
        let missing = || SourceError::NotFound {
            what: name.to_owned(),
            at: self.path().display().to_string(),
        };
        match self {
            Self::Tar { file, path, index } => {
                let (offset, len) = index.find(name, path)?.ok_or_else(missing)?;
                Ok(Slice {
                    file: Arc::clone(file),
                    offset,
                    len,
                    path: path.clone(),
                })
            }
            Self::Dir { root } => {
                let path = match fs::canonicalize(root.join(name)) {
                    Ok(path) => path,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
                    Err(error) => return Err(SourceError::io(root.join(name), "open it", error)),
                };
                if !path.starts_with(root) {
                    let reason = format!(
                        "{name} is a link that leads out of the layout: copy the layout with its \
                         links resolved (cp -rL)"
                    );
                    return Err(SourceError::archive(root, reason));
                }
                let file = open_regular(&path)?;
                let len = file
                    .metadata()
                    .map_err(|e| SourceError::io(&path, "read its size", e))?
                    .len();
                Ok(Slice {
                    file: Arc::new(file),
                    offset: 0,
                    len,
                    path,
                })
            }
        }
    }
}

impl Slice {
    /// The whole run, if it has no more than `limit` bytes.
    pub(crate) fn read_all(&self, limit: u64) -> Result<Vec<u8>, SourceError> {
        if self.len > limit {
            let what = self.path.display().to_string();
            return Err(SourceError::TooLarge { what, limit });
        }
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// How the run is compressed, by its first bytes.
    pub(crate) fn sniff(&self) -> Result<Compression, SourceError> {
        sniff(&self.file, self.offset, &self.path)
    }

    /// Digest of the run; blocks for as long as reading it takes.
    pub(crate) fn digest(&self) -> Result<Digest, SourceError> {
        use sha2::Digest as _;
        let mut hasher = sha2::Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.len {
            let len = chunk_len(self.len - at);
            self.read_at(at, &mut buffer[..len])?;
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
        Ok(Digest::from_bytes(hasher.finalize().into()))
    }

    /// Feeds the run into `sink` and ends it.
    pub(crate) async fn pump(self, mut sink: BlobSink) {
        if self.len != sink.size() {
            let what = format!("blob {} from {}", sink.digest(), self.path.display());
            let error = SourceError::WrongSize {
                what,
                want: sink.size(),
                got: self.len,
            };
            return sink.fail(error).await;
        }
        let mut at = 0;
        while at < self.len {
            let slice = self.clone();
            let read = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; chunk_len(slice.len - at)];
                slice.read_at(at, &mut buffer)?;
                Ok(Bytes::from(buffer))
            });
            let chunk = match read.await {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(error)) => return sink.fail(error).await,
                Err(_) => return sink.fail(SourceError::Stopped).await,
            };
            at += chunk.len() as u64;
            if sink.push(chunk).await.is_err() {
                return;
            }
        }
        sink.finish(&self.path.display().to_string(), || {}).await;
    }

    fn read_at(&self, at: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let done = self.file.read_exact_at(out, self.offset + at);
        done.map_err(|e| SourceError::io(&self.path, "read it", e))
    }
}

fn chunk_len(left: u64) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK)
}

/// Opens a regular file. Anything else (a fifo would block for ever) is refused.
fn open_regular(path: &Path) -> Result<File, SourceError> {
    let regular = |metadata: io::Result<fs::Metadata>| match metadata {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(SourceError::archive(path, "this is not a regular file")),
        Err(error) => Err(SourceError::io(path, "read its type", error)),
    };
    regular(fs::metadata(path))?;
    let file = File::open(path).map_err(|e| SourceError::io(path, "open it", e))?;
    regular(file.metadata())?;
    Ok(file)
}

fn sniff(file: &File, offset: u64, path: &Path) -> Result<Compression, SourceError> {
    let mut start = [0; 6];
    let mut filled = 0;
    while filled < start.len() {
        match file.read_at(&mut start[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(SourceError::io(path, "read it", error)),
        }
    }
    Compression::sniff(&start[..filled]).ok_or_else(|| {
        let reason = "xz and bzip2 are not supported: compress with gzip or zstd, or not at all";
        SourceError::archive(path, reason)
    })
}
