//! `harbour metad`

use std::process::ExitCode;

use harbour_metad::server;

use super::{Context, daemon};
use crate::{cli::MetadArgs, stop::Stop};

pub(super) fn run(context: &Context, args: MetadArgs) -> anyhow::Result<ExitCode> {
    daemon::follow_parent(args.supervised)?;
    context.places.create()?;
    let _pid = daemon::PidFile::take(context, "metad")?;
    let keys = args.keys.over(context.file.metad.clone());
    let mut config = server::Config {
        listen: keys.listen,
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
    config.options.failpoints = crate::failpoint::of_metad()?;
    context.runtime()?.block_on(async {
        let stop = Stop::on_signals()?;
        server::run(config, stop.wait()).await?;
        Ok(ExitCode::SUCCESS)
    })
}
