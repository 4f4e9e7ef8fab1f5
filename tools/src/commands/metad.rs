//! `harbour metad`

use std::{process::ExitCode, sync::Arc};

use harbour_metad::server;
use harbour_metad_client::tls::{Identity, is_loopback};

use super::{Context, daemon};
use crate::{cli::MetadArgs, notify, stop::Stop};

/// Shorter, and a pull on a busy host would be taken for dead; longer, and what it had is missed.
const LEASE_S: std::ops::RangeInclusive<u32> = 2..=600;

pub(super) fn run(context: &Context, args: MetadArgs) -> anyhow::Result<ExitCode> {
    daemon::follow_parent(args.supervised)?;
    context.places.create()?;
    let _pid = daemon::PidFile::take(context, "metad")?;
    let keys = args.keys.over(context.file.metad.clone());
    let places = &context.places;
    let beyond = |listen: std::net::SocketAddr| !is_loopback(&listen.ip().to_string());
    // Whoever names certificates wants them used; beyond loopback nothing else will do.
    let identity = match keys.listen {
        Some(listen) if places.tls_named || (beyond(listen) && !places.insecure_metad) => {
            Some(Arc::new(Identity::load(&places.tls)?))
        }
        _ => None,
    };
    if let Some(listen) = keys
        .listen
        .filter(|listen| identity.is_none() && beyond(*listen))
    {
        tracing::warn!(%listen, "gRPC is in plain text, as --insecure-metad says: anybody on the network can read and change it");
    }
    let mut config = server::Config {
        listen: keys.listen,
        identity,
        plain: places.insecure_metad,
        metrics: keys.metrics,
        ..server::Config::new(
            context.places.state.join("metad"),
            context.places.metad_socket(),
        )
    };
    let options = &mut config.options;
    options.replicas = keys.replicas.unwrap_or(options.replicas);
    options.hot_replicas = keys.hot_replicas.unwrap_or(options.hot_replicas);
    options.rebalance_mib_s = keys.rebalance_mib_s.unwrap_or(options.rebalance_mib_s);
    if let Some(seconds) = keys.lease_s {
        anyhow::ensure!(
            LEASE_S.contains(&seconds),
            "lease_s = {seconds}: give {} to {} seconds",
            LEASE_S.start(),
            LEASE_S.end()
        );
        let lease_ms = u64::from(seconds) * 1_000;
        let timing = &mut config.options.timing;
        (timing.pull_lease_ms, timing.copy_lease_ms) = (lease_ms, lease_ms);
    }
    config.options.failpoints = crate::failpoint::of_metad()?;
    context.runtime()?.block_on(async {
        let stop = Stop::on_signals()?;
        let server = server::Server::bind(config).await?;
        notify::ready();
        server.serve(stop.wait()).await?;
        Ok(ExitCode::SUCCESS)
    })
}
