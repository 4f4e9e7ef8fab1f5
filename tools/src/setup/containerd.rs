//! containerd's `config.toml`.
//!
//! The keys differ between releases, and what a release does not know it passes over without a word:
//! * 1.x reads versions 1 and 2; CRI's snapshotter is `plugins."io.containerd.grpc.v1.cri".containerd.snapshotter`.
//! * 2.x reads version 3, and turns 1 and 2 into it as it starts, but not that key: the snapshotter of a
//!   version 2 file is dropped, and CRI stays on overlayfs. What a file of version 2 says under the new name,
//!   `plugins."io.containerd.cri.v1.images"`, is taken, so that is where it goes for every 2.x.
//! * From 1.7 on the transfer service unpacks only for the snapshotters in its `unpack_config`.

use std::path::Path;

use toml_edit::{DocumentMut, Item, TableLike, Value};

use super::{
    EditError, Edited, Release, SNAPSHOTTER,
    text::Lines,
    toml::{parse, strings, table},
};

/// Where it is unless somebody moved it.
pub const DEFAULT_FILE: &str = "/etc/containerd/config.toml";

const CRI_1: &str = "io.containerd.grpc.v1.cri";
const CRI_2: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// What containerd unpacks with when nothing is said.
const OWN: &str = "overlayfs";

/// What is wanted of it.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Whose keys to write.
    pub release: Release,
    /// Where our snapshotter listens.
    pub socket: &'a Path,
    /// Whether pulls through CRI are to use it too, or only who asks for it, like Docker.
    pub cri: bool,
}

/// This machine as registries name it.
pub fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

/// Puts our snapshotter into the file.
///
/// # Errors
/// A file that is no TOML, of a version that the release does not read, or that has to be migrated first.
pub fn edit(before: &str, wanted: &Wanted<'_>) -> Result<Edited, EditError> {
    let lines = Lines::of(before);
    let mut doc = parse(lines.plain())?;
    let mut notes = Vec::new();
    let mut version = version(&doc, wanted.release)?;
    let off = cri_off(&doc);
    if wanted.cri && off {
        notes.push(
            "CRI is disabled in this file (disabled_plugins), so only who asks for the snapshotter gets it: \
             ctr, nerdctl, docker"
                .to_owned(),
        );
    }
    let cri = wanted.cri && !off;
    // A new file says of which version it is, whoever it is for.
    let new = lines.plain().trim().is_empty();
    if version == 1 && (cri || new) {
        version = lift(&mut doc, wanted.release)?;
    }
    proxy(&mut doc, wanted)?;
    if cri {
        let path: &[&str] = match wanted.release.0 {
            1 => &["plugins", CRI_1, "containerd"],
            _ => &["plugins", CRI_2],
        };
        let mut images = table(&mut doc, path)?;
        images.set("snapshotter", SNAPSHOTTER);
        // Without annotations the snapshotter is not told which image a layer is of.
        images.set("disable_snapshot_annotations", false);
    }
    if wanted.cri && version >= 2 && wanted.release >= Release(1, 7) {
        unpacking(&mut doc)?;
    }
    let text = doc.to_string();
    // There are ways to write TOML in which nothing can be added.
    if let Err(error) = parse(&text) {
        return Err(EditError::Conflict {
            what: format!("it is written in a way that cannot be added to: {error}"),
            next: "write its tables under headings of their own, [plugins], [proxy_plugins]".into(),
        });
    }
    let text = lines.restore(&text);
    Ok(Edited { text, notes })
}

/// The version that the file says it has.
fn version(doc: &DocumentMut, release: Release) -> Result<i64, EditError> {
    let version = match doc.get("version") {
        None => 1,
        Some(item) => item.as_integer().ok_or_else(|| EditError::Kind {
            key: "version".into(),
            wanted: "number",
        })?,
    };
    let most = if release.0 == 1 { 2 } else { 3 };
    if version > most {
        let next = if version == 3 {
            "is this the file of another containerd? Say which with --containerd-version"
        } else {
            "a newer harbour may know it"
        };
        return Err(EditError::Conflict {
            what: format!(
                "it is of version {version}, and containerd {release} is known to read {most} at most"
            ),
            next: next.into(),
        });
    }
    Ok(version)
}

