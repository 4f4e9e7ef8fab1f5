//! Has metad keep what snapshots stand on: a layer that containerd has snapshots of stays in the catalogue
//! when its image is removed, for as long as this host says so.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use harbour_metad_client::{Client, Error as ClientError, v1};
use tokio::sync::Notify;

use super::{known::Catalogue, store::Store};
use crate::stop::Stop;

/// Pause before metad is asked again after a failure.
const RETRY: Duration = Duration::from_millis(250);

/// Most layers that can be named.
const USED_MAX: usize = 65_536;

/// Tells metad until `stop` which layers are used, whenever that changes and as often as its lease wants. A host
/// that uses none says nothing.
pub async fn keep(
    client: &Client,
    name: &str,
    catalogue: &Catalogue,
    store: &Store,
    changed: &Arc<Notify>,
    stop: &Stop,
) {
    let mut lease: Option<v1::NodeLease> = None;
    let mut news = catalogue.changes();
    let mut told = BTreeSet::new();
    loop {
        let used = used(catalogue, store);
        let pause = if used.is_empty() && told.is_empty() {
            lease = None;
            None
        } else {
            match tell(client, name, &mut lease, &used).await {
                Ok(pause) => {
                    told = used;
                    Some(pause)
                }
                Err(error) => {
                    tracing::debug!(%error, "metad was not told which layers are used");
                    if !matches!(
                        error,
                        ClientError::Unavailable { .. } | ClientError::Deadline { .. }
                    ) {
                        lease = None;
                    }
                    Some(RETRY)
                }
            }
        };
        let pause = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.wait() => return,
            () = changed.notified() => {}
            _ = news.changed() => {}
            () = pause => {}
        }
    }
}

fn used(catalogue: &Catalogue, store: &Store) -> BTreeSet<u32> {
    let known = catalogue.now();
    let records = store.list(|record| record.layer.is_some());
    let layers = records.iter().filter_map(|record| record.layer);
    let numbers = layers.filter_map(|layer| known.number(&layer));
    numbers.take(USED_MAX).collect()
}

/// How long to wait until it is to be said again.
async fn tell(
    client: &Client,
    name: &str,
    lease: &mut Option<v1::NodeLease>,
    used: &BTreeSet<u32>,
) -> Result<Duration, ClientError> {
    let held = match lease.take() {
        Some(held) => held,
        None => {
            let name = name.to_owned();
            client
                .register_node(v1::RegisterNodeRequest { name })
                .await?
        }
    };
    // Whoever reads nothing has nothing to drop.
    let beat = v1::NodeHeartbeat {
        node: held.node,
        acknowledged_generation: held.freed_generation,
        held: Vec::new(),
        used: used.iter().copied().collect(),
    };
    *lease = Some(held);
    let fresh = client.node_heartbeat(beat).await?;
    let pause = match fresh.freed.is_empty() && !fresh.forget_all {
        true => Duration::from_millis(u64::from(fresh.lease_ms.max(150))) / 3,
        // What was freed meanwhile is acknowledged at once: somebody may wait for the space.
        false => Duration::from_millis(1),
    };
    *lease = Some(fresh);
    Ok(pause)
}
