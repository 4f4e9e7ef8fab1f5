//! `harbour docker attach`, `detach`, `list`, `apply`

mod follow;
mod split;

use std::process::ExitCode;

use harbour_image::source::SourceSpec;
use serde_json::json;

use super::Context;
use crate::{
    cli::docker::{Apply, Attach, Detach, Docker, DockerArgs, List, Restart, Where},
    container::image::Documents,
    docker::{
        apply::{self, Report},
        daemon::{self, Api},
        plan,
        record::{Record, State},
        root::DataRoot,
    },
    failure::{self, Code},
    output::{self, Table},
    size::Size,
};

pub(super) fn run(context: &Context, args: &DockerArgs) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        return Err(failure::failure(
            Code::Failed,
            "Docker's data-root is root's",
            "run it with sudo",
        ));
    }
    match &args.command {
        Docker::Attach(args) if args.watch => follow::run(context, args),
        Docker::Attach(args) => attach(context, args),
        Docker::Detach(args) => detach(args),
        Docker::List(args) => list(args),
        Docker::Apply(args) => apply_now(args),
    }
}

impl Where {
    /// The data-root, after a look at the daemon that has it, if one runs.
    fn root(&self) -> anyhow::Result<DataRoot> {
        let root = DataRoot::find(self.data_root.as_deref(), &self.daemon_json)?;
        if daemon::is_running(&root)?
            && let Some((_, info)) = self.api(&root)?
        {
            root.check_daemon(&info)?;
        }
        Ok(root)
    }

    fn api(&self, root: &DataRoot) -> anyhow::Result<Option<(Api, daemon::Info)>> {
        Api::of(root, self.docker_host.as_deref())
    }
}

fn attach(context: &Context, args: &Attach) -> anyhow::Result<ExitCode> {
    let root = args.at.root()?;
    let mut records = Vec::new();
    for image in &args.images {
        let documents = Documents::find(&context.places, image)?;
        records.push(plan::record(&root, &context.places, &documents)?);
    }
    if args.tar_split {
        split::keep(context, &root, &records)?;
    }
    let mut new = Vec::new();
    let lock = root.lock()?;
    for mut record in records {
        let before = Record::of(&root, &record.image())?;
        if let Some(before) = &before {
            record.replace(before);
        }
        let there = before.is_some_and(|b| b.state == State::Attached && b.id() == record.id());
        if there && record.former.is_empty() && apply::is_whole(&root, &record)? {
            output::say(&format!("{} is attached already\n", record.name()))?;
            continue;
        }
        apply::want(&root, &record)?;
        new.push(record);
    }
    drop(lock);
    if new.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    settle(&root, &args.at, &args.restart)
}

fn apply_now(args: &Apply) -> anyhow::Result<ExitCode> {
    settle(&args.at.root()?, &args.at, &args.restart)
}

