//! The daemon's sockets: gRPC on a unix socket and, when wanted, on TCP, which between hosts is
//! under mutual TLS; metrics over HTTP.

mod guard;
mod http;
mod socket;
mod tls;

pub use http::pages;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use harbour_metad_client::{
    FRAME_MAX,
    tls::{Identity, TlsError, is_loopback},
    v1,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tonic::transport::server::Router;
use v1::{
    admin_server::AdminServer, catalogue_server::CatalogueServer, donors_server::DonorsServer,
    ingest_server::IngestServer, locks_server::LocksServer, nodes_server::NodesServer,
};

use crate::{
    engine::{Engine, Options},
    error::Error,
    metrics::Metrics,
    service::Service,
};
use socket::UnixSocket;

/// Connections at a time, of each listener of gRPC: strangers on the network must not keep this
/// host's own from the unix socket.
const CONNECTIONS: usize = 1024;
/// Calls of one connection at a time.
const CALLS_PER_CONNECTION: usize = 128;
/// Streams of one connection at a time.
const STREAMS_PER_CONNECTION: u32 = 256;
/// Longest header of one call in bytes.
const HEADER_BYTES: u32 = 16 << 10;
/// Longest that a call works; a stream's pauses have their own bound.
const CALL_TIME: Duration = Duration::from_secs(120);
/// Quiet connections are asked whether they live.
const PING_EVERY: Duration = Duration::from_secs(20);
/// And have this long to say so.
const PING_WAIT: Duration = Duration::from_secs(10);
/// Calls under way at the end have this long.
const STOP_WAIT: Duration = Duration::from_secs(5);
/// How often leases and quarantine are looked at.
const TICK: Duration = Duration::from_millis(250);

/// What a daemon is given. The caller reads files, flags and environment; nothing here does.
#[derive(Debug)]
pub struct Config {
    /// Database, index files and lock. Made when it is not there; one daemon at a time.
    pub state_dir: PathBuf,
    /// Unix socket for gRPC. A stale one is replaced, a live one is an error.
    pub socket: PathBuf,
    /// Permission bits of the socket.
    pub socket_mode: u32,
    /// TCP address for gRPC.
    pub listen: Option<SocketAddr>,
    /// Certificates for it: with them, clients must show one of the same CA.
    pub identity: Option<Arc<Identity>>,
    /// Whether it may be beyond loopback without them.
    pub plain: bool,
    /// TCP address for `/metrics` and `/healthz`.
    pub metrics: Option<SocketAddr>,
    /// Leases, replicas, policy, clock, failpoints.
    pub options: Options,
}

impl Config {
    /// A daemon with defaults: a socket of mode 0660, no TCP, no metrics.
    pub fn new(state_dir: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            socket: socket.into(),
            socket_mode: 0o660,
            listen: None,
            identity: None,
            plain: false,
            metrics: None,
            options: Options::default(),
        }
    }
}

/// Why a daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The state directory cannot be used.
    #[error("state directory {}", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Error,
    },
    /// Another daemon listens on the socket, or something else has its name.
    #[error("socket {}: {reason}", path.display())]
    SocketTaken {
        /// The socket.
        path: PathBuf,
        /// What is there and what to do.
        reason: String,
    },
    /// The socket cannot be made.
    #[error("socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A TCP address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another host could listen in.
    #[error("gRPC on {address} is refused")]
    Plain {
        /// The address.
        address: SocketAddr,
        /// Why, and what to do.
        #[source]
        source: TlsError,
    },
    /// A listener failed while it ran.
    #[error("serving failed: {0}")]
    Serve(String),
}

/// A daemon whose sockets are bound. Clients can connect; they are answered in [`Server::serve`].
#[derive(Debug)]
pub struct Server {
    engine: Arc<Engine>,
    unix: UnixSocket,
    tcp: Option<TcpListener>,
    identity: Option<Arc<Identity>>,
    metrics: Option<TcpListener>,
}

/// Runs a daemon until `shutdown` is ready.
///
/// # Errors
/// [`ServerError`], which names the path or address.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServerError> {
    Server::bind(config).await?.serve(shutdown).await
}

