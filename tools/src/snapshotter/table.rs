//! Snapshots and the rules that containerd has for them. Nothing here touches the disk.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use harbour_image::digest::Digest;
use serde::{Deserialize, Serialize};

/// Most snapshots at a time.
const SNAPSHOTS_MAX: usize = 100_000;

/// Longest key or name, in bytes.
const NAME_MAX: usize = 4096;

/// Most bytes of all labels of one snapshot. containerd has 4096 for each.
const LABELS_MAX: usize = 256 << 10;

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, for one user.
    View,
    /// Being written.
    Active,
    /// Done, and what others stand on.
    Committed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        })
    }
}

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot takes of this host's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: i64,
    /// Files, directories and all else that has an inode.
    pub inodes: i64,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Number, never used again: the name of its directory.
    pub id: u64,
    /// Name, or key of one that is not committed.
    pub name: String,
    /// Name of what it stands on; empty for none.
    #[serde(default)]
    pub parent: String,
    /// What it is.
    pub kind: Kind,
    /// Labels.
    #[serde(default)]
    pub labels: Labels,
    /// When it was made, in nanoseconds since 1970.
    pub created_ns: i64,
    /// When it was last changed.
    pub updated_ns: i64,
    /// The layer of the mount that it is, when it has no directory of its own: its diff ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<Digest>,
    /// What it takes, once committed.
    #[serde(default)]
    pub usage: Usage,
}

/// Why something cannot be done, in the classes that containerd knows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// There is no such snapshot.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// There is one already.
    #[error("snapshot {0:?} already exists")]
    Exists(String),
    /// It is not in the state for it.
    #[error("{0}")]
    Precondition(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Too many, or too large.
    #[error("{0}")]
    Exhausted(String),
}

/// All snapshots.
#[derive(Debug, Default)]
pub struct Table {
    by_name: HashMap<String, Record>,
    /// How many stand on each.
    children: HashMap<String, usize>,
    next: u64,
}

impl Table {
    /// The snapshot of this name.
    ///
    /// # Errors
    /// [`Refused::NotFound`].
    pub fn get(&self, name: &str) -> Result<&Record, Refused> {
        let found = self.by_name.get(name);
        found.ok_or_else(|| Refused::NotFound(name.to_owned()))
    }

