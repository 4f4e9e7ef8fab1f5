//! Waiting for a metad that is on its way up.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use harbour_metad_client::Error;

/// How long one is waited for by a command that a person began: longer than a start, or a restart by a
/// service manager, takes; and short enough for who forgot to start it.
const LIMIT: Duration = Duration::from_secs(5);

/// Between attempts.
const AGAIN: Duration = Duration::from_millis(200);

/// Calls until metad can be reached, for [`LIMIT`] at most and not when `stopped`. Says once, after
/// the first attempt, that it waits.
///
/// # Errors
/// Those of `call`; [`Error::Unavailable`] when the time is over.
pub async fn for_metad<T, F>(stopped: &AtomicBool, call: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let limit = Instant::now() + LIMIT;
    let mut told = false;
    loop {
        let outcome = call().await;
        let Err(error @ Error::Unavailable { .. }) = &outcome else {
            return outcome;
        };
        if Instant::now() + AGAIN > limit || stopped.load(Ordering::Relaxed) {
            return outcome;
        }
        if !told {
            tracing::warn!(%error, "waiting for metad");
            told = true;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn away() -> Error {
        Error::Unavailable {
            endpoint: "unix:/nowhere".to_owned(),
            asked: "a test",
            source: "refused".into(),
        }
    }

    #[tokio::test]
    async fn one_that_comes_up_is_waited_for_and_one_that_does_not_is_an_error() {
        let (stopped, calls) = (AtomicBool::new(false), AtomicU32::new(0));
        let third = || async {
            match calls.fetch_add(1, Ordering::Relaxed) {
                2 => Ok(7),
                _ => Err(away()),
            }
        };
        assert_eq!(for_metad(&stopped, third).await.unwrap(), 7);
        stopped.store(true, Ordering::Relaxed);
        let never = || async { Err::<(), _>(away()) };
        assert!(for_metad(&stopped, never).await.is_err());
        // What waiting does not mend is told at once.
        stopped.store(false, Ordering::Relaxed);
        let refused = || async {
            calls.fetch_add(1, Ordering::Relaxed);
            Err::<(), _>(Error::Refused {
                asked: "a test",
                message: "no".to_owned(),
            })
        };
        calls.store(0, Ordering::Relaxed);
        assert!(for_metad(&stopped, refused).await.is_err());
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}
