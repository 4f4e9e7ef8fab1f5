//! How long a pooled image takes until it can be used on a host that never saw it.

use std::{path::Path, process::Command, time::Instant};

use anyhow::Context as _;

use crate::{
    Common, command,
    data::Data,
    harbour::Harbour,
    ingest::{
        self, Subject,
        engines::{self, Engine},
        registry::Registry,
    },
    mounts::Mounted,
    report::{MILLIS, Report},
    sandbox::Place,
};

/// First `ls` of the merged tree.
pub(crate) const LS: &str = "harbour-ls";
/// Kernel mount of the image's EROFS file and first `ls` of it.
pub(crate) const VIEW: &str = "harbour-view";

/// Runs it: a row for each image, as the table of ImageHarbour's paper has it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let data = Data::load(&common.data)?;
    let rounds = common.rounds(5);
    let mut report = Report::new("open", rounds, common.quick, &[]);
    let mut subjects = Vec::new();
    for tag in Data::sizes() {
        let image = data.image(tag)?;
        let text = format!(
            "{:.1} MB unpacked, {:.1} MB compressed",
            image.unpacked_bytes as f64 / 1e6,
            image.blob_bytes as f64 / 1e6
        );
        report.settings.insert(tag.to_owned(), text);
        subjects.push(Subject::of_data(common, &data, tag)?);
    }
    let bytes = subjects.iter().map(|subject| subject.bytes).sum();
    {
        let harbour = Harbour::up(&common.harbour, place, "o", bytes, &["--fast-view", "off"])?;
        for subject in &subjects {
            harbour.pull(&subject.source)?;
        }
        for round in 0..rounds {
            command::note(&format!("round {} of {rounds}: {LS}, {VIEW}", round + 1));
            first_listings(&harbour, &data, place, round, &mut report)?;
        }
    }
    let registry = Registry::start(place)?;
    for subject in &subjects {
        registry.push(&subject.source, &subject.name)?;
    }
    let mut engines = engines::all(common, place, &mut report);
    engines.retain(|engine| matches!(engine.name(), "podman" | "docker"));
    for round in 0..rounds {
        for subject in &subjects {
            for engine in &mut engines {
                command::note(&format!(
                    "round {} of {rounds}: {} {}",
                    round + 1,
                    engine.name(),
                    subject.name
                ));
                pull(engine.as_mut(), &registry, subject, place, &mut report);
            }
        }
    }
    Ok(report)
}

fn pull(
    engine: &mut dyn Engine,
    registry: &Registry,
    subject: &Subject,
    place: &Place,
    report: &mut Report,
) {
    match ingest::fresh(engine, registry, subject, place) {
        Ok(pulled) => {
            let target = format!("{} pull", engine.name());
            report.add(
                &format!("open {}", subject.name),
                "",
                &target,
                MILLIS,
                pulled.seconds * 1e3,
            );
        }
        Err(why) => report.skip(&format!("{} of {}", engine.name(), subject.name), why),
    }
}

/// Both doors of every image, each on a node that has just been started for it alone: what a node
/// does once for all images falls on each of them.
fn first_listings(
    harbour: &Harbour,
    data: &Data,
    place: &Place,
    round: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    for tag in Data::sizes() {
        let manifest = &data.image(tag)?.manifest;
        let work = format!("open {tag}");
        // Where it lies is asked of the first mount: the new one must not see it before the time.
        let root = harbour.root(manifest)?;
        let root = root.strip_prefix(harbour.mount())?;
        let node = harbour.second_node(place, &format!("d-{tag}-{round}"))?;
        let started = Instant::now();
        ls(&node.mount().join(root))?;
        report.add(&work, "", LS, MILLIS, started.elapsed().as_secs_f64() * 1e3);
        drop(node);

        let node = harbour.second_node(place, &format!("v-{tag}-{round}"))?;
        let file = format!("erofs/{}.erofs", &manifest[..12]);
        let point = place.short.join("first-view");
        std::fs::create_dir_all(&point)?;
        let started = Instant::now();
        match Mounted::erofs(&node.mount().join(file), &point) {
            Ok(_view) => {
                ls(&point)?;
                let elapsed = started.elapsed();
                report.add(&work, "", VIEW, MILLIS, elapsed.as_secs_f64() * 1e3);
            }
            Err(why) => report.skip(VIEW, why),
        }
    }
    Ok(())
}

fn ls(dir: &Path) -> anyhow::Result<()> {
    let names = command::run(Command::new("ls").arg(dir)).context("ls of a new image failed")?;
    anyhow::ensure!(!names.is_empty(), "{} is empty", dir.display());
    Ok(())
}
