//! `harbour snapshotter`: containerd's proxy snapshotter.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, http::header, routing::get};
use harbour_metad::server;
use harbour_metad_client::Client;
use harbour_pool::transport::Access;
use tokio::{net::TcpListener, sync::Notify};

use super::{Context, daemon};
use crate::{
    cli::snapshotter::SnapshotterArgs,
    config::{self, SnapshotterKeys},
    ingest::options,
    link::Link,
    snapshotter::{
        bring::Bringer, figures::Figures, known::Catalogue, mounts::Places, serve,
        service::Service, store::Store, uses,
    },
    stop::Stop,
};

pub(super) fn run(context: &Context, args: SnapshotterArgs) -> anyhow::Result<ExitCode> {
    context.places.create()?;
    let keys = args.keys.over(context.file.snapshotter.clone());
    // Another one for another containerd has a socket, and a state, of its own.
    let _pid = match keys.socket {
        None => Some(daemon::PidFile::take(context, "snapshotter")?),
        Some(_) => None,
    };
    let runtime = context.runtime()?;
    runtime.block_on(async {
        let stop = Stop::on_signals()?;
        match context.patient_client(&stop).await? {
            Some(client) => serve(context, &keys, client, &stop).await,
            None => Ok(()),
        }
    })?;
    runtime.shutdown_timeout(Duration::from_millis(500));
    Ok(ExitCode::SUCCESS)
}

/// Serves until `stop`.
pub(super) async fn serve(
    context: &Context,
    keys: &SnapshotterKeys,
    client: Client,
    stop: &Stop,
) -> anyhow::Result<()> {
    let places = &context.places;
    let mounts = Places::new(places)?;
    mounts.sweep();
    let path = keys
        .socket
        .clone()
        .unwrap_or_else(|| places.snapshotter_socket());
    let socket = serve::Socket::bind(&path).await?;
    let store = Arc::new(Store::open(&places.state.join("snapshotter"))?);
    let figures: Arc<Figures> = Arc::default();
    let catalogue = Arc::new(Catalogue::new(client.clone()));
    let used = Arc::new(Notify::new());
    let bringer = match keys.pull_missing.unwrap_or(true) {
        true => Some(Arc::new(bringer(context, client.clone(), &figures, stop)?)),
        false => None,
    };
    let service = Service {
        store: Arc::clone(&store),
        catalogue: Arc::clone(&catalogue),
        bringer,
        pull_limit: Duration::from_secs(keys.pull_wait_s.unwrap_or(600).clamp(1, 86_400)),
        places: mounts,
        figures: Arc::clone(&figures),
        used: Arc::clone(&used),
    };
    let name = format!(
        "{}:{}:snapshotter",
        config::host_name(),
        places.mount.display()
    );
    let listener = match keys.metrics {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot serve metrics on {address}"))?,
        ),
        None => None,
    };
    tracing::info!(socket = %path.display(), snapshots = store.counts().0, "serving containerd");
    let page = path.with_extension("json");
    let (served, (), (), (), ()) = tokio::join!(
        socket.serve(service, stop),
        catalogue.follow(stop),
        uses::keep(&client, &name, &catalogue, &store, &used, stop),
        serve::keep_page(&page, &figures, &store, stop),
        metrics(listener, Arc::clone(&figures), Arc::clone(&store), stop),
    );
    served
}

fn bringer(
    context: &Context,
    client: Client,
    figures: &Arc<Figures>,
    stop: &Stop,
) -> anyhow::Result<Bringer> {
    let section = &context.file.pull;
    let ways = context.ways(section.transport, section.rdma_device.as_ref())?;
    let link = Arc::new(Link::new(Access::ReadWrite, &ways));
    let options = options::options(&config::PullKeys::default(), &context.file, false)?;
    let (options, figures) = (Arc::new(options), Arc::clone(figures));
    Ok(Bringer::new(client, link, options, stop.flag(), figures))
}

/// `/metrics` for Prometheus.
async fn metrics(
    listener: Option<TcpListener>,
    figures: Arc<Figures>,
    store: Arc<Store>,
    stop: &Stop,
) {
    let Some(listener) = listener else {
        return;
    };
    let address = listener.local_addr().ok();
    let text = move || {
        let (all, layers) = store.counts();
        let kind = "text/plain; version=0.0.4; charset=utf-8";
        std::future::ready(([(header::CONTENT_TYPE, kind)], figures.text(all, layers)))
    };
    let router = Router::new()
        .route("/metrics", get(text))
        .route("/healthz", get(|| async { "ok\n" }));
    let stop = stop.clone();
    let ended = async move { stop.wait().await };
    if let Err(error) = server::pages(listener, router, ended).await {
        tracing::error!(%error, ?address, "metrics are not served any more");
    }
}
