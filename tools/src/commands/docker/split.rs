//! `harbour docker attach --tar-split`: layers read through once more, from where their images came.

use std::sync::Arc;

use anyhow::Context as _;
use harbour_image::{
    manifest::{LayerDescriptor, Platform},
    source::{Source, SourceSpec},
};

use crate::{
    commands::Context,
    config::PullKeys,
    docker::{record::Record, root::DataRoot, watch::name_of},
    failure::{self, Code},
    ingest::{layer, options::options, pull::PullOptions},
};

/// Keeps the way to each layer's tar stream that is not known yet.
pub(super) fn keep(context: &Context, root: &DataRoot, records: &[Record]) -> anyhow::Result<()> {
    let options = Arc::new(options(&PullKeys::default(), &context.file, false)?);
    let runtime = context.runtime()?;
    let snapshot = runtime
        .block_on(async { anyhow::Ok(context.client().await?.snapshot().await?) })
        .context("--tar-split asks metad where images came from")?;
    for record in records {
        let missing = missing(root, record)?;
        if missing.is_empty() {
            continue;
        }
        let image = snapshot
            .images
            .iter()
            .find(|image| name_of(image) == record.image());
        let image = image.with_context(|| format!("metad does not know {}", record.name()))?;
        let platform = image.platform.parse::<Platform>().ok();
        let (source, layers) = runtime.block_on(open(&image.source, record, platform, &options))?;
        for diff_id in missing {
            let descriptor = layers
                .iter()
                .find(|layer| layer.diff_id.to_string() == diff_id);
            let descriptor = descriptor.ok_or_else(|| {
                failure::failure(
                    Code::NotFound,
                    format!("{} does not give layer {diff_id} any more", image.source),
                    "attach without --tar-split: all but docker save and docker push works",
                )
            })?;
            let decode = layer::decode_options(descriptor, &options.limits);
            root.keep_tar_split(&decode, &descriptor.diff_id, || source.blob(descriptor))?;
        }
    }
    runtime.shutdown_background();
    Ok(())
}

/// Diff IDs of layers whose way is not known.
fn missing(root: &DataRoot, record: &Record) -> anyhow::Result<Vec<String>> {
    let mut missing = Vec::new();
    for diff_id in record.diff_ids()? {
        let text = diff_id.to_string();
        if !root.keeps_tar_split(&diff_id) && !missing.contains(&text) {
            missing.push(text);
        }
    }
    Ok(missing)
}

/// Where an image came from: by its digest where a registry has it, as a tag may mean another by now.
async fn open(
    source: &str,
    record: &Record,
    platform: Option<Platform>,
    options: &PullOptions,
) -> anyhow::Result<(Source, Vec<LayerDescriptor>)> {
    let why = || format!("cannot read {source}");
    let mut spec = SourceSpec::parse(source).with_context(why)?;
    if let SourceSpec::Registry(_) = &spec {
        let (registry, repository) = (&record.registry, &record.repository);
        let text = format!("docker://{registry}/{repository}@{}", record.manifest);
        spec = SourceSpec::parse(&text).with_context(why)?;
    }
    let source = Source::open(&spec, &options.source)
        .await
        .with_context(why)?;
    let resolved = source.resolve(platform.as_ref()).await.with_context(why)?;
    Ok((source, resolved.layers))
}
