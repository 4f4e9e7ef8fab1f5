//! Writing layers byte by byte and images as OCI layouts: honest ones for the model tests, and
//! hostile ones that no library would write.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::shell;

const BLOCK: usize = 512;

/// Media types.
pub mod media {
    /// A gzip layer.
    pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// A plain layer.
    pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
    /// A zstd layer.
    pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// A manifest.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// A config.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
}

/// `sha256:…` of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// One tar entry; `Default` is an empty file of root's with mode 0644.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Path as it stands in the archive.
    pub name: Vec<u8>,
    /// Type flag: `b'0'` file, `b'5'` directory and so on.
    pub kind: u8,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds, nanoseconds.
    pub mtime: (i64, u32),
    /// Target of a link.
    pub link: Vec<u8>,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Content of a file.
    pub data: Vec<u8>,
    /// A size to claim instead of the true one.
    pub claimed: Option<u64>,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            name: Vec::new(),
            kind: b'0',
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (1_700_000_000, 0),
            link: Vec::new(),
            device: (0, 0),
            xattrs: Vec::new(),
            data: Vec::new(),
            claimed: None,
        }
    }
}

impl Entry {
    /// A regular file.
    pub fn file(name: impl Into<Vec<u8>>, data: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            data: data.into(),
            ..Self::default()
        }
    }

    /// A directory of mode 0755.
    pub fn dir(name: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            kind: b'5',
            mode: 0o755,
            ..Self::default()
        }
    }

    /// A symbolic link.
    pub fn symlink(name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            kind: b'2',
            mode: 0o777,
            link: target.into(),
            ..Self::default()
        }
    }

    /// A hard link.
    pub fn hard(name: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            kind: b'1',
            link: target.into(),
            ..Self::default()
        }
    }

    /// Adds this entry to a tar stream.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut pax = Vec::new();
        if self.name.len() > 100 {
            record(&mut pax, b"path", &self.name);
        }
        if self.link.len() > 100 {
            record(&mut pax, b"linkpath", &self.link);
        }
        if self.mtime.1 != 0 {
            record(
                &mut pax,
                b"mtime",
                format!("{}.{:09}", self.mtime.0, self.mtime.1).as_bytes(),
            );
        }
        for (key, value) in &self.xattrs {
            record(&mut pax, &[b"SCHILY.xattr.", &key[..]].concat(), value);
        }
        if !pax.is_empty() {
            let head = Self {
                name: b"PaxHeaders/x".to_vec(),
                kind: b'x',
                ..Self::default()
            };
            out.extend(head.header(pax.len() as u64));
            pad(out, &pax);
        }
        let data = if self.kind == b'0' {
            &self.data[..]
        } else {
            &[]
        };
        out.extend(self.header(self.claimed.unwrap_or(data.len() as u64)));
        pad(out, data);
    }

    fn header(&self, size: u64) -> [u8; BLOCK] {
        let mut head = [0_u8; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name[..self.name.len().min(100)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.uid & 0o7_777_777).as_bytes());
        put(116, format!("{:07o}", self.gid & 0o7_777_777).as_bytes());
        if size < 1 << 33 {
            put(124, format!("{size:011o}").as_bytes());
        } else {
            put(124, &[0x80, 0, 0, 0]);
            put(128, &size.to_be_bytes());
        }
        put(136, format!("{:011o}", self.mtime.0.max(0)).as_bytes());
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, &self.link[..self.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        head
    }
}

/// One PAX record: its length, which counts itself, the key, the value.
pub fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    out.extend(format!("{length} ").into_bytes());
    out.extend(key);
    out.push(b'=');
    out.extend(value);
    out.push(b'\n');
}