impl Server {
    /// Opens the state directory and binds all sockets.
    ///
    /// # Errors
    /// [`ServerError`], which names the path or address.
    pub async fn bind(config: Config) -> Result<Self, ServerError> {
        let Config {
            state_dir,
            socket,
            socket_mode,
            listen,
            identity,
            plain,
            metrics,
            options,
        } = config;
        if let Some(address) = listen
            && identity.is_none()
            && !plain
            && !is_loopback(&address.ip().to_string())
        {
            let source = TlsError::Plain {
                address: address.to_string(),
            };
            return Err(ServerError::Plain { address, source });
        }
        let path = state_dir.clone();
        let opened = tokio::task::spawn_blocking(move || Engine::open(&state_dir, options)).await;
        let engine = opened
            .map_err(|e| ServerError::Serve(e.to_string()))?
            .map_err(|source| ServerError::State { path, source })?;
        let unix = UnixSocket::bind(&socket, socket_mode).await?;
        let tcp = bind(listen).await?;
        let metrics = bind(metrics).await?;
        Ok(Self {
            engine,
            unix,
            tcp,
            identity,
            metrics,
        })
    }

    /// Address of gRPC over TCP, with the port that the system chose for port 0.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }

    /// Address of the metrics, likewise.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }

    /// Answers until `shutdown` is ready, then lets calls under way finish for 5 s.
    ///
    /// # Errors
    /// [`ServerError::Serve`] when a listener fails.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServerError> {
        let Self {
            engine,
            unix,
            tcp,
            identity,
            metrics,
        } = self;
        let figures = Arc::new(Metrics::new());
        let (close, closing) = watch::channel(false);
        let service = Service::new(engine.clone(), figures.clone(), closing.clone())
            .map_err(|e| ServerError::Serve(format!("no thread for locks: {e}")))?;
        let places = || Arc::new(Semaphore::new(CONNECTIONS));
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<CatalogueServer<Service>>().await;
        health.set_serving::<IngestServer<Service>>().await;
        health.set_serving::<LocksServer<Service>>().await;
        health.set_serving::<DonorsServer<Service>>().await;
        health.set_serving::<NodesServer<Service>>().await;
        health.set_serving::<AdminServer<Service>>().await;
        let mut tasks: JoinSet<Result<(), ServerError>> = JoinSet::new();
        let router = router(&service).add_service(health_service.clone());
        let incoming = guard::incoming(unix.listener, places());
        tasks.spawn(serve(router, incoming, closing.clone()));
        if let Some(listener) = tcp {
            let router = self::router(&service).add_service(health_service);
            match identity {
                Some(identity) => {
                    let incoming = tls::incoming(listener, identity, places());
                    tasks.spawn(serve(router, incoming, closing.clone()));
                }
                None => {
                    let incoming = guard::incoming(listener, places());
                    tasks.spawn(serve(router, incoming, closing.clone()));
                }
            }
        }
        if let Some(listener) = metrics {
            tasks.spawn(http::serve(
                listener,
                engine.clone(),
                figures,
                closing.clone(),
            ));
        }
        tasks.spawn(tick(engine, closing));
        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            ended = tasks.join_next() => match ended {
                Some(Ok(Err(error))) => Err(error),
                other => Err(ServerError::Serve(format!("a listener ended: {other:?}"))),
            },
        };
        close.send_replace(true);
        let rest = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_WAIT, rest).await.is_err() {
            tracing::warn!("calls were still under way at the end");
        }
        drop(unix.name);
        outcome
    }
}

async fn bind(address: Option<SocketAddr>) -> Result<Option<TcpListener>, ServerError> {
    let Some(address) = address else {
        return Ok(None);
    };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) => Err(ServerError::Listen { address, source }),
    }
}

/// All services but health, with limits.
fn router(service: &Service) -> Router {
    macro_rules! limited {
        ($server:ident) => {
            $server::new(service.clone())
                .max_decoding_message_size(FRAME_MAX)
                .max_encoding_message_size(FRAME_MAX)
        };
    }
    tonic::transport::Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_WAIT))
        .timeout(CALL_TIME)
        .add_service(limited!(CatalogueServer))
        .add_service(limited!(IngestServer))
        .add_service(limited!(LocksServer))
        .add_service(limited!(DonorsServer))
        .add_service(limited!(NodesServer))
        .add_service(limited!(AdminServer))
}

async fn serve<T>(
    router: Router,
    incoming: guard::Incoming<T>,
    closing: watch::Receiver<bool>,
) -> Result<(), ServerError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    router
        .serve_with_incoming_shutdown(incoming, closed(closing))
        .await
        .map_err(|e| ServerError::Serve(e.to_string()))
}

/// Ready when the daemon stops.
async fn closed(mut closing: watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn tick(engine: Arc<Engine>, mut closing: watch::Receiver<bool>) -> Result<(), ServerError> {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            _ = closing.wait_for(|closing| *closing) => return Ok(()),
        }
        let engine = engine.clone();
        match tokio::task::spawn_blocking(move || engine.tick()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let status = tonic::Status::from(error);
                tracing::error!(
                    error = status.message(),
                    "the round of leases failed, trying again"
                );
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(ServerError::Serve(error.to_string())),
        }
    }
}
