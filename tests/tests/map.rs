//! ARCHITECTURE.md is true: the edges between crates are those of its table, every crate keeps
//! the workspace's lints, and what its ninth invariant confines to few files stays there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use harbour_tests::{fixtures::checkout, shell};
use serde_json::Value;

/// One row of the table of rooms.
#[derive(Debug, PartialEq, Eq)]
struct Room {
    dir: String,
    may_use: BTreeSet<String>,
}

/// Reads the table under "Rooms and the edges between them": crate by name.
fn rooms(page: &str) -> BTreeMap<String, Room> {
    let mut rooms = BTreeMap::new();
    for line in page.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [dir, name, _, edges] = cells[..] else {
            panic!("a row of the map without four cells: {line}")
        };
        let (dir, name) = (quoted(dir).remove(0), quoted(name).remove(0));
        let may_use: BTreeSet<String> = match edges {
            "nothing of ours" => BTreeSet::new(),
            "all of the above" => rooms.keys().cloned().collect(),
            _ => quoted(edges).into_iter().collect(),
        };
        assert!(
            !may_use.is_empty() || edges == "nothing of ours",
            "what does {name} use? {edges:?}"
        );
        rooms.insert(
            name,
            Room {
                dir: dir.trim_end_matches('/').into(),
                may_use,
            },
        );
    }
    rooms
}

/// What stands between backquotes.
fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

fn architecture() -> BTreeMap<String, Room> {
    let rooms = rooms(&fs::read_to_string(checkout().join("ARCHITECTURE.md")).unwrap());
    assert!(
        rooms.len() >= 8,
        "the table of rooms was not found in ARCHITECTURE.md"
    );
    rooms
}

fn packages() -> Vec<Value> {
    let mut command = std::process::Command::new(env!("CARGO"));
    command.current_dir(checkout()).args([
        "metadata",
        "--offline",
        "--no-deps",
        "--format-version",
        "1",
    ]);
    let output = shell::run(&mut command, Duration::from_secs(60))
        .and_then(shell::Output::ok)
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Edges that the map does not have, of a crate with these dependencies.
fn strangers<'a>(room: &Room, ours: &BTreeSet<String>, dependencies: &[&'a str]) -> Vec<&'a str> {
    dependencies
        .iter()
        .filter(|d| ours.contains(**d) && !room.may_use.contains(**d))
        .copied()
        .collect()
}

#[test]
fn every_edge_is_on_the_map() {
    let rooms = architecture();
    let packages = packages();
    let names: BTreeSet<String> = packages
        .iter()
        .map(|p| p["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        rooms.keys().cloned().collect::<BTreeSet<_>>(),
        names,
        "crates of the map and of the workspace"
    );
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let room = &rooms[name];
        let manifest = checkout().join(&room.dir).join("Cargo.toml");
        assert_eq!(
            Path::new(package["manifest_path"].as_str().unwrap()),
            manifest,
            "where {name} is"
        );
        let dependencies: Vec<_> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d["name"].as_str().unwrap())
            .collect();
        let strange = strangers(room, &names, &dependencies);
        assert!(
            strange.is_empty(),
            "{name} uses {strange:?}, which ARCHITECTURE.md does not allow it"
        );
    }
}

#[test]
fn an_edge_too_many_is_noticed() {
    let page = "| `a/` | `x-a` | job | nothing of ours |\n| `b/c/` | `x-b` | job | `x-a` |\n\
                | `t/` | `x-t` | job | all of the above |\n";
    let rooms = rooms(page);
    let ours: BTreeSet<String> = rooms.keys().cloned().collect();
    assert_eq!(
        rooms["x-b"],
        Room {
            dir: "b/c".into(),
            may_use: BTreeSet::from(["x-a".into()])
        }
    );
    assert_eq!(strangers(&rooms["x-a"], &ours, &["serde", "x-b"]), ["x-b"]);
    assert_eq!(
        strangers(&rooms["x-t"], &ours, &["x-a", "x-b"]),
        Vec::<&str>::new()
    );
}

