//! The time that an operation has left.
//!
//! It is kept per thread because it must reach reads that happen below the index reader, whose
//! trait speaks of bytes and offsets only.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Time and patience of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// When the operation must have ended.
    pub(crate) deadline: Instant,
    /// Whether only the first rung may be tried: a known replica over a live transport. Whatever
    /// needs more answers [`crate::Error::Later`].
    pub(crate) quick: bool,
}

thread_local! {
    static CURRENT: Cell<Option<Budget>> = const { Cell::new(None) };
}

/// Used by threads that run no operation (background work that forgot to set one).
const FALLBACK: Duration = Duration::from_secs(30);

impl Budget {
    /// Ends `after` from now.
    pub(crate) fn new(after: Duration, quick: bool) -> Self {
        Self {
            deadline: Instant::now() + after,
            quick,
        }
    }

    /// The budget of the operation that this thread runs.
    pub(crate) fn current() -> Self {
        CURRENT.get().unwrap_or_else(|| Self::new(FALLBACK, false))
    }

    /// Runs `operation` with this budget.
    pub(crate) fn run<T>(self, operation: impl FnOnce() -> T) -> T {
        let _restore = Restore(CURRENT.replace(Some(self)));
        operation()
    }

    /// Whether the deadline has passed.
    pub(crate) fn is_spent(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

struct Restore(Option<Budget>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_nest_and_are_restored() {
        let outer = Budget::new(Duration::from_secs(100), true);
        outer.run(|| {
            assert!(Budget::current().quick);
            Budget::new(Duration::ZERO, false).run(|| {
                assert!(!Budget::current().quick);
                assert!(Budget::current().is_spent());
            });
            assert_eq!(Budget::current().deadline, outer.deadline);
        });
        assert!(CURRENT.get().is_none());
    }
}
