//! `harbour locks`

use std::{process::ExitCode, time::Duration};

use harbour_metad_client::v1;
use serde_json::json;

use super::Context;
use crate::{
    cli::Listing,
    output::{self, Table},
    size::Size,
};

/// Digits of a digest that people get to see.
const DIGITS: usize = 12;

pub(super) fn locks(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let locks = context
        .runtime()?
        .block_on(async { anyhow::Ok(context.client().await?.list_locks().await?) })?;
    if args.json {
        output::json(&json!(locks.iter().map(lock_json).collect::<Vec<_>>()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[
        "KEY", "STATE", "MODE", "HOST", "PID", "FOR", "DONE", "PULL OF",
    ]);
    for lock in &locks {
        table.row(vec![
            shortened(&lock.key),
            state(lock).to_owned(),
            mode(lock).to_owned(),
            lock.host.clone(),
            lock.pid.to_string(),
            age(lock),
            done(lock),
            lock.what.clone(),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

fn lock_json(lock: &v1::Lock) -> serde_json::Value {
    json!({
        "key": lock.key, "state": state(lock), "mode": mode(lock),
        "fence": (lock.fence > 0).then_some(lock.fence), "age_ms": lock.age_ms,
        "pull": format!("{:x}", lock.pull), "what": lock.what, "host": lock.host, "pid": lock.pid,
        "done_bytes": (lock.total_bytes > 0).then_some(lock.done_bytes),
        "total_bytes": (lock.total_bytes > 0).then_some(lock.total_bytes),
    })
}

fn state(lock: &v1::Lock) -> &'static str {
    if lock.fence > 0 { "held" } else { "waits" }
}

fn mode(lock: &v1::Lock) -> &'static str {
    if lock.exclusive {
        "exclusive"
    } else {
        "shared"
    }
}

/// How far the holder has come, where it says so.
fn done(lock: &v1::Lock) -> String {
    match lock.total_bytes {
        0 => "-".to_owned(),
        total => format!("{} of {}", Size(lock.done_bytes), Size(total)),
    }
}

fn age(lock: &v1::Lock) -> String {
    let age = Duration::from_millis(lock.age_ms);
    format!("{:.1} s", age.as_secs_f64())
}

/// The key with as much of a digest as the mount's names have.
fn shortened(key: &str) -> String {
    match key.split_once(':') {
        Some((kind @ ("layer" | "image"), digits)) => {
            let digits: String = digits.chars().take(DIGITS).collect();
            format!("{kind} {digits}")
        }
        Some((kind, rest)) => format!("{kind} {rest}"),
        None => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_short_enough_to_read() {
        let layer = format!("layer:{}", "0123456789abcdef".repeat(4));
        assert_eq!(shortened(&layer), "layer 0123456789ab");
        assert_eq!(shortened("name:r/p:t"), "name r/p:t");
        assert_eq!(shortened("collection"), "collection");
        // A newer metad's.
        assert_eq!(shortened("pack:00"), "pack 00");
    }
}