/// Whether the file turns CRI off, by any of the names that it has had.
fn cri_off(doc: &DocumentMut) -> bool {
    strings(doc.get("disabled_plugins"))
        .iter()
        .any(|name| ["cri", CRI_1, CRI_2].contains(name))
}

/// Makes a file without a version one of the release's newest, which changes nothing where no plugin is named.
fn lift(doc: &mut DocumentMut, release: Release) -> Result<i64, EditError> {
    let named = ["plugins", "disabled_plugins", "required_plugins"]
        .into_iter()
        .find(|key| {
            doc.get(key).is_some_and(|item| {
                item.as_table_like().is_some_and(|table| !table.is_empty())
                    || item.as_array().is_some_and(|array| !array.is_empty())
            })
        });
    if let Some(key) = named {
        return Err(EditError::Conflict {
            what: format!("it is of version 1, whose {key} have other names than today's"),
            next: "bring it up to date first: containerd config migrate > new.toml, look at it, and put it \
                   in place of the old"
                .into(),
        });
    }
    let version = if release.0 == 1 { 2 } else { 3 };
    let first = doc.iter().next().map(|(key, _)| key.to_owned());
    // A file of comments alone: they are of the file.
    let comments = doc
        .trailing()
        .as_str()
        .unwrap_or_default()
        .trim_end_matches('\n')
        .to_owned();
    doc.insert("version", Item::from(version));
    // Keys at the top come before all tables, but a comment at the very top belongs to the file.
    if let Some(first) = first {
        move_comment(doc, &first);
    } else if !comments.is_empty() {
        doc.set_trailing("");
        if let Some(mut key) = doc.key_mut("version") {
            key.leaf_decor_mut().set_prefix(format!("{comments}\n"));
        }
    }
    Ok(version)
}

/// Gives the comment before the file's first table to the key that now stands before it.
fn move_comment(doc: &mut DocumentMut, first: &str) {
    let Some(table) = doc.get_mut(first).and_then(Item::as_table_mut) else {
        return;
    };
    let prefix = table.decor().prefix().and_then(|prefix| prefix.as_str());
    let Some((comment, rest)) = prefix.and_then(|prefix| prefix.rsplit_once("\n\n")) else {
        return;
    };
    let (comment, rest) = (format!("{comment}\n\n"), format!("\n{rest}"));
    table.decor_mut().set_prefix(rest);
    if let Some(mut key) = doc.key_mut("version") {
        key.leaf_decor_mut().set_prefix(comment);
    }
}

/// The plugin itself: a socket that answers for snapshots.
fn proxy(doc: &mut DocumentMut, wanted: &Wanted<'_>) -> Result<(), EditError> {
    let mut plugin = table(doc, &["proxy_plugins", SNAPSHOTTER])?;
    plugin.set("type", "snapshot");
    plugin.set("address", wanted.socket.display().to_string());
    if wanted.release.0 >= 2 {
        let mut exports = table(doc, &["proxy_plugins", SNAPSHOTTER, "exports"])?;
        exports.set("enable_remote_snapshot_annotations", "true");
    }
    Ok(())
}

