//! The node's lease at metad, its watch of the catalogue, and the page that tells how it stands.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use harbour_fs::Fs;
use harbour_image::object::PackId;
use harbour_metad_client::{Client, Error as ClientError, v1};
use serde_json::json;
use tokio::sync::Notify;

use super::{catalogue::Remote, views::Keeper};
use crate::{
    config::Places,
    link::{Link, Travel},
    stop::Stop,
};

/// Pause before metad is asked again after a failure.
const RETRY: Duration = Duration::from_millis(250);

/// Changes that come together are asked after together.
const GATHER: Duration = Duration::from_millis(50);

/// Keeps this node's lease, and asks at once when the watch tells that something changed. Places of
/// freed packs are dropped before they are acknowledged: metad gives their space to others only
/// afterwards (invariant 1).
///
/// When the lease runs out because metad cannot be reached, freed space may be written again under
/// this node's eyes. Places are kept all the same where digests are checked (`verify`): most are
/// still true, metad is not there to tell new ones, and what has been written over does not pass.
/// They are dropped when metad answers again, as it does to a node that it has to register anew.
pub async fn keep_lease(client: &Client, name: &str, shown: &Shown, verify: bool, stop: &Stop) {
    let (remote, fs) = (&shown.remote, &shown.fs);
    let mut lease: Option<v1::NodeLease> = None;
    let mut heard = std::time::Instant::now();
    loop {
        let answer = match &lease {
            None => {
                client
                    .register_node(v1::RegisterNodeRequest {
                        name: name.to_owned(),
                    })
                    .await
            }
            Some(held) => {
                let beat = v1::NodeHeartbeat {
                    node: held.node,
                    acknowledged_generation: held.freed_generation,
                    held: fs.held(),
                    used: Vec::new(),
                };
                client.node_heartbeat(beat).await
            }
        };
        let pause = match answer {
            Ok(fresh) => {
                let first = lease.is_none();
                remote.leased(&fresh);
                if fresh.forget_all || first {
                    fs.forget_locations();
                } else {
                    let freed: Vec<PackId> = fresh
                        .freed
                        .iter()
                        .filter_map(|p| p.as_slice().try_into().ok().map(PackId))
                        .collect();
                    fs.freed(&freed);
                }
                heard = std::time::Instant::now();
                let lease_time = Duration::from_millis(u64::from(fresh.lease_ms.max(150)));
                // What was just dropped is acknowledged at once: somebody may wait for the space.
                let pause = if fresh.freed.is_empty() {
                    lease_time / 3
                } else {
                    Duration::from_millis(1)
                };
                lease = Some(fresh);
                pause
            }
            Err(error) => {
                if !matches!(
                    error,
                    ClientError::Unavailable { .. } | ClientError::Deadline { .. }
                ) {
                    tracing::debug!(%error, "registering with metad again");
                    lease = None;
                } else if let Some(held) = &lease
                    && !verify
                    && heard.elapsed() > Duration::from_millis(u64::from(held.lease_ms))
                {
                    fs.forget_locations();
                }
                RETRY
            }
        };
        let changed = async {
            shown.changed.notified().await;
            tokio::time::sleep(GATHER).await;
        };
        tokio::select! {
            stopped = stop.within(pause) => if stopped { return },
            () = changed => {}
        }
    }
}

/// What is shown to the rest of this host.
pub struct Shown {
    /// The catalogue.
    pub remote: Arc<Remote>,
    /// The file system.
    pub fs: Arc<Fs>,
    /// Takes what the kernel must drop.
    pub invalidate: Box<dyn Fn(harbour_fs::Changes) + Send + Sync>,
    /// Keeps the fast views, where there are any.
    pub keeper: Option<Keeper>,
    /// In words, whether there are fast views.
    pub fast_view: String,
    /// The pool, as it is read from here.
    pub link: Arc<Link>,
    /// Places.
    pub places: Places,
    /// The watch told of a change: packs may have been freed.
    pub changed: Notify,
}

impl Shown {
    /// The generation of the catalogue that is shown, and the one that will be as soon as its fast
    /// views are mounted.
    pub fn generations(&self) -> (u64, u64) {
        use harbour_fs::source::Catalogue as _;
        let newest = self.remote.snapshot().generation;
        (
            self.keeper
                .as_ref()
                .map_or(newest, Keeper::applied)
                .min(newest),
            newest,
        )
    }

    /// Shows the newest catalogue: names first, then fast views.
    pub async fn refresh(&self) -> Result<(), ClientError> {
        self.remote.refresh().await?;
        let changes = self.fs.snapshot_changed();
        (self.invalidate)(changes);
        if let Some(keeper) = &self.keeper {
            use harbour_fs::source::Catalogue as _;
            let snapshot = self.remote.snapshot();
            let names = snapshot
                .images
                .iter()
                .filter_map(|image| self.fs.view_name(image.number));
            keeper.want(names.collect(), snapshot.generation);
        }
        Ok(())
    }

    /// Follows the catalogue until `stop`.
    pub async fn follow(&self, client: &Client, stop: &Stop) {
        loop {
            let outcome = tokio::select! {
                () = stop.wait() => return,
                outcome = self.follow_once(client) => outcome,
            };
            if let Err(error) = outcome {
                tracing::debug!(%error, "the watch of the catalogue broke off; beginning again");
            }
            if stop.within(RETRY).await {
                return;
            }
        }
    }

    async fn follow_once(&self, client: &Client) -> Result<(), ClientError> {
        let mut watch = client.watch().await?;
        loop {
            watch.next().await?;
            self.changed.notify_one();
            self.refresh().await?;
        }
    }
}

/// The page `node.json` in the run directory: that this node serves, and how.
pub struct Page {
    path: PathBuf,
    last: Mutex<String>,
}

impl Page {
    /// The page of these places.
    pub fn new(places: &Places) -> Self {
        Self {
            path: path(places),
            last: Mutex::default(),
        }
    }

    /// Writes it, when it differs from what stands there.
    pub fn write(
        &self,
        ready: bool,
        generation: u64,
        fast_view: &str,
        views: &[String],
        travels: &BTreeMap<u64, Travel>,
    ) -> std::io::Result<()> {
        let transports: BTreeMap<_, _> = (travels.iter())
            .map(|(donor, travel)| (donor, travel.transport))
            .collect();
        let remarks: BTreeMap<_, _> = (travels.iter())
            .filter_map(|(donor, travel)| Some((donor, travel.remark.as_ref()?)))
            .collect();
        let page = json!({
            "ready": ready, "generation": generation, "fast_view": fast_view, "views": views,
            "transports": transports, "transport_remarks": remarks,
        });
        let text = page.to_string();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != text {
            let fresh = self.path.with_extension("json.new");
            std::fs::write(&fresh, &text)?;
            std::fs::rename(&fresh, &self.path)?;
            *last = text;
        }
        Ok(())
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where the page is.
pub fn path(places: &Places) -> PathBuf {
    places.run.join("node.json")
}
