//! Waiting for SIGTERM and SIGINT.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

/// Becomes true once, when the process should end.
#[derive(Clone)]
pub struct Stop {
    flag: Arc<AtomicBool>,
    watch: watch::Receiver<bool>,
}

impl Stop {
    /// Set by the first SIGTERM or SIGINT. To be called inside a runtime.
    pub fn on_signals() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut term, mut int) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let (sender, watch) = watch::channel(false);
        let flag = Arc::new(AtomicBool::new(false));
        let set = Arc::clone(&flag);
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            set.store(true, Ordering::SeqCst);
            let _ = sender.send(true);
            // Kept, so that receivers do not see a closed channel.
            sender.closed().await;
        });
        Ok(Self { flag, watch })
    }

    /// As a flag, for threads.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.flag)
    }

    /// Waits for it.
    pub async fn wait(&self) {
        let mut watch = self.watch.clone();
        let _ = watch.wait_for(|stop| *stop).await;
    }

    /// Waits for it at most `limit`; true when it came.
    pub async fn within(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.wait()).await.is_ok()
    }
}
