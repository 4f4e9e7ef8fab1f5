//! `harbour up` and `down`: metad, a donor and the mount on one host.
//!
//! Three processes and a supervisor, not threads of one: a node that is killed must not take the
//! lent memory with it, nor metad the mount. The supervisor starts what ends, with a growing pause.

use std::{
    ffi::OsString,
    fs,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Child;

use super::{Context, daemon};
use crate::{
    bounded, cli, config,
    failure::{self, Code},
    notify, output,
    stop::Stop,
};

/// Longest pause before a process that keeps ending is started again.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How long a process may take to end after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Time a process must run for its pause to be forgotten.
const SETTLED: Duration = Duration::from_secs(5);

pub(super) fn up(context: &Context, args: cli::Up) -> anyhow::Result<ExitCode> {
    context.places.create()?;
    if args.detach {
        return detach(context, &args);
    }
    let _pid = daemon::PidFile::take(context, "up")?;
    context.runtime()?.block_on(async {
        let stop = Stop::on_signals()?;
        supervise(context, &args, &stop).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Starts the foreground form in a session of its own and waits until the mount serves.
fn detach(context: &Context, args: &cli::Up) -> anyhow::Result<ExitCode> {
    if let Some(pid) = daemon::holder(context, "up")
        && ready(context)
    {
        let mount = context.places.mount.display();
        output::say(&format!("already up (process {pid}), images at {mount}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let log_path = context.places.state.join("harbour.log");
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("cannot write {}", log_path.display()))?;
    let mut flags = base_flags(context);
    flags.push("up".into());
    flags.extend(metad_flags(&args.metad));
    flags.extend(donor_flags(&args.donor));
    flags.extend(network_flags(args, "donor-"));
    flags.extend(node_flags(&args.node));
    let mut child = Command::new("setsid")
        .arg(own_binary()?)
        .args(flags)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the background process (setsid, of util-linux)")?;
    let limit = Duration::from_secs(args.wait_s);
    let outcome = bounded::poll(limit, || {
        if ready(context) {
            return Some(true);
        }
        matches!(child.try_wait(), Ok(Some(_))).then_some(false)
    });
    if outcome == Some(true) {
        output::say(&format!(
            "up: images at {}\n",
            context.places.mount.display()
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let why = if outcome.is_none() {
        "the mount does not serve yet"
    } else {
        "it ended at once"
    };
    Err(failure::failure(
        Code::Unavailable,
        format!("{why}: {}", last_lines(&log_path)),
        format!(
            "the whole log: {}; what could be wrong: harbour doctor",
            log_path.display()
        ),
    ))
}

/// Whether the mount serves and a donor has registered.
fn ready(context: &Context) -> bool {
    super::status::node_status(context)["ready"].as_bool() == Some(true)
}

fn last_lines(path: &std::path::Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

struct Part {
    name: &'static str,
    flags: Vec<OsString>,
    child: Option<Child>,
    started: Instant,
    next: Instant,
    pause: Duration,
}

async fn supervise(context: &Context, args: &cli::Up, stop: &Stop) -> anyhow::Result<()> {
    let now = Instant::now();
    let part = |name: &'static str, flags: Vec<OsString>| Part {
        name,
        flags,
        child: None,
        started: now,
        next: now,
        pause: Duration::from_millis(50),
    };
    let mut parts = [
        part("metad", metad_flags(&args.metad)),
        part(
            "donor",
            [donor_flags(&args.donor), network_flags(args, "")].concat(),
        ),
        part("node", node_flags(&args.node)),
    ];
    let mut told = false;
    loop {
        for part in &mut parts {
            tend(context, part)?;
        }
        if !told && ready(context) {
            told = true;
            notify::ready();
        }
        if stop.within(Duration::from_millis(50)).await {
            break;
        }
    }
    tracing::info!("stopping");
    // The node first: the mount must not outlive what it reads from.
    for part in parts.iter_mut().rev() {
        end(part).await;
    }
    Ok(())
}

/// Starts a part that is not there and notices one that has ended.
fn tend(context: &Context, part: &mut Part) -> anyhow::Result<()> {
    if let Some(child) = &mut part.child {
        let Some(status) = child.try_wait()? else {
            return Ok(());
        };
        part.child = None;
        if part.started.elapsed() > SETTLED {
            part.pause = Duration::from_millis(50);
        }
        part.next = Instant::now() + part.pause;
        tracing::error!(part = part.name, %status, again_in_ms = part.pause.as_millis() as u64, "ended");
        part.pause = (part.pause * 2).min(PAUSE_MAX);
    }
    if part.child.is_none() && Instant::now() >= part.next {
        let mut command = tokio::process::Command::new(own_binary()?);
        command
            .args(base_flags(context))
            .arg(part.name)
            .args(&part.flags)
            .arg("--supervised")
            // Only the supervisor knows when all of them are ready.
            .env_remove(notify::VARIABLE);
        command.stdin(Stdio::null()).kill_on_drop(true);
        part.child = Some(
            command
                .spawn()
                .with_context(|| format!("cannot start {}", part.name))?,
        );
        part.started = Instant::now();
    }
    Ok(())
}

async fn end(part: &mut Part) {
    let Some(mut child) = part.child.take() else {
        return;
    };
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(END_LIMIT, child.wait()).await.is_err() {
        tracing::warn!(part = part.name, "did not end when asked; killing it");
        let _ = child.kill().await;
    }
}

pub(super) fn down(context: &Context, args: &cli::Down) -> anyhow::Result<ExitCode> {
    let limit = Duration::from_secs(args.wait_s);
    let parts = ["up", "node", "donor", "metad"];
    let mut found = false;
    for what in parts {
        let Some(pid) = daemon::holder(context, what) else {
            continue;
        };
        found = true;
        let signal = if args.force && what != "up" {
            Signal::SIGKILL
        } else {
            Signal::SIGTERM
        };
        let _ = kill(pid, signal);
        let wait = if args.force {
            Duration::from_secs(2).min(limit)
        } else {
            limit
        };
        if bounded::poll(wait, || {
            daemon::holder(context, what).is_none().then_some(())
        })
        .is_none()
        {
            if !args.force {
                return Err(failure::failure(
                    Code::Failed,
                    format!(
                        "{what} (process {pid}) did not end within {} s",
                        args.wait_s
                    ),
                    "files under the mount may be open; detach them with: harbour down --force",
                ));
            }
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    let left = crate::node::views::detach_all(&context.places);
    output::say(match (found, left) {
        (true, _) => "down\n",
        (false, 0) => "nothing was running\n",
        (false, _) => "nothing was running; mounts that were left are detached\n",
    })?;
    Ok(ExitCode::SUCCESS)
}

fn own_binary() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find the path of this program")
}

fn base_flags(context: &Context) -> Vec<OsString> {
    let mut flags = context.places.flags();
    if let Some(config) = &context.config {
        let config = std::path::absolute(config).unwrap_or_else(|_| config.clone());
        flags.extend(["--config".into(), config.into()]);
    }
    flags.extend((0..context.verbose).map(|_| "-v".into()));
    flags
}

/// A flag and its value, when there is one.
fn flag<T: ToString>(name: &str, value: Option<T>) -> Vec<OsString> {
    value.map_or_else(Vec::new, |value| {
        vec![name.into(), value.to_string().into()]
    })
}

fn metad_flags(keys: &config::MetadKeys) -> Vec<OsString> {
    [
        flag("--listen", keys.listen),
        flag("--metrics", keys.metrics),
        flag("--replicas", keys.replicas),
        flag("--hot-replicas", keys.hot_replicas),
        flag("--rebalance-mib-s", keys.rebalance_mib_s),
        flag("--lease-s", keys.lease_s),
    ]
    .concat()
}

/// A donor under `up` drops what it holds when everything on this host ends with it.
fn donor_flags(keys: &config::DonorKeys) -> Vec<OsString> {
    let huge = keys.huge_pages.map(|when| match when {
        config::HugePages::Auto => "auto",
        config::HugePages::Never => "never",
        config::HugePages::Require => "require",
    });
    let on_stop = match keys.on_stop {
        Some(config::OnStop::Move) => "move",
        Some(config::OnStop::Drop) | None => "drop",
    };
    [
        flag("--lend", keys.lend),
        flag("--keep-free", keys.keep_free.map(|size| size.0)),
        flag("--lend-fixed", keys.lend_fixed),
        flag("--lock-memory", keys.lock_memory),
        flag("--on-stop", Some(on_stop)),
        flag("--drain-s", keys.drain_s),
        flag("--donor-name", keys.donor_name.as_deref()),
        flag("--failure-domain", keys.failure_domain.as_deref()),
        flag("--huge-pages", huge),
    ]
    .concat()
}

/// Where the donor listens: flags that `up` knows by a longer name, since metad listens too.
fn network_flags(args: &cli::Up, prefix: &str) -> Vec<OsString> {
    let listen = args.donor_listen.iter().map(ToString::to_string);
    let listen = listen.flat_map(|at| [format!("--{prefix}listen"), at]);
    let advertise = args.donor_advertise.iter().map(ToString::to_string);
    let advertise = advertise.flat_map(|at| [format!("--{prefix}advertise"), at]);
    listen.chain(advertise).map(OsString::from).collect()
}

fn node_flags(keys: &config::NodeKeys) -> Vec<OsString> {
    let view = keys.fast_view.map(|when| match when {
        config::FastView::Auto => "auto",
        config::FastView::Off => "off",
    });
    [
        flag("--node-name", keys.node_name.as_deref()),
        flag("--threads", keys.threads),
        flag("--read-deadline-s", keys.read_deadline_s),
        flag("--fast-view", view),
        flag("--unsafe-no-verify", keys.unsafe_no_verify),
    ]
    .concat()
}
