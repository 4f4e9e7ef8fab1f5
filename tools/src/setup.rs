//! Engines' own configuration: what has to stand in it for them to use this host's mount.
//!
//! [`containerd`], [`docker`] and [`podman`] turn the text of a file into another and touch nothing.
//! [`files`] reads and writes, [`journal`] keeps what there was before so that it can be put back, and
//! [`ask`] asks the engines themselves.

pub mod ask;
pub mod containerd;
pub mod docker;
pub mod files;
pub mod journal;
pub mod podman;
pub mod text;
pub mod toml;

/// The name under which engines know our snapshotter.
pub const SNAPSHOTTER: &str = "harbour";

/// An engine that can be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// containerd, by itself or below Kubernetes
    Containerd,
    /// Docker with images in containerd
    Docker,
    /// Podman, and CRI-O, which reads the same file
    Podman,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Containerd, Self::Docker, Self::Podman];

    /// As it is written on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }
}

/// What is wrong with a file that was to be edited. Nothing is written then.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// It does not parse; the text names line and column.
    #[error("{0}")]
    Syntax(String),
    /// A key is there and is not what it has to be.
    #[error("{key} is no {wanted}")]
    Kind {
        /// The key.
        key: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// It says something that cannot be reconciled with what is wanted.
    #[error("{what}")]
    Conflict {
        /// What it says.
        what: String,
        /// What to do about it.
        next: String,
    },
}

/// A file's new text, and what somebody should know about it.
#[derive(Debug)]
pub struct Edited {
    /// All of it.
    pub text: String,
    /// Sentences for the user.
    pub notes: Vec<String>,
}

/// A version as engines print it; what follows the second number does not matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl Release {
    /// The first version in a line such as `containerd github.com/… 1.6.20~ds1 …` or
    /// `Docker version 26.1.5+dfsg1, build a72d7cd`.
    pub fn find(text: &str) -> Option<Self> {
        text.split_whitespace()
            .find_map(|word| word.parse::<Self>().ok())
    }
}

impl std::str::FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut numbers = text.trim_start_matches('v').splitn(3, '.').map(|number| {
            let end = number.find(|c: char| !c.is_ascii_digit());
            number[..end.unwrap_or(number.len())].parse::<u32>()
        });
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self(major, minor)),
            _ => Err(format!("{text:?} is not a version like 1.7")),
        }
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn versions_are_found_in_what_engines_print() {
        for (text, release) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                Release(1, 6),
            ),
            (
                "containerd github.com/containerd/containerd/v2 2.1.9+unknown ",
                Release(2, 1),
            ),
            (
                "containerd containerd.io v2.2.0 1c4457e00facac03ce1d75f7b6777a7a851e5c41",
                Release(2, 2),
            ),
            ("Docker version 26.1.5+dfsg1, build a72d7cd", Release(26, 1)),
            ("podman version 4.3.1", Release(4, 3)),
        ] {
            assert_eq!(Release::find(text), Some(release), "{text}");
        }
        assert_eq!(Release::find("no version at all"), None);
        assert!("2".parse::<Release>().is_err());
    }
}
