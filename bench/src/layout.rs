//! Writes an OCI image layout. Source: OCI image specification 1.1, image-layout, manifest, config.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    content::Content,
    sets::{Entry, Kind},
};

/// One image of a layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Hex of its manifest's digest.
    pub manifest: String,
    /// Sum of file sizes.
    pub unpacked_bytes: u64,
    /// Sum of blob sizes.
    pub blob_bytes: u64,
}

/// How a layer's blob is stored.
#[derive(Clone, Copy, Debug)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip of this level.
    Gzip(u32),
}

/// A layer that is in the layout.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Hex of the blob's SHA-256.
    pub blob: String,
    /// Length of the blob.
    pub blob_bytes: u64,
    /// Hex of the uncompressed tar's SHA-256.
    pub diff_id: String,
    /// Whether the blob is gzip.
    pub gzip: bool,
    /// Regular files.
    pub files: u64,
    /// Sum of their lengths.
    pub unpacked_bytes: u64,
}

/// A layout under construction.
#[derive(Debug)]
pub struct Layout {
    blobs: PathBuf,
    dir: PathBuf,
    manifests: Vec<serde_json::Value>,
}

impl Layout {
    /// Starts an empty one at `dir`.
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs).with_context(|| format!("cannot create {}", blobs.display()))?;
        fs::write(
            dir.join("oci-layout"),
            json!({"imageLayoutVersion": "1.0.0"}).to_string(),
        )?;
        Ok(Self {
            blobs,
            dir: dir.to_owned(),
            manifests: Vec::new(),
        })
    }

    /// Writes a layer of these entries.
    pub fn layer(&mut self, entries: &[Entry], compression: Compression) -> anyhow::Result<Layer> {
        let (mut files, mut bytes) = (0, 0);
        let mut layer = self.blob(compression, |out| write_tar(entries, out))?;
        for entry in entries {
            if let Kind::File { len, .. } = entry.kind {
                files += 1;
                bytes += len;
            }
        }
        (layer.files, layer.unpacked_bytes) = (files, bytes);
        Ok(layer)
    }

    /// Takes an existing tar file as a layer, as it is.
    pub fn import_tar(&mut self, path: &Path) -> anyhow::Result<Layer> {
        let mut from =
            File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let mut layer = self.blob(Compression::Gzip(1), |mut out| {
            io::copy(&mut from, &mut out).map(drop)
        })?;
        for entry in tar::Archive::new(File::open(path)?).entries()? {
            let entry = entry.with_context(|| format!("{} is not a tar file", path.display()))?;
            layer.files += u64::from(entry.header().entry_type().is_file());
            layer.unpacked_bytes += entry.size();
        }
        Ok(layer)
    }

    fn blob(
        &mut self,
        compression: Compression,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<Layer> {
        let partial = self.blobs.join("partial");
        let file = Hashed::new(BufWriter::with_capacity(1 << 20, File::create(&partial)?));
        let (diff_id, mut file) = match compression {
            Compression::None => {
                let mut file = Hashed::new(file);
                fill(&mut file)?;
                (file.hex(), file.inner)
            }
            Compression::Gzip(level) => {
                let mut zip = Hashed::new(GzEncoder::new(file, flate2::Compression::new(level)));
                fill(&mut zip)?;
                (zip.hex(), zip.inner.finish()?)
            }
        };
        file.flush()?;
        let (blob, blob_bytes) = (file.hex(), file.written);
        fs::rename(&partial, self.blobs.join(&blob))?;
        let gzip = matches!(compression, Compression::Gzip(_));
        Ok(Layer {
            blob,
            blob_bytes,
            diff_id,
            gzip,
            files: 0,
            unpacked_bytes: 0,
        })
    }

    /// Adds an image of these layers.
    pub fn image(&mut self, tag: &str, layers: &[Layer]) -> anyhow::Result<Image> {
        self.runnable(tag, layers, &["/bin/sh"])
    }

    /// The same, with a command.
    pub fn runnable(
        &mut self,
        tag: &str,
        layers: &[Layer],
        command: &[&str],
    ) -> anyhow::Result<Image> {
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|l| format!("sha256:{}", l.diff_id))
            .collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": layers.iter().map(|_| json!({"created_by": "harbour-bench"})).collect::<Vec<_>>(),
        });
        let (config, config_len) = self.document(&config)?;
        let descriptors: Vec<_> = layers
            .iter()
            .map(|layer| {
                let kind = if layer.gzip { "tar+gzip" } else { "tar" };
                json!({
                    "mediaType": format!("application/vnd.oci.image.layer.v1.{kind}"),
                    "digest": format!("sha256:{}", layer.blob),
                    "size": layer.blob_bytes,
                })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": format!("sha256:{config}"),
                "size": config_len,
            },
            "layers": descriptors,
        });
        let (manifest, manifest_len) = self.document(&manifest)?;
        self.manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{manifest}"),
            "size": manifest_len,
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        Ok(Image {
            manifest,
            unpacked_bytes: layers.iter().map(|l| l.unpacked_bytes).sum(),
            blob_bytes: layers.iter().map(|l| l.blob_bytes).sum(),
        })
    }

    fn document(&mut self, value: &serde_json::Value) -> anyhow::Result<(String, usize)> {
        let text = value.to_string();
        let digest = hex::encode(Sha256::digest(&text));
        fs::write(self.blobs.join(&digest), &text)?;
        Ok((digest, text.len()))
    }

    /// Writes the index: the layout is whole after this.
    pub fn finish(self) -> anyhow::Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        fs::write(self.dir.join("index.json"), index.to_string())?;
        Ok(())
    }
}

