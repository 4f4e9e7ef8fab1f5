//! Images that containerd wants and the pool does not have.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use harbour_image::{digest::Digest, source::SourceSpec};
use harbour_metad_client::Client;
use tokio::sync::{Semaphore, watch};

use super::figures::Figures;
use crate::{
    ingest::pull::{PullOptions, pull},
    link::Link,
    output,
    progress::Silent,
};

/// Pulls at the same time; others wait.
const PULLS_MAX: usize = 4;

/// How long a failure is the answer to whoever asks again: containerd asks for each layer of an image.
const FAILED_FOR: Duration = Duration::from_secs(30);

/// Most images that are remembered.
const REMEMBERED_MAX: usize = 1024;

/// The generation of the catalogue that has the image, or why there is none.
type Outcome = Result<u64, String>;

/// Pulls each image once, however many ask for it.
pub struct Bringer {
    client: Client,
    link: Arc<Link>,
    options: Arc<PullOptions>,
    stopped: Arc<AtomicBool>,
    figures: Arc<Figures>,
    places: Semaphore,
    under_way: Mutex<HashMap<String, Bringing>>,
}

enum Bringing {
    Now(watch::Receiver<Option<Outcome>>),
    Failed(Instant, String),
}

impl Bringer {
    /// One that pulls with these options.
    pub fn new(
        client: Client,
        link: Arc<Link>,
        options: Arc<PullOptions>,
        stopped: Arc<AtomicBool>,
        figures: Arc<Figures>,
    ) -> Self {
        Self {
            client,
            link,
            options,
            stopped,
            figures,
            places: Semaphore::new(PULLS_MAX),
            under_way: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Bringing>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls the image, or waits for who does, for `limit` at most: then the pull goes on by itself. With
    /// `manifest` it is that one, whatever the name points at meanwhile.
    ///
    /// # Errors
    /// In words, what went wrong, also a short time ago.
    pub async fn bring(
        self: &Arc<Self>,
        image: &str,
        manifest: Option<Digest>,
        limit: Duration,
    ) -> Outcome {
        let key = format!("{image} {manifest:?}");
        let mut waiting = match self.begin(&key, image, manifest) {
            Bringing::Now(waiting) => waiting,
            Bringing::Failed(_, why) => return Err(why),
        };
        let ended = waiting.wait_for(Option::is_some);
        match tokio::time::timeout(limit, ended).await {
            Ok(Ok(outcome)) => outcome
                .clone()
                .unwrap_or_else(|| Err("it ended".to_owned())),
            Ok(Err(_)) => Err("the pull was given up".to_owned()),
            Err(_) => Err(format!("it takes more than {} s", limit.as_secs())),
        }
    }

    fn begin(self: &Arc<Self>, key: &str, image: &str, manifest: Option<Digest>) -> Bringing {
        let mut under_way = self.lock();
        match under_way.get(key) {
            Some(Bringing::Now(waiting)) => return Bringing::Now(waiting.clone()),
            Some(Bringing::Failed(at, why)) if at.elapsed() < FAILED_FOR => {
                return Bringing::Failed(*at, why.clone());
            }
            _ => {}
        }
        under_way.retain(|_, bringing| match bringing {
            Bringing::Now(_) => true,
            Bringing::Failed(at, _) => at.elapsed() < FAILED_FOR,
        });
        if under_way.len() >= REMEMBERED_MAX {
            return Bringing::Failed(Instant::now(), "too many pulls are under way".to_owned());
        }
        let (done, waiting) = watch::channel(None);
        under_way.insert(key.to_owned(), Bringing::Now(waiting.clone()));
        drop(under_way);
        let (bringer, image, key) = (Arc::clone(self), image.to_owned(), key.to_owned());
        tokio::spawn(async move {
            let outcome = bringer.pull(&image, manifest).await;
            bringer.figures.pull(outcome.is_ok());
            let mut under_way = bringer.lock();
            match &outcome {
                Ok(_) => drop(under_way.remove(&key)),
                Err(why) => {
                    tracing::warn!(
                        image,
                        why,
                        "containerd's image cannot be pulled into the pool"
                    );
                    under_way.insert(key, Bringing::Failed(Instant::now(), why.clone()));
                }
            }
            drop(under_way);
            done.send_replace(Some(outcome));
        });
        Bringing::Now(waiting)
    }

    async fn pull(&self, image: &str, manifest: Option<Digest>) -> Outcome {
        let Ok(_place) = self.places.acquire().await else {
            return Err("stopping".to_owned());
        };
        let spec = SourceSpec::parse(&format!("docker://{image}")).map_err(|e| e.to_string())?;
        tracing::info!(image, "pulling what containerd wants into the pool");
        let report = self.pull_one(&spec).await?;
        let by_digest = match (manifest, &spec) {
            (Some(manifest), SourceSpec::Registry(reference)) if manifest != report.1 => {
                SourceSpec::Registry(reference.with_digest(manifest))
            }
            _ => return Ok(report.0),
        };
        tracing::info!(image, %by_digest, "the name points at another image by now");
        Ok(self.pull_one(&by_digest).await?.0)
    }

    /// The generation of the catalogue that has it, and the manifest.
    async fn pull_one(&self, spec: &SourceSpec) -> Result<(u64, Digest), String> {
        let report = pull(
            self.client.clone(),
            Arc::clone(&self.link),
            spec,
            &self.options,
            Arc::new(Silent),
            Arc::clone(&self.stopped),
        )
        .await
        .map_err(|error| output::printable(&format!("{:#}", anyhow::Error::new(error))))?;
        Ok((report.generation, report.manifest))
    }
}
