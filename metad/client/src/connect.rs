//! The channel: connecting, deadlines, frame limits.

use std::{future::Future, time::Duration};

use hyper_util::rt::TokioIo;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Uri},
};

use crate::{Endpoint, Error, FRAME_MAX, v1};

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

impl Client {
    /// Connects within `timeout`, which bounds only this: calls have their own deadline of 10 s,
    /// see [`Client::with_timeout`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] when nothing answers there, [`Error::Deadline`] when it is too slow.
    pub async fn connect(endpoint: &Endpoint, timeout: Duration) -> Result<Self, Error> {
        const ASKED: &str = "connecting";
        let unavailable = |source: Box<dyn std::error::Error + Send + Sync>| Error::Unavailable {
            endpoint: endpoint.to_string(),
            asked: ASKED,
            source,
        };
        let builder = builder(endpoint, timeout).map_err(|e| unavailable(Box::new(e)))?;
        let connecting = async {
            match endpoint {
                Endpoint::Unix(path) => {
                    builder
                        .connect_with_connector(unix_connector(path.clone()))
                        .await
                }
                Endpoint::Tcp { .. } => builder.connect().await,
            }
        };
        let channel = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| Error::Deadline {
                asked: ASKED,
                after: timeout,
            })?
            .map_err(|e| unavailable(Box::new(e)))?;
        Ok(Self {
            channel,
            endpoint: endpoint.clone(),
            timeout: CALL_TIMEOUT,
        })
    }

    /// A client that connects at its first call. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the endpoint cannot be written as an address.
    pub fn lazy(endpoint: &Endpoint) -> Result<Self, Error> {
        let builder = builder(endpoint, CALL_TIMEOUT).map_err(|e| Error::Unavailable {
            endpoint: endpoint.to_string(),
            asked: "connecting",
            source: Box::new(e),
        })?;
        let channel = match endpoint {
            Endpoint::Unix(path) => {
                builder.connect_with_connector_lazy(unix_connector(path.clone()))
            }
            Endpoint::Tcp { .. } => builder.connect_lazy(),
        };
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
        Endpoint::Tcp { .. } => endpoint.to_string(),
    };
    Ok(tonic::transport::Endpoint::from_shared(uri)?
        .connect_timeout(connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
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