    /// All, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Record> {
        self.by_name.values()
    }

    /// What the snapshot stands on, the nearest first.
    ///
    /// # Errors
    /// [`Refused::NotFound`].
    pub fn below(&self, record: &Record) -> Result<Vec<Record>, Refused> {
        let (mut chain, mut parent) = (Vec::new(), record.parent.as_str());
        while !parent.is_empty() {
            // Parents are there before their children and cannot change, so this ends.
            let next = self.get(parent)?;
            chain.push(next.clone());
            parent = &next.parent;
        }
        Ok(chain)
    }

    /// Puts a new snapshot in.
    pub fn put(&mut self, record: Record) {
        self.next = self.next.max(record.id + 1);
        if !record.parent.is_empty() {
            *self.children.entry(record.parent.clone()).or_default() += 1;
        }
        self.by_name.insert(record.name.clone(), record);
    }

    /// Takes a snapshot out.
    pub fn take(&mut self, name: &str) -> Option<Record> {
        let record = self.by_name.remove(name)?;
        if let Some(count) = self.children.get_mut(&record.parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&record.parent);
            }
        }
        Some(record)
    }

    /// Puts `record` in place of the one of the same number, whose name was `before`.
    pub fn replace(&mut self, before: &str, record: Record) {
        self.take(before);
        self.put(record);
    }

    /// A new snapshot, not yet put in.
    ///
    /// # Errors
    /// A name that is taken, a parent that is not there or not committed.
    pub fn new_snapshot(
        &self,
        kind: Kind,
        name: &str,
        parent: &str,
        labels: Labels,
        now_ns: i64,
    ) -> Result<Record, Refused> {
        check_name(name)?;
        check_labels(&labels)?;
        if self.by_name.contains_key(name) {
            return Err(Refused::Exists(name.to_owned()));
        }
        if !parent.is_empty() && self.get(parent)?.kind != Kind::Committed {
            let text = format!("parent {parent:?} is not a committed snapshot");
            return Err(Refused::Invalid(text));
        }
        if self.by_name.len() >= SNAPSHOTS_MAX {
            let text = format!("there are {SNAPSHOTS_MAX} snapshots, no more are allowed");
            return Err(Refused::Exhausted(text));
        }
        Ok(Record {
            id: self.next,
            name: name.to_owned(),
            parent: parent.to_owned(),
            kind,
            labels,
            created_ns: now_ns,
            updated_ns: now_ns,
            layer: None,
            usage: Usage::default(),
        })
    }

    /// The committed snapshot that an active one becomes.
    ///
    /// # Errors
    /// One that is not there or not active, or a name that is taken.
    pub fn committed(
        &self,
        name: &str,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        now_ns: i64,
    ) -> Result<Record, Refused> {
        check_name(name)?;
        check_labels(&labels)?;
        let active = self.get(key)?;
        if active.kind != Kind::Active {
            let text = format!("snapshot {key:?} is {}, not active", active.kind);
            return Err(Refused::Precondition(text));
        }
        if self.by_name.contains_key(name) {
            return Err(Refused::Exists(name.to_owned()));
        }
        let parent = match parent {
            Some(parent) if parent != active.parent => {
                // What was written over one parent says nothing over another.
                if !active.parent.is_empty() {
                    let text = format!("snapshot {key:?} stands on {:?} already", active.parent);
                    return Err(Refused::Precondition(text));
                }
                if self.get(parent)?.kind != Kind::Committed {
                    let text = format!("parent {parent:?} is not a committed snapshot");
                    return Err(Refused::Invalid(text));
                }
                parent.to_owned()
            }
            _ => active.parent.clone(),
        };
        Ok(Record {
            name: name.to_owned(),
            kind: Kind::Committed,
            parent,
            labels,
            created_ns: now_ns,
            updated_ns: now_ns,
            ..active.clone()
        })
    }

    /// The snapshot with other labels: all of them, or those that `paths` name.
    ///
    /// # Errors
    /// One that is not there, or a path to what cannot change.
    pub fn relabelled(
        &self,
        name: &str,
        labels: &Labels,
        paths: &[String],
        now_ns: i64,
    ) -> Result<Record, Refused> {
        let mut record = self.get(name)?.clone();
        if paths.is_empty() || paths.iter().any(|path| path == "labels") {
            record.labels.clone_from(labels);
        }
        for path in paths.iter().filter(|path| *path != "labels") {
            let Some(label) = path.strip_prefix("labels.") else {
                let text = format!("{path:?} of snapshot {name:?} cannot change");
                return Err(Refused::Invalid(text));
            };
            match labels.get(label) {
                Some(value) => record.labels.insert(label.to_owned(), value.clone()),
                None => record.labels.remove(label),
            };
        }
        check_labels(&record.labels)?;
        record.updated_ns = now_ns;
        Ok(record)
    }

    /// The snapshot, when it can go.
    ///
    /// # Errors
    /// One that is not there, or that others stand on.
    pub fn removable(&self, name: &str) -> Result<&Record, Refused> {
        let record = self.get(name)?;
        match self.children.get(name) {
            None => Ok(record),
            Some(count) => Err(Refused::Precondition(format!(
                "cannot remove snapshot {name:?}: {count} stand on it"
            ))),
        }
    }
}

fn check_name(name: &str) -> Result<(), Refused> {
    match name.len() {
        0 => Err(Refused::Invalid("a snapshot needs a name".to_owned())),
        1..=NAME_MAX => Ok(()),
        len => Err(Refused::Invalid(format!(
            "a snapshot's name of {len} bytes is too long: at most {NAME_MAX}"
        ))),
    }
}

