//! HTTP as registries are read with it: clients with their trust and proxies, bounded bodies,
//! errors by name.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use reqwest::{Certificate, Client, NoProxy, Response, header, redirect};
use serde::Deserialize;
use tokio::time::timeout;
use url::Url;

use super::retry::parse_retry_after;
use crate::source::{
    error::{SourceError, public_url},
    options::{Deadlines, Proxy},
};

/// Most bytes of an error's body that are looked at.
const ERROR_BODY_MAX: u64 = 16 << 10;

/// Most header lines of an answer; their total size is bounded by hyper at 400 KiB.
const HEADERS_MAX: usize = 128;

/// Largest CA file in bytes.
const CA_FILE_MAX: u64 = 4 << 20;

/// What a client is made of.
pub(crate) struct ClientOptions<'a> {
    pub(crate) insecure: bool,
    pub(crate) ca_files: Vec<&'a Path>,
    pub(crate) proxy: &'a Proxy,
    /// Whether the host is this machine, which no proxy can reach for us.
    pub(crate) loopback: bool,
    pub(crate) deadlines: Deadlines,
}

/// A client for one endpoint. Redirects are left to the caller, who knows which headers may go on.
pub(crate) fn client(options: &ClientOptions<'_>) -> Result<Client, SourceError> {
    // Another part of the process may have chosen a provider before; either is good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let authorities = authorities(&options.ca_files)?;
    let builder = |system_trust: bool| {
        let mut builder = Client::builder()
            .user_agent(concat!("imageharbour/", env!("CARGO_PKG_VERSION")))
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(options.deadlines.connect)
            .pool_idle_timeout(Duration::from_secs(30))
            .http1_max_headers(HEADERS_MAX)
            .http2_adaptive_window(true)
            .tls_danger_accept_invalid_certs(options.insecure);
        builder = if system_trust {
            authorities.iter().fold(builder, |builder, ca| {
                builder.add_root_certificate(ca.clone())
            })
        } else {
            builder.tls_certs_only(authorities.iter().cloned())
        };
        proxied(builder, options)
    };
    // A machine with no authorities at all can still talk plain HTTP, and to those given.
    let made = builder(true)?.build().or_else(|error| {
        tracing::warn!("the system's certificate authorities cannot be used: {error}");
        builder(false)
            .map(|builder| builder.build())?
            .map_err(|error| SourceError::Option {
                option: "TLS".to_owned(),
                reason: error.to_string(),
            })
    })?;
    Ok(made)
}

fn proxied(
    builder: reqwest::ClientBuilder,
    options: &ClientOptions<'_>,
) -> Result<reqwest::ClientBuilder, SourceError> {
    let Proxy::Fixed {
        http,
        https,
        no_proxy,
    } = options.proxy
    else {
        let direct = options.loopback || matches!(options.proxy, Proxy::Direct);
        return Ok(if direct { builder.no_proxy() } else { builder });
    };
    let mut builder = builder.no_proxy();
    if options.loopback {
        return Ok(builder);
    }
    let except = no_proxy.as_deref().and_then(NoProxy::from_string);
    // The address may hold a password, so the error does not repeat it.
    let bad = |_| SourceError::Option {
        option: "proxy".to_owned(),
        reason: "it is no address".to_owned(),
    };
    if let Some(address) = http {
        builder = builder.proxy(
            reqwest::Proxy::http(address)
                .map_err(bad)?
                .no_proxy(except.clone()),
        );
    }
    if let Some(address) = https {
        builder = builder.proxy(
            reqwest::Proxy::https(address)
                .map_err(bad)?
                .no_proxy(except),
        );
    }
    Ok(builder)
}

fn authorities(files: &[&Path]) -> Result<Vec<Certificate>, SourceError> {
    use std::io::Read;
    let mut all = Vec::new();
    for file in files {
        let bad = |reason: String| SourceError::Option {
            option: format!("CA file {}", file.display()),
            reason,
        };
        let mut pem = Vec::new();
        let opened = std::fs::File::open(file).map_err(|e| bad(e.to_string()))?;
        opened
            .take(CA_FILE_MAX + 1)
            .read_to_end(&mut pem)
            .map_err(|e| bad(e.to_string()))?;
        if pem.len() as u64 > CA_FILE_MAX {
            return Err(bad(format!("it is larger than {CA_FILE_MAX} bytes")));
        }
        let found = Certificate::from_pem_bundle(&pem).map_err(|e| bad(e.to_string()))?;
        if found.is_empty() {
            return Err(bad("it holds no certificate in PEM form".to_owned()));
        }
        all.extend(found);
    }
    Ok(all)
}

/// The next piece of a body; `None` at its end.
pub(crate) async fn next_chunk(
    response: &mut Response,
    url: &Url,
    read: Duration,
) -> Result<Option<Bytes>, SourceError> {
    match timeout(read, response.chunk()).await {
        Ok(chunk) => chunk.map_err(|error| SourceError::transport(url, error)),
        Err(_) => Err(SourceError::Timeout {
            url: public_url(url),
            what: "data",
            after: read,
        }),
    }
}

/// A whole body of at most `limit` bytes. The caller bounds the total time.
pub(crate) async fn read_body(
    mut response: Response,
    url: &Url,
    limit: u64,
    read: Duration,
) -> Result<Vec<u8>, SourceError> {
    let too_large = || SourceError::TooLarge {
        what: format!("the answer of {}", public_url(url)),
        limit,
    };
    if response
        .content_length()
        .is_some_and(|length| length > limit)
    {
        return Err(too_large());
    }
    let mut body = Vec::new();
    while let Some(chunk) = next_chunk(&mut response, url, read).await? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The error for an answer that is none of those its caller knows.
pub(crate) async fn status_error(response: Response, url: &Url, read: Duration) -> SourceError {
    let status = response.status().as_u16();
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| parse_retry_after(value, std::time::SystemTime::now()));
    let body = timeout(read, read_body(response, url, ERROR_BODY_MAX, read)).await;
    let code = body
        .ok()
        .and_then(Result::ok)
        .and_then(|body| error_code(&body));
    SourceError::Status {
        url: public_url(url),
        status,
        code,
        retry_after,
    }
}

/// The first error code of a registry's answer, if it is a word as the specification wants it.
///
/// Source: OCI distribution specification, "Error Codes". Messages are left out: they are free
/// text that could repeat what was sent.
fn error_code(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        code: String,
    }
    let code = serde_json::from_slice::<Errors>(body)
        .ok()?
        .errors
        .into_iter()
        .next()?
        .code;
    let good = |b: u8| b.is_ascii_uppercase() || b == b'_';
    (code.len() <= 40 && code.bytes().all(good)).then_some(code)
}

/// Whether `host` (a name, or an address with its brackets) is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