/// Writes a tar stream of these entries.
pub fn write_tar(entries: &[Entry], out: &mut dyn Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    for entry in entries {
        append(&mut tar, entry)?;
    }
    tar.finish()
}

/// A fixed time, so that the same flags give the same digests: 2024-01-01.
const MTIME: u64 = 1_704_067_200;

fn append(tar: &mut tar::Builder<&mut dyn Write>, entry: &Entry) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(MTIME);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    match &entry.kind {
        Kind::Dir => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            tar.append_data(&mut header, format!("{}/", entry.path), io::empty())
        }
        Kind::File { len, seed, texture } => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(0o644);
            header.set_size(*len);
            tar.append_data(
                &mut header,
                &entry.path,
                Content::new(*seed, *texture, *len),
            )
        }
        Kind::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            tar.append_link(&mut header, &entry.path, target)
        }
    }
}

/// Hashes and counts what goes through.
#[derive(Debug)]
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    written: u64,
}

impl<W> Hashed<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            written: 0,
        }
    }

    fn hex(&self) -> String {
        hex::encode(self.hash.clone().finalize())
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::io::Read as _;

    use super::*;
    use crate::sets;

    #[test]
    fn the_layout_is_whole_and_the_same_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifests = Vec::new();
        for name in ["a", "b"] {
            let mut layout = Layout::create(&dir.path().join(name)).unwrap();
            let entries = sets::image_like(300_000, 1);
            let zipped = layout.layer(&entries, Compression::Gzip(6)).unwrap();
            let plain = layout.layer(&entries, Compression::None).unwrap();
            assert_eq!(zipped.diff_id, plain.diff_id);
            assert_eq!(plain.diff_id, plain.blob);
            assert_eq!(zipped.unpacked_bytes, 300_000);
            let blob = fs::read(layout.blobs.join(&zipped.blob)).unwrap();
            assert_eq!(hex::encode(Sha256::digest(&blob)), zipped.blob);
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(&blob[..])
                .read_to_end(&mut tar)
                .unwrap();
            assert_eq!(hex::encode(Sha256::digest(&tar)), zipped.diff_id);
            assert_eq!(
                tar::Archive::new(&tar[..]).entries().unwrap().count(),
                entries.len()
            );
            manifests.push(layout.image("x", &[zipped, plain]).unwrap().manifest);
            layout.finish().unwrap();
        }
        assert_eq!(manifests[0], manifests[1]);
    }
}
