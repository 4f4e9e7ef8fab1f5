//! Dependency policy: licences, sources, banned crates and duplicates, as `tests/policy.toml` says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use harbour_tests::{fixtures::checkout, shell};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Policy {
    licences: Allowed,
    sources: Allowed,
    bans: BTreeMap<String, String>,
    duplicates: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    allowed: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

#[derive(Clone, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Clone, Deserialize)]
struct Dependency {
    name: String,
    req: String,
    source: Option<String>,
}

/// What is wrong with `packages` under `policy`, one line each.
fn complaints(policy: &Policy, packages: &[Package]) -> Vec<String> {
    let mut found = Vec::new();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        let who = format!("{} {}", package.name, package.version);
        match &package.license {
            None => found.push(format!("{who} names no licence")),
            Some(licence) if !is_met(licence, &policy.licences.allowed) => {
                found.push(format!("{who} has the licence {licence}"));
            }
            Some(_) => {}
        }
        if let Some(why) = policy.bans.get(&package.name) {
            found.push(format!("{who} is banned: {why}"));
        }
        match &package.source {
            Some(source) if !policy.sources.allowed.contains(source) => {
                found.push(format!("{who} comes from {source}"))
            }
            Some(_) => {}
            None => {
                let loose = package
                    .dependencies
                    .iter()
                    .filter(|d| d.req == "*" && d.source.is_some());
                found.extend(loose.map(|d| format!("{who} takes any version of {}", d.name)));
            }
        }
        versions
            .entry(&package.name)
            .or_default()
            .insert(&package.version);
    }
    for (name, versions) in &versions {
        if versions.len() > 1 && !policy.duplicates.contains_key(*name) {
            found.push(format!(
                "{name} is there in {} versions: {versions:?}",
                versions.len()
            ));
        }
    }
    let stale = policy
        .duplicates
        .keys()
        .filter(|n| versions.get(n.as_str()).is_none_or(|v| v.len() < 2));
    found.extend(stale.map(|n| format!("policy.toml excuses {n}, which needs no excuse any more")));
    found
}

/// Whether an SPDX expression can be met by allowed licences. AND binds closer than OR; the
/// slash of old manifests means OR.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = any(&words, &mut at, allowed);
    met && at == words.len()
}

fn any(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = all(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all(words, at, allowed);
    }
    met
}

fn all(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let Some(word) = words.get(*at) else {
        return false;
    };
    *at += 1;
    if *word == "(" {
        let met = any(words, at, allowed);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return met && closed;
    }
    if words.get(*at) == Some(&"WITH") {
        let with = format!("{word} WITH {}", words.get(*at + 1).unwrap_or(&""));
        *at += 2;
        // An exception only gives permissions: the licence alone is enough too.
        return allowed.contains(&with) || allowed.contains(*word);
    }
    allowed.contains(*word)
}

fn policy() -> Policy {
    toml::from_str(&fs::read_to_string(checkout().join("tests/policy.toml")).unwrap()).unwrap()
}

#[test]
fn dependencies_keep_the_policy() {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = std::process::Command::new(env!("CARGO"));
    command.current_dir(checkout());
    command.args([
        "metadata",
        "--offline",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        &target,
    ]);
    let output = shell::run(&mut command, Duration::from_secs(120))
        .and_then(shell::Output::ok)
        .unwrap();
    let metadata: Metadata = serde_json::from_slice(&output.stdout).unwrap();
    let used: BTreeSet<_> = metadata
        .resolve
        .nodes
        .iter()
        .map(|n| n.id.as_str())
        .collect();
    let packages: Vec<_> = metadata
        .packages
        .iter()
        .filter(|p| used.contains(p.id.as_str()))
        .cloned()
        .collect();
    assert!(
        packages.len() > 100,
        "only {} packages in the graph",
        packages.len()
    );
    let found = complaints(&policy(), &packages);
    assert!(
        found.is_empty(),
        "{} complaints:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn licence_expressions_are_understood() {
    let allowed = BTreeSet::from(["MIT".to_owned(), "Apache-2.0".to_owned()]);
    for (expression, wanted) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("MIT OR GPL-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 OR MIT AND Apache-2.0", true),
        ("(GPL-3.0 OR MIT) AND Apache-2.0", true),
        ("(GPL-3.0 OR MIT) AND BSD", false),
        ("MIT/GPL-3.0", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("GPL-3.0 WITH Classpath-exception-2.0", false),
        ("", false),
        ("(MIT", false),
        ("MIT MIT", false),
    ] {
        assert_eq!(is_met(expression, &allowed), wanted, "{expression:?}");
    }
}

#[test]
fn breaches_are_noticed() {
    let package =
        |name: &str, version: &str, licence: Option<&str>, source: Option<&str>| Package {
            id: String::new(),
            name: name.into(),
            version: version.into(),
            license: licence.map(Into::into),
            source: source.map(Into::into),
            dependencies: vec![Dependency {
                name: "any".into(),
                req: "*".into(),
                source: Some(String::new()),
            }],
        };
    let registry = "registry+https://github.com/rust-lang/crates.io-index";
    let packages = [
        package("good", "1.0.0", Some("MIT"), Some(registry)),
        package("good", "2.0.0", Some("MIT"), Some(registry)),
        package("openssl-sys", "1.0.0", Some("MIT"), Some(registry)),
        package("copyleft", "1.0.0", Some("GPL-3.0"), Some(registry)),
        package("silent", "1.0.0", None, Some(registry)),
        package(
            "forked",
            "1.0.0",
            Some("MIT"),
            Some("git+https://example.org/forked"),
        ),
        package("ours", "0.1.0", Some("MIT"), None),
    ];
    let mut policy = policy();
    policy.duplicates.clear();
    let found = complaints(&policy, &packages);
    for wanted in [
        "good is there in 2 versions",
        "openssl-sys 1.0.0 is banned",
        "copyleft 1.0.0 has the licence GPL-3.0",
        "silent 1.0.0 names no licence",
        "forked 1.0.0 comes from git+",
        "ours 0.1.0 takes any version of any",
    ] {
        assert!(
            found.iter().any(|f| f.starts_with(wanted)),
            "wanted {wanted:?} among {found:#?}"
        );
    }
    assert_eq!(found.len(), 6, "{found:#?}");
}