/// Does what is to be done, or says how it can be: a running daemon has to be started again for it.
fn settle(root: &DataRoot, at: &Where, restart: &Restart) -> anyhow::Result<ExitCode> {
    let report = match (daemon::is_running(root)?, restart.commands()) {
        (false, _) => {
            let _lock = root.lock()?;
            apply::apply(root)?
        }
        (true, Some(commands)) => around_restart(root, at, &commands)?,
        (true, None) => {
            for record in Record::all(root)? {
                if matches!(record.state, State::Pending | State::Leaving) {
                    output::say(&format!("{} is {}\n", record.name(), record.state.name()))?;
                }
            }
            output::say(
                "Docker reads its data-root when it starts. To start it again, with containers running on \
                 where it has live-restore:\n  harbour docker apply --restart\n",
            )?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    say(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// Applies while the daemon is away for a moment, and asks it afterwards whether it has taken all in.
fn around_restart(
    root: &DataRoot,
    at: &Where,
    commands: &daemon::Commands,
) -> anyhow::Result<Report> {
    let host = at.docker_host.as_deref();
    let work = || {
        let _lock = root.lock()?;
        apply::apply(root)
    };
    let (report, api) = daemon::restart_around(root, host, commands, work)?;
    for record in Record::all(root)? {
        let new = report.attached.iter().any(|name| name == record.name());
        if new && api.image(record.name())?.as_deref() != Some(&record.id().to_string()) {
            return Err(failure::failure(
                Code::Failed,
                format!("Docker has started again without {}", record.name()),
                "see why with: journalctl -u docker",
            ));
        }
    }
    Ok(report)
}

fn say(report: &Report) -> anyhow::Result<()> {
    let mut text = String::new();
    for name in &report.attached {
        text.push_str(&format!("{name} is attached\n"));
    }
    for name in &report.detached {
        text.push_str(&format!("{name} is detached\n"));
    }
    for kept in &report.kept {
        text.push_str(&format!("{kept}\n"));
    }
    if text.is_empty() {
        text.push_str("nothing was to be done\n");
    }
    output::say(&output::printable(&text))?;
    Ok(())
}

fn detach(args: &Detach) -> anyhow::Result<ExitCode> {
    let root = args.at.root()?;
    let all = Record::all(&root)?;
    let records = match args.all {
        true => all,
        false => named(&all, &args.images)?,
    };
    let mut refused = None;
    if daemon::is_running(&root)? {
        let (api, _) = args
            .at
            .api(&root)?
            .ok_or_else(|| daemon::unreachable(&root))?;
        for record in &records {
            match remove_by(&root, &api, record) {
                Ok(()) => output::say(&format!("{} is detached\n", record.name()))?,
                Err(error) if refused.is_none() => refused = Some(error),
                Err(error) => eprintln!("harbour: {error:#}"),
            }
        }
    } else {
        let _lock = root.lock()?;
        for mut record in records {
            record.state = State::Leaving;
            apply::want(&root, &record)?;
        }
        let report = apply::apply(&root)?;
        say(&report)?;
        if let [first, ..] = &report.kept[..]
            && !args.all
            && report.detached.is_empty()
        {
            refused = Some(failure::failure(Code::Failed, first, "see: docker ps -a"));
        }
    }
    match refused {
        Some(error) => Err(error),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Has a running daemon remove an image by all names that we gave it, and forgets it. What nothing uses
/// any more the daemon takes away itself.
fn remove_by(root: &DataRoot, api: &Api, record: &Record) -> anyhow::Result<()> {
    let names = {
        let _lock = root.lock()?;
        apply::hand_over(root, record)?
    };
    for name in names {
        api.remove(&name)?;
    }
    let _lock = root.lock()?;
    apply::forget(root, record)
}

/// The records of these images, by the catalogue's names or by Docker's.
fn named(all: &[Record], images: &[String]) -> anyhow::Result<Vec<Record>> {
    let mut found = Vec::new();
    for image in images {
        let name = SourceSpec::parse(image).ok().map(|spec| spec.name());
        let is = |record: &&Record| {
            name.as_ref() == Some(&record.image()) || record.names.iter().any(|name| name == image)
        };
        let record = all.iter().find(is).ok_or_else(|| {
            failure::failure(
                Code::NotFound,
                format!("{image} is not attached"),
                "see what is: harbour docker list",
            )
        })?;
        found.push(record.clone());
    }
    Ok(found)
}

fn list(args: &List) -> anyhow::Result<ExitCode> {
    let root = args.at.root()?;
    let running = daemon::is_running(&root)?;
    let mut rows = Vec::new();
    for record in Record::all(&root)? {
        let whole = apply::is_whole(&root, &record)?;
        let size: u64 = record.layers.iter().map(|layer| layer.size_bytes).sum();
        rows.push((record, whole, size));
    }
    if args.json {
        let images: Vec<_> = rows
            .iter()
            .map(|(record, whole, size)| {
                json!({
                    "registry": record.registry, "repository": record.repository, "tag": record.tag,
                    "names": record.names, "id": record.id().to_string(),
                    "manifest": record.manifest, "state": record.state.name(), "whole": whole,
                    "watched": record.watched, "layers": record.layers.len(), "size_bytes": size,
                    "mount": record.mount,
                })
            })
            .collect();
        output::json(&json!({
            "data_root": root.path(), "daemon_running": running, "images": images,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["IMAGE", "ID", "STATE", "LAYERS", "SIZE", "MOUNT"]);
    for (record, whole, size) in rows {
        let state = match (record.state, whole) {
            (State::Attached, false) => "attached, changed in Docker".to_owned(),
            (state, _) => state.name().to_owned(),
        };
        table.row(vec![
            record.name().to_owned(),
            record.id().short(),
            state,
            record.layers.len().to_string(),
            Size(size).to_string(),
            record.mount.display().to_string(),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}
