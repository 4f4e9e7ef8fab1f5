//! `harbour docker attach --watch`

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use harbour_metad_client::{Client, Snapshot};

use super::{around_restart, remove_by, split};
use crate::{
    cli::docker::Attach,
    commands::Context,
    docker::{
        apply::{self, Report},
        daemon,
        record::{Record, State},
        root::DataRoot,
        watch,
    },
    stop::Stop,
};

/// Changes that come together are looked at together.
const GATHER: Duration = Duration::from_millis(300);

/// How often the data-root is looked at when the catalogue does not change: somebody may have stopped the
/// daemon, or the mount may be behind.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Shortest time between two starts of the daemon.
const RESTART_EVERY: Duration = Duration::from_secs(30);

pub(super) fn run(context: &Context, args: &Attach) -> anyhow::Result<ExitCode> {
    let root = args.at.root()?;
    let runtime = context.runtime()?;
    let stop = runtime.block_on(async { Stop::on_signals() })?;
    let Some(client) = runtime.block_on(context.patient_client(&stop))? else {
        return Ok(ExitCode::SUCCESS);
    };
    tracing::info!(data_root = %root.path().display(), "following the catalogue");
    let mut follower = Follower {
        context,
        args,
        root,
        snapshot: None,
        behind: true,
        restarted: None,
    };
    loop {
        let known = follower.snapshot.as_ref().map(|known| known.generation);
        let change = runtime.block_on(next(&client, known, &stop));
        if stop.flag().load(std::sync::atomic::Ordering::SeqCst) {
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(snapshot) = change {
            follower.behind = true;
            follower.snapshot = Some(snapshot);
        }
        if let Err(error) = follower.step() {
            tracing::warn!(
                error = format!("{error:#}"),
                "Docker is not in step; trying again"
            );
        }
    }
}

/// The catalogue, once it is of another generation than `known`. `None` after a while without that, or
/// when metad is away.
async fn next(client: &Client, known: Option<u64>, stop: &Stop) -> Option<Snapshot> {
    let changed = async {
        let mut watch = client.watch().await?;
        // The first answer comes at once and tells of what was before.
        while known == Some(watch.next().await?) {}
        tokio::time::sleep(GATHER).await;
        client.snapshot().await
    };
    tokio::select! {
        () = stop.wait() => None,
        () = tokio::time::sleep(LOOK_EVERY) => None,
        changed = changed => match changed {
            Ok(snapshot) => Some(snapshot),
            Err(error) => {
                tracing::debug!(%error, "metad is away");
                stop.within(LOOK_EVERY).await;
                None
            }
        },
    }
}

struct Follower<'a> {
    context: &'a Context,
    args: &'a Attach,
    root: DataRoot,
    /// The catalogue as it was seen last.
    snapshot: Option<Snapshot>,
    /// Not everything in it has been looked at to the end.
    behind: bool,
    restarted: Option<Instant>,
}

impl Follower<'_> {
    fn step(&mut self) -> anyhow::Result<()> {
        if let Some(snapshot) = self.snapshot.as_ref().filter(|_| self.behind) {
            self.behind = self.look(snapshot)?;
        }
        self.settle()
    }

    /// Notes what differs from the catalogue. Gives whether something is left for later.
    fn look(&self, snapshot: &Snapshot) -> anyhow::Result<bool> {
        let (root, places) = (&self.root, &self.context.places);
        let look = watch::look(root, places, snapshot, &self.args.images)?;
        if self.args.tar_split && !look.wanted.is_empty() {
            split::keep(self.context, root, &look.wanted)?;
        }
        if !look.wanted.is_empty() {
            let _lock = root.lock()?;
            watch::note(root, &look)?;
            for record in &look.wanted {
                tracing::info!(image = record.name(), "wanted");
            }
        }
        let mut later = look.later > 0;
        for record in look.gone {
            later |= !self.part_with(record)?;
        }
        Ok(later)
    }

    /// Takes away an image that the catalogue has not any more; false while it is in use.
    fn part_with(&self, mut record: Record) -> anyhow::Result<bool> {
        if let Some((api, _)) = self.args.at.api(&self.root)? {
            return Ok(match remove_by(&self.root, &api, &record) {
                Ok(()) => {
                    tracing::info!(image = record.name(), "detached");
                    true
                }
                Err(error) => {
                    tracing::debug!(image = record.name(), %error, "it is in use");
                    false
                }
            });
        }
        let _lock = self.root.lock()?;
        record.state = State::Leaving;
        apply::want(&self.root, &record)?;
        Ok(true)
    }

    /// Does what is to be done where no daemon runs, or where it may be started again.
    fn settle(&mut self) -> anyhow::Result<()> {
        let open = |record: &Record| matches!(record.state, State::Pending | State::Leaving);
        if !Record::all(&self.root)?.iter().any(open) {
            return Ok(());
        }
        let report = if daemon::is_running(&self.root)? {
            let Some(commands) = self.args.restart.commands() else {
                return Ok(());
            };
            if self
                .restarted
                .is_some_and(|at| at.elapsed() < RESTART_EVERY)
            {
                return Ok(());
            }
            self.restarted = Some(Instant::now());
            around_restart(&self.root, &self.args.at, &commands)?
        } else {
            let _lock = self.root.lock()?;
            apply::apply(&self.root)?
        };
        tell(&report);
        Ok(())
    }
}

fn tell(report: &Report) {
    for image in &report.attached {
        tracing::info!(image, "attached");
    }
    for image in &report.detached {
        tracing::info!(image, "detached");
    }
    for why in &report.kept {
        tracing::info!(why, "kept");
    }
}
