//! Lists of layers and images for engines, made when they are first looked at.

use std::{collections::HashMap, num::NonZeroUsize, sync::Arc};

use harbour_image::{digest::Digest, tree::Time};
use lru::LruCache;
use parking_lot::Mutex;

use super::Fs;
use crate::{
    control::{Control, DocumentFacts, Page},
    error::{Error, Result},
    source::SourceError,
};

/// Lists that are kept: of each kind the present one, and some that somebody may be reading yet.
const LISTS: NonZeroUsize = NonZeroUsize::new(6).unwrap();

/// A list, and the time that its file shows.
type List = (Arc<[u8]>, Time);

/// What of the stores is made only when somebody looks.
pub(super) struct Lists {
    /// Lists by the number of their node.
    made: Mutex<LruCache<u64, List>>,
    /// What is known of documents: of those in the catalogue, once somebody asked.
    facts: Mutex<HashMap<Digest, DocumentFacts>>,
    /// Taken while a list is made.
    making: Mutex<()>,
}

impl Default for Lists {
    fn default() -> Self {
        Self {
            made: Mutex::new(LruCache::new(LISTS)),
            facts: Mutex::default(),
            making: Mutex::default(),
        }
    }
}

impl Fs {
    /// The list whose node has this number, if it was made: also when the catalogue has gone on.
    pub(super) fn list_as_seen(&self, number: u64) -> Option<List> {
        self.lists.made.lock().get(&number).cloned()
    }

    /// The list whose node in `control` has this number and time.
    pub(super) fn list(
        &self,
        control: &Control,
        number: u64,
        page: Page,
        mtime: Time,
    ) -> Result<List> {
        if let Some(seen) = self.list_as_seen(number) {
            return Ok(seen);
        }
        if crate::budget::Budget::current().quick {
            // Metad is asked for documents, and many records are written.
            return Err(Error::Later);
        }
        let _turn = self.lists.making.lock();
        if let Some(seen) = self.list_as_seen(number) {
            return Ok(seen);
        }
        let made = match page {
            Page::Layers => control.store.layers_page(),
            Page::Images => {
                self.learn_documents(control)?;
                control.store.images_page(&self.lists.facts.lock())
            }
        };
        // Records of strings and numbers: nothing in them cannot be written.
        let list: Arc<[u8]> = made.unwrap_or_default().into();
        let entry = (Arc::clone(&list), mtime);
        self.lists.made.lock().put(number, entry);
        Ok((list, mtime))
    }

    /// Looks at all documents that were not looked at yet. One that is not there or not right takes
    /// its image out of the list, and no other.
    fn learn_documents(&self, control: &Control) -> Result<()> {
        let mut before = std::mem::take(&mut *self.lists.facts.lock());
        let mut unknown = Vec::new();
        let mut facts = HashMap::new();
        for (digest, config) in control.store.documents() {
            match before.remove(&digest) {
                Some(known) => drop(facts.insert(digest, known)),
                None => unknown.push((digest, config)),
            }
        }
        let mut outcome = Ok(());
        for (digest, config) in unknown {
            if facts.contains_key(&digest) {
                continue;
            }
            match self.fetch_document(&digest) {
                Ok(document) => drop(facts.insert(digest, DocumentFacts::of(&document, config))),
                Err(
                    Error::WrongDocument(_)
                    | Error::Document {
                        source: SourceError::Gone(_),
                        ..
                    },
                ) => {
                    tracing::warn!(%digest, "an image without this document is not shown to engines");
                }
                // What was learned is kept: who asks again gets further.
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        *self.lists.facts.lock() = facts;
        outcome
    }
}
