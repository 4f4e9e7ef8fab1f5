//! `harbour node`: the mount of one host.

use std::{
    process::ExitCode,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use harbour_fs::{
    Config, Fs,
    session::{self, MountConfig, Unmount},
};
use harbour_metad_client::{Client, v1};
use harbour_pool::transport::Access;
use tokio::{runtime::Handle, sync::Notify};

use super::{Context, daemon, snapshotter};
use crate::{
    cli::NodeArgs,
    config,
    ingest::options,
    link::Link,
    node::{
        catalogue::{Reads, Remote, Report, send_reports},
        refill::Refiller,
        session::{Page, Shown, keep_lease},
        spool::Spool,
        views::{FastViews, Keeper},
    },
    notify,
    stop::Stop,
};

/// How often the page is brought up to date.
const PAGE_EVERY: Duration = Duration::from_millis(20);

/// The same while something is about to change.
const PAGE_SOON: Duration = Duration::from_millis(5);

pub(super) fn run(context: &Context, args: NodeArgs) -> anyhow::Result<ExitCode> {
    daemon::follow_parent(args.supervised)?;
    context.places.create()?;
    let _pid = daemon::PidFile::take(context, "node")?;
    let keys = args.keys.over(context.file.node.clone());
    let runtime = context.runtime()?;
    let handle = runtime.handle().clone();
    let stop = runtime.block_on(async { Stop::on_signals() })?;
    let Some(client) = runtime.block_on(context.patient_client(&stop))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let ways = context.ways(keys.transport, keys.rdma_device.as_ref())?;
    let link = Arc::new(Link::new(Access::Read, &ways));
    let spool = Spool::new(&context.places.state)
        .with_context(|| format!("cannot make a file in {}", context.places.state.display()))?;
    let outside = Outside {
        client: client.clone(),
        link: Arc::clone(&link),
        spool: Arc::new(spool),
        handle: handle.clone(),
    };
    let (remote, reports) = outside.catalogue();
    runtime.block_on(first_snapshot(&remote, &stop))?;
    let fs = file_system(context, &keys, outside, &remote)?;
    let mounted = mount(context, &keys, &fs)?;
    {
        let (client, handle) = (client.clone(), handle.clone());
        std::thread::Builder::new()
            .name("reports".into())
            .spawn(move || send_reports(&client, &handle, &reports))?;
    }
    let (views, fast_view) = fast_views(context, &keys, &fs);
    let keeper = views
        .as_ref()
        .map(|views| Keeper::start(Arc::clone(views)))
        .transpose()?;
    let mounted = Arc::new(mounted);
    let invalidate = {
        let (mounted, views) = (Arc::clone(&mounted), views.clone());
        Box::new(move |changes: harbour_fs::Changes| {
            mounted.invalidate(&changes);
            if let Some(views) = &views {
                views.invalidate(&changes);
            }
        })
    };
    let shown = Shown {
        remote,
        fs: Arc::clone(&fs),
        invalidate,
        keeper,
        fast_view,
        link,
        places: context.places.clone(),
        changed: Notify::new(),
    };
    let name = keys
        .node_name
        .clone()
        .unwrap_or_else(|| format!("{}:{}", config::host_name(), context.places.mount.display()));
    let verify = !keys.unsafe_no_verify.unwrap_or(false);
    tracing::info!(name, mount = %context.places.mount.display(), fast_view = shown.fast_view, "serving");
    notify::ready();
    runtime.block_on(async {
        tokio::join!(
            keep_lease(&client, &name, &shown, verify, &stop),
            shown.follow(&client, &stop),
            keep_page(context, &shown, views.as_deref(), &client, &stop),
            serve_containerd(context, &keys, client.clone(), &stop),
        )
    });
    tracing::info!("unmounting");
    if let Some(keeper) = shown.keeper {
        keeper.stop();
    }
    if mounted.unmount(Unmount::Plain).is_err() {
        // Somebody has files open: the mount goes out of sight, and ends with its last user.
        mounted.unmount(Unmount::Lazy)?;
    }
    runtime.shutdown_timeout(Duration::from_millis(500));
    Ok(ExitCode::SUCCESS)
}

/// The catalogue must be known once before anything is shown.
async fn first_snapshot(remote: &Remote, stop: &Stop) -> anyhow::Result<()> {
    while let Err(error) = remote.refresh().await {
        tracing::info!(%error, "waiting for metad's catalogue");
        anyhow::ensure!(
            !stop.within(Duration::from_millis(250)).await,
            "stopped while waiting for metad"
        );
    }
    Ok(())
}

/// What the file system is joined to.
struct Outside {
    client: Client,
    link: Arc<Link>,
    spool: Arc<Spool>,
    handle: Handle,
}

impl Outside {
    fn catalogue(&self) -> (Arc<Remote>, Receiver<Report>) {
        let (link, spool) = (Arc::clone(&self.link), Arc::clone(&self.spool));
        Remote::new(self.client.clone(), link, spool, self.handle.clone())
    }
}

fn file_system(
    context: &Context,
    keys: &config::NodeKeys,
    outside: Outside,
    remote: &Arc<Remote>,
) -> anyhow::Result<Arc<Fs>> {
    let verify = !keys.unsafe_no_verify.unwrap_or(false);
    if !verify {
        tracing::warn!("digests are NOT checked: for benchmarks only");
    }
    let config = Config {
        deadline: keys.read_deadline(),
        verify,
        seed: seed(),
        mountpoint: std::path::absolute(&context.places.mount)?,
        ..Config::default()
    };
    let pull_options = Arc::new(options::options(
        &config::PullKeys::default(),
        &context.file,
        false,
    )?);
    let ways = context.ways(keys.transport, keys.rdma_device.as_ref())?;
    let writing = Arc::new(Link::new(Access::ReadWrite, &ways));
    let refiller = Arc::new(Refiller::new(
        outside.client,
        writing,
        Arc::clone(&outside.spool),
        outside.handle,
        pull_options,
    ));
    Ok(Fs::new(
        config,
        Arc::clone(remote) as _,
        Arc::new(Reads(outside.link, outside.spool)),
        refiller,
    ))
}

/// Something that differs between hosts and between runs.
fn seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id())
}

