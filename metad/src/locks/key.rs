//! What can be locked.

use std::{fmt, str::FromStr};

use crate::error::Hash;

/// Longest name in bytes.
const NAME_MAX: usize = 1024;

/// What an operation touches. Its text (`layer:…`, `image:…`, `name:…`, `collection`) is what the
/// store, the wire and people see.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A layer, by its diff ID: who holds it fetches and unpacks it.
    Layer(Hash),
    /// An image, by its manifest's digest: who holds it merges its layers and commits it.
    Image(Hash),
    /// A name, like `registry/repository:tag`.
    Name(String),
    /// The run that takes away what nothing refers to.
    Collection,
}

/// A text that names no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no key: layer:<64 hex digits>, image:<64 hex digits>, name:<text> or collection")]
pub struct KeyError(String);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(digest) => write!(f, "layer:{}", hex::encode(digest)),
            Self::Image(digest) => write!(f, "image:{}", hex::encode(digest)),
            Self::Name(name) => write!(f, "name:{name}"),
            Self::Collection => f.write_str("collection"),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let wrong = || KeyError(text.chars().take(100).collect());
        let digest = |digits: &str| {
            let mut digest = Hash::default();
            // One text for one key: capital digits would be another row of the store.
            let small = !digits.bytes().any(|byte| byte.is_ascii_uppercase());
            let decoded = hex::decode_to_slice(digits, &mut digest).is_ok();
            (small && decoded).then_some(digest).ok_or_else(wrong)
        };
        match text.split_once(':') {
            None if text == "collection" => Ok(Self::Collection),
            Some(("layer", digits)) => digest(digits).map(Self::Layer),
            Some(("image", digits)) => digest(digits).map(Self::Image),
            Some(("name", name))
                if !name.is_empty()
                    && name.len() <= NAME_MAX
                    && !name.chars().any(char::is_control) =>
            {
                Ok(Self::Name(name.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn text_and_key_are_one_to_one() {
        let keys = [
            Key::Layer([0xab; 32]),
            Key::Image([7; 32]),
            Key::Name("docker.io/library/debian:12".into()),
            Key::Collection,
        ];
        for key in keys {
            assert_eq!(key.to_string().parse(), Ok(key));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let (capital, short, long) = ("AB".repeat(32), "ab".repeat(31), "n".repeat(NAME_MAX + 1));
        for text in [
            "",
            "layer",
            "layer:",
            "collection:",
            "name:",
            "name:a\nb",
            "pack:00",
            &format!("layer:{capital}"),
            &format!("image:{short}"),
            &format!("name:{long}"),
        ] {
            let error = text.parse::<Key>().unwrap_err();
            assert!(error.to_string().len() < 250, "{error}");
        }
    }
}
