//! What engines run: an image of three layers that hide and replace parts of each other, one of as
//! many layers as engines allow, and what containers of them print when all of it is right.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    layers::{Blob, Entry, Layout, architecture, digest, noise, programs, tar},
    shell,
};

const PUSH_LIMIT: Duration = Duration::from_secs(120);
/// Layers of the tall image.
pub const TALL: usize = 120;
/// Noise in the middle layer of the other: more than a pull may move or store.
const NOISE_BYTES: usize = 6 << 20;

/// Prints what the three layers must show together.
const REPORT_THREE: &str = r#"#!/bin/bash
listed=no gone=yes
for file in /*; do [ "$file" != /gone ] || listed=yes; done
[ ! -e /gone ] || gone=no
cd /dir
sum=$(sha256sum /srv/noise)
echo "gone: $gone, listed: $listed; dir: $(echo *); replaced: $(cat /replaced); kept: $(cat /kept); link: $(cat /link); noise: ${sum%% *}"
"#;

/// Counts what all layers have left of each other.
const REPORT_TALL: &str = r#"#!/bin/bash
files=0 sum=0
for file in /layers/*; do files=$((files + 1)) sum=$((sum + $(cat "$file"))); done
cd /dir
echo "files: $files, sum: $sum; dir: $(echo *)"
"#;

/// An image in the registry.
#[derive(Clone, Debug)]
pub struct Image {
    tag: &'static str,
    /// The line that its command prints when every layer is in its place.
    pub says: String,
    /// Diff IDs, from the bottom up.
    pub diff_ids: Vec<String>,
    /// Compressed bytes of its layers.
    pub bytes: u64,
}

impl Image {
    /// Name in the registry.
    pub fn name(&self) -> String {
        format!("harbour/{}:1", self.tag)
    }

    /// Tag in the layout.
    pub fn tag(&self) -> &'static str {
        self.tag
    }
}

/// The test images.
#[derive(Clone, Debug)]
pub struct Images {
    /// Whiteout, opaque directory, replaced and kept files.
    pub three: Image,
    /// [`TALL`] layers with whiteouts and an opaque directory among them.
    pub tall: Image,
    /// One more of a single layer, for a pull into a pool that lacks it.
    pub spare: Image,
    /// Waits for ever, as the container does that holds a pod together.
    pub pause: Image,
}

impl Images {
    /// Writes them all.
    pub fn write(layout: &mut Layout) -> Result<Self> {
        let below = base()?;
        Ok(Self {
            three: three(layout, &below)?,
            tall: tall(layout, &below)?,
            spare: spare(layout, &below)?,
            pause: pause(layout)?,
        })
    }

    /// Pushes them to a registry on plain HTTP.
    pub fn push(&self, layout: &Layout, registry: &str) -> Result<()> {
        for image in [&self.three, &self.tall, &self.spare, &self.pause] {
            let from = layout.reference(image.tag);
            let to = format!("docker://{registry}/{}", image.name());
            let copy = ["copy", "-q", "--dest-tls-verify=false", &from, &to];
            shell::check("skopeo", copy, PUSH_LIMIT).context("(package skopeo)")?;
        }
        Ok(())
    }
}

fn base() -> Result<Vec<Entry>> {
    let mut below = programs(&["/bin/bash", "/bin/cat", "/bin/sleep", "/usr/bin/sha256sum"])?;
    let dirs = ["etc", "proc", "dev", "sys", "tmp", "srv", "dir", "dir/deep"];
    below.extend(dirs.map(Entry::dir));
    below.push(Entry::file("etc/passwd", "root:x:0:0::/root:/bin/bash\n"));
    below.push(Entry::file("gone", "gone\n"));
    below.push(Entry::file("dir/old", "old\n"));
    below.push(Entry::file("dir/deep/older", "older\n"));
    below.push(Entry::file("replaced", "below\n"));
    below.push(Entry::file("kept", "below\n"));
    Ok(below)
}

fn three(layout: &mut Layout, below: &[Entry]) -> Result<Image> {
    let noise = noise(5, NOISE_BYTES);
    let sum = digest(&noise);
    let middle = vec![
        Entry::file("srv/noise", noise),
        Entry::file("dir/middle", "middle\n"),
        Entry::hard("link", "kept"),
    ];
    let middle = with_target(middle);
    let above = vec![
        Entry::file(".wh.gone", ""),
        Entry::dir("dir"),
        Entry::file("dir/.wh..wh..opq", ""),
        Entry::file("dir/new", "new\n"),
        Entry::file("replaced", "above\n"),
        script(REPORT_THREE),
    ];
    let says = format!(
        "gone: yes, listed: no; dir: new; replaced: above; kept: below; link: below; noise: {}",
        sum.trim_start_matches("sha256:")
    );
    write(layout, "three", &[below, &middle, &above], says)
}

/// A hard link needs its target in the same layer.
fn with_target(mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.insert(0, Entry::file("kept", "below\n"));
    entries
}

fn tall(layout: &mut Layout, below: &[Entry]) -> Result<Image> {
    let mut layers = vec![below.to_vec()];
    let mut left: Vec<usize> = Vec::new();
    for n in 2..TALL {
        let mut layer = vec![Entry::file(format!("layers/{n}"), n.to_string())];
        left.push(n);
        if n % 10 == 0 {
            layer.push(Entry::file(format!("layers/.wh.{}", n - 5), ""));
            left.retain(|kept| *kept != n - 5);
        }
        if n == TALL / 2 {
            layer.push(Entry::dir("dir"));
            layer.push(Entry::file("dir/.wh..wh..opq", ""));
            layer.push(Entry::file("dir/new", "new\n"));
        }
        layers.push(layer);
    }
    layers.push(vec![script(REPORT_TALL)]);
    let sum: usize = left.iter().sum();
    let says = format!("files: {}, sum: {sum}; dir: new", left.len());
    let layers: Vec<_> = layers.iter().map(Vec::as_slice).collect();
    write(layout, "tall", &layers, says)
}

fn spare(layout: &mut Layout, below: &[Entry]) -> Result<Image> {
    let layer = [below, &[script("#!/bin/bash\necho spare\n")]].concat();
    write(layout, "spare", &[&layer], "spare".to_owned())
}

fn pause(layout: &mut Layout) -> Result<Image> {
    let mut layer = programs(&["/bin/sleep", "/bin/bash"])?;
    layer.extend(["etc", "proc", "dev", "sys"].map(Entry::dir));
    layer.push(script("#!/bin/bash\nexec sleep infinity\n"));
    write(layout, "pause", &[&layer], String::new())
}

fn script(text: &str) -> Entry {
    Entry {
        mode: 0o755,
        ..Entry::file("report", text)
    }
}

fn write(
    layout: &mut Layout,
    tag: &'static str,
    layers: &[&[Entry]],
    says: String,
) -> Result<Image> {
    let blobs = layers.iter().map(|layer| Blob::gzip(&tar(layer)));
    let blobs = blobs.collect::<Result<Vec<_>>>()?;
    let diff_ids: Vec<_> = blobs.iter().map(|blob| blob.diff_id.clone()).collect();
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": { "Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/report"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": vec![json!({ "created_by": "harbour tests" }); diff_ids.len()],
    });
    layout.documents(tag, config.to_string().as_bytes(), &blobs)?;
    Ok(Image {
        tag,
        says,
        diff_ids,
        bytes: blobs.iter().map(|blob| blob.size).sum(),
    })
}
