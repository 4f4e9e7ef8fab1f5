//! Making a data-root as the records want it, while no daemon has it.
//!
//! The order is that of what needs what: layers from the lowest, what is known of their blobs, configs;
//! then, all of that being on the disk, the names in one step; then what is not wanted goes the other way
//! round. A daemon that starts in between finds a whole store, if not yet the whole of what was wanted.

use anyhow::Context as _;

use super::{
    files::{self, Scratch},
    record::{Record, State, chains},
    repositories::Repositories,
    root::DataRoot,
};
use crate::failure::{self, Code};

/// Most layers that Docker takes.
const LAYERS_MAX: usize = 125;

/// What was done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Images that Docker has from now on.
    pub attached: Vec<String>,
    /// Images that it has not any more.
    pub detached: Vec<String>,
    /// What stays, and why.
    pub kept: Vec<String>,
    /// Whether anything had to be done.
    pub changed: bool,
}

/// Writes down that an image is wanted. To be called under [`DataRoot::lock`].
///
/// # Errors
/// More layers than Docker takes, or what the file system says.
pub fn want(root: &DataRoot, record: &Record) -> anyhow::Result<()> {
    if record.layers.len() > LAYERS_MAX {
        return Err(failure::failure(
            Code::Refused,
            format!(
                "{} has {} layers, and Docker takes {LAYERS_MAX}",
                record.name(),
                record.layers.len()
            ),
            "run it without Docker: harbour run",
        ));
    }
    let scratch = scratch(root)?;
    record.write(root, &scratch)?;
    files::sync(&root.own())
}

/// Forgets a record that Docker has heard nothing of, or has undone itself.
///
/// # Errors
/// What the file system says.
pub fn forget(root: &DataRoot, record: &Record) -> anyhow::Result<()> {
    record.forget(root, &scratch(root)?)?;
    tidy(root);
    Ok(())
}

