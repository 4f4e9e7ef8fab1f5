//! `harbour setup`: engines' configuration, shown, asked about, kept, written, tried, and taken back.

mod check;
pub(super) mod plan;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Context;
use crate::{
    cli::setup::{Change, SetupCommand},
    failpoint::Failpoints,
    failure::{self, Code},
    output,
    setup::{
        Engine, ask,
        files::{self, Found, Staged},
        journal::{Entry, Journal, Record, Undo},
        text,
    },
};
use plan::{Plan, Step};

/// How long an engine may take to restart.
const RESTART: Duration = Duration::from_secs(120);

pub(super) fn run(context: &Context, command: SetupCommand) -> anyhow::Result<ExitCode> {
    let (engine, change) = match &command {
        SetupCommand::Check(args) => return check::run(context, args),
        SetupCommand::Containerd(args) => (Engine::Containerd, &args.change),
        SetupCommand::Docker(args) => (Engine::Docker, &args.change),
        SetupCommand::Podman(args) => (Engine::Podman, args),
    };
    let work = Work {
        context,
        change,
        failpoints: Failpoints::from_env(),
    };
    if change.undo {
        return work.undo(engine);
    }
    let plan = match &command {
        SetupCommand::Containerd(args) => plan::containerd(context, args)?,
        SetupCommand::Docker(args) => plan::docker(context, args)?,
        SetupCommand::Podman(args) => plan::podman(context, args)?,
        SetupCommand::Check(_) => return Ok(ExitCode::SUCCESS),
    };
    work.carry_out(&plan)
}

/// Where what was there before is kept: with what else is kept of this host, or of this user.
pub(super) fn state(context: &Context) -> PathBuf {
    let root = nix::unistd::geteuid().is_root();
    let state = &context.places.state;
    if root || state != Path::new("/var/lib/harbour") {
        return state.clone();
    }
    let own = std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty());
    let own = own.map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty())?;
        Some(PathBuf::from(home).join(".local/state"))
    });
    own.map_or_else(|| state.clone(), |own| own.join("harbour"))
}

/// One run of the command.
struct Work<'a> {
    context: &'a Context,
    change: &'a Change,
    failpoints: Failpoints,
}

