//! `harbour images`, `layers`, `donors`

use std::process::ExitCode;

use harbour_metad_client::v1;
use serde_json::json;

use super::Context;
use crate::{
    cli::Listing,
    output::{self, Table},
    size::Size,
};

pub(super) fn images(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let snapshot = context
        .runtime()?
        .block_on(async { anyhow::Ok(context.client().await?.snapshot().await?) })?;
    if args.json {
        let list: Vec<_> = snapshot
            .images
            .iter()
            .map(|image| {
                json!({
                    "registry": image.registry, "repository": image.repository, "tag": image.tag,
                    "manifest": sha256(&image.manifest), "config": sha256(&image.config),
                    "layers": image.diff_ids.iter().map(|d| sha256(d)).collect::<Vec<_>>(),
                    "number": image.number, "unpacked_bytes": image.unpacked_bytes,
                    "index_bytes": image.index.as_ref().map_or(0, |i| i.len_bytes),
                    "committed_unix_ms": image.committed_unix_ms,
                    "platform": image.platform, "source": image.source, "replicas": image.replicas,
                    "rootfs": rootfs(context, image),
                })
            })
            .collect();
        output::json(&json!(list))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "IMAGE", "MANIFEST", "LAYERS", "UNPACKED", "PLATFORM", "PULLED",
    ]);
    for image in &snapshot.images {
        let separator = if image.tag.starts_with("sha256:") {
            '@'
        } else {
            ':'
        };
        table.row(vec![
            format!(
                "{}/{}{separator}{}",
                image.registry, image.repository, image.tag
            ),
            short(&image.manifest),
            image.diff_ids.len().to_string(),
            Size(image.unpacked_bytes).to_string(),
            image.platform.clone(),
            output::ago(image.committed_unix_ms),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn layers(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let snapshot = context
        .runtime()?
        .block_on(async { anyhow::Ok(context.client().await?.snapshot().await?) })?;
    let used_by = |diff_id: &Vec<u8>| {
        snapshot
            .images
            .iter()
            .filter(|i| i.diff_ids.contains(diff_id))
            .count()
    };
    if args.json {
        let list: Vec<_> = snapshot
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "diff_id": sha256(&layer.diff_id), "name": short(&layer.diff_id),
                    "state": state(layer), "number": layer.number, "entries": layer.entries,
                    "unpacked_bytes": layer.unpacked_bytes, "pool_bytes": layer.pool_bytes,
                    "new_bytes": layer.new_bytes, "images": used_by(&layer.diff_id),
                    "index_bytes": layer.index.as_ref().map_or(0, |i| i.len_bytes),
                    "blobs": layer.blobs.iter().map(|blob| json!({
                        "digest": sha256(&blob.digest), "len_bytes": blob.len_bytes,
                        "media_type": blob.media_type,
                    })).collect::<Vec<_>>(),
                    "path": context.places.mount.join("layers").join(short(&layer.diff_id)),
                })
            })
            .collect();
        output::json(&json!(list))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "LAYER",
        "STATE",
        "ENTRIES",
        "UNPACKED",
        "NEW IN POOL",
        "IMAGES",
        "DIFF ID",
    ]);
    for layer in &snapshot.layers {
        table.row(vec![
            short(&layer.diff_id),
            state(layer).to_owned(),
            layer.entries.to_string(),
            Size(layer.unpacked_bytes).to_string(),
            Size(layer.new_bytes).to_string(),
            used_by(&layer.diff_id).to_string(),
            sha256(&layer.diff_id),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn donors(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let reply = context.runtime()?.block_on(async {
        anyhow::Ok(
            context
                .client()
                .await?
                .list_donors(v1::ListDonorsRequest {})
                .await?,
        )
    })?;
    let node = super::status::node_status(context);
    if args.json {
        output::json(&json!(
            reply
                .donors
                .iter()
                .map(|donor| donor_json(donor, &node))
                .collect::<Vec<_>>()
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "DONOR",
        "STATE",
        "DOMAIN",
        "REGIONS",
        "LENT",
        "USED",
        "FREE",
        "HUGE PAGES",
        "HEARD",
        "OVER",
        "ADDRESS",
    ]);
    for donor in &reply.donors {
        table.row(vec![
            donor.name.clone(),
            donor_state(donor).to_owned(),
            donor.failure_domain.clone(),
            donor.regions.len().to_string(),
            Size(donor.regions.iter().map(|r| r.len).sum()).to_string(),
            Size(donor.used_bytes).to_string(),
            Size(donor.free_bytes).to_string(),
            if donor.regions.iter().any(|r| r.huge_pages) {
                "yes"
            } else {
                "no"
            }
            .to_owned(),
            format!("{} ms ago", donor.heard_ms_ago),
            transport(donor, &node).unwrap_or("-").to_owned(),
            donor.addresses.join(" "),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

/// How the node of this host, with this status, reads from a donor; `None` when it does not (yet).
pub(super) fn transport<'a>(donor: &v1::Donor, node: &'a serde_json::Value) -> Option<&'a str> {
    node["transports"][donor.id.to_string()].as_str()
}

/// Why that is TCP and not RDMA, where there is something to say.
pub(super) fn remark<'a>(donor: &v1::Donor, node: &'a serde_json::Value) -> Option<&'a str> {
    node["transport_remarks"][donor.id.to_string()].as_str()
}

pub(super) fn donor_state(donor: &v1::Donor) -> &'static str {
    match (donor.live, donor.draining) {
        (false, _) => "silent",
        (true, true) => "draining",
        (true, false) => "live",
    }
}

/// A donor as listings show it, seen from the node of this host.
pub(super) fn donor_json(donor: &v1::Donor, node: &serde_json::Value) -> serde_json::Value {
    json!({
        "id": donor.id, "name": donor.name, "epoch": format!("{:016x}", donor.epoch), "live": donor.live,
        "lent_bytes": donor.regions.iter().map(|r| r.len).sum::<u64>(), "used_bytes": donor.used_bytes,
        "huge_pages": donor.regions.iter().any(|r| r.huge_pages),
        "heard_ms_ago": donor.heard_ms_ago, "addresses": donor.addresses,
        "transport": transport(donor, node), "transport_remark": remark(donor, node),
        "failure_domain": donor.failure_domain, "draining": donor.draining, "free_bytes": donor.free_bytes,
        "regions": donor.regions.iter().map(|r| json!({
            "id": r.id, "len_bytes": r.len, "huge_pages": r.huge_pages,
        })).collect::<Vec<_>>(),
    })
}

/// A digest in full.
pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(bytes))
}

/// The 12 digits that paths use.
pub(super) fn short(bytes: &[u8]) -> String {
    hex::encode(bytes.get(..6).unwrap_or(bytes))
}

fn rootfs(context: &Context, image: &v1::Image) -> Option<std::path::PathBuf> {
    rootfs_of(context, &image.registry, &image.repository, &image.tag)
}

/// Where an image's merged tree is, unless its name cannot be a path.
pub(super) fn rootfs_of(
    context: &Context,
    registry: &str,
    repository: &str,
    tag: &str,
) -> Option<std::path::PathBuf> {
    let path = harbour_fs::image_path(registry, repository, tag)?;
    Some(context.places.mount.join(path).join("rootfs"))
}

fn state(layer: &v1::Layer) -> &'static str {
    match layer.state() {
        v1::LayerState::Ready => "ready",
        v1::LayerState::Partial => "partial",
        v1::LayerState::Unspecified => "unknown",
    }
}
