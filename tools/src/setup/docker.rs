//! Docker's `daemon.json`.

use jsonc_parser::{
    ParseOptions,
    cst::{CstInputValue, CstObject, CstRootNode},
};

use super::{EditError, Edited, Release, SNAPSHOTTER};

/// Where it is unless somebody moved it.
pub const DEFAULT_FILE: &str = "/etc/docker/daemon.json";

/// The first release that can keep its images in containerd with a snapshotter of somebody else.
pub const FIRST: Release = Release(24, 0);

const FEATURE: &str = "containerd-snapshotter";

/// As dockerd reads it: JSON and nothing more.
const STRICT: ParseOptions = ParseOptions {
    allow_comments: false,
    allow_loose_object_property_names: false,
    allow_trailing_commas: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

/// Has images kept in containerd, with our snapshotter.
///
/// # Errors
/// A file that is no JSON object.
pub fn edit(before: &str) -> Result<Edited, EditError> {
    let fresh = before.trim().is_empty();
    let text = if fresh { "{\n}\n" } else { before };
    // Strictly first: the parser that keeps the layout lets some things pass that dockerd does not.
    serde_json::from_str::<serde_json::Value>(text)
        .map_err(|error| EditError::Syntax(format!("JSON: {error}")))?;
    let root =
        CstRootNode::parse(text, &STRICT).map_err(|error| EditError::Syntax(error.to_string()))?;
    let object = root.object_value().ok_or_else(|| EditError::Kind {
        key: "the whole".into(),
        wanted: "object",
    })?;
    let mut notes = Vec::new();
    if object.get("storage-opts").is_some() {
        notes.push(
            "storage-opts are the old storage driver's and mean nothing to the new one: take them out if \
             dockerd does not start"
                .to_owned(),
        );
    }
    let features = match object.get("features") {
        None => {
            object.append("features", CstInputValue::Object(Vec::new()));
            let new = object.object_value("features");
            if let Some(new) = &new {
                new.ensure_multiline();
            }
            new
        }
        Some(_) => object.object_value("features"),
    };
    let features = features.ok_or_else(|| EditError::Kind {
        key: "features".into(),
        wanted: "object",
    })?;
    set(&features, FEATURE, CstInputValue::Bool(true), "true");
    let quoted = format!("\"{SNAPSHOTTER}\"");
    let name = CstInputValue::String(SNAPSHOTTER.into());
    set(&object, "storage-driver", name, &quoted);
    let text = root.to_string();
    Ok(Edited { text, notes })
}

/// Sets a key, unless it says that already.
fn set(object: &CstObject, key: &str, value: CstInputValue, written: &str) {
    match object.get(key) {
        Some(there) => {
            if there.value().is_none_or(|old| old.to_string() != written) {
                there.set_value(value);
            }
        }
        None => {
            object.append(key, value);
        }
    }
}

/// Whether the file names our snapshotter, whatever else it lacks.
pub fn names_us(text: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(text)
        .is_ok_and(|value| value["storage-driver"] == SNAPSHOTTER)
}

/// Whether the file has dockerd use our snapshotter.
pub fn is_set(text: &str) -> bool {
    let value = serde_json::from_str::<serde_json::Value>(text);
    value.is_ok_and(|value| value["features"][FEATURE] == true) && names_us(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn edited(before: &str) -> String {
        let after = edit(before).unwrap().text;
        assert!(is_set(&after), "{after}");
        assert_eq!(edit(&after).unwrap().text, after, "a second time");
        after
    }

    #[test]
    fn a_new_file_is_laid_out() {
        let new = "{\n  \"features\": {\n    \"containerd-snapshotter\": true\n  },\n  \"storage-driver\": \"harbour\"\n}\n";
        assert_eq!(edited(""), new);
        assert_eq!(edited("\n"), new);
    }

    #[test]
    fn what_is_there_stays_as_it_is() {
        let before = "{\r\n\t\"log-driver\" :  \"json-file\",\r\n\t\"features\": {\"buildkit\": true},\r\n\t\"storage-driver\": \"overlay2\",\r\n\t\"debug\":true\r\n}";
        let after = edited(before);
        assert!(after.contains("\t\"log-driver\" :  \"json-file\",\r\n"));
        assert!(after.contains("\"buildkit\": true"));
        assert!(after.contains("\t\"storage-driver\": \"harbour\",\r\n\t\"debug\":true\r\n}"));
        assert!(!after.replace("\r\n", "").contains('\n'), "{after:?}");
        let value: serde_json::Value = serde_json::from_str(&after).unwrap();
        assert_eq!(value["features"]["containerd-snapshotter"], true);
        assert_eq!(value["log-driver"], "json-file");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = edit("{\n  \"debug\": true,\n}").unwrap_err().to_string();
        assert!(error.contains("line"), "{error}");
        for wrong in ["[]", "7", "{\"features\": []}", "{} {}", "{// no\n}"] {
            assert!(edit(wrong).is_err(), "{wrong}");
        }
    }
}
