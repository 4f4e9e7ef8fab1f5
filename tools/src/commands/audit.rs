//! `harbour audit`

use std::{process::ExitCode, time::Duration};

use harbour_metad_client::v1;
use serde_json::{Value, json};

use super::Context;
use crate::{
    cli::Listing,
    failure::Code,
    output::{self, Table},
    size::Size,
};

/// Every row is read: a catalogue of some ten million objects takes half a minute.
const AUDIT_LIMIT: Duration = Duration::from_secs(300);

pub(super) fn run(context: &Context, args: &Listing) -> anyhow::Result<ExitCode> {
    let reply = context.runtime()?.block_on(async {
        let client = context.client().await?.with_timeout(AUDIT_LIMIT);
        anyhow::Ok(client.audit(v1::AuditRequest {}).await?)
    })?;
    if args.json {
        output::json(&to_json(&reply))?;
    } else {
        print(&reply)?;
    }
    Ok(if reply.found == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(Code::Failed as u8)
    })
}

fn books_json(books: Option<&v1::Books>) -> Value {
    let books = books.copied().unwrap_or_default();
    json!({
        "lent_bytes": books.lent_bytes, "free_bytes": books.free_bytes,
        "reserved_bytes": books.reserved_bytes, "used_bytes": books.used_bytes,
        "quarantined_bytes": books.quarantined_bytes,
    })
}

fn to_json(reply: &v1::AuditReply) -> Value {
    let counted = reply.counted.iter();
    let counted = counted.map(|counted| (counted.what.clone(), json!(counted.count)));
    json!({
        "equal": reply.found == 0,
        "found": reply.found,
        "differences": reply.differences.iter().map(|difference| json!({
            "what": difference.what, "stored": difference.stored, "kept": difference.kept,
        })).collect::<Vec<_>>(),
        "stored": books_json(reply.stored.as_ref()),
        "kept": books_json(reply.kept.as_ref()),
        "donors": reply.donors.iter().map(|donor| json!({
            "name": donor.name, "stored": books_json(donor.stored.as_ref()),
            "kept": books_json(donor.kept.as_ref()),
        })).collect::<Vec<_>>(),
        "counted": counted.collect::<serde_json::Map<_, _>>(),
        "generation": reply.generation, "took_ms": reply.took_ms,
    })
}

fn print(reply: &v1::AuditReply) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        "COUNTED AGAIN",
        "LENT",
        "USED",
        "RESERVED",
        "WAITING FOR READERS",
        "FREE",
    ]);
    let donors = reply.donors.iter();
    let donors = donors.map(|donor| (donor.name.as_str(), donor.stored));
    for (name, books) in donors.chain([("all donors", reply.stored)]) {
        let books = books.unwrap_or_default();
        let sizes = [
            books.lent_bytes,
            books.used_bytes,
            books.reserved_bytes,
            books.quarantined_bytes,
            books.free_bytes,
        ];
        let sizes = sizes.map(|bytes| Size(bytes).to_string());
        table.row([name.to_owned()].into_iter().chain(sizes).collect());
    }
    table.print()?;
    let counted = reply.counted.iter();
    let counted: Vec<String> = counted.map(|c| format!("{} {}", c.count, c.what)).collect();
    let mut text = format!("{}, in {} ms\n", counted.join(", "), reply.took_ms);
    if reply.found == 0 {
        text += "equal: metad's books in memory are those of its store\n";
    } else {
        text += &format!("{} differences:\n", reply.found);
    }
    for difference in &reply.differences {
        text += &format!(
            "  {}: counted {}, kept {}\n",
            difference.what, difference.stored, difference.kept
        );
    }
    let untold = reply.found.saturating_sub(reply.differences.len() as u64);
    if untold > 0 {
        text += &format!("  and {untold} more\n");
    }
    output::say(&output::printable(&text))?;
    Ok(())
}
