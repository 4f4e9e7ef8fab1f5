//! Pulls of one image from a registry on loopback: ours beside those of engines.
//!
//! Every pull starts with nothing: a fresh pool, fresh storage, on the same disk. The registry's
//! blobs stay in the page cache for all, so that decompressing and unpacking is what is compared
//! and not the registry's disk.

pub(crate) mod engines;
pub(crate) mod registry;

use clap::Args;

use crate::{
    Common, command,
    data::Data,
    memory::Peak,
    mounts,
    report::{MIB, Report, SECONDS},
    sandbox::{self, Place},
};
use engines::Engine;
use registry::Registry;

/// Ours, in reports.
pub(crate) const HARBOUR: &str = "harbour";

/// `harbour-bench ingest`
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Images, as skopeo names them, like oci:DIR:TAG [default: the largest of the data directory]
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
    /// Unpacked size of given images at most, in MB: how much the pool lends
    #[arg(long, default_value_t = 6000, value_name = "MB")]
    largest_mb: u64,
}

/// One image to pull.
pub(crate) struct Subject {
    /// Short name.
    pub(crate) name: String,
    /// What skopeo reads.
    pub(crate) source: String,
    /// Upper bound of its unpacked size.
    pub(crate) bytes: u64,
}

impl Subject {
    /// One of the data directory's images.
    pub(crate) fn of_data(common: &Common, data: &Data, tag: &str) -> anyhow::Result<Self> {
        Ok(Self {
            name: tag.to_owned(),
            source: format!("oci:{}:{tag}", common.data.join("oci").display()),
            bytes: data.image(tag)?.unpacked_bytes,
        })
    }
}

/// Runs it.
pub(crate) fn run(options: &Options, place: &Place) -> anyhow::Result<Report> {
    let common = &options.common;
    let rounds = common.rounds(5);
    let mut report = Report::new(
        "ingest",
        rounds,
        common.quick,
        &["podman", "docker", "skopeo+umoci"],
    );
    let subjects = subjects(options, &mut report)?;
    let registry = Registry::start(place)?;
    for subject in &subjects {
        registry.push(&subject.source, &subject.name)?;
    }
    let mut engines = engines::all(common, place, &mut report);
    for round in 0..rounds {
        for subject in &subjects {
            let count = engines.len();
            for turn in 0..count {
                let engine = &mut engines[(turn + round as usize) % count];
                command::note(&format!(
                    "round {} of {rounds}: {} {}",
                    round + 1,
                    engine.name(),
                    subject.name
                ));
                if let Err(why) = one(engine.as_mut(), &registry, subject, place, &mut report) {
                    report.skip(&format!("{} of {}", engine.name(), subject.name), why);
                }
            }
        }
    }
    Ok(report)
}

fn subjects(options: &Options, report: &mut Report) -> anyhow::Result<Vec<Subject>> {
    if options.images.is_empty() {
        let data = Data::load(&options.common.data)?;
        let tag = Data::sizes()[3];
        let image = data.image(tag)?;
        let text = format!(
            "{} MB unpacked, {} MB compressed",
            image.unpacked_bytes / 1_000_000,
            image.blob_bytes / 1_000_000
        );
        report.settings.insert(tag.to_owned(), text);
        return Ok(vec![Subject::of_data(&options.common, &data, tag)?]);
    }
    let subject = |(number, source): (usize, &String)| Subject {
        // Names of repositories allow little: what is left of the last part of the source's name.
        name: source
            .rsplit(['/', ':'])
            .next()
            .map(|part| {
                part.chars()
                    .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
                    .collect::<String>()
            })
            .filter(|part| !part.is_empty())
            .unwrap_or_else(|| format!("image{number}")),
        source: source.clone(),
        bytes: options.largest_mb * 1_000_000,
    };
    Ok(options.images.iter().enumerate().map(subject).collect())
}

/// One pull by one engine.
fn one(
    engine: &mut dyn Engine,
    registry: &Registry,
    subject: &Subject,
    place: &Place,
    report: &mut Report,
) -> anyhow::Result<()> {
    let pulled = fresh(engine, registry, subject, place)?;
    report.add(
        &format!("pull {}", subject.name),
        "",
        engine.name(),
        SECONDS,
        pulled.seconds,
    );
    for (who, peak) in &pulled.memory {
        add_memory(report, &subject.name, who, *peak);
    }
    Ok(())
}

/// Pulls into storage that did not exist before and does not exist after.
pub(crate) fn fresh(
    engine: &mut dyn Engine,
    registry: &Registry,
    subject: &Subject,
    place: &Place,
) -> anyhow::Result<engines::Pulled> {
    let storage = place.work.join("storage");
    sandbox::remove(&storage)?;
    std::fs::create_dir_all(&storage)?;
    mounts::sync();
    mounts::back_memory(3 * subject.bytes)?;
    let pulled = engine.pull(&registry.reference(&subject.name), subject.bytes, &storage);
    mounts::unmount_below(&storage);
    sandbox::remove(&storage)?;
    pulled
}

fn add_memory(report: &mut Report, image: &str, who: &str, peak: Peak) {
    let mib = |kib: u64| kib as f64 / 1024.0;
    for (what, kib) in [
        ("peak VmHWM", peak.hwm_kib),
        ("peak RssAnon", peak.anon_kib),
        ("peak beyond the pool", peak.beyond_pool_kib),
    ] {
        report.add(&format!("{what}, {image}"), "", who, MIB, mib(kib));
    }
}
