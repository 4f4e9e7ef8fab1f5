//! Named places where a test can stop the daemon dead, or slow it down.
//!
//! A failpoint is a value in [`crate::server::Config`]; nothing here reads the environment. The
//! command line does, once, from [`VARIABLE`], so that the kill tests can walk through [`NAMES`].

use std::{str::FromStr, time::Duration};

/// Environment variable that the command line reads: `NAME=abort` or `NAME=sleep:MS`.
pub const VARIABLE: &str = "HARBOUR_FAILPOINT";

/// Every place, in the order in which a pull passes them.
pub const NAMES: &[&str] = &[
    "begin.before",
    "begin.after",
    "reserve.before",
    "reserve.after",
    "evict.before",
    "evict.after",
    "release.before",
    "release.after",
    "put_index.middle",
    "put_index.before_rename",
    "put_index.after_rename",
    "put_index.after",
    "stage_layer.before",
    "stage_layer.middle",
    "stage_layer.after",
    "commit.before",
    "commit.after",
    "commit_refill.before",
    "commit_refill.after",
    "abort.before",
    "abort.after",
    "expire.before",
    "expire.after",
    "remove_name.before",
    "remove_name.after",
    "collect.before",
    "collect.after",
    "collect.files",
];

/// What happens at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// The process ends at once with SIGABRT: nothing is flushed, no destructor runs.
    Abort,
    /// The thread sleeps.
    Sleep(Duration),
}

/// At most one armed place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failpoints {
    armed: Option<(&'static str, Action)>,
}

/// Why a string arms nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("failpoint {text:?}: want NAME=abort or NAME=sleep:MS with a known name")]
pub struct FailpointError {
    /// What was given.
    pub text: String,
}

impl Failpoints {
    /// Nothing armed.
    pub fn none() -> Self {
        Self::default()
    }

    /// To be called where `name` is; does what is armed there.
    pub(crate) fn hit(&self, name: &'static str) {
        debug_assert!(NAMES.contains(&name), "{name} is not in NAMES");
        match &self.armed {
            Some((armed, Action::Abort)) if *armed == name => {
                tracing::error!(failpoint = name, "aborting");
                std::process::abort();
            }
            Some((armed, Action::Sleep(time))) if *armed == name => std::thread::sleep(*time),
            _ => {}
        }
    }
}

impl FromStr for Failpoints {
    type Err = FailpointError;

    /// Reads `NAME=abort` or `NAME=sleep:MS`; an empty string arms nothing.
    fn from_str(text: &str) -> Result<Self, FailpointError> {
        if text.is_empty() {
            return Ok(Self::none());
        }
        let error = || FailpointError {
            text: text.chars().take(200).collect(),
        };
        let (name, action) = text.split_once('=').ok_or_else(error)?;
        let name = NAMES
            .iter()
            .find(|known| **known == name)
            .ok_or_else(error)?;
        let action = match action.split_once(':') {
            None if action == "abort" => Action::Abort,
            Some(("sleep", ms)) => {
                Action::Sleep(Duration::from_millis(ms.parse().map_err(|_| error())?))
            }
            _ => return Err(error()),
        };
        Ok(Self {
            armed: Some((name, action)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_and_actions_and_nothing_else() {
        assert_eq!("".parse(), Ok(Failpoints::none()));
        let abort = Failpoints {
            armed: Some(("commit.before", Action::Abort)),
        };
        assert_eq!("commit.before=abort".parse(), Ok(abort));
        let sleep = Failpoints {
            armed: Some(("reserve.after", Action::Sleep(Duration::from_millis(5)))),
        };
        assert_eq!("reserve.after=sleep:5".parse(), Ok(sleep));
        for bad in [
            "x",
            "nowhere=abort",
            "commit.before=",
            "commit.before=sleep",
            "commit.before=sleep:x",
        ] {
            assert!(bad.parse::<Failpoints>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_armed_place_does_anything() {
        let points: Failpoints = "commit.before=sleep:30".parse().unwrap_or_default();
        let start = std::time::Instant::now();
        points.hit("commit.after");
        assert!(start.elapsed() < Duration::from_millis(25));
        points.hit("commit.before");
        assert!(start.elapsed() >= Duration::from_millis(30));
    }
}
