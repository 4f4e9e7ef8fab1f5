//! Waiting with an end: blocking calls that may never return are put on a thread of their own.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Runs `call` on its own thread and waits at most `limit` for it. `None` when it did not return in
/// time: the thread is left behind, which is what a hung mount leaves no choice about.
pub fn within<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("bounded".into())
        .spawn(move || {
            let _ = sender.send(call());
        })
        .ok()?;
    receiver.recv_timeout(limit).ok()
}

/// Asks `ready` every 10 ms until it gives something or `limit` has passed.
pub fn poll<T>(limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
