//! Editing TOML that somebody else wrote.

use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value};

use super::EditError;

/// Parses a file; the error names the line.
pub fn parse(text: &str) -> Result<DocumentMut, EditError> {
    text.parse::<DocumentMut>()
        .map_err(|error| EditError::Syntax(error.to_string().trim_end().to_owned()))
}

fn no_table(path: &[&str]) -> EditError {
    EditError::Kind {
        key: path.join("."),
        wanted: "table",
    }
}

/// A table and how far what stands in it is indented.
pub struct Spot<'a> {
    /// The table.
    pub table: &'a mut dyn TableLike,
    /// Blanks before its keys; none in a file that does not indent.
    pub indent: String,
}

/// The table at `path`, made where it is missing, indented as its neighbours are.
pub fn table<'a>(doc: &'a mut DocumentMut, path: &[&str]) -> Result<Spot<'a>, EditError> {
    let carried = comments(doc, path);
    let mut at = doc.as_item_mut();
    for (depth, key) in path.iter().enumerate() {
        let inline = at.is_inline_table();
        let here = at
            .as_table_like_mut()
            .ok_or_else(|| no_table(&path[..depth]))?;
        if here.get(key).is_none() {
            let indent = indent_of(here);
            let mut new = Table::new();
            // A heading is shown as soon as there is a key below it.
            new.set_implicit(true);
            new.decor_mut().set_prefix(format!("{carried}\n{indent}"));
            let new = match inline {
                true => Item::Value(Value::InlineTable(InlineTable::new())),
                false => Item::Table(new),
            };
            here.insert(key, new);
        }
        at = here.get_mut(key).ok_or_else(|| no_table(&path[..=depth]))?;
    }
    let heading = at
        .as_table()
        .and_then(|table| table.decor().prefix()?.as_str());
    let indent = within(&heading.map(indent).unwrap_or_default());
    let table = at.as_table_like_mut().ok_or_else(|| no_table(path))?;
    Ok(Spot { table, indent })
}

/// What stands below a heading that is indented so far.
fn within(heading: &str) -> String {
    match heading.is_empty() {
        true => String::new(),
        false => format!("{heading}  "),
    }
}

/// The comments at the end of a file that has no table yet: they stay before the one that comes now.
fn comments(doc: &mut DocumentMut, path: &[&str]) -> String {
    let first = path.first().is_some_and(|key| !doc.contains_key(key));
    if !first || !doc.iter().all(|(_, item)| item.is_value()) {
        return String::new();
    }
    let text = doc
        .trailing()
        .as_str()
        .unwrap_or_default()
        .trim_end_matches('\n');
    let text = match text.is_empty() {
        true => String::new(),
        false => format!("{text}\n"),
    };
    doc.set_trailing("");
    text
}

/// How far the headings of the tables within `parent` stand from the margin.
fn indent_of(parent: &dyn TableLike) -> String {
    let heading = parent.iter().find_map(|(_, item)| {
        let table = item.as_table().filter(|table| !table.is_dotted())?;
        match table.is_implicit() {
            true => Some(indent_of(table)),
            false => Some(indent(table.decor().prefix()?.as_str()?)),
        }
    });
    heading.unwrap_or_default()
}

/// Blanks behind the last end of a line.
fn indent(prefix: &str) -> String {
    let last = prefix.rsplit('\n').next().unwrap_or_default();
    match last.trim().is_empty() {
        true => last.to_owned(),
        false => String::new(),
    }
}

impl Spot<'_> {
    /// Sets a key, unless it says that already: comment and place of one that is there stay.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let mut value: Value = value.into();
        if let Some(Item::Value(old)) = self.table.get_mut(key) {
            if !same(old, &value) {
                *value.decor_mut() = old.decor().clone();
                *old = value;
            }
            return;
        }
        let like = self.table.iter().find_map(|(key, item)| {
            let key = self.table.key(key).filter(|_| item.is_value())?;
            Some(indent(key.leaf_decor().prefix()?.as_str()?)).filter(|it| !it.is_empty())
        });
        let indent = like.unwrap_or_else(|| self.indent.clone());
        self.table.insert(key, Item::Value(value));
        if let Some(mut key) = self.table.key_mut(key).filter(|_| !indent.is_empty()) {
            key.leaf_decor_mut().set_prefix(indent);
        }
    }

    /// Adds tables to the list of them under `key`, however that is written.
    ///
    /// # Errors
    /// A key that is something else.
    pub fn list(&mut self, key: &str, entries: &[Vec<(&str, String)>]) -> Result<(), EditError> {
        let inline = |entry: &[(&str, String)]| -> InlineTable {
            entry
                .iter()
                .map(|(key, value)| (*key, Value::from(value.as_str())))
                .collect()
        };
        if self.table.get(key).is_none() {
            self.table
                .insert(key, Item::ArrayOfTables(ArrayOfTables::new()));
        }
        match self.table.get_mut(key) {
            Some(Item::Value(Value::Array(array))) => {
                entries.iter().for_each(|entry| array.push(inline(entry)));
                Ok(())
            }
            Some(Item::ArrayOfTables(tables)) => {
                let like = tables.iter().last();
                let like =
                    like.and_then(|table| Some(table.decor().prefix()?.as_str()?.to_owned()));
                let heading = indent(like.as_deref().unwrap_or(&self.indent));
                for entry in entries {
                    let mut table = Table::new();
                    table.decor_mut().set_prefix(format!("\n{heading}"));
                    let indent = within(&heading);
                    let mut spot = Spot {
                        table: &mut table,
                        indent,
                    };
                    for (key, value) in entry {
                        spot.set(key, value.as_str());
                    }
                    tables.push(table);
                }
                Ok(())
            }
            _ => Err(EditError::Kind {
                key: key.to_owned(),
                wanted: "list of tables",
            }),
        }
    }
}

fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::String(a), Value::String(b)) => a.value() == b.value(),
        (Value::Boolean(a), Value::Boolean(b)) => a.value() == b.value(),
        (Value::Integer(a), Value::Integer(b)) => a.value() == b.value(),
        _ => false,
    }
}

/// Adds a string to an array, laid out as those before it.
pub fn push(array: &mut Array, text: &str) {
    let mut value = Value::from(text);
    let trailing = array.trailing().as_str().unwrap_or_default().to_owned();
    let lines = trailing.contains('\n');
    match array.get(array.len().wrapping_sub(1)) {
        Some(last) => {
            let prefix = last.decor().prefix().and_then(|prefix| prefix.as_str());
            // A comment behind the last comma is of what stands before it.
            let comment = trailing.trim_end_matches([' ', '\t', '\n']).to_owned();
            value.decor_mut().set_prefix(match (lines, prefix) {
                (true, Some(prefix)) => format!("{comment}\n{}", indent(prefix)),
                (true, None) => format!("{comment}\n  "),
                (false, _) => " ".to_owned(),
            });
            if lines {
                array.set_trailing("\n");
            }
        }
        None if lines => {
            value.decor_mut().set_prefix("\n  ");
            array.set_trailing("\n");
            array.set_trailing_comma(true);
        }
        None => {}
    }
    array.push_formatted(value);
}

/// The strings of an array, others passed over.
pub fn strings(item: Option<&Item>) -> Vec<&str> {
    let array = item.and_then(Item::as_array);
    array
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}