#[test]
fn every_crate_keeps_the_lints() {
    for package in packages() {
        let path = package["manifest_path"].as_str().unwrap();
        let manifest: toml::Value = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let opted_in = manifest
            .get("lints")
            .and_then(|l| l.get("workspace"))
            .and_then(toml::Value::as_bool);
        assert_eq!(
            opted_in,
            Some(true),
            "{path} lacks `[lints] workspace = true`"
        );
    }
}

/// A word that only some files may contain, in code.
struct Confined {
    word: &'static str,
    allowed: fn(&str) -> bool,
}

const CONFINED: &[Confined] = &[
    Confined {
        word: "fuser",
        allowed: |f| f == "fs/src/adapter.rs" || f == "fs/src/session.rs",
    },
    Confined {
        word: "rusqlite",
        allowed: |f| f.starts_with("metad/src/store"),
    },
    Confined {
        word: "unsafe",
        allowed: |f| f.starts_with("pool/src/sys"),
    },
];

#[test]
fn what_is_confined_stays_where_it_is() {
    let mut found = Vec::new();
    for file in sources() {
        let name = file
            .strip_prefix(checkout())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let text = fs::read_to_string(&file).unwrap();
        for confined in CONFINED.iter().filter(|c| !(c.allowed)(&name)) {
            found.extend(
                lines_with(&text, confined.word)
                    .into_iter()
                    .map(|n| format!("{name}:{n}: {}", confined.word)),
            );
        }
    }
    assert!(
        found.is_empty(),
        "invariant 9 of ARCHITECTURE.md:\n{}",
        found.join("\n")
    );
}

#[test]
fn no_module_hides_behind_mod_rs() {
    let hidden: Vec<_> = sources()
        .into_iter()
        .filter(|f| f.ends_with("mod.rs"))
        .collect();
    assert!(hidden.is_empty(), "name.rs stands beside name/: {hidden:?}");
}

#[test]
fn words_are_found_in_code_alone() {
    let text = "// unsafe\nlet s = \"unsafe\";\n/// unsafe\n#![deny(unsafe_code)]\nunsafe { x() }\nlet unsafely = 1;\n";
    assert_eq!(lines_with(text, "unsafe"), [5]);
    assert_eq!(lines_with("use fuser::Session;\n", "fuser"), [1]);
    assert_eq!(lines_with("let c = '\"'; unsafe {}\n", "unsafe"), [1]);
}

/// Numbers of lines that contain `word` as a word outside comments and strings. Strings over
/// several lines are taken line by line: good enough for words that code rarely quotes.
fn lines_with(text: &str, word: &str) -> Vec<usize> {
    let has = |line: &str| {
        let code = code_of(line);
        let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        code.match_indices(word).any(|(at, _)| {
            !is_word(code[..at].chars().next_back())
                && !is_word(code[at + word.len()..].chars().next())
        })
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| has(line))
        .map(|(n, _)| n + 1)
        .collect()
}

/// A line without its string literals and its comment.
fn code_of(line: &str) -> String {
    let (mut code, mut quoted) = (String::new(), false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => {
                chars.next();
            }
            '"' => quoted = !quoted,
            '\'' if !quoted && chars.peek() == Some(&'"') => {
                chars.next();
            }
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            c if !quoted => code.push(c),
            _ => {}
        }
    }
    code
}

/// Every Rust file of the workspace's crates; this one and the fuzz crate aside, which must name
/// the words or cannot do without what they mean.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for room in architecture().values() {
        for part in ["src", "tests", "benches", "examples", "build.rs"] {
            walk(&checkout().join(&room.dir).join(part), &mut found);
        }
    }
    found.retain(|f| !f.ends_with("tests/tests/map.rs"));
    assert!(found.len() > 50, "only {} source files found", found.len());
    found
}

fn walk(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        fs::read_dir(path)
            .unwrap()
            .for_each(|e| walk(&e.unwrap().path(), found));
    } else if path.is_file() && path.extension().is_some_and(|e| e == "rs") {
        found.push(path.to_owned());
    }
}
