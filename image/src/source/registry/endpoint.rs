//! One server that holds a repository: the registry itself or a mirror of it.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

use reqwest::{
    Client, Response,
    header::{self, HeaderValue},
};
use tokio::time::timeout;
use url::Url;

use super::{
    auth::Authority,
    http::{ClientOptions, client, is_loopback, status_error},
};
use crate::source::{
    error::{SourceError, public_url},
    options::{Deadlines, SourceOptions},
};

/// Most redirects of one request. Content networks use one or two.
const REDIRECTS_MAX: usize = 5;

/// Host that answers for `docker.io`.
const DOCKER_IO_HOST: &str = "registry-1.docker.io";

/// One server.
pub(crate) struct Endpoint {
    /// Host and path prefix, without scheme or user.
    base: String,
    repository: String,
    scheme: AtomicU8,
    insecure: bool,
    client: Client,
    authority: Authority,
    deadlines: Deadlines,
    /// Set when it failed to connect or gave wrong bytes: asked last from then on.
    suspect: AtomicBool,
    mirror: bool,
}

const UNKNOWN: u8 = 0;
const HTTPS: u8 = 1;
const HTTP: u8 = 2;

/// A GET below `/v2/<repository>/`.
#[derive(Clone, Debug)]
pub(crate) struct Get<'a> {
    /// `manifests/latest`, `blobs/sha256:…`.
    pub(crate) path: &'a str,
    /// The thing asked for, for messages.
    pub(crate) what: &'a str,
    /// `Accept`.
    pub(crate) accept: &'static str,
    /// First byte wanted; 0 asks for everything without a range.
    pub(crate) from: u64,
}

/// A successful answer and the address it came from, after redirects.
pub(crate) struct Reply {
    pub(crate) response: Response,
    pub(crate) url: Url,
}

impl Endpoint {
    /// The registry `registry` itself.
    pub(crate) fn origin(
        registry: &str,
        repository: &str,
        options: &SourceOptions,
    ) -> Result<Self, SourceError> {
        let host = if registry == "docker.io" {
            DOCKER_IO_HOST
        } else {
            registry
        };
        Self::new(host, "", UNKNOWN, registry, repository, options, false)
    }

