//! Copying the journal into the database beside the writer.
//!
//! SQLite lets the commit that makes the journal long copy and sync it, and whoever waits for the writer
//! waits for the disk: 20 ms and more where a thousand locks are granted meanwhile. Here a thread with a
//! connection of its own does that while the writer goes on, and the writer only copies what came since,
//! so that its next transaction begins the journal anew (<https://www.sqlite.org/wal.html>, 2.1).

use std::{
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use parking_lot::{Condvar, Mutex};
use rusqlite::{Connection, hooks::Wal};

use super::READER_WAIT;
use crate::error::Error;

/// Pages of 4 KiB in the journal before they are copied: digests are random, so the objects of one
/// layer touch many pages, which should not be written before its transactions ended.
pub(super) const LONG_PAGES: i32 = 8192;

/// What the writer and the thread tell each other.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The journal is short, or was long when the thread could not copy all of it.
    #[default]
    Idle,
    /// The thread is to copy it.
    Long,
    /// The thread has copied what was there when it began.
    Copied,
    /// The thread is to end.
    Over,
}

/// The thread, which ends with this.
#[derive(Debug)]
pub(super) struct Checkpoints {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpoints {
    /// Takes the copying of `database`'s journal off `writer`.
    pub(super) fn open(database: &Path, writer: &mut Connection) -> Result<Self, Error> {
        let connection = Connection::open(database)?;
        connection.busy_timeout(READER_WAIT)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        let shared = Arc::new(Shared::default());
        let copying = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("checkpoints".into())
            .spawn(move || copying.copy(&connection))
            .map_err(Error::io(database))?;
        let watching = Arc::clone(&shared);
        let mut next = LONG_PAGES;
        writer.wal_hook(Some(move |wal: &mut Wal, pages: i32| {
            watching.committed(wal, pages, &mut next);
            Ok(())
        }))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        self.shared.set(State::Over);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that copied the journal has panicked");
        }
    }
}

impl Shared {
    fn set(&self, state: State) {
        let mut now = self.state.lock();
        if *now != State::Over {
            *now = state;
        }
        drop(now);
        self.changed.notify_all();
    }

    /// A transaction has committed, and the journal has so many pages. The thread is woken at `next`.
    ///
    /// What goes wrong with the copying is no error of the transaction: that is in the journal.
    fn committed(&self, wal: &mut Wal, pages: i32, next: &mut i32) {
        let copied = *self.state.lock() == State::Copied;
        if copied {
            self.set(State::Idle);
        }
        if pages < LONG_PAGES {
            *next = LONG_PAGES;
        } else if copied {
            // Short of all of it when a reader looks at what was before: then once more, later.
            if let Err(error) = wal.checkpoint() {
                tracing::debug!(%error, "the rest of the journal was not copied");
            }
        } else if pages >= *next {
            *next = pages.saturating_add(LONG_PAGES);
            self.set(State::Long);
        }
    }

    /// What the thread does.
    fn copy(&self, connection: &Connection) {
        let mut state = self.state.lock();
        loop {
            match *state {
                State::Over => return,
                State::Idle | State::Copied => self.changed.wait(&mut state),
                State::Long => {
                    drop(state);
                    let begun = Instant::now();
                    let copied =
                        connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                            Ok((row.get::<_, i32>(1)?, row.get::<_, i32>(2)?))
                        });
                    let took = begun.elapsed();
                    match copied {
                        Ok((pages, copied)) => {
                            tracing::debug!(pages, copied, ?took, "the journal was copied");
                            self.set(State::Copied);
                        }
                        Err(error) => {
                            tracing::warn!(%error, "the journal could not be copied");
                            self.set(State::Idle);
                        }
                    }
                    state = self.state.lock();
                }
            }
        }
    }
}
