//! OCI distribution registries.
//!
//! Source: OCI distribution specification 1.1, "Pull"; the distribution project's token pages.
//! What is asked for goes to the mirrors in their order and then to the registry itself; each has
//! its own retries. A server that could not be reached or gave wrong bytes is asked last.

mod auth;
mod challenge;
mod credentials;
mod download;
mod endpoint;
mod http;
mod retry;
mod tags;

use reqwest::header;
use tokio::time::{sleep, timeout};

use self::{
    endpoint::{Endpoint, Get, Reply},
    http::read_body,
    retry::Backoff,
};
use super::{
    error::{SourceError, public_url},
    options::{Deadlines, RetryPolicy, SourceOptions},
};
use crate::{
    digest::Digest,
    manifest::{MANIFEST_MAX, media},
    reference::Reference,
};

/// One repository of one registry.
pub(crate) struct Registry {
    name: String,
    repository: String,
    /// Mirrors, then the registry.
    endpoints: Vec<Endpoint>,
    deadlines: Deadlines,
    retry: RetryPolicy,
}

/// A document with the type it was served as.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
    /// A page of a list, and more follow.
    pub(crate) more: bool,
}

/// A small document of the registry.
#[derive(Clone, Copy)]
enum Document {
    Manifest,
    Blob,
    Tags,
}

impl Registry {
    /// Prepares to read the repository of `reference`; sends nothing yet.
    pub(crate) fn new(reference: &Reference, options: &SourceOptions) -> Result<Self, SourceError> {
        let (registry, repository) = (reference.registry(), reference.repository());
        let mirrors = options
            .registries
            .get(registry)
            .map(|own| own.mirrors.as_slice())
            .unwrap_or_default();
        let mut endpoints = mirrors
            .iter()
            .map(|mirror| Endpoint::mirror(mirror, repository, options))
            .collect::<Result<Vec<_>, _>>()?;
        endpoints.push(Endpoint::origin(registry, repository, options)?);
        Ok(Self {
            name: registry.to_owned(),
            repository: repository.to_owned(),
            endpoints,
            deadlines: options.deadlines,
            retry: options.retry,
        })
    }

    /// Registry and repository, for messages.
    pub(crate) fn describe(&self) -> String {
        format!("{}/{}", self.name, self.repository)
    }

    /// The manifest or list called `name`, a tag or digest, checked against `want`.
    pub(crate) async fn manifest(
        &self,
        name: &str,
        want: Option<Digest>,
    ) -> Result<Fetched, SourceError> {
        self.fetch(Document::Manifest, name, want, MANIFEST_MAX)
            .await
    }

    /// The blob called `digest`, checked, of at most `limit` bytes.
    pub(crate) async fn small_blob(
        &self,
        digest: Digest,
        limit: u64,
    ) -> Result<Vec<u8>, SourceError> {
        let fetched = self
            .fetch(Document::Blob, &digest.to_string(), Some(digest), limit)
            .await?;
        Ok(fetched.bytes)
    }

    async fn fetch(
        &self,
        document: Document,
        name: &str,
        want: Option<Digest>,
        limit: u64,
    ) -> Result<Fetched, SourceError> {
        let mut last = SourceError::Stopped;
        for endpoint in self.in_order() {
            let mut backoff = Backoff::new(self.retry, self.attempts(endpoint));
            last = loop {
                let error = match self.fetch_once(endpoint, document, name, want, limit).await {
                    Ok(fetched) => return Ok(fetched),
                    Err(error) => error,
                };
                let again = error
                    .is_transient()
                    .then(|| backoff.failed(error.retry_after()))
                    .flatten();
                let Some(wait) = again else { break error };
                tracing::debug!(?wait, "{}: {error}; trying again", endpoint.name());
                sleep(wait).await;
            };
            self.note_failure(endpoint, &last);
        }
        Err(last)
    }

    async fn fetch_once(
        &self,
        endpoint: &Endpoint,
        document: Document,
        name: &str,
        want: Option<Digest>,
        limit: u64,
    ) -> Result<Fetched, SourceError> {
        let (kind, what, accept) = match document {
            Document::Manifest => ("manifests", "manifest", media::MANIFEST_ACCEPT),
            Document::Blob => ("blobs", "blob", "*/*"),
            Document::Tags => ("tags", "list of tags", "application/json"),
        };
        let path = format!("{kind}/{name}");
        let what = match document {
            Document::Manifest | Document::Blob => format!("{what} {name}"),
            Document::Tags => what.to_owned(),
        };
        let Reply { response, url } = endpoint
            .get(&Get {
                path: &path,
                what: &what,
                accept,
                from: 0,
            })
            .await?;
        let text = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let content_type = text(header::CONTENT_TYPE.as_str()).map(str::to_owned);
        let more = text(header::LINK.as_str()).is_some_and(|link| link.contains("rel=\"next\""));
        // Only manifests have it by the specification; an algorithm that we do not use says nothing.
        let served = text("docker-content-digest").and_then(|digest| digest.parse::<Digest>().ok());
        let after = self.deadlines.request;
        let late = |_| SourceError::Timeout {
            url: public_url(&url),
            what: "complete answer",
            after,
        };
        let body = read_body(response, &url, limit, self.deadlines.read);
        let bytes = timeout(after, body).await.map_err(late)??;
        let got = Digest::of(&bytes);
        let served = served.filter(|_| matches!(document, Document::Manifest));
        match want.or(served).filter(|want| *want != got) {
            None => Ok(Fetched {
                bytes,
                content_type,
                digest: got,
                more,
            }),
            Some(want) => {
                let what = format!("{what} from {}", public_url(&url));
                Err(SourceError::WrongDigest { what, want, got })
            }
        }
    }

    /// Endpoints in the order in which they are asked now.
    fn in_order(&self) -> impl Iterator<Item = &Endpoint> {
        let (suspect, good): (Vec<_>, Vec<_>) =
            self.endpoints.iter().partition(|one| one.is_suspect());
        good.into_iter().chain(suspect)
    }

    fn attempts(&self, endpoint: &Endpoint) -> u32 {
        if endpoint.is_mirror() {
            self.retry.mirror_attempts
        } else {
            self.retry.attempts
        }
    }

    fn note_failure(&self, endpoint: &Endpoint, error: &SourceError) {
        let lasting = matches!(
            error,
            SourceError::Transport { .. }
                | SourceError::Timeout { .. }
                | SourceError::WrongDigest { .. }
        );
        if lasting {
            endpoint.distrust();
        }
        if endpoint.is_mirror() {
            tracing::warn!("mirror {} passed over: {error}", endpoint.name());
        }
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry")
            .field("name", &self.describe())
            .finish_non_exhaustive()
    }
}