    /// A mirror, given as `host[:port]`, or as an address with scheme and path prefix.
    pub(crate) fn mirror(
        text: &str,
        repository: &str,
        options: &SourceOptions,
    ) -> Result<Self, SourceError> {
        let shown = text.rsplit('@').next().unwrap_or_default();
        let bad = |reason: &str| SourceError::Option {
            option: format!("mirror {shown:?}"),
            reason: reason.to_owned(),
        };
        let (scheme, address) = match text.split_once("://") {
            Some(("https", _)) => (HTTPS, text.to_owned()),
            Some(("http", _)) => (HTTP, text.to_owned()),
            Some(_) => return Err(bad("its scheme is not http or https")),
            None => (UNKNOWN, format!("https://{text}")),
        };
        let url = Url::parse(&address).map_err(|_| bad("it is no address"))?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(bad(
                "it has a user or a query; put credentials into an auth file",
            ));
        }
        let host = url.host_str().ok_or_else(|| bad("it has no host"))?;
        let host = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        Self::new(
            &host,
            url.path().trim_end_matches('/'),
            scheme,
            &host,
            repository,
            options,
            true,
        )
    }

    fn new(
        host: &str,
        prefix: &str,
        scheme: u8,
        key: &str,
        repository: &str,
        options: &SourceOptions,
        mirror: bool,
    ) -> Result<Self, SourceError> {
        let own = options.registries.get(key);
        let insecure = options.insecure || scheme == HTTP || own.is_some_and(|own| own.insecure);
        let own_files = own.map(|own| own.ca_files.as_slice()).unwrap_or_default();
        let ca_files = options
            .ca_files
            .iter()
            .chain(own_files)
            .map(PathBuf::as_path)
            .collect();
        let name = host
            .rsplit_once(':')
            .filter(|(_, port)| !port.contains(']'))
            .map_or(host, |(name, _)| name);
        let client = client(&ClientOptions {
            insecure,
            ca_files,
            proxy: &options.proxy,
            loopback: is_loopback(name),
            deadlines: options.deadlines,
        })?;
        let mut auth = options.auth.clone();
        if mirror {
            // A credential given for the registry is not the mirror's to see.
            auth.credential = None;
        }
        Ok(Self {
            base: format!("{host}{prefix}"),
            repository: repository.to_owned(),
            scheme: AtomicU8::new(scheme),
            insecure,
            client,
            authority: Authority::new(key, repository, auth, options.deadlines, insecure),
            deadlines: options.deadlines,
            suspect: AtomicBool::new(false),
            mirror,
        })
    }

    /// Host and prefix, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.base
    }

    pub(crate) fn is_mirror(&self) -> bool {
        self.mirror
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    /// Has the endpoint asked last from now on.
    pub(crate) fn distrust(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    /// Sends `get` once, with what is needed of authorisation, redirects and, for an insecure
    /// endpoint, a second try over plain HTTP.
    ///
    /// The answer has status 200, or 206 when a range was asked for; its body is yet to be read.
    pub(crate) async fn get(&self, get: &Get<'_>) -> Result<Reply, SourceError> {
        let after = self.deadlines.request;
        let scheme = self.scheme.load(Ordering::Relaxed);
        let first = if scheme == HTTP { "http" } else { "https" };
        let url = self.url(first, get)?;
        let late = |_| SourceError::Timeout {
            url: public_url(&url),
            what: "answer",
            after,
        };
        match timeout(after, self.authorised(&url, get))
            .await
            .map_err(late)?
        {
            Err(SourceError::Transport { source, .. })
                if scheme == UNKNOWN && self.insecure && source.is_connect() =>
            {
                let url = self.url("http", get)?;
                let late = |_| SourceError::Timeout {
                    url: public_url(&url),
                    what: "answer",
                    after,
                };
                let reply = timeout(after, self.authorised(&url, get))
                    .await
                    .map_err(late)?;
                if !matches!(reply, Err(SourceError::Transport { .. })) {
                    self.scheme.store(HTTP, Ordering::Relaxed);
                }
                reply
            }
            reply => {
                if scheme == UNKNOWN && !matches!(reply, Err(SourceError::Transport { .. })) {
                    self.scheme.store(HTTPS, Ordering::Relaxed);
                }
                reply
            }
        }
    }

    async fn authorised(&self, url: &Url, get: &Get<'_>) -> Result<Reply, SourceError> {
        let mut sent = self.authority.current().await;
        // A token may run out between two tries, so a new one is fetched at most twice.
        for _ in 0..3 {
            let reply = self.follow(url, get, sent.as_ref()).await?;
            let status = reply.response.status().as_u16();
            match status {
                200 => return Ok(reply),
                206 if get.from > 0 => return Ok(reply),
                401 if same_origin(&reply.url, url) => {
                    let challenges = challenges(&reply.response);
                    drop(reply);
                    sent = self
                        .authority
                        .answer(&self.client, url, &challenges, sent.as_ref())
                        .await?;
                    if sent.is_none() {
                        return Err(self.authority.denied(url, status).await);
                    }
                }
                403 if same_origin(&reply.url, url) => {
                    return Err(self.authority.denied(url, status).await);
                }
                404 => {
                    let at = format!("{}/{}", self.base, self.repository);
                    return Err(SourceError::NotFound {
                        what: get.what.to_owned(),
                        at,
                    });
                }
                _ => {
                    return Err(
                        status_error(reply.response, &reply.url, self.deadlines.read).await,
                    );
                }
            }
        }
        Err(self.authority.denied(url, 401).await)
    }

    /// Sends the request and follows redirects. `Authorization` goes to the endpoint alone: a
    /// content network would refuse it at best.
    async fn follow(
        &self,
        origin: &Url,
        get: &Get<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Reply, SourceError> {
        let mut url = origin.clone();
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self
                .client
                .get(url.clone())
                .header(header::ACCEPT, get.accept)
                .header(header::ACCEPT_ENCODING, "identity");
            if get.from > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", get.from));
            }
            if let Some(value) = authorization.filter(|_| same_origin(&url, origin)) {
                request = request.header(header::AUTHORIZATION, value.clone());
            }
            let response = request
                .send()
                .await
                .map_err(|e| SourceError::transport(&url, e))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Reply { response, url });
            }
            url = self.target(&response, &url)?;
        }
        let reason = format!("it redirects more than {REDIRECTS_MAX} times");
        Err(SourceError::Protocol {
            url: public_url(origin),
            reason,
        })
    }

    fn target(&self, response: &Response, url: &Url) -> Result<Url, SourceError> {
        let bad = |reason: &str| SourceError::Protocol {
            url: public_url(url),
            reason: reason.to_owned(),
        };
        let location = response
            .headers()
            .get(header::LOCATION)
            .and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| bad("it redirects without saying where to"))?;
        let next = url
            .join(location)
            .map_err(|_| bad("it redirects to something that is no address"))?;
        match next.scheme() {
            "https" => {}
            "http" if url.scheme() == "http" || self.insecure => {}
            "http" => return Err(bad("it redirects from HTTPS to plain HTTP")),
            _ => return Err(bad("it redirects to something that is not HTTP")),
        }
        if !next.username().is_empty() || next.password().is_some() {
            return Err(bad("it redirects to an address with a user in it"));
        }
        Ok(next)
    }

    fn url(&self, scheme: &str, get: &Get<'_>) -> Result<Url, SourceError> {
        let text = format!(
            "{scheme}://{}/v2/{}/{}",
            self.base, self.repository, get.path
        );
        Url::parse(&text).map_err(|e| SourceError::Option {
            option: format!("registry {:?}", self.base),
            reason: e.to_string(),
        })
    }
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.origin() == b.origin()
}

/// The `WWW-Authenticate` lines of an answer.
fn challenges(response: &Response) -> Vec<String> {
    let lines = response.headers().get_all(header::WWW_AUTHENTICATE).iter();
    lines
        .filter_map(|line| line.to_str().ok())
        .take(8)
        .map(str::to_owned)
        .collect()
}
