//! `harbour pull`

use std::{process::ExitCode, sync::Arc};

use anyhow::Context as _;
use harbour_image::{reference::ImageName, source::SourceSpec};
use harbour_pool::transport::Access;
use serde_json::json;

use super::Context;
use crate::{
    cli, failure,
    ingest::{
        options::options,
        pull::{PullReport, pull},
    },
    link::Link,
    output, progress,
    size::Size,
    stop::Stop,
};

pub(super) fn run(context: &Context, args: cli::Pull) -> anyhow::Result<ExitCode> {
    let options = Arc::new(options(&args.keys, &context.file, args.insecure)?);
    let runtime = context.runtime()?;
    let outcome = runtime.block_on(async {
        let stop = Stop::on_signals()?;
        let client = context.client().await?;
        let link = Arc::new(Link::new(Access::ReadWrite));
        let mut reports = Vec::new();
        for image in &args.images {
            let spec = SourceSpec::parse(image).map_err(|error| {
                failure::failure(
                    failure::Code::Usage,
                    error.to_string(),
                    "see: harbour pull --help",
                )
            })?;
            let display = progress::display(args.progress);
            let report = pull(
                client.clone(),
                Arc::clone(&link),
                &spec,
                &options,
                display,
                stop.flag(),
            )
            .await
            .with_context(|| format!("cannot pull {image}"))?;
            if !args.json {
                print(context, &report)?;
            }
            reports.push(as_json(&report));
        }
        anyhow::Ok(reports)
    });
    // Transfers that were cut off sit in blocking reads for a moment: they are not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    let reports = outcome?;
    if args.json {
        output::json(&json!(reports))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(context: &Context, report: &PullReport) -> anyhow::Result<()> {
    let ImageName {
        registry,
        repository,
        tag,
    } = &report.name;
    output::say(&format!(
        "{registry}/{repository}:{tag}  {}  {} layers ({} fetched, {}), {} unpacked, {} new in the pool, {:.2} s\n{}\n",
        report.manifest.short(),
        report.layers,
        report.fetched + report.refilled,
        Size(report.fetched_bytes),
        Size(report.unpacked_bytes),
        Size(report.stored_bytes),
        report.took.as_secs_f64(),
        context
            .places
            .mount
            .join("images")
            .join(registry)
            .join(repository)
            .join(tag)
            .join("rootfs")
            .display(),
    ))?;
    Ok(())
}

fn as_json(report: &PullReport) -> serde_json::Value {
    let ImageName {
        registry,
        repository,
        tag,
    } = &report.name;
    json!({
        "registry": registry, "repository": repository, "tag": tag,
        "manifest": report.manifest.to_string(),
        "layers": report.layers, "fetched": report.fetched, "refilled": report.refilled,
        "fetched_bytes": report.fetched_bytes, "stored_bytes": report.stored_bytes,
        "unpacked_bytes": report.unpacked_bytes,
        "took_ms": u64::try_from(report.took.as_millis()).unwrap_or(u64::MAX),
    })
}