/// `data`, filled with zeros to a whole block.
pub fn pad(out: &mut Vec<u8>, data: &[u8]) {
    out.extend(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// A tar stream of `entries` with its end marker.
pub fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    entries.iter().for_each(|e| e.write(&mut out));
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// A layer as a manifest and a config speak of it.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The bytes stored under [`Self::digest`].
    pub bytes: Vec<u8>,
    /// Media type in the descriptor.
    pub media_type: String,
    /// Digest in the descriptor.
    pub digest: String,
    /// Size in the descriptor.
    pub size: u64,
    /// Diff ID in the config.
    pub diff_id: String,
}

impl Blob {
    /// A true gzip layer of a tar stream.
    pub fn gzip(tar: &[u8]) -> Result<Self> {
        Ok(Self::new(gzip(tar)?, media::GZIP, digest(tar)))
    }

    /// A true layer that is not compressed.
    pub fn plain(tar: &[u8]) -> Self {
        Self::new(tar.to_vec(), media::TAR, digest(tar))
    }

    /// A layer whose descriptor tells the truth about `bytes`.
    pub fn new(bytes: Vec<u8>, media_type: &str, diff_id: String) -> Self {
        let (digest, size) = (digest(&bytes), bytes.len() as u64);
        Self {
            bytes,
            media_type: media_type.into(),
            digest,
            size,
            diff_id,
        }
    }
}

/// An OCI layout being written into a directory.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    /// Starts an empty layout in `dir`, which is made.
    pub fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("blobs/sha256"))
            .with_context(|| format!("making {}", dir.display()))?;
        std::fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let layout = Self {
            dir: dir.to_owned(),
            manifests: Vec::new(),
        };
        layout.save()?;
        Ok(layout)
    }

    /// What `harbour pull` takes.
    pub fn reference(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.dir.display())
    }

    /// Adds an image of honest gzip layers.
    pub fn image(&mut self, tag: &str, layers: &[Vec<Entry>]) -> Result<()> {
        let blobs = layers
            .iter()
            .map(|l| Blob::gzip(&tar(l)))
            .collect::<Result<Vec<_>>>()?;
        self.blobs(tag, &blobs)
    }

    /// Adds an image of these layers, honest or not.
    pub fn blobs(&mut self, tag: &str, blobs: &[Blob]) -> Result<()> {
        let diff_ids: Vec<_> = blobs.iter().map(|b| b.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture(), "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        self.documents(tag, &config.to_string().into_bytes(), blobs)
    }

    /// Adds an image with any config at all.
    pub fn documents(&mut self, tag: &str, config: &[u8], blobs: &[Blob]) -> Result<()> {
        for blob in blobs {
            self.store(&blob.digest, &blob.bytes)?;
        }
        self.store(&digest(config), config)?;
        let layers: Vec<_> = blobs
            .iter()
            .map(|b| json!({ "mediaType": b.media_type, "digest": b.digest, "size": b.size }))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media::MANIFEST,
            "config": { "mediaType": media::CONFIG, "digest": digest(config), "size": config.len() },
            "layers": layers,
        });
        self.manifest(tag, &manifest.to_string().into_bytes())
    }

    /// Adds a manifest with any bytes at all.
    pub fn manifest(&mut self, tag: &str, bytes: &[u8]) -> Result<()> {
        self.store(&digest(bytes), bytes)?;
        self.manifests.push(json!({
            "mediaType": media::MANIFEST, "digest": digest(bytes), "size": bytes.len(),
            "annotations": { "org.opencontainers.image.ref.name": tag },
        }));
        self.save()
    }

    fn store(&self, digest: &str, bytes: &[u8]) -> Result<()> {
        let Some(hex) = digest.strip_prefix("sha256:") else {
            return Ok(());
        };
        if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            std::fs::write(self.dir.join("blobs/sha256").join(hex), bytes)?;
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        Ok(std::fs::write(
            self.dir.join("index.json"),
            index.to_string(),
        )?)
    }
}

/// Programs of this machine with their libraries, as a layer.
pub fn programs(names: &[&str]) -> Result<Vec<Entry>> {
    let mut paths: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    for program in names {
        let listed = shell::check("ldd", [program], Duration::from_secs(60))?;
        for word in listed.text().split_whitespace() {
            if word.starts_with('/') && !paths.iter().any(|path| path == word) {
                paths.push(word.to_owned());
            }
        }
    }
    let entry = |path: &String| -> Result<Entry> {
        let data = std::fs::read(path).with_context(|| format!("reading {path}"))?;
        let name = path.trim_start_matches('/');
        Ok(Entry {
            mode: 0o755,
            ..Entry::file(name, data)
        })
    };
    paths.iter().map(entry).collect()
}

/// This machine's architecture, in the words that images use.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
