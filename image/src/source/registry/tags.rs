//! The list of a repository's tags.
//!
//! Source: OCI distribution specification 1.1, "Listing Tags": pages, of which the next begins behind the
//! last tag of the one before, as long as a `Link` says that there is one.

use serde::Deserialize;

use super::{Document, Registry};
use crate::{reference::Reference, source::error::SourceError};

/// Tags asked for at a time; a registry may give fewer.
const PAGE: usize = 1000;
/// Bytes of one page: as many of the longest tags, with room.
const PAGE_MAX: u64 = 1 << 20;
/// Tags of one repository that are listed at most.
const TAGS_MAX: usize = 100_000;

#[derive(Deserialize)]
struct Page {
    /// Null where a repository has none.
    tags: Option<Vec<String>>,
}

impl Registry {
    /// All tags of the repository in the order of their bytes, as references like `like`.
    pub(crate) async fn tags(&self, like: &Reference) -> Result<Vec<Reference>, SourceError> {
        let wrong = |reason: String| SourceError::Protocol {
            url: self.describe(),
            reason,
        };
        let mut found: Vec<Reference> = Vec::new();
        loop {
            let behind = found.last().and_then(Reference::tag);
            let name = match behind {
                Some(last) => format!("list?n={PAGE}&last={last}"),
                None => format!("list?n={PAGE}"),
            };
            let page = self.fetch(Document::Tags, &name, None, PAGE_MAX).await?;
            let more = page.more;
            let page: Page = serde_json::from_slice(&page.bytes)
                .map_err(|error| wrong(format!("its list of tags is not one: {error}")))?;
            let tags = page.tags.unwrap_or_default();
            // A registry that gives the same page for ever must not be asked for ever.
            let again = behind.is_some_and(|last| tags.iter().any(|tag| tag == last));
            if again || (more && tags.is_empty()) {
                return Err(wrong("its list of tags does not end".to_owned()));
            }
            for tag in tags {
                let reference = like.with_tag(&tag).map_err(|error| {
                    let tag: String = tag.chars().take(100).collect();
                    wrong(format!("its list of tags has {tag:?}: {error}"))
                })?;
                found.push(reference);
            }
            if found.len() > TAGS_MAX {
                return Err(wrong(format!("it has more than {TAGS_MAX} tags")));
            }
            if !more {
                found.sort();
                found.dedup();
                return Ok(found);
            }
        }
    }
}
