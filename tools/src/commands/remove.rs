//! `harbour rm`

use std::process::ExitCode;

use anyhow::Context as _;
use harbour_image::{reference::ImageName, source::SourceSpec};
use harbour_metad_client::v1;
use serde_json::json;

use super::Context;
use crate::{cli::Rm, failure, output, size::Size};

pub(super) fn run(context: &Context, args: &Rm) -> anyhow::Result<ExitCode> {
    let done = context.runtime()?.block_on(async {
        let client = context.client().await?;
        let mut done = Vec::new();
        for image in &args.images {
            let ImageName {
                registry,
                repository,
                tag,
            } = name_of(image)?;
            let request = v1::RemoveNameRequest {
                registry,
                repository,
                tag,
            };
            let reply = client
                .remove_name(request)
                .await
                .with_context(|| format!("cannot remove {image}"))?;
            done.push((image, reply));
        }
        anyhow::Ok(done)
    })?;
    if args.json {
        let list: Vec<_> = done
            .iter()
            .map(|(image, reply)| {
                json!({
                    "image": image, "image_removed": reply.image_removed,
                    "layers_removed": reply.layers_removed, "bytes_freed": reply.bytes_freed,
                })
            })
            .collect();
        output::json(&json!(list))?;
    } else {
        for (image, reply) in done {
            output::say(&format!(
                "{image}: removed{}, {} layers, {} freed\n",
                if reply.image_removed {
                    ""
                } else {
                    " (the image has other names)"
                },
                reply.layers_removed,
                Size(reply.bytes_freed),
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The name in the catalogue that `image`, as given to `pull`, has.
pub(super) fn name_of(image: &str) -> anyhow::Result<ImageName> {
    let spec = SourceSpec::parse(image).map_err(|error| {
        failure::failure(
            failure::Code::Usage,
            error.to_string(),
            "see the names with: harbour images",
        )
    })?;
    Ok(spec.name())
}
