//! Blobs from registries: streamed, resumed where they broke off, from the next server if need be.

use std::time::Duration;

use reqwest::header;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Registry,
    endpoint::{Endpoint, Get, Reply},
    http::next_chunk,
    retry::Backoff,
};
use crate::source::{
    blob::BlobSink,
    error::{SourceError, public_url},
};

/// Why one try ended before the blob did.
enum Stop {
    /// Nobody reads any more.
    ReaderGone,
    Failed(SourceError),
}

impl From<SourceError> for Stop {
    fn from(error: SourceError) -> Self {
        Self::Failed(error)
    }
}

impl Registry {
    /// Feeds the blob that `sink` wants into it and ends it, whatever happens.
    pub(crate) async fn download(&self, mut sink: BlobSink) {
        let allowed = self.deadlines.for_blob(sink.size());
        let done = timeout_at(Instant::now() + allowed, self.download_from_any(&mut sink)).await;
        match done {
            Ok(Ok(endpoint)) => {
                // The bytes are gone, but the next try is better made elsewhere.
                sink.finish(endpoint.name(), || endpoint.distrust()).await;
            }
            Ok(Err(Stop::ReaderGone)) => {}
            Ok(Err(Stop::Failed(error))) => sink.fail(error).await,
            Err(_) => {
                let url = format!("{}/{}", self.name, self.repository);
                sink.fail(SourceError::Timeout {
                    url,
                    what: "complete blob",
                    after: allowed,
                })
                .await;
            }
        }
    }

    async fn download_from_any(&self, sink: &mut BlobSink) -> Result<&Endpoint, Stop> {
        let mut resumes = self.retry.resumes;
        let mut last = None;
        for endpoint in self.in_order() {
            match self.download_from(endpoint, sink, &mut resumes).await {
                Ok(()) => return Ok(endpoint),
                Err(Stop::ReaderGone) => return Err(Stop::ReaderGone),
                Err(Stop::Failed(error)) => {
                    self.note_failure(endpoint, &error);
                    last = Some(error);
                }
            }
        }
        Err(Stop::Failed(last.unwrap_or(SourceError::Stopped)))
    }

    /// The rest of the blob from one endpoint, with its retries.
    async fn download_from(
        &self,
        endpoint: &Endpoint,
        sink: &mut BlobSink,
        resumes: &mut u32,
    ) -> Result<(), Stop> {
        let mut backoff = Backoff::new(self.retry, self.attempts(endpoint));
        loop {
            let before = sink.taken();
            let error = match self.stream(endpoint, sink).await {
                Ok(()) => return Ok(()),
                Err(Stop::Failed(error)) if error.is_transient() && *resumes > 0 => error,
                Err(stop) => return Err(stop),
            };
            *resumes -= 1;
            if sink.taken() > before {
                backoff.progress();
            }
            let Some(wait) = backoff.failed(error.retry_after()) else {
                return Err(Stop::Failed(error));
            };
            tracing::debug!(
                blob = %sink.digest(), at = sink.taken(), ?wait, "{}: {error}; trying again", endpoint.name()
            );
            sleep(wait).await;
        }
    }

    /// One request, from where the sink stands to the end of the blob or of the connection.
    async fn stream(&self, endpoint: &Endpoint, sink: &mut BlobSink) -> Result<(), Stop> {
        let (size, from) = (sink.size(), sink.taken());
        if from == size {
            return Ok(());
        }
        let digest = sink.digest().to_string();
        let (path, what) = (format!("blobs/{digest}"), format!("blob {digest}"));
        let reply = endpoint
            .get(&Get {
                path: &path,
                what: &what,
                accept: "*/*",
                from,
            })
            .await?;
        let mut skip = first_byte_distance(&reply, from, size, &what)?;
        let Reply { mut response, url } = reply;
        while let Some(mut chunk) = next_chunk(&mut response, &url, self.deadlines.read).await? {
            if skip > 0 {
                let cut = chunk.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
                bytes::Buf::advance(&mut chunk, cut);
                skip -= cut as u64;
            }
            // An answer without a length may go on after the blob; what follows is nobody's.
            let left = usize::try_from(size - sink.taken()).unwrap_or(usize::MAX);
            chunk.truncate(left);
            sink.push(chunk).await.map_err(|_| Stop::ReaderGone)?;
            if sink.taken() == size {
                return Ok(());
            }
        }
        // The body ended well but early; asking again from here tells whether there is more.
        Err(Stop::Failed(SourceError::Timeout {
            url: public_url(&url),
            what: "complete blob",
            after: Duration::ZERO,
        }))
    }
}

/// How many bytes of the answer come before byte `from` of the blob: none, or all of them when
/// the server passed over the range.
fn first_byte_distance(
    reply: &Reply,
    from: u64,
    size: u64,
    what: &str,
) -> Result<u64, SourceError> {
    let response = &reply.response;
    let what = || format!("{what} from {}", public_url(&reply.url));
    if response.status().as_u16() != 206 {
        // Told at once, where only the digest would have told it at the end.
        if let Some(got) = response.content_length().filter(|got| *got != size) {
            return Err(SourceError::WrongSize {
                what: what(),
                want: size,
                got,
            });
        }
        return Ok(from);
    }
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let bad = |reason: String| SourceError::Protocol {
        url: public_url(&reply.url),
        reason,
    };
    let range = range.ok_or_else(|| bad("it sent a part without saying which".to_owned()))?;
    let parsed = parse_content_range(range);
    let (start, total) = parsed.ok_or_else(|| bad(format!("it sent the part {:?}", cut(range))))?;
    if let Some(got) = total.filter(|total| *total != size) {
        return Err(SourceError::WrongSize {
            what: what(),
            want: size,
            got,
        });
    }
    if start != from {
        return Err(bad(format!(
            "asked for bytes from {from} it sent them from {start}"
        )));
    }
    Ok(0)
}

/// First byte and total of `bytes 5-9/10` or `bytes 5-9/*`.
///
/// Source: RFC 9110, section 14.4.
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text
        .trim()
        .strip_prefix("bytes")?
        .trim_start()
        .split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let sane = start <= end && total.is_none_or(|total| end < total);
    sane.then_some((start, total))
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::parse_content_range;

    #[test]
    fn content_ranges() {
        for (text, want) in [
            ("bytes 5-9/10", Some((5, Some(10)))),
            ("bytes 0-0/1", Some((0, Some(1)))),
            ("bytes 5-9/*", Some((5, None))),
            ("bytes */10", None),
            ("bytes 9-5/10", None),
            ("bytes 5-10/10", None),
            ("lines 5-9/10", None),
            ("bytes 5-9", None),
            ("bytes -9/10", None),
            ("", None),
        ] {
            assert_eq!(parse_content_range(text), want, "{text}");
        }
    }
}
