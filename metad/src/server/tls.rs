//! Connections under mutual TLS: a stranger gets as far as the handshake, for a short while.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use harbour_metad_client::tls::Identity;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    task::AbortHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::guard::{self, Guarded, Incoming, Listen as _};

/// Handshakes at a time. One more ends the oldest: an honest one takes milliseconds, so whoever
/// has been at it for longest is whom it costs least to lose.
const HANDSHAKES: usize = 256;
/// Longest handshake, with the wait for a place after it.
const HANDSHAKE_TIME: Duration = Duration::from_secs(3);
/// Refused handshakes are spoken of this often, however many they are.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

type Accepted = io::Result<Guarded<TlsStream<TcpStream>>>;

/// Accepts connections whose handshake succeeds, while there are places. Ends when the stream is
/// dropped.
pub(super) fn incoming(
    mut listener: TcpListener,
    identity: Arc<Identity>,
    places: Arc<Semaphore>,
) -> Incoming<TlsStream<TcpStream>> {
    let (send, receive) = mpsc::channel(1);
    tokio::spawn(async move {
        let refused = Arc::new(Refused::default());
        let mut shaking = Shaking::default();
        loop {
            let stream = tokio::select! {
                stream = listener.next() => stream,
                () = send.closed() => return,
            };
            match stream {
                Ok(stream) => {
                    let (identity, places) = (Arc::clone(&identity), Arc::clone(&places));
                    let (send, refused) = (send.clone(), Arc::clone(&refused));
                    let task = tokio::spawn(async move {
                        let peer = stream.peer_addr().ok();
                        match tokio::time::timeout(HANDSHAKE_TIME, shake(stream, &identity, places))
                            .await
                        {
                            Ok(Ok(accepted)) => {
                                let _ = send.send(Ok(accepted)).await;
                            }
                            Ok(Err(error)) => refused.note(peer, &error),
                            Err(_) => refused.note(peer, &io::ErrorKind::TimedOut.into()),
                        }
                    });
                    shaking.admit(task.abort_handle());
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(guard::ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Incoming::new(receive)
}

async fn shake(stream: TcpStream, identity: &Identity, places: Arc<Semaphore>) -> Accepted {
    let acceptor = TlsAcceptor::from(identity.server());
    let stream = acceptor.accept(stream).await?;
    let place = places.acquire_owned().await.map_err(io::Error::other)?;
    Ok(guard::greeted(stream, place))
}

/// Handshakes under way, the oldest first. Dropped, it ends them all.
#[derive(Default)]
struct Shaking(VecDeque<AbortHandle>);

impl Shaking {
    fn admit(&mut self, task: AbortHandle) {
        self.0.retain(|task| !task.is_finished());
        if self.0.len() >= HANDSHAKES
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(task);
    }
}

impl Drop for Shaking {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Handshakes that failed: worth a line, not a line each.
#[derive(Default)]
struct Refused {
    count: AtomicU64,
    said: Mutex<Option<Instant>>,
}

impl Refused {
    fn note(&self, peer: Option<SocketAddr>, error: &io::Error) {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_some_and(|at| at.elapsed() < COMPLAIN_EVERY) {
            return;
        }
        *said = Some(Instant::now());
        let peer = peer.map_or_else(|| "a client".into(), |peer| peer.to_string());
        tracing::warn!(peer, %error, refused = count, "a TLS handshake failed");
    }
}
