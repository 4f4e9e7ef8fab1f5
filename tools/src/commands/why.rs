//! `harbour why`: where the bytes of a file come from.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};

use super::Context;
use crate::{
    bounded,
    cli::Why,
    failure::{self, Code},
    output,
};

/// Extended attribute that the mount answers with its account of a file.
const ATTRIBUTE: &str = "user.harbour.why";

/// Longest wait for the mount.
const LIMIT: Duration = Duration::from_secs(5);

pub(super) fn run(context: &Context, args: &Why) -> anyhow::Result<ExitCode> {
    let mut answers = Vec::new();
    for path in &args.paths {
        let answer = ask(context, path)?;
        if !args.json {
            print(path, &answer)?;
        }
        answers.push(json!({ "path": path, "why": answer }));
    }
    if args.json {
        output::json(&json!(answers))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(context: &Context, path: &Path) -> anyhow::Result<Value> {
    let asked = on_mount(context, path);
    let shown = path.display();
    let answer =
        bounded::within(LIMIT, move || crate::xattr::get(&asked, ATTRIBUTE)).ok_or_else(|| {
            failure::failure(
                Code::Unavailable,
                format!("{shown}: the mount does not answer"),
                "see: harbour doctor",
            )
        })?;
    let bytes = answer.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            failure::failure(Code::NotFound, format!("{shown}: no such file"), "")
        }
        _ => failure::failure(
            Code::Failed,
            format!("{shown} is not served by this mount ({error})"),
            format!(
                "give a path below {} or {}",
                context.places.mount.display(),
                context.places.views().display()
            ),
        ),
    })?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// The same file on the FUSE mount when `path` is in a fast view, whose file system is the kernel's
/// and answers no questions of ours.
fn on_mount(context: &Context, path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let Ok(rest) = absolute.strip_prefix(context.places.views()) else {
        return absolute;
    };
    let mut parts = rest.components();
    let Some(name) = parts.next() else {
        return absolute;
    };
    let below = parts.as_path();
    let layer = context.places.mount.join("layers").join(name);
    if layer.exists() {
        return layer.join(below);
    }
    context
        .places
        .mount
        .join(".status/views")
        .join(name)
        .join(below)
}

fn print(path: &Path, answer: &Value) -> anyhow::Result<()> {
    let mut text = format!("{}\n", path.display());
    if let Value::Object(map) = answer {
        for (key, value) in map {
            match value {
                Value::String(value) => text += &format!("  {key}: {value}\n"),
                Value::Array(items) => {
                    text += &format!("  {key}:\n");
                    for item in items.iter().take(20) {
                        text += &format!("    {item}\n");
                    }
                    if items.len() > 20 {
                        text += &format!("    and {} more\n", items.len() - 20);
                    }
                }
                other => text += &format!("  {key}: {other}\n"),
            }
        }
    }
    output::say(&output::printable(&text))?;
    Ok(())
}
