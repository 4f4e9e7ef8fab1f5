//! `harbour pull`

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use harbour_image::{
    reference::ImageName,
    source::{Source, SourceSpec},
};
use harbour_pool::transport::Access;
use serde_json::json;

use super::Context;
use crate::{
    cli, failure,
    ingest::{
        IngestError,
        options::options,
        pull::{PullOptions, PullReport, is_stopped, pull},
    },
    link::Link,
    output, progress,
    size::Size,
    stop::Stop,
};

/// Longest time from Ctrl-C to the end.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// Longest wait for the mount of this host to show what was pulled.
const SHOW_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn run(context: &Context, args: cli::Pull) -> anyhow::Result<ExitCode> {
    let options = Arc::new(options(&args.keys, &context.file, args.insecure)?);
    let runtime = context.runtime()?;
    let outcome = runtime.block_on(async {
        let stop = Stop::on_signals()?;
        let client = context.client_soon(&stop).await?;
        let section = &context.file.pull;
        let ways = context.ways(section.transport, section.rdma_device.as_ref())?;
        let link = Arc::new(Link::new(Access::ReadWrite, &ways));
        let mut specs = Vec::new();
        for image in &args.images {
            if args.all_tags {
                specs.extend(all_tags(image, &options, &stop).await?);
            } else {
                specs.push(SourceSpec::parse(image).map_err(|error| usage(&error.to_string()))?);
            }
        }
        let mut reports = Vec::new();
        let mut failed = None;
        for spec in &specs {
            let display = progress::display(args.progress);
            let pulling = pull(
                client.clone(),
                Arc::clone(&link),
                spec,
                &options,
                display,
                stop.flag(),
            );
            let report = tokio::select! {
                report = pulling => report,
                // The pull sees the flag itself and gives its space back; a source that hangs does
                // not keep it from ending.
                () = async { stop.wait().await; tokio::time::sleep(STOP_LIMIT).await } => {
                    Err(IngestError::Cancelled)
                }
            };
            let report = match report.with_context(|| format!("cannot pull {spec}")) {
                Ok(report) => report,
                Err(error) if args.all_tags && !is_stopped(&stop.flag()) => {
                    let text = output::printable(&format!("{error:#}"));
                    eprintln!("harbour: {text}");
                    failed.get_or_insert(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            wait_for_mount(context, report.generation).await;
            if !args.json {
                print(context, &report)?;
            }
            reports.push(as_json(&report));
        }
        anyhow::Ok((reports, failed, specs.len()))
    });
    // Transfers that were cut off sit in blocking reads for a moment: they are not waited for.
    runtime.shutdown_timeout(Duration::from_millis(200));
    let (reports, failed, wanted) = outcome?;
    if args.json {
        output::json(&json!(reports))?;
    }
    match failed {
        None => Ok(ExitCode::SUCCESS),
        Some(first) => {
            let bad = wanted - reports.len();
            Err(first.context(format!(
                "{bad} of {wanted} tags could not be pulled; the first"
            )))
        }
    }
}

fn usage(text: &str) -> anyhow::Error {
    failure::failure(
        failure::Code::Usage,
        text.to_owned(),
        "see: harbour pull --help",
    )
}

/// The images of a repository's tags.
async fn all_tags(
    repository: &str,
    options: &PullOptions,
    stop: &Stop,
) -> anyhow::Result<Vec<SourceSpec>> {
    let spec = SourceSpec::parse(repository).map_err(|error| usage(&error.to_string()))?;
    if !matches!(spec, SourceSpec::Registry(_)) {
        let text = format!("{spec}: only repositories of registries have a list of tags");
        return Err(usage(&text));
    }
    let last = repository.rsplit('/').next().unwrap_or(repository);
    if last.contains([':', '@']) {
        return Err(usage(&format!(
            "{repository:?} has a tag or digest beside --all-tags"
        )));
    }
    let listing = async {
        let source = Source::open(&spec, &options.source).await?;
        source.tags().await
    };
    let tags = tokio::select! {
        tags = listing => tags.map_err(|source| IngestError::Source {
            what: format!("the tags of {repository}"),
            source,
        })?,
        () = stop.wait() => return Err(IngestError::Cancelled.into()),
    };
    Ok(tags.into_iter().map(SourceSpec::Registry).collect())
}

/// Waits until the mount of this host, if there is one, shows what was committed: whoever lists it
/// right after a pull finds the image.
async fn wait_for_mount(context: &Context, generation: u64) {
    let path = crate::node::session::path(&context.places);
    let deadline = tokio::time::Instant::now() + SHOW_LIMIT;
    loop {
        let Ok(text) = tokio::fs::read(&path).await else {
            return;
        };
        let page: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        if page["generation"]
            .as_u64()
            .is_some_and(|shown| shown >= generation)
        {
            return;
        }
        if tokio::time::Instant::now() >= deadline {
            tracing::warn!(
                "the image is in the pool, but the mount of this host does not show it yet"
            );
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn print(context: &Context, report: &PullReport) -> anyhow::Result<()> {
    let ImageName {
        registry,
        repository,
        tag,
    } = &report.name;
    output::say(&format!(
        "{registry}/{repository}:{tag}  {}  {} layers ({} fetched, {}{}), {} unpacked, {} new in the pool, {:.2} s\n{}\n",
        report.manifest.short(),
        report.layers,
        report.fetched + report.refilled,
        Size(report.fetched_bytes),
        match report.elsewhere {
            0 => String::new(),
            elsewhere => format!("; {elsewhere} by other pulls"),
        },
        Size(report.unpacked_bytes),
        Size(report.stored_bytes),
        report.took.as_secs_f64(),
        match super::list::rootfs_of(context, registry, repository, tag) {
            Some(path) => path.display().to_string(),
            None => "its name cannot be a path: read it by its layers".to_owned(),
        },
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
        "fetched_by_others": report.elsewhere,
        "fetched_bytes": report.fetched_bytes, "stored_bytes": report.stored_bytes,
        "unpacked_bytes": report.unpacked_bytes,
        "took_ms": u64::try_from(report.took.as_millis()).unwrap_or(u64::MAX),
    })
}
