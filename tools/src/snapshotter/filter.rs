//! containerd's filters, as `ListSnapshots` takes them: selectors joined by commas, all of which have to
//! hold, like `kind==active,labels."containerd.io/snapshot.ref"==sha256:…`. A selector is a path alone
//! (there is something), or a path, `==`, `!=` or `~=` (a regular expression), and a value, which may be
//! quoted (containerd, `pkg/filters`).

use regex::Regex;

use super::table::Record;

/// Longest filter, in bytes.
const FILTER_MAX: usize = 16 << 10;

/// Largest compiled expression, in bytes.
const EXPRESSION_MAX: usize = 1 << 20;

/// Why a text is no filter.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("filter {text:?}: {reason}")]
pub struct FilterError {
    text: String,
    reason: String,
}

/// Selectors that all have to hold.
#[derive(Debug)]
pub struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    wants: Wants,
}

#[derive(Debug)]
enum Wants {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Reads one filter. The empty one holds for everything.
    ///
    /// # Errors
    /// Text that is no filter.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        let error = |reason: String| FilterError {
            text: text.chars().take(100).collect(),
            reason,
        };
        if text.len() > FILTER_MAX {
            return Err(error(format!("longer than {FILTER_MAX} bytes")));
        }
        let mut rest = Rest(text);
        let mut selectors = Vec::new();
        while !rest.0.is_empty() {
            if !selectors.is_empty() {
                rest.symbol(",")
                    .ok_or_else(|| error(format!("a comma is missing before {:?}", rest.0)))?;
            }
            selectors.push(rest.selector().map_err(error)?);
        }
        Ok(Self(selectors))
    }

    /// Whether the snapshot is meant.
    pub fn holds(&self, record: &Record) -> bool {
        self.0.iter().all(|selector| {
            let found = field(record, &selector.path);
            let value = found.as_deref().unwrap_or_default();
            match &selector.wants {
                Wants::Present => found.is_some(),
                Wants::Equal(wanted) => found.is_some() && value == wanted,
                Wants::NotEqual(other) => value != other,
                Wants::Matches(expression) => found.is_some() && expression.is_match(value),
            }
        })
    }
}

fn field(record: &Record, path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    match (first.as_str(), rest.is_empty()) {
        ("name", true) => Some(record.name.clone()),
        // There is one, be it none.
        ("parent", true) => Some(record.parent.clone()),
        ("kind", true) => Some(record.kind.to_string()),
        ("labels", false) => record.labels.get(&rest.join(".")).cloned(),
        _ => None,
    }
}

struct Rest<'a>(&'a str);

impl Rest<'_> {
    fn symbol(&mut self, symbol: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(symbol)?;
        Some(())
    }

    fn selector(&mut self) -> Result<Selector, String> {
        let mut path = vec![self.word(false)?];
        while self.symbol(".").is_some() {
            path.push(self.word(false)?);
        }
        let wants = if self.symbol("==").is_some() {
            Wants::Equal(self.word(true)?)
        } else if self.symbol("!=").is_some() {
            Wants::NotEqual(self.word(true)?)
        } else if self.symbol("~=").is_some() {
            let expression = self.word(true)?;
            let built = regex::RegexBuilder::new(&expression)
                .size_limit(EXPRESSION_MAX)
                .build();
            Wants::Matches(built.map_err(|error| error.to_string())?)
        } else {
            Wants::Present
        };
        Ok(Selector { path, wants })
    }

    /// A quoted string, or what goes on to the next comma (of a value), or a name (in a path).
    fn word(&mut self, value: bool) -> Result<String, String> {
        if let Some(quote) = self.0.chars().next().filter(|c| "\"/|".contains(*c))
            && (quote == '"' || value)
        {
            return self.quoted(quote);
        }
        let ends = |c: char| match value {
            true => c == ',',
            false => !(c.is_ascii_alphanumeric() || c == '_'),
        };
        let end = self.0.find(ends).unwrap_or(self.0.len());
        if end == 0 && !value {
            return Err(format!("a name is missing before {:?}", self.0));
        }
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        Ok(word.to_owned())
    }

    /// Up to the same quote; a backslash takes the next character's meaning away.
    fn quoted(&mut self, quote: char) -> Result<String, String> {
        let mut word = String::new();
        let mut chars = self.0.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.0 = &self.0[at + c.len_utf8()..];
                    return Ok(word);
                }
                // In an expression the backslash is the expression's own.
                '\\' if quote == '"' => word.extend(chars.next().map(|(_, c)| c)),
                c => word.push(c),
            }
        }
        Err(format!("a quote does not end: {}", self.0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{
        super::table::{Kind, Labels, Usage},
        *,
    };

    fn record() -> Record {
        let labels = [("containerd.io/snapshot.ref", "sha256:a"), ("plain", "x,y")];
        Record {
            id: 1,
            name: "default/3/sha256:a".to_owned(),
            parent: "p".to_owned(),
            kind: Kind::Committed,
            labels: Labels::from(labels.map(|(key, value)| (key.to_owned(), value.to_owned()))),
            created_ns: 0,
            updated_ns: 0,
            layer: None,
            usage: Usage::default(),
        }
    }

    #[test]
    fn selectors_hold_as_in_containerd() {
        let holds = |text: &str| Filter::parse(text).unwrap().holds(&record());
        for yes in [
            "",
            "kind==committed",
            "name==default/3/sha256:a,parent==\"p\"",
            "labels.\"containerd.io/snapshot.ref\"==sha256:a,parent==\"p\"",
            "labels.plain",
            "parent",
            "labels.plain==\"x,y\"",
            "labels.plain~=\"^x,\"",
            "labels.plain~=/^x,/",
            "labels.plain~=|y$|",
            "kind!=active",
            "labels.other!=x",
        ] {
            assert!(holds(yes), "{yes}");
        }
        for no in [
            "kind==active",
            "kind==committed,parent==q",
            "labels.other",
            "labels.other==\"\"",
            "nothing==x",
            "labels.plain~=^y",
        ] {
            assert!(!holds(no), "{no}");
        }
        for bad in [
            "==x",
            "kind==\"x",
            "kind==a,,",
            "labels.",
            "name~=(",
            "a b",
            &"x".repeat(20_000),
        ] {
            assert!(Filter::parse(bad).is_err(), "{bad:.20}");
        }
    }
}