fn check_labels(labels: &Labels) -> Result<(), Refused> {
    let len: usize = labels
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    match len <= LABELS_MAX {
        true => Ok(()),
        false => Err(Refused::Invalid(format!(
            "labels of {len} bytes are too long: at most {LABELS_MAX}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    fn add(table: &mut Table, kind: Kind, name: &str, parent: &str) -> Result<(), Refused> {
        let record = table.new_snapshot(kind, name, parent, Labels::new(), 1)?;
        table.put(record);
        Ok(())
    }

    fn commit(table: &mut Table, name: &str, key: &str) -> Result<(), Refused> {
        let record = table.committed(name, key, None, Labels::new(), 2)?;
        table.replace(key, record);
        Ok(())
    }

    #[test]
    fn snapshots_stand_on_committed_ones_alone() {
        let mut table = Table::default();
        add(&mut table, Kind::Active, "a", "").unwrap();
        assert!(matches!(
            add(&mut table, Kind::View, "a", ""),
            Err(Refused::Exists(_))
        ));
        assert!(matches!(
            add(&mut table, Kind::Active, "b", "a"),
            Err(Refused::Invalid(_))
        ));
        assert!(matches!(
            add(&mut table, Kind::Active, "b", "x"),
            Err(Refused::NotFound(_))
        ));
        assert!(matches!(
            add(&mut table, Kind::Active, "", ""),
            Err(Refused::Invalid(_))
        ));
        commit(&mut table, "one", "a").unwrap();
        assert!(table.get("a").is_err());
        add(&mut table, Kind::Active, "b", "one").unwrap();
        assert!(matches!(
            commit(&mut table, "one", "b"),
            Err(Refused::Exists(_))
        ));
        add(&mut table, Kind::View, "v", "one").unwrap();
        assert!(matches!(
            commit(&mut table, "two", "v"),
            Err(Refused::Precondition(_))
        ));
        commit(&mut table, "two", "b").unwrap();
        let two = table.get("two").unwrap().clone();
        let below = table.below(&two).unwrap();
        assert_eq!((below.len(), below[0].name.as_str()), (1, "one"));
        // What others stand on stays, and goes after them.
        assert!(matches!(
            table.removable("one"),
            Err(Refused::Precondition(_))
        ));
        table.take("two").unwrap();
        assert!(table.removable("one").is_err());
        table.take("v").unwrap();
        assert_eq!(table.removable("one").unwrap().id, 0);
        // Numbers are not used again.
        add(&mut table, Kind::Active, "c", "one").unwrap();
        assert_eq!(table.get("c").unwrap().id, 3);
    }

    #[test]
    fn labels_change_by_path_and_nothing_else_does() {
        let mut table = Table::default();
        add(&mut table, Kind::Active, "a", "").unwrap();
        let all = labels(&[("l1", "1"), ("l2", "2"), ("l3", "3")]);
        let record = table.relabelled("a", &all, &[], 5).unwrap();
        assert_eq!(
            (&record.labels, record.updated_ns, record.created_ns),
            (&all, 5, 1)
        );
        table.replace("a", record);
        let paths = ["labels.l1".to_owned(), "labels.l2".to_owned()];
        let some = labels(&[("l1", "new"), ("l4", "4")]);
        let record = table.relabelled("a", &some, &paths, 6).unwrap();
        assert_eq!(record.labels, labels(&[("l1", "new"), ("l3", "3")]));
        let bad = table.relabelled("a", &some, &["parent".to_owned()], 6);
        assert!(matches!(bad, Err(Refused::Invalid(_))));
        assert!(table.relabelled("b", &some, &[], 6).is_err());
    }

    #[test]
    fn only_what_stands_on_nothing_can_be_put_on_something() {
        let mut table = Table::default();
        add(&mut table, Kind::Active, "a", "").unwrap();
        commit(&mut table, "one", "a").unwrap();
        add(&mut table, Kind::Active, "b", "").unwrap();
        let record = table.committed("two", "b", Some("one"), Labels::new(), 2);
        table.replace("b", record.unwrap());
        assert_eq!(table.get("two").unwrap().parent, "one");
        add(&mut table, Kind::Active, "c", "two").unwrap();
        let record = table.committed("three", "c", Some("one"), Labels::new(), 2);
        assert!(matches!(record, Err(Refused::Precondition(_))));
    }
}
