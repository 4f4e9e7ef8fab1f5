//! Snapshots on the disk: a file of JSON lines, each a snapshot as it is now or the number of one that is
//! gone. A line counts when it is whole, so what a kill or a power cut leaves of the last one is dropped; a
//! line is on the disk before anybody hears of it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::table::Record;

/// The file is written anew when it has this many lines more than twice what it needs.
const SPARE: usize = 1024;

/// Longest line, in bytes: a record with all its labels.
const LINE_MAX: usize = 4 << 20;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Put(Record),
    Gone(u64),
}

/// The file, open for more lines.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes that are whole lines.
    len: u64,
    lines: usize,
}

impl Journal {
    /// Opens the file, or makes it, and gives what it has.
    ///
    /// # Errors
    /// What the file system says, or a line in the middle that is damaged.
    pub fn open(path: &Path) -> io::Result<(Self, Vec<Record>)> {
        let records = match File::open(path) {
            Ok(file) => read(file, path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut journal = Self {
            path: path.to_owned(),
            file: OpenOptions::new().append(true).create(true).open(path)?,
            len: 0,
            lines: 0,
        };
        journal.rewrite(&records)?;
        Ok((journal, records))
    }

    /// Notes a snapshot, new or changed.
    ///
    /// # Errors
    /// What the file system says; nothing is noted then.
    pub fn put(&mut self, record: &Record) -> io::Result<()> {
        self.append(&Line::Put(record.clone()))
    }

    /// Notes that a snapshot is gone.
    ///
    /// # Errors
    /// As [`Journal::put`].
    pub fn gone(&mut self, id: u64) -> io::Result<()> {
        self.append(&Line::Gone(id))
    }

    fn append(&mut self, line: &Line) -> io::Result<()> {
        let text = text(line)?;
        let written = self
            .file
            .write_all(&text)
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // Half a line must not stand before the next one.
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += text.len() as u64;
        self.lines += 1;
        Ok(())
    }

    /// Whether so much of the file is of the past that it should be written anew with `alive` records.
    pub fn is_long(&self, alive: usize) -> bool {
        self.lines > 2 * alive + SPARE
    }

    /// Writes the file anew.
    ///
    /// # Errors
    /// What the file system says; the old file stays then.
    pub fn rewrite<'a>(&mut self, records: impl IntoIterator<Item = &'a Record>) -> io::Result<()> {
        let fresh = self.path.with_extension("new");
        let mut out = BufWriter::new(File::create(&fresh)?);
        let (mut len, mut lines) = (0, 0);
        for record in records {
            let text = text(&Line::Put(record.clone()))?;
            out.write_all(&text)?;
            len += text.len() as u64;
            lines += 1;
        }
        out.into_inner()?.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        (self.len, self.lines) = (len, lines);
        Ok(())
    }
}

fn text(line: &Line) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    Ok(text)
}

fn read(file: File, path: &Path) -> io::Result<Vec<Record>> {
    let mut records = BTreeMap::new();
    let mut lines = BufReader::new(file);
    for number in 1.. {
        let mut line = Vec::new();
        let limited = io::Read::take(&mut lines, LINE_MAX as u64).read_until(b'\n', &mut line)?;
        if limited == 0 || line.last() != Some(&b'\n') {
            break;
        }
        match serde_json::from_slice(&line) {
            Ok(Line::Put(record)) => drop(records.insert(record.id, record)),
            Ok(Line::Gone(id)) => drop(records.remove(&id)),
            Err(error) => {
                let text = format!("line {number} of {} is damaged: {error}", path.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
    Ok(records.into_values().collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::table::{Kind, Labels, Usage},
        *,
    };

    fn record(id: u64, name: &str) -> Record {
        Record {
            id,
            name: name.to_owned(),
            parent: String::new(),
            kind: Kind::Committed,
            labels: Labels::from([("a\nb".to_owned(), "\"c\"".to_owned())]),
            created_ns: 1,
            updated_ns: 2,
            layer: None,
            usage: Usage::default(),
        }
    }

    #[test]
    fn what_was_noted_is_there_whatever_end_it_came_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, records) = Journal::open(&path).unwrap();
        assert!(records.is_empty());
        for id in 0..4 {
            journal.put(&record(id, "first")).unwrap();
        }
        journal.put(&record(2, "second")).unwrap();
        journal.gone(1).unwrap();
        let whole = fs::read(&path).unwrap();
        let kept = [record(0, "first"), record(2, "second"), record(3, "first")];
        // Cut anywhere, it has what stood before the cut.
        let mut most = 0;
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (_, records) = Journal::open(&path).unwrap();
            let lines = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(
                records.len(),
                lines.min(4) - usize::from(lines == 6),
                "{cut}"
            );
            most = most.max(records.len());
            if cut == whole.len() {
                assert_eq!(records, kept);
            }
        }
        assert_eq!(most, 4);
        // It was written anew, with what is left, and goes on from there.
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.gone(0).unwrap();
        assert_eq!(Journal::open(&path).unwrap().1, kept[1..]);
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        fs::write(&path, "{\"gone\":1}\nx\n{\"gone\":2}\n").unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