impl Work<'_> {
    fn carry_out(&self, plan: &Plan) -> anyhow::Result<ExitCode> {
        let changed: Vec<&Step> = plan.steps.iter().filter(|step| step.changes()).collect();
        if changed.is_empty() {
            let files: Vec<_> = plan
                .steps
                .iter()
                .map(|s| s.found.path.display().to_string())
                .collect();
            self.say(&format!(
                "nothing to do: {} has all that is needed\n",
                files.join(", ")
            ))?;
            return self.finish(plan.engine, "unchanged", &plan.steps, &plan.notes, None);
        }
        for step in &changed {
            let path = step.found.path.display().to_string();
            self.say(&text::unified(
                &path,
                step.found.text.as_deref(),
                &step.text,
            ))?;
        }
        for note in &plan.notes {
            self.say(&format!("note: {note}\n"))?;
        }
        if self.change.dry_run {
            return self.finish(plan.engine, "would change", &plan.steps, &plan.notes, None);
        }
        if !self.agreed("Write this?")? {
            return Err(failure::failure(Code::Failed, "nothing was written", ""));
        }
        self.write(plan, &changed)?;
        let home = state(self.context).join("setup").join(plan.engine.name());
        self.say(&format!(
            "written; what was there before is kept in {}, and comes back with: harbour setup {} --undo\n",
            home.display(),
            plan.engine.name()
        ))?;
        let fresh = self.restart(plan.units)?;
        let checked = match fresh && !self.change.no_check {
            true => Some(check::after_setup(self.context, plan.engine)?),
            false => {
                self.say(&format!(
                    "then: harbour setup check {}\n",
                    plan.engine.name()
                ))?;
                None
            }
        };
        self.finish(plan.engine, "changed", &plan.steps, &plan.notes, checked)
    }

    /// The record; then all files beside their old ones, looked at by the engine; then all in place.
    fn write(&self, plan: &Plan, changed: &[&Step]) -> anyhow::Result<()> {
        let journal = Journal::open(&state(self.context))?;
        let earlier = journal.record(plan.engine)?;
        let noted: Vec<_> = plan
            .steps
            .iter()
            .map(|step| (&step.found, step.text.as_str()))
            .collect();
        journal.note(plan.engine, &noted)?;
        self.failpoints.hit("setup.noted");
        let outcome = self.replace(changed);
        if outcome.is_err() && changed.iter().all(|step| is_as_found(step)) {
            journal.reset(plan.engine, earlier.as_ref())?;
        }
        outcome
    }

    fn replace(&self, changed: &[&Step]) -> anyhow::Result<()> {
        let mut staged = Vec::new();
        for step in changed {
            let new = Staged::new(&step.found, &step.text, step.found.attributes)?;
            step.prove(new.temporary())?;
            staged.push(new);
        }
        self.failpoints.hit("setup.staged");
        for (step, new) in changed.iter().zip(staged) {
            if !is_as_found(step) {
                return Err(failure::failure(
                    Code::Failed,
                    format!(
                        "{} was changed just now by somebody else",
                        step.found.path.display()
                    ),
                    "see what it is now, and run this again",
                ));
            }
            new.commit()?;
            self.failpoints.hit("setup.replaced");
        }
        Ok(())
    }

    fn undo(&self, engine: Engine) -> anyhow::Result<ExitCode> {
        let journal = Journal::open(&state(self.context))?;
        let Some(record) = journal.record(engine)? else {
            self.say(&format!(
                "nothing to undo: {} was not set up from here\n",
                engine.name()
            ))?;
            return self.finish(engine, "unchanged", &[], &[], None);
        };
        let work = self.undoable(&journal, engine, &record)?;
        if self.change.dry_run {
            return self.finish(engine, "would undo", &[], &[], None);
        }
        if !work.is_empty() && !self.agreed("Put this back?")? {
            return Err(failure::failure(Code::Failed, "nothing was put back", ""));
        }
        for (entry, now, undo) in &work {
            if *undo == Undo::Changed
                && let Some(saved) = journal.save(now)?
            {
                self.say(&format!(
                    "what it held now is kept in {}\n",
                    saved.display()
                ))?;
            }
            journal.put_back(engine, entry, now)?;
            self.failpoints.hit("setup.undone");
        }
        for entry in &record.files {
            files::sweep(&entry.path, &entry.made);
        }
        journal.forget(engine)?;
        self.say("as it was before\n")?;
        let units: &[&str] = match engine {
            Engine::Containerd => &["containerd"],
            Engine::Docker => &["containerd", "docker"],
            Engine::Podman => &[],
        };
        self.restart(units)?;
        self.finish(engine, "undone", &[], &[], None)
    }

    /// The files that are not as they were, shown; an error where one of them may not be put back.
    fn undoable<'r>(
        &self,
        journal: &Journal,
        engine: Engine,
        record: &'r Record,
    ) -> anyhow::Result<Vec<(&'r Entry, Found, Undo)>> {
        let mut work = Vec::new();
        for entry in &record.files {
            let now = Found::read(&entry.path)?;
            let undo = Journal::undo(entry, &now);
            let needed = journal.needed_by(engine, entry)?;
            if let Some(other) = needed.filter(|_| undo != Undo::Nothing && !self.change.force) {
                return Err(failure::failure(
                    Code::Failed,
                    format!(
                        "{} was set up after it and needs {}",
                        other.name(),
                        entry.path.display()
                    ),
                    format!("first: harbour setup {} --undo", other.name()),
                ));
            }
            if undo == Undo::Changed && !self.change.force {
                return Err(changed_since(journal, engine, entry));
            }
            let before = entry
                .before
                .as_ref()
                .map(|kept| journal.before(engine, kept))
                .transpose()?;
            if undo != Undo::Nothing {
                let path = entry.path.display().to_string();
                let now_text = now.text.as_deref();
                match &before {
                    Some(before) => self.say(&text::unified(&path, now_text, before))?,
                    None => self.say(&format!("{path} goes away: it was not there before\n"))?,
                }
                work.push((entry, now, undo));
            }
        }
        Ok(work)
    }

    /// Whether the engine reads its new configuration by now.
    fn restart(&self, units: &[&str]) -> anyhow::Result<bool> {
        if units.is_empty() {
            return Ok(true);
        }
        let systemd = Path::new("/run/systemd/system").is_dir();
        let line = format!("systemctl restart {}", units.join(" "));
        let wanted =
            self.change.restart || (systemd && self.may_ask() && self.asked("Restart it now?")?);
        if !wanted || !systemd {
            let how = match systemd {
                true => line,
                false => format!(
                    "restart {}; systemd does not run here",
                    units.join(", then ")
                ),
            };
            self.say(&format!("for it to take effect: {how}\n"))?;
            return Ok(false);
        }
        let systemctl = ask::find("systemctl").context("there is no systemctl on this host")?;
        let answer = ask::ask(&systemctl, ["restart"].iter().chain(units), RESTART)?;
        if !answer.good {
            return Err(failure::failure(
                Code::Failed,
                format!("{line}: {}", answer.why()),
                format!("see: journalctl -u {}", units.join(" -u ")),
            ));
        }
        Ok(true)
    }

    fn may_ask(&self) -> bool {
        !self.change.yes && !self.change.json && io::stdin().is_terminal()
    }

    fn agreed(&self, question: &str) -> anyhow::Result<bool> {
        if self.change.yes {
            return Ok(true);
        }
        if !self.may_ask() {
            return Err(failure::failure(
                Code::Usage,
                "there is no terminal to ask on",
                "if this is what you want, say --yes; to look only, --dry-run",
            ));
        }
        self.asked(question)
    }

    fn asked(&self, question: &str) -> anyhow::Result<bool> {
        let mut terminal = io::stderr().lock();
        write!(terminal, "{question} [y/N] ")?;
        terminal.flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
    }

    fn say(&self, text: &str) -> io::Result<()> {
        match self.change.json {
            true => Ok(()),
            false => output::say(&output::printable(text)),
        }
    }

    fn finish(
        &self,
        engine: Engine,
        outcome: &str,
        steps: &[Step],
        notes: &[String],
        checked: Option<Value>,
    ) -> anyhow::Result<ExitCode> {
        if self.change.json {
            let files: Vec<_> = steps
                .iter()
                .map(|step| {
                    let path = step.found.path.display().to_string();
                    let diff = text::unified(&path, step.found.text.as_deref(), &step.text);
                    json!({ "path": path, "changed": step.changes(), "diff": diff })
                })
                .collect();
            output::json(&json!({
                "engine": engine.name(), "outcome": outcome, "files": files, "notes": notes, "check": checked,
            }))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn is_as_found(step: &Step) -> bool {
    Found::read(&step.found.path).is_ok_and(|now| now.text == step.found.text)
}

fn changed_since(journal: &Journal, engine: Engine, entry: &Entry) -> anyhow::Error {
    let path = entry.path.display();
    let next = match &entry.before {
        Some(kept) => format!(
            "take our keys out by hand; or compare with {}, and put that back with --undo --force",
            journal.home(engine).join(&kept.digest).display()
        ),
        None => "take our keys out by hand; or take the file away with --undo --force".to_owned(),
    };
    failure::failure(
        Code::Refused,
        format!("{path} was changed by somebody else since it was set up: undoing would lose that"),
        next,
    )
}
