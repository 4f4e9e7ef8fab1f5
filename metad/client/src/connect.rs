//! The channel: connecting, deadlines, frame limits.

use std::{future::Future, time::Duration};

use hyper_util::rt::TokioIo;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Uri},
};

use crate::{
    Endpoint, Error, FRAME_MAX,
    tls::{self, TlsError, Trust},
    v1,
};

/// Default deadline of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Pings on a quiet connection, so that a stream from a host that vanished ends.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long a ping may go unanswered.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of one metadata daemon. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    endpoint: Endpoint,
    timeout: Duration,
}

/// What connecting is called in errors.
const CONNECTING: &str = "connecting";

impl Client {
    /// Connects to a daemon on this host; see [`Client::connect_with`].
    ///
    /// # Errors
    /// As [`Client::connect_with`], and [`Error::Tls`] for another host.
    pub async fn connect(endpoint: &Endpoint, timeout: Duration) -> Result<Self, Error> {
        Self::connect_with(endpoint, &Trust::default(), timeout).await
    }

    /// Connects within `timeout`, which bounds only this: calls have their own deadline of 10 s,
    /// see [`Client::with_timeout`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] when nothing answers there, [`Error::Deadline`] when it is too slow,
    /// [`Error::Tls`] when the two ends do not trust each other, or when `trust` does not allow
    /// what the endpoint asks for.
    pub async fn connect_with(
        endpoint: &Endpoint,
        trust: &Trust,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let distrusted = |source| Error::Tls {
            asked: CONNECTING,
            source,
        };
        let failed = |source: tonic::transport::Error| match distrust(&source) {
            Some(error) => distrusted(error.clone()),
            None => Error::Unavailable {
                endpoint: endpoint.to_string(),
                asked: CONNECTING,
                source: Box::new(source),
            },
        };
        let builder = builder(endpoint, timeout).map_err(failed)?;
        let connecting = async {
            match endpoint {
                Endpoint::Unix(path) => {
                    let connector = unix_connector(path.clone());
                    builder.connect_with_connector(connector).await
                }
                Endpoint::Tcp { .. } => builder.connect().await,
                Endpoint::Tls { host, port } => {
                    let Some(identity) = trust.identity.clone() else {
                        return Err(distrusted(TlsError::NoIdentity {
                            endpoint: endpoint.to_string(),
                        }));
                    };
                    let connector =
                        tls::connector(identity, host.clone(), *port, endpoint.to_string());
                    builder.connect_with_connector(connector).await
                }
            }
            .map_err(failed)
        };
        if let Endpoint::Tcp { host, .. } = endpoint
            && !trust.plain
            && !tls::is_loopback(host)
        {
            return Err(distrusted(TlsError::Plain {
                address: endpoint.to_string(),
            }));
        }
        let channel = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| Error::Deadline {
                asked: CONNECTING,
                after: timeout,
            })??;
        Ok(Self {
            channel,
            endpoint: endpoint.clone(),
            timeout: CALL_TIMEOUT,
        })
    }

    /// The same connection with another deadline for each call.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self {
            timeout,
            ..self.clone()
        }
    }

    /// Where this client connects to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Deadline of each call.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn catalogue(&self) -> v1::catalogue_client::CatalogueClient<Channel> {
        v1::catalogue_client::CatalogueClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn ingest(&self) -> v1::ingest_client::IngestClient<Channel> {
        v1::ingest_client::IngestClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn locks(&self) -> v1::locks_client::LocksClient<Channel> {
        v1::locks_client::LocksClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn donors(&self) -> v1::donors_client::DonorsClient<Channel> {
        v1::donors_client::DonorsClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn nodes(&self) -> v1::nodes_client::NodesClient<Channel> {
        v1::nodes_client::NodesClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn admin(&self) -> v1::admin_client::AdminClient<Channel> {
        v1::admin_client::AdminClient::new(self.channel.clone())
            .max_decoding_message_size(FRAME_MAX)
            .max_encoding_message_size(FRAME_MAX)
    }

    pub(crate) fn error(&self, status: Status, asked: &'static str) -> Error {
        Error::from_status(status, asked, &self.endpoint.to_string(), self.timeout)
    }

    /// Runs one call under `timeout`, which also travels with the request so that metad stops
    /// working for a caller that has gone.
    pub(crate) async fn call<M, R, F>(
        &self,
        asked: &'static str,
        timeout: Duration,
        message: M,
        send: impl FnOnce(Request<M>) -> F,
    ) -> Result<R, Error>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut request = Request::new(message);
        request.set_timeout(timeout);
        match tokio::time::timeout(timeout, send(request)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(Error::from_status(
                status,
                asked,
                &self.endpoint.to_string(),
                timeout,
            )),
            Err(_) => Err(Error::Deadline {
                asked,
                after: timeout,
            }),
        }
    }
}

fn builder(
    endpoint: &Endpoint,
    connect_timeout: Duration,
) -> Result<tonic::transport::Endpoint, tonic::transport::Error> {
    let uri = match endpoint {
        // The connector ignores this; HTTP/2 wants an authority all the same.
        Endpoint::Unix(_) => "http://metad".to_owned(),
        Endpoint::Tcp { .. } | Endpoint::Tls { .. } => endpoint.to_string(),
    };
    Ok(tonic::transport::Endpoint::from_shared(uri)?
        .connect_timeout(connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// What an error says of certificates, if that is what it is about.
fn distrust<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e TlsError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<TlsError>() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

fn unix_connector(
    path: std::path::PathBuf,
) -> impl tower::Service<
    Uri,
    Response = TokioIo<tokio::net::UnixStream>,
    Error = std::io::Error,
    Future: Send,
> + Send
+ 'static {
    tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move {
            tokio::net::UnixStream::connect(path)
                .await
                .map(TokioIo::new)
        }
    })
}