fn mount(
    context: &Context,
    keys: &config::NodeKeys,
    fs: &Arc<Fs>,
) -> anyhow::Result<session::Mounted> {
    crate::node::views::detach_all(&context.places);
    let path = &context.places.mount;
    std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    let config = MountConfig {
        threads: keys.threads(),
        ..MountConfig::new(path)
    };
    session::mount(Arc::clone(fs), &config)
        .with_context(|| format!("cannot mount {}", path.display()))
}

/// The fast views of this host, and in words whether there are any.
fn fast_views(
    context: &Context,
    keys: &config::NodeKeys,
    fs: &Arc<Fs>,
) -> (Option<Arc<FastViews>>, String) {
    if keys.fast_view == Some(config::FastView::Off) {
        return (None, "off, by configuration".to_owned());
    }
    match FastViews::new(&context.places, fs, keys.threads()) {
        Ok(views) => {
            let text = format!("on, below {}", context.places.views().display());
            (Some(Arc::new(views)), text)
        }
        Err(error) => (None, format!("off: {error}")),
    }
}

/// The snapshotter of this host. Without it the mount serves all the same.
async fn serve_containerd(context: &Context, keys: &config::NodeKeys, client: Client, stop: &Stop) {
    if keys.snapshotter == Some(false) {
        return;
    }
    if let Err(error) = snapshotter::serve(context, &context.file.snapshotter, client, stop).await {
        tracing::error!(error = format!("{error:#}"), "containerd is not served");
    }
}

/// Keeps the page in step: ready when the mount serves and a donor is there.
async fn keep_page(
    context: &Context,
    shown: &Shown,
    views: Option<&FastViews>,
    client: &Client,
    stop: &Stop,
) {
    let page = Page::new(&context.places);
    let mut ready = false;
    let mut asked = Instant::now() - Duration::from_secs(1);
    loop {
        if !ready && asked.elapsed() > Duration::from_millis(20) {
            asked = Instant::now();
            let donors = client.list_donors(v1::ListDonorsRequest {}).await;
            ready = donors.is_ok_and(|reply| reply.donors.iter().any(|donor| donor.live));
        }
        let (generation, newest) = shown.generations();
        let names = views.map(FastViews::mounted).unwrap_or_default();
        if let Err(error) = page.write(
            ready,
            generation,
            &shown.fast_view,
            &names,
            &shown.link.travels(),
        ) {
            tracing::debug!(%error, "the page cannot be written");
        }
        let pause = if ready && generation == newest {
            PAGE_EVERY
        } else {
            PAGE_SOON
        };
        if stop.within(pause).await {
            return;
        }
    }
}
