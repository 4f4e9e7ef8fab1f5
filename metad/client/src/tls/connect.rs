//! A connection to metad on another host.

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{io::AsyncBufReadExt, net::TcpStream};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Uri;

use super::{Identity, TlsError, error};

/// Longest that TCP, TLS and the first byte of the other end may take together.
const CONNECT_MAX: Duration = Duration::from_secs(10);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Connects to `host` (a name, or an address without brackets) whenever it is called.
pub(crate) fn connector(
    identity: Arc<Identity>,
    host: String,
    port: u16,
    endpoint: String,
) -> impl tower::Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = Failure, Future: Send>
+ Send
+ 'static {
    tower::service_fn(move |_: Uri| {
        let (identity, host, endpoint) = (Arc::clone(&identity), host.clone(), endpoint.clone());
        async move {
            let connecting = connect(&identity, &host, port, &endpoint);
            match tokio::time::timeout(CONNECT_MAX, connecting).await {
                Ok(connected) => connected.map(TokioIo::new),
                Err(_) => Err(Failure::from(io::Error::from(io::ErrorKind::TimedOut))),
            }
        }
    })
}

async fn connect(
    identity: &Identity,
    host: &str,
    port: u16,
    endpoint: &str,
) -> Result<TlsStream<TcpStream>, Failure> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Handshake {
        endpoint: endpoint.to_owned(),
        why: format!("{host:?} is no name that a certificate could have"),
    })?;
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    let explain = |error: io::Error| {
        let inside = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match inside {
            Some(inside) => Failure::from(error::of_peer(identity.files(), endpoint, host, inside)),
            None => Failure::from(error),
        }
    };
    let connector = TlsConnector::from(identity.client());
    let mut stream = connector.connect(name, stream).await.map_err(explain)?;
    // The handshake ends here before the other end has looked at our certificate. Its verdict is
    // the first thing that comes: an alert, or the greeting of HTTP/2, which stays in the buffer.
    let first = stream.fill_buf().await.map_err(explain)?;
    if first.is_empty() {
        return Err(Failure::from(TlsError::Handshake {
            endpoint: endpoint.to_owned(),
            why: "it closed the connection".into(),
        }));
    }
    Ok(stream)
}