/// What the transfer service may unpack for: us, and what it would have unpacked for by itself.
fn unpacking(doc: &mut DocumentMut) -> Result<(), EditError> {
    let mut transfer = table(doc, &["plugins", TRANSFER])?;
    let known: Vec<String> = match transfer.table.get("unpack_config") {
        None => Vec::new(),
        Some(item) => entries(item).ok_or_else(|| EditError::Kind {
            key: format!("plugins.{TRANSFER:?}.unpack_config"),
            wanted: "list of tables",
        })?,
    };
    let mut missing = Vec::new();
    if known.is_empty() {
        missing.push(OWN);
    }
    if !known.iter().any(|name| name == SNAPSHOTTER) {
        missing.push(SNAPSHOTTER);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let entry = |name: &str| {
        let pair = [("platform", platform()), ("snapshotter", name.to_owned())];
        Vec::from(pair)
    };
    let entries: Vec<_> = missing.into_iter().map(entry).collect();
    transfer.list("unpack_config", &entries)
}

/// The snapshotters that a list of tables names, in either of TOML's two ways to write one.
fn entries(item: &Item) -> Option<Vec<String>> {
    let name = |table: &dyn TableLike| {
        let name = table.get("snapshotter").and_then(Item::as_str);
        name.unwrap_or_default().to_owned()
    };
    match item {
        Item::ArrayOfTables(tables) => Some(tables.iter().map(|table| name(table)).collect()),
        Item::Value(Value::Array(array)) => array
            .iter()
            .map(|value| value.as_inline_table().map(|table| name(table)))
            .collect(),
        _ => None,
    }
}

/// What a containerd makes of its file and all that the file imports: of `containerd config dump`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effective {
    /// Where containerd itself listens.
    pub address: Option<String>,
    /// Where the plugin's socket is, if there is the plugin.
    pub socket: Option<String>,
    /// What pulls through CRI use; `None` when CRI is not there.
    pub cri: Option<String>,
    /// Whether CRI tells the snapshotter of which image a layer is.
    pub annotations: bool,
    /// Whether the transfer service would unpack for the plugin; `None` before 1.7.
    pub unpacks: Option<bool>,
}

impl Effective {
    /// Reads a dump, or a file as if it stood alone.
    ///
    /// # Errors
    /// A dump that is no TOML.
    pub fn of(text: &str, release: Release) -> Result<Self, EditError> {
        let doc = parse(text)?;
        let plugin = |name: &str| doc.get("plugins")?.get(name);
        let images = match release.0 {
            1 => plugin(CRI_1).and_then(|cri| cri.get("containerd")),
            _ => plugin(CRI_2),
        };
        let word = |item: Option<&Item>| item.and_then(Item::as_str).map(str::to_owned);
        let proxy = doc
            .get("proxy_plugins")
            .and_then(|all| all.get(SNAPSHOTTER));
        let proxy = proxy.filter(|it| it.get("type").and_then(Item::as_str) == Some("snapshot"));
        let images = images.filter(|_| !cri_off(&doc));
        let off = images.and_then(|images| images.get("disable_snapshot_annotations"));
        let unpack = plugin(TRANSFER).and_then(|transfer| transfer.get("unpack_config"));
        let grpc = doc.get("grpc").and_then(|grpc| grpc.get("address"));
        Ok(Self {
            address: word(grpc),
            socket: word(proxy.and_then(|it| it.get("address"))),
            cri: word(images.and_then(|images| images.get("snapshotter"))),
            annotations: off.and_then(Item::as_bool) == Some(false),
            unpacks: (release >= Release(1, 7)).then(|| {
                let known = unpack.and_then(entries).unwrap_or_default();
                known.iter().any(|name| name == SNAPSHOTTER)
            }),
        })
    }

    /// What is missing for `wanted`, as sentences.
    pub fn lacks(&self, wanted: &Wanted<'_>) -> Vec<String> {
        let mut lacks = Vec::new();
        let socket = wanted.socket.display().to_string();
        match &self.socket {
            None => lacks.push(format!("there is no snapshot plugin {SNAPSHOTTER}")),
            Some(other) if *other != socket => {
                lacks.push(format!(
                    "its plugin {SNAPSHOTTER} is at {other}, not {socket}"
                ));
            }
            Some(_) => {}
        }
        if !wanted.cri {
            return lacks;
        }
        if let Some(used) = &self.cri {
            if used != SNAPSHOTTER {
                lacks.push(format!("pulls through CRI use {used}"));
            } else if !self.annotations {
                lacks.push("CRI does not say which image a layer is of".to_owned());
            }
        }
        if self.unpacks == Some(false) {
            lacks.push(format!(
                "the transfer service does not unpack for {SNAPSHOTTER}"
            ));
        }
        lacks
    }
}

#[cfg(test)]
mod tests;