/// Whether an image is there, whole, with all its names.
///
/// # Errors
/// What the file system says.
pub fn is_whole(root: &DataRoot, record: &Record) -> anyhow::Result<bool> {
    let (names, id) = (Repositories::read(root)?, record.id());
    let named = |name: &String| names.get(name) == Some(&id.to_string());
    if !root.content(&id).exists() || !record.names.iter().all(named) {
        return Ok(false);
    }
    let diff_ids = record.diff_ids()?;
    for (chain, diff_id) in chains(&diff_ids).iter().zip(&diff_ids) {
        let Some(cache_id) = root.cache_of(chain)? else {
            return Ok(false);
        };
        if !root.is_our_layer(chain)? {
            continue;
        }
        let target = record.mount.join("layers").join(diff_id.short());
        let diff = root.driver().join(cache_id).join("diff");
        let to = std::fs::read_link(diff).is_ok_and(|at| at == target);
        if !to || (root.tar_split(diff_id).exists() && !root.has_tar_split(chain)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Names that Docker has from us for a record, each with the image that it means.
fn names_left(root: &DataRoot, record: &Record) -> anyhow::Result<Vec<(String, String)>> {
    let names = Repositories::read(root)?;
    let id = record.id().to_string();
    let given = record.given.iter().map(|name| (name.clone(), id.clone()));
    let mut left: Vec<_> = given.chain(record.former.iter().cloned()).collect();
    left.retain(|(name, id)| names.get(name) == Some(id));
    Ok(left)
}

/// Does what the records say. To be called under [`DataRoot::lock`], while no daemon has the data-root.
///
/// # Errors
/// What the file system says. The next call goes on from there.
pub fn apply(root: &DataRoot) -> anyhow::Result<Report> {
    apply_in_steps(root, &mut || Ok(()))
}

/// The same; `step` is called between any two changes and may end it.
pub(super) fn apply_in_steps(
    root: &DataRoot,
    step: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let mut report = Report::default();
    if !root.own().exists() {
        return Ok(report);
    }
    let scratch = scratch(root)?;
    let mut records = Record::all(root)?;
    let mut names = Repositories::read(root)?;
    let before = records.clone();
    for record in &mut records {
        if record.state == State::Attached && !root.content(&record.id()).exists() {
            record.state = State::Removed;
        }
        if record.is_wanted() {
            report.changed |= make(root, &scratch, record, step)
                .with_context(|| format!("cannot attach {}", record.name()))?;
        }
    }
    if report.changed {
        files::sync(root.path())?;
    }
    rename(root, &mut records, &mut names, &mut report)?;
    // Before the names are there: an end in between would leave names that nobody takes away.
    for (record, before) in records.iter().zip(&before) {
        if record.given != before.given {
            record.write(root, &scratch)?;
        }
    }
    step()?;
    if names.write(&scratch)? {
        report.changed = true;
        files::sync(root.path())?;
    }
    step()?;
    for (record, before) in records.iter_mut().zip(&before) {
        record.former.clear();
        match record.state {
            State::Pending => {
                report.attached.push(record.name().to_owned());
                record.state = State::Attached;
            }
            State::Leaving => report.detached.push(record.name().to_owned()),
            State::Attached | State::Removed => {}
        }
        if record.state != before.state || record.former != before.former {
            report.changed = true;
            record.write(root, &scratch)?;
        }
    }
    report
        .kept
        .extend(root.remove_unwanted(&scratch, &records, &names, step)?);
    for record in records
        .iter()
        .filter(|record| record.state == State::Leaving)
    {
        report.changed = true;
        record.forget(root, &scratch)?;
    }
    tidy(root);
    if report.changed {
        files::sync(root.path())?;
    }
    Ok(report)
}

/// What an image needs, but for its names. Gives whether something was missing.
fn make(
    root: &DataRoot,
    scratch: &Scratch,
    record: &Record,
    step: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let layers = root.ensure_layers(scratch, record, step)?;
    root.ensure_maps(scratch, record)?;
    step()?;
    let id = record.id();
    if root.content(&id).exists() {
        return Ok(layers > 0);
    }
    scratch.replace(&root.mark(&id), b"", 0o600)?;
    step()?;
    scratch.replace(&root.content(&id), record.config.as_bytes(), 0o600)?;
    step()?;
    Ok(true)
}

/// Names that come and names that go. The last name of an image that a container has stays, as with
/// `docker rmi`.
fn rename(
    root: &DataRoot,
    records: &mut [Record],
    names: &mut Repositories,
    report: &mut Report,
) -> anyhow::Result<()> {
    let containers = root.containers()?;
    for record in records.iter_mut() {
        let id = record.id().to_string();
        if record.state != State::Pending {
            continue;
        }
        for name in &record.names {
            if names.get(name) != Some(&id) && !record.given.contains(name) {
                record.given.push(name.clone());
            }
            names.set(name, &id);
        }
    }
    for at in 0..records.len() {
        let id = records[at].id().to_string();
        for (name, id) in records[at].former.clone() {
            if !inherited(records, &name, &id) {
                names.remove(&name, &id);
            }
        }
        if records[at].state != State::Leaving {
            continue;
        }
        let given = records[at].given.clone();
        let going: Vec<String> = given
            .into_iter()
            .filter(|name| !inherited(records, name, &id))
            .collect();
        let last = names.names_of(&id).iter().all(|name| going.contains(name));
        match containers.get(&id).filter(|_| last) {
            Some(users) => {
                let (name, users) = (records[at].name(), users.join(", "));
                let why =
                    format!("{name} stays in Docker: container {users} has it; docker rm it first");
                report.kept.push(why);
                records[at].state = State::Attached;
            }
            None => going.iter().for_each(|name| names.remove(name, &id)),
        }
    }
    Ok(())
}

/// Lets a record that wants a name for the same image have it, when there is one.
fn inherited(records: &mut [Record], name: &String, id: &str) -> bool {
    let Some(heir) = records.iter_mut().find(|record| record.wants(name, id)) else {
        return false;
    };
    if !heir.given.contains(name) {
        heir.given.push(name.clone());
    }
    true
}

/// The same for a record that is about to be forgotten. To be called under [`DataRoot::lock`]. Gives the
/// names that nobody else wants.
///
/// # Errors
/// What the file system says.
pub fn hand_over(root: &DataRoot, record: &Record) -> anyhow::Result<Vec<String>> {
    let mut others = Record::all(root)?;
    others.retain(|other| other.image() != record.image());
    let mut left = names_left(root, record)?;
    left.retain(|(name, id)| !inherited(&mut others, name, id));
    let scratch = scratch(root)?;
    for other in &others {
        other.write(root, &scratch)?;
    }
    Ok(left.into_iter().map(|(name, _)| name).collect())
}

fn scratch(root: &DataRoot) -> anyhow::Result<Scratch> {
    files::make_dir(&root.own())?;
    Scratch::new(root.own().join("tmp"))
}

/// Takes away our own directories where nothing is in them any more.
fn tidy(root: &DataRoot) {
    for name in ["tmp", "images", "maps", "tar-split", ""] {
        // One that is not empty stays.
        let _ = std::fs::remove_dir(root.own().join(name));
    }
}

#[cfg(test)]
mod tests;
