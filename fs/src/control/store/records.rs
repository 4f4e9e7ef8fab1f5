//! Records of containers/storage, as JSON.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use harbour_image::{digest::Digest, manifest::Compression};
use serde::Serialize;

use crate::source::BlobEntry;

/// The file that engines keep a document under this key in.
pub(super) fn file_name(key: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    match key.bytes().all(plain) {
        true => key.to_owned(),
        false => format!("={}", STANDARD.encode(key)),
    }
}

/// A layer in `layers.json`, and without an ID in the layer store.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct LayerRecord {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    #[serde(flatten)]
    pub(super) blob: Option<BlobRecord>,
    pub(super) diff_digest: String,
    pub(super) diff_size: u64,
}

impl LayerRecord {
    /// Of a layer, without what depends on where it stands.
    pub(super) fn of(diff_id: &Digest, unpacked_bytes: u64) -> Self {
        Self {
            id: None,
            parent: None,
            blob: None,
            diff_digest: diff_id.to_string(),
            diff_size: unpacked_bytes,
        }
    }
}

/// What of a layer is about its blob.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlobRecord {
    pub(super) compressed_diff_digest: String,
    pub(super) compressed_size: u64,
    pub(super) compression: u32,
}

impl From<&BlobEntry> for BlobRecord {
    fn from(blob: &BlobEntry) -> Self {
        Self {
            compressed_diff_digest: blob.digest.to_string(),
            compressed_size: blob.len,
            compression: match blob.compression {
                Compression::None => 0,
                Compression::Gzip => 2,
                Compression::Zstd => 4,
            },
        }
    }
}

/// An image in `images.json`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ImageRecord<'a> {
    pub(super) id: String,
    pub(super) digest: String,
    pub(super) names: &'a [String],
    pub(super) layer: String,
    pub(super) metadata: &'a str,
    pub(super) created: &'a str,
    pub(super) big_data_names: Vec<String>,
    pub(super) big_data_sizes: BTreeMap<String, u64>,
    pub(super) big_data_digests: BTreeMap<String, String>,
}

/// What the list of images says about a manifest or config.
#[derive(Clone, Debug)]
pub(crate) struct DocumentFacts {
    pub(super) len: u64,
    pub(super) created: Option<String>,
}

impl DocumentFacts {
    /// Of a manifest, or of a `config`.
    pub(crate) fn of(document: &[u8], config: bool) -> Self {
        #[derive(serde::Deserialize)]
        struct Config {
            created: Option<String>,
        }
        let config = config.then(|| serde_json::from_slice::<Config>(document).ok());
        let created = config.flatten().and_then(|config| config.created);
        Self {
            len: document.len() as u64,
            created: created.filter(|time| is_time(time)),
        }
    }
}

/// Whether `text` is a time of RFC 3339. One that is not would have engines refuse the whole list.
fn is_time(text: &str) -> bool {
    let bytes = text.as_bytes();
    let number = |at: usize, len: usize| -> Option<u32> {
        let digits = bytes.get(at..at + len)?;
        let all = digits.iter().all(u8::is_ascii_digit);
        all.then(|| {
            digits
                .iter()
                .fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'))
        })
    };
    let within = |at: usize, least: u32, most: u32| {
        number(at, 2).is_some_and(|value| (least..=most).contains(&value))
    };
    let marks = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    let marked = marks.iter().all(|(at, mark)| bytes.get(*at) == Some(mark));
    let (Some(year), Some(month)) = (number(0, 4), number(5, 2)) else {
        return false;
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return false,
    };
    let good = marked && within(8, 1, days) && within(11, 0, 23) && within(14, 0, 59);
    let mut at = 19;
    if bytes.get(at) == Some(&b'.') {
        let digits = bytes[at + 1..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit());
        let len = digits.count();
        at += 1 + len;
        if !(1..=9).contains(&len) {
            return false;
        }
    }
    let zone = match bytes.get(at..) {
        Some(b"Z") => true,
        Some([b'+' | b'-', _, _, b':', _, _]) => within(at + 1, 0, 23) && within(at + 4, 0, 59),
        _ => false,
    };
    good && within(17, 0, 59) && zone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_from_what_is_none() {
        let good = [
            "2024-02-29T23:59:59Z",
            "1970-01-01T00:00:00.123456789Z",
            "2023-12-31T00:00:00+14:00",
            "2023-12-31T00:00:00.5-00:30",
        ];
        let bad = [
            "",
            "2023-02-29T00:00:00Z",
            "2023-13-01T00:00:00Z",
            "2023-00-01T00:00:00Z",
            "2023-01-00T00:00:00Z",
            "2023-01-01T24:00:00Z",
            "2023-01-01T00:60:00Z",
            "2023-01-01T00:00:60Z",
            "2023-01-01T00:00:00",
            "2023-01-01T00:00:00.Z",
            "2023-01-01T00:00:00.1234567890Z",
            "2023-01-01 00:00:00Z",
            "2023-01-01T00:00:00Zx",
            "2023-01-01T00:00:00+1:00",
            "+023-01-01T00:00:00Z",
            "yesterday",
        ];
        for text in good {
            assert!(is_time(text), "{text}");
        }
        for text in bad {
            assert!(!is_time(text), "{text}");
        }
        for (config, created) in [
            (
                r#"{"created":"2024-02-29T00:00:00Z"}"#,
                Some("2024-02-29T00:00:00Z"),
            ),
            (r#"{"created":"soon"}"#, None),
            (r#"{"created":7}"#, None),
            ("no JSON", None),
        ] {
            let facts = DocumentFacts::of(config.as_bytes(), true);
            assert_eq!(facts.len, config.len() as u64);
            assert_eq!(facts.created.as_deref(), created);
        }
    }

    #[test]
    fn files_are_called_as_engines_call_them() {
        assert_eq!(file_name("manifest"), "manifest");
        assert_eq!(file_name("sha256:ab"), "=c2hhMjU2OmFi");
    }
}
