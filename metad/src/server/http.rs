//! `/metrics` and `/healthz` over plain HTTP.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};

use super::{
    ServerError, closed,
    guard::{Guarded, Listen},
};
use crate::{engine::Engine, metrics::Metrics};

/// Connections at a time.
const CONNECTIONS: usize = 64;
/// Longest life of one, whatever it does.
const LIFE: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
struct Shared {
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
}

/// Answers until the daemon stops.
pub(super) async fn serve(
    listener: TcpListener,
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    closing: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let router = Router::new()
        .route("/metrics", get(figures))
        .route("/healthz", get(healthy))
        .with_state(Shared { engine, metrics });
    pages(listener, router, closed(closing))
        .await
        .map_err(|e| ServerError::Serve(e.to_string()))
}

/// Serves `router` over plain HTTP until `ended`, with a bound on connections and on their lives.
pub async fn pages(
    listener: TcpListener,
    router: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let bounded = Bounded {
        listener,
        places: Arc::new(Semaphore::new(CONNECTIONS)),
    };
    axum::serve(bounded, router)
        .with_graceful_shutdown(ended)
        .await
}

async fn figures(State(shared): State<Shared>) -> Response {
    let text = tokio::task::spawn_blocking(move || shared.metrics.text(&shared.engine)).await;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match text {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Ok(Err(error)) => {
            let status = tonic::Status::from(error);
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                status.message().to_owned(),
            )
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Healthy is who can read the database and take the engine's lock.
async fn healthy(State(shared): State<Shared>) -> Response {
    match tokio::task::spawn_blocking(move || shared.engine.status()).await {
        Ok(Ok(_)) => "ok\n".into_response(),
        _ => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the state cannot be read\n",
        )
            .into_response(),
    }
}

/// A listener with a bound on connections and on their lives.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Guarded<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            // The semaphore is never closed; if it were, there would be nothing to accept.
            let Ok(place) = self.places.clone().acquire_owned().await else {
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.next().await {
                Ok(stream) => {
                    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
                    let address = stream.peer_addr().unwrap_or(unknown);
                    return (Guarded::new(stream, place, usize::MAX, LIFE), address);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for metrics");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
