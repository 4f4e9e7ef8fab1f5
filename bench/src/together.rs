//! Hosts that pull one image at the same moment, as Wharf's paper measures it: the time until all of
//! them have it, and the bytes that leave the registry, beside as many independent copies.
//!
//! Each host is a network namespace; the registry's cable is limited. With us each host has a node of
//! its own, on a pool that begins empty, and has the image when its own mount shows it. `skopeo copy`
//! only stores the blobs, and unpacks nothing.

use std::path::Path;

use anyhow::Context as _;
use harbour_bench::{
    content::Texture,
    layout::{Compression, Layout},
    sets::{Entry, Kind},
};

use crate::{
    Common, command,
    fleet::{FIRST, Fleet},
    mounts,
    report::{MIB, Report, SECONDS},
    sandbox::{self, Place},
};

mod plot;

/// Pulls into a pool.
pub(crate) const OURS: &str = "harbour";
/// Independent copies.
pub(crate) const SKOPEO: &str = "skopeo";
pub(crate) const TIME: &str = "time";
pub(crate) const BYTES: &str = "bytes";

/// Hosts that pull.
const HOSTS: [usize; 5] = [1, 5, 10, 15, 20];
const QUICK_HOSTS: [usize; 2] = [1, 3];
/// The image: layers, and files of each.
const LAYERS: u64 = 10;
const FILES: u64 = 10;
const FILE_BYTES: u64 = 5_000_000;
const QUICK_FILE_BYTES: u64 = 100_000;
/// Room beside the content.
const SPARE_BYTES: u64 = 256 << 20;

/// The name of a series.
pub(crate) fn workload(what: &str, hosts: usize) -> String {
    format!("{what}, {hosts} host{}", if hosts == 1 { "" } else { "s" })
}

/// Runs it.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let rounds = common.rounds(1);
    let mut report = Report::new("together", rounds, common.quick, &[SKOPEO]);
    let (hosts, file_bytes): (&[usize], _) = match common.quick {
        true => (&QUICK_HOSTS, QUICK_FILE_BYTES),
        false => (&HOSTS, FILE_BYTES),
    };
    let most = hosts.iter().copied().max().unwrap_or(1);
    let layout = place.work.join("layout");
    let image = make_image(&layout, file_bytes)?;
    report.settings.insert(
        "image".to_owned(),
        format!(
            "{LAYERS} layers, {} MB compressed",
            image.blob_bytes / 1_000_000
        ),
    );
    let bench = Bench {
        fleet: Fleet::new(common, place, most, &layout)?,
        place,
        lend: (image.unpacked_bytes * 2 + SPARE_BYTES).next_multiple_of(16 << 20),
        manifest: image.manifest,
    };
    for round in 0..rounds {
        for count in hosts {
            command::note(&format!("round {} of {rounds}: {count} hosts", round + 1));
            for (target, pulls) in [(OURS, bench.ours(*count)), (SKOPEO, bench.copies(*count))] {
                match pulls {
                    Ok((seconds, sent)) => {
                        report.add(&workload(TIME, *count), "", target, SECONDS, seconds);
                        let mib = sent as f64 / f64::from(1 << 20);
                        report.add(&workload(BYTES, *count), "", target, MIB, mib);
                    }
                    Err(why) => report.skip(&format!("{count} hosts with {target}"), why),
                }
            }
        }
    }
    if let Some(json) = &common.json {
        plot::draw(&report, hosts, &json.with_extension("svg"))?;
    }
    Ok(report)
}

fn make_image(dir: &Path, len: u64) -> anyhow::Result<harbour_bench::layout::Image> {
    let mut layout = Layout::create(dir)?;
    let layers: anyhow::Result<Vec<_>> = (0..LAYERS)
        .map(|layer| {
            let files = (0..FILES).map(|file| Entry {
                path: format!("layer-{layer}-file-{file}"),
                kind: Kind::File {
                    len,
                    seed: layer * FILES + file,
                    texture: Texture::Random,
                },
            });
            layout.layer(&files.collect::<Vec<_>>(), Compression::Gzip(1))
        })
        .collect();
    let image = layout.image("i", &layers?)?;
    layout.finish()?;
    Ok(image)
}

struct Bench<'a> {
    fleet: Fleet<'a>,
    place: &'a Place,
    /// Memory of the pool in bytes.
    lend: u64,
    manifest: String,
}

impl Bench<'_> {
    /// Seconds until `count` hosts that have nothing show the image, and the bytes that the registry
    /// sent.
    fn ours(&self, count: usize) -> anyhow::Result<(f64, u64)> {
        let fleet = &self.fleet;
        let hosts: Vec<usize> = (FIRST..FIRST + count).collect();
        let running = fleet.start(self.lend, &hosts, &["--fast-view", "off"])?;
        mounts::drop_caches(self.lend)?;
        let measured =
            fleet.at_once(&hosts, |host| command::run(&mut fleet.pull(host)).map(drop))?;
        for host in &hosts {
            crate::harbour::root_below(&fleet.mount(*host), &self.manifest)
                .with_context(|| format!("host {host} does not show the image"))?;
        }
        fleet.stop(running, &hosts)?;
        Ok(measured)
    }

    /// The same for as many independent copies of its blobs.
    fn copies(&self, count: usize) -> anyhow::Result<(f64, u64)> {
        let hosts: Vec<usize> = (FIRST..FIRST + count).collect();
        let into = |host: usize| self.place.work.join(format!("copy-{host}"));
        mounts::drop_caches(self.lend)?;
        let copy = |host: usize| command::run(&mut self.fleet.copy(host, &into(host))).map(drop);
        let measured = self.fleet.at_once(&hosts, copy);
        for host in hosts {
            sandbox::remove(&into(host))?;
        }
        measured
    }
}
