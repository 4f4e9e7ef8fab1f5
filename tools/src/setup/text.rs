//! What editors of structured text lose, put back: line endings and a mark at the beginning.

use similar::{DiffTag, TextDiff};

/// What some editors put before the first character.
const MARK: char = '\u{feff}';

/// A file's text without what parsers do not care for, for [`Lines::restore`] to put back.
pub struct Lines<'a> {
    before: &'a str,
    plain: String,
}

impl<'a> Lines<'a> {
    /// Takes `before` apart.
    pub fn of(before: &'a str) -> Self {
        let plain = before.trim_start_matches(MARK).replace("\r\n", "\n");
        Self { before, plain }
    }

    /// The text with `\n` alone.
    pub fn plain(&self) -> &str {
        &self.plain
    }

    /// `edited` with the lines that were there as they were, byte for byte, and new lines ending as most of
    /// the others do.
    pub fn restore(&self, edited: &str) -> String {
        if edited == self.plain {
            return self.before.to_owned();
        }
        if self.plain.is_empty() {
            return edited.trim_start_matches('\n').to_owned();
        }
        let marked = self.before.starts_with(MARK);
        let old: Vec<&str> = self
            .before
            .trim_start_matches(MARK)
            .split_inclusive('\n')
            .collect();
        let new: Vec<&str> = edited.split_inclusive('\n').collect();
        let theirs = old.iter().filter(|line| line.ends_with("\r\n")).count();
        let ending = if theirs * 2 > old.len() { "\r\n" } else { "\n" };
        let plain: Vec<&str> = self.plain.split_inclusive('\n').collect();
        let diff = TextDiff::from_slices(&plain, &new);
        let mut text = String::from(if marked { "\u{feff}" } else { "" });
        for op in diff.ops() {
            if op.tag() == DiffTag::Equal {
                text.extend(old[op.old_range()].iter().copied());
                continue;
            }
            for line in &new[op.new_range()] {
                match line.strip_suffix('\n') {
                    Some(line) => text.extend([line, ending]),
                    None => text.push_str(line),
                }
            }
        }
        text
    }
}

/// What changes, as `diff -u` shows it.
pub fn unified(path: &str, before: Option<&str>, after: &str) -> String {
    let diff = TextDiff::from_lines(before.unwrap_or_default(), after);
    let from = if before.is_some() { path } else { "/dev/null" };
    diff.unified_diff().header(from, path).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_stay_keep_their_endings() {
        let before = "\u{feff}a\r\nb\r\n\r\nc\n";
        let lines = Lines::of(before);
        assert_eq!(lines.plain(), "a\nb\n\nc\n");
        assert_eq!(lines.restore(lines.plain()), before);
        assert_eq!(
            lines.restore("a\nx\n\nc\nd\n"),
            "\u{feff}a\r\nx\r\n\r\nc\nd\r\n"
        );
        assert_eq!(Lines::of("").restore("a\n"), "a\n");
        assert_eq!(Lines::of("a").restore("a\nb\n"), "a\nb\n");
    }
}
