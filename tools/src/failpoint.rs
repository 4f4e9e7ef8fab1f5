//! Named steps of a pull, and of a setup, where a test ends the process, to see that nothing half-made
//! remains.
//!
//! Armed by the environment variable that metad's failpoints use too, `NAME=abort`; names of one
//! are not names of the other, so that either process passes over what is not its own.

/// Steps of a pull, in the order in which they are passed.
pub const NAMES: &[&str] = &[
    "pull.begun",
    "pull.reserved",
    "pull.stored",
    "pull.unpacked",
    "pull.index_put",
    "pull.staged",
    "pull.layer_committed",
    "pull.committing",
    "pull.committed",
];

/// Steps of a setup, and of taking one back, in the order in which they are passed. The last of each is
/// passed for each file.
pub const SETUP_NAMES: &[&str] = &[
    "setup.noted",
    "setup.staged",
    "setup.replaced",
    "setup.undone",
];

/// At most one armed step.
#[derive(Clone, Debug, Default)]
pub struct Failpoints {
    armed: Option<&'static str>,
}

impl Failpoints {
    /// What the environment arms, if it is a step of ours.
    pub fn from_env() -> Self {
        let text = std::env::var(harbour_metad::failpoint::VARIABLE).unwrap_or_default();
        let armed = text.strip_suffix("=abort").and_then(|name| {
            NAMES
                .iter()
                .chain(SETUP_NAMES)
                .find(|known| **known == name)
        });
        Self {
            armed: armed.copied(),
        }
    }

    /// Ends the process when `name` is armed: nothing is flushed, no destructor runs.
    pub fn hit(&self, name: &'static str) {
        debug_assert!(
            NAMES.contains(&name) || SETUP_NAMES.contains(&name),
            "{name} is not in NAMES"
        );
        if self.armed == Some(name) {
            std::process::abort();
        }
    }
}

/// Failpoints of metad, when the environment arms one of its own.
pub fn of_metad() -> anyhow::Result<harbour_metad::failpoint::Failpoints> {
    let text = std::env::var(harbour_metad::failpoint::VARIABLE).unwrap_or_default();
    if text.is_empty() || text.starts_with("pull.") {
        return Ok(harbour_metad::failpoint::Failpoints::none());
    }
    Ok(text.parse()?)
}
