//! Digests as OCI writes them: `sha256:` and 64 lower-case hex digits.

use std::{fmt, str::FromStr};

/// A SHA-256 digest of a blob, a manifest or an uncompressed layer (a *diff ID*).
///
/// Other algorithms of the OCI image specification (`sha512`) are refused by name when parsed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a string is not a digest that we use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a digest: want \"sha256:\" and 64 lower-case hex digits")]
pub struct DigestError {
    /// What was given, cut to 100 characters.
    pub text: String,
}

impl Digest {
    /// The digest whose 32 raw bytes are `bytes`.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// SHA-256 of `data`.
    pub fn of(data: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(data).into())
    }

    /// The chain ID of a layer with this diff ID on top of the chain `below` (OCI image specification,
    /// "Layer ChainID").
    pub fn chained(&self, below: Option<Self>) -> Self {
        match below {
            None => *self,
            Some(below) => Self::of(format!("{below} {self}").as_bytes()),
        }
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex digits, with no algorithm in front.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 hex digits: the name of a layer's directory in the mount.
    ///
    /// Short on purpose: engines join 100 and more of these into one mount option string.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let error = || DigestError {
            text: text.chars().take(100).collect(),
        };
        let digits = text.strip_prefix("sha256:").ok_or_else(error)?;
        if digits.len() != 64
            || !digits
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(error());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| error())?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_refuses_the_rest() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(digest.short(), "e3b0c44298fc");
        for bad in [
            "",
            "sha256:",
            &text[..70],
            &text.to_uppercase(),
            &text.replace("256", "512"),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
