//! `storage.conf`, which Podman, Buildah and CRI-O read.

use std::path::{Path, PathBuf};

use toml_edit::{Array, Item, Value};

use super::{
    EditError, Edited,
    text::Lines,
    toml::{parse, push, strings, table},
};

/// What root's engines read.
pub const DEFAULT_FILE: &str = "/etc/containers/storage.conf";

/// What they read where that is not there.
pub const VENDOR_FILE: &str = "/usr/share/containers/storage.conf";

const STORES: &str = "additionalimagestores";

/// The file that a user's engines read, if the environment says where that is.
pub fn file_of_user() -> Option<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
    let config = config.map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").filter(|dir| !dir.is_empty())?;
        Some(PathBuf::from(home).join(".config"))
    });
    Some(config?.join("containers/storage.conf"))
}

/// Adds `store` to the stores that are only read.
///
/// # Errors
/// A file that is no TOML, or whose storage driver is another than overlay.
pub fn edit(before: &str, store: &Path, root: bool) -> Result<Edited, EditError> {
    let lines = Lines::of(before);
    let mut doc = parse(lines.plain())?;
    let mut storage = table(&mut doc, &["storage"])?;
    let driver = storage.table.get("driver").and_then(Item::as_str);
    match driver {
        Some("overlay") => {}
        None | Some("") => storage.set("driver", "overlay"),
        Some(other) => {
            return Err(EditError::Conflict {
                what: format!(
                    "the storage driver is {other}, and a store of layers for overlay is nothing to it"
                ),
                next: "podman system reset, and driver = \"overlay\", would change that; all that is stored \
                       is lost then"
                    .into(),
            });
        }
    }
    // Without these root's engines do not start on a file that is there.
    if root {
        for (key, value) in [
            ("runroot", "/run/containers/storage"),
            ("graphroot", "/var/lib/containers/storage"),
        ] {
            if storage.table.get(key).is_none() {
                storage.set(key, value);
            }
        }
    }
    let mut options = table(&mut doc, &["storage", "options"])?;
    let store = store.display().to_string();
    match options.table.get_mut(STORES) {
        None => {
            let mut array = Array::new();
            array.push(store);
            options.set(STORES, Value::Array(array));
        }
        Some(item) => {
            let known = strings(Some(item)).contains(&store.as_str());
            let array = item.as_array_mut().ok_or_else(|| EditError::Kind {
                key: format!("storage.options.{STORES}"),
                wanted: "list",
            })?;
            if !known {
                push(array, &store);
            }
        }
    }
    let text = lines.restore(&doc.to_string());
    Ok(Edited {
        text,
        notes: Vec::new(),
    })
}

/// The stores that the file names, or what is wrong with it.
///
/// # Errors
/// A file that is no TOML.
pub fn stores(text: &str) -> Result<Vec<PathBuf>, EditError> {
    let doc = parse(Lines::of(text).plain())?;
    let options = doc
        .get("storage")
        .and_then(|storage| storage.get("options"));
    let named = strings(options.and_then(|options| options.get(STORES)));
    Ok(named.into_iter().map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn edited(before: &str) -> String {
        let store = Path::new("/harbour/store");
        let after = edit(before, store, true).unwrap().text;
        assert!(stores(&after).unwrap().contains(&store.into()), "{after}");
        assert_eq!(edit(&after, store, true).unwrap().text, after, "twice");
        after
    }

    #[test]
    fn a_new_file_has_what_is_needed() {
        assert_eq!(
            edited(""),
            "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\n\
             graphroot = \"/var/lib/containers/storage\"\n\n[storage.options]\n\
             additionalimagestores = [\"/harbour/store\"]\n"
        );
    }

    #[test]
    fn stores_that_are_there_stay() {
        let before = "# mine\n[storage]\ndriver = \"overlay\" # yes\nrunroot = \"/r\"\ngraphroot = \"/g\"\n\n\
            [storage.options]\nadditionalimagestores = [ # two\n  \"/a\",\n  \"/b\", # b\n]\nsize = \"\"\n";
        let after = edited(before);
        for line in before.lines() {
            assert!(after.contains(line), "{line} of\n{after}");
        }
        let empty = "[storage]\ndriver = \"overlay\"\nrunroot = \"/r\"\ngraphroot = \"/g\"\n\
            [storage.options]\nadditionalimagestores = [\n]\n";
        let expected = empty.replace("[\n]", "[\n  \"/harbour/store\",\n]");
        assert_eq!(edited(empty), expected);
    }

    #[test]
    fn another_driver_is_refused() {
        let error = edit("[storage]\ndriver = \"btrfs\"\n", Path::new("/s"), true).unwrap_err();
        assert!(error.to_string().contains("btrfs"));
        let error = edit("[storage]\n\ndriver = overlay\n", Path::new("/s"), true).unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
    }
}
