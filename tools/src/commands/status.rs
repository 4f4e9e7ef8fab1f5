//! `harbour status`

use std::{process::ExitCode, time::Duration};

use harbour_metad_client::v1;
use serde_json::{Value, json};

use super::{Context, daemon, list};
use crate::{bounded, cli::Listing, output, size::Size};

/// A mount that does not answer in this time is reported as hung.
const MOUNT_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn run(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let answers = context.runtime()?.block_on(async {
        let client = context.client().await?;
        let mut status = client.status(v1::StatusRequest {}).await?;
        let list = client.list_donors(v1::ListDonorsRequest {}).await?;
        // Space moves between the two answers: that of the second is of the instant of the donors.
        status.lent_bytes = list.lent_bytes;
        status.used_bytes = list.used_bytes;
        status.reserved_bytes = list.reserved_bytes;
        status.quarantined_bytes = list.quarantined_bytes;
        anyhow::Ok((status, list.donors))
    });
    let node = node_status(context);
    let snapshotter = snapshotter_page(context);
    let running: Vec<&str> = ["up", "metad", "donor", "node", "snapshotter"]
        .into_iter()
        .filter(|what| daemon::holder(context, what).is_some())
        .collect();
    let (status, donors) = match answers {
        Ok(answers) => answers,
        Err(error) => {
            if args.json {
                output::json(&json!({ "running": running, "node": node, "metad": Value::Null }))?;
            } else {
                output::say(&format!("running here: {}\n", words(&running)))?;
            }
            return Err(error);
        }
    };
    if args.json {
        output::json(&json!({
            "running": running,
            "metad": metad_json(&status),
            "donors": donors.iter().map(|donor| list::donor_json(donor, &node)).collect::<Vec<_>>(),
            "node": node,
            "snapshotter": snapshotter,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    print(context, &running, &status, &donors, &node, &snapshotter)?;
    Ok(ExitCode::SUCCESS)
}

fn words(running: &[&str]) -> String {
    if running.is_empty() {
        "nothing".to_owned()
    } else {
        running.join(", ")
    }
}

fn metad_json(status: &v1::StatusReply) -> Value {
    json!({
        "version": status.version, "uptime_ms": status.uptime_ms, "policy": status.policy,
        "lent_bytes": status.lent_bytes, "used_bytes": status.used_bytes,
        "reserved_bytes": status.reserved_bytes, "quarantined_bytes": status.quarantined_bytes,
        "free_bytes": free(status),
        "images": status.images, "layers": status.layers, "objects": status.objects, "packs": status.packs,
        "logical_bytes": status.logical_bytes, "evictions": status.evictions,
        "database_bytes": status.database_bytes,
        "replicas": replicas_json(status),
        "pulls": status.pulls.iter().map(|pull| json!({
            "pull": pull.pull, "what": pull.what, "host": pull.host, "pid": pull.pid,
            "reserved_bytes": pull.reserved_bytes, "expires_ms": pull.expires_ms,
        })).collect::<Vec<_>>(),
        "nodes": status.nodes.iter().map(|node| json!({
            "node": node.node, "name": node.name, "heard_ms_ago": node.heard_ms_ago,
            "acknowledged_generation": node.acknowledged_generation, "held": node.held,
        })).collect::<Vec<_>>(),
    })
}

fn replicas_json(status: &v1::StatusReply) -> Value {
    json!({
        "default": status.replicas_default,
        "wanted": status.replicas_wanted, "missing": status.replicas_missing,
        "packs_short": status.packs_short, "packs_lost": status.packs_lost,
        "copies_running": status.copies_running, "copies_done": status.copies_done,
        "copies_failed": status.copies_failed, "copied_bytes": status.copied_bytes,
        "moved_bytes": status.moved_bytes, "rebalancing": status.rebalancing,
        "pool_reads": status.pool_reads, "pool_misses": status.pool_misses,
    })
}

/// What is missing of what images want, and what is done about it; nothing to say when all is well.
fn replicas_text(status: &v1::StatusReply) -> String {
    let mut text = String::new();
    if status.replicas_missing > 0 {
        text += &format!(
            "replicas      {} of {} missing: {} packs have too few, {} have none (a read fetches them again)\n",
            status.replicas_missing, status.replicas_wanted, status.packs_short, status.packs_lost
        );
    }
    if status.copies_running > 0 || status.rebalancing {
        text += &format!(
            "copies        {} under way{}; {} copied since the start\n",
            status.copies_running,
            if status.rebalancing {
                " to even the load"
            } else {
                ""
            },
            Size(status.copied_bytes)
        );
    }
    text
}

fn free(status: &v1::StatusReply) -> u64 {
    status
        .lent_bytes
        .saturating_sub(status.used_bytes)
        .saturating_sub(status.reserved_bytes)
        .saturating_sub(status.quarantined_bytes)
}

/// What the node on this host says, in its page and through its mount, without ever hanging on it.
pub(super) fn node_status(context: &Context) -> Value {
    let path = context.places.mount.join(".status/status.json");
    let mut page: Value = std::fs::read(crate::node::session::path(&context.places))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_else(|| json!({}));
    let (mounted, hung, counters) = match bounded::within(MOUNT_LIMIT, move || std::fs::read(path))
    {
        None => (true, true, Value::Null),
        Some(Err(_)) => (false, false, Value::Null),
        Some(Ok(text)) => (
            true,
            false,
            serde_json::from_slice(&text).unwrap_or(Value::Null),
        ),
    };
    page["mounted"] = json!(mounted);
    page["hung"] = json!(hung);
    page["counters"] = counters;
    page["ready"] = json!(mounted && !hung && page["ready"].as_bool() == Some(true));
    page
}

fn print(
    context: &Context,
    running: &[&str],
    status: &v1::StatusReply,
    donors: &[v1::Donor],
    node: &Value,
    snapshotter: &Value,
) -> anyhow::Result<()> {
    let mut text = format!("running here  {}\n", words(running));
    text += &format!(
        "pool          {} lent by {} donors; {} used, {} reserved, {} waiting for readers, {} free\n",
        Size(status.lent_bytes),
        donors.iter().filter(|d| d.live).count(),
        Size(status.used_bytes),
        Size(status.reserved_bytes),
        Size(status.quarantined_bytes),
        Size(free(status)),
    );
    let ratio = if status.used_bytes == 0 {
        1.0
    } else {
        status.logical_bytes as f64 / status.used_bytes as f64
    };
    text += &format!(
        "catalogue     {} images, {} layers, {} objects in {} packs; de-duplication {ratio:.2}\n",
        status.images, status.layers, status.objects, status.packs
    );
    text += &format!(
        "policy        {}, {} evictions\n",
        status.policy, status.evictions
    );
    for donor in donors {
        text += &format!(
            "donor         {}, {}, {} lent; {}\n",
            donor.name,
            list::donor_state(donor),
            Size(donor.regions.iter().map(|region| region.len).sum()),
            match (list::transport(donor, node), list::remark(donor, node)) {
                (Some(transport), Some(remark)) =>
                    format!("read over {transport} from here: {remark}"),
                (Some(transport), None) => format!("read over {transport} from here"),
                (None, _) => "not read from here yet".to_owned(),
            }
        );
    }
    text += &replicas_text(status);
    for pull in &status.pulls {
        text += &format!(
            "pull          {} by {} (process {}), {} reserved\n",
            pull.what,
            pull.host,
            pull.pid,
            Size(pull.reserved_bytes)
        );
    }
    for reader in &status.nodes {
        text += &format!(
            "node          {}, heard {} ms ago, holds {} views\n",
            reader.name, reader.heard_ms_ago, reader.held
        );
    }
    let mount = context.places.mount.display();
    text += &match (node["hung"].as_bool(), node["mounted"].as_bool()) {
        (Some(true), _) => format!("mount         {mount} does not answer: see harbour doctor\n"),
        (_, Some(false)) => format!("mount         {mount} is not mounted on this host\n"),
        _ => format!("mount         {mount}\n"),
    };
    if let Some(fast) = node["fast_view"].as_str() {
        text += &format!("fast view     {fast}\n");
    }
    text += &containerd_text(snapshotter);
    output::say(&output::printable(&text))?;
    Ok(())
}

/// What the snapshotter of this host says of itself; null when there is none.
fn snapshotter_page(context: &Context) -> Value {
    let page = std::fs::read(context.places.run.join("snapshotter.json"));
    page.ok()
        .and_then(|page| serde_json::from_slice(&page).ok())
        .unwrap_or(Value::Null)
}

fn containerd_text(page: &Value) -> String {
    let count = |key: &str| page[key].as_u64().unwrap_or(0);
    let fallbacks = page["fallbacks"].as_object().into_iter().flatten();
    let fallbacks: Vec<String> = fallbacks
        .filter(|(_, count)| count.as_u64() != Some(0))
        .map(|(why, count)| format!("{why} {count}"))
        .collect();
    match (page.is_null(), fallbacks.is_empty()) {
        (true, _) => String::new(),
        (false, true) => format!(
            "containerd    {} snapshots, {} of them layers of the mount\n",
            count("snapshots"),
            count("snapshots_of_layers")
        ),
        (false, false) => format!(
            "containerd    {} snapshots, {} of them layers of the mount; fetched by itself: {}\n",
            count("snapshots"),
            count("snapshots_of_layers"),
            fallbacks.join(", ")
        ),
    }
}
