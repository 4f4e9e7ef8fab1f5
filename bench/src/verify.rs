//! What verification costs: the same random reads with it and without it.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::{
    Common, command,
    data::Data,
    fio::{self, Job},
    harbour::Harbour,
    mounts,
    report::{K_PER_S, Report},
    sandbox::Place,
};

/// Checks digests, as users have it.
pub(crate) const VERIFIED: &str = "verified";
/// Does not.
pub(crate) const UNVERIFIED: &str = "unverified";

/// Runs two instances that differ in one flag, turn about.
pub(crate) fn run(common: &Common, place: &Place) -> anyhow::Result<Report> {
    let data = Data::load(&common.data)?;
    let rounds = common.rounds(7);
    let seconds = if common.quick { 1 } else { 3 };
    let mut report = Report::new("verify", rounds, common.quick, &[UNVERIFIED]);
    report.settings.insert("data".to_owned(), data.text());
    let image = data.image("big")?;
    let source = format!("oci:{}:big", common.data.join("oci").display());
    let mut instances = Vec::new();
    for (name, flags) in [
        (VERIFIED, &[][..]),
        (UNVERIFIED, &["--unsafe-no-verify"][..]),
    ] {
        let harbour = Harbour::up(
            &common.harbour,
            place,
            &name[..1],
            image.unpacked_bytes,
            flags,
        )
        .with_context(|| format!("cannot start the {name} instance"))?;
        harbour.pull(&source)?;
        instances.push((name, harbour));
    }
    let doors = doors(&instances, &image.manifest, &mut report)?;
    for round in 0..rounds {
        command::note(&format!("round {} of {rounds}", round + 1));
        for (door, files) in &doors {
            for (job, work) in [
                (Job::Random4K(1), "rand-4k-1"),
                (Job::Random4K(4), "rand-4k-4"),
            ] {
                for turn in 0..files.len() {
                    let (name, file) = &files[(turn + round as usize) % files.len()];
                    mounts::drop_caches(2 * data.big_bytes)?;
                    // Another order each round: a cache of ours would remember the last one.
                    let rate =
                        fio::run(job, file, data.big_bytes, seconds, true, u64::from(round))?;
                    report.add(
                        &format!("{work} {door}"),
                        "cold",
                        name,
                        K_PER_S,
                        rate.operations / 1e3,
                    );
                }
            }
        }
    }
    Ok(report)
}

type Doors = Vec<(&'static str, Vec<(&'static str, PathBuf)>)>;

/// The large file of each instance behind each door that there is.
fn doors(
    instances: &[(&'static str, Harbour)],
    manifest: &str,
    report: &mut Report,
) -> anyhow::Result<Doors> {
    let (mut dirs, mut views) = (Vec::new(), Vec::new());
    for (name, harbour) in instances {
        dirs.push((*name, harbour.root(manifest)?.join("big.bin")));
        match harbour.view(manifest) {
            Ok(view) => views.push((*name, view.join("big.bin"))),
            Err(why) => report.skip("view", why),
        }
    }
    let mut doors = vec![("dirs", dirs)];
    if views.len() == instances.len() {
        doors.push(("view", views));
    }
    Ok(doors)
}
