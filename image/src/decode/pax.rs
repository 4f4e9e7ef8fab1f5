//! PAX extended header records: `LENGTH KEYWORD=VALUE\n`, the length in decimal and counting
//! itself. Values may hold any byte, which is why they are walked by length.
//!
//! Source: POSIX.1-2017 `pax`, "pax Extended Header".

use super::error::DecodeErrorKind as Kind;
use crate::tree::Time;

/// Walks the records of one extended header.
pub(super) struct Records<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), Kind>;

    fn next(&mut self) -> Option<Self::Item> {
        // Some writers fill the rest of the header with NULs.
        if self.0.iter().all(|byte| *byte == 0) {
            return None;
        }
        let record = split_record(self.0);
        // Nothing after a bad record can be trusted to begin where it seems to.
        self.0 = record.as_ref().map_or(&[], |(_, rest)| *rest);
        Some(record.map(|(record, _)| record))
    }
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn split_record(data: &[u8]) -> Result<(Record<'_>, &[u8]), Kind> {
    // Twenty digits hold any length; more is no number that we want to add up.
    let space = data.iter().take(21).position(|byte| *byte == b' ');
    let space = space.ok_or(Kind::Pax("a record does not begin with its length"))?;
    let length = decimal(&data[..space])
        .and_then(|length| usize::try_from(length).ok())
        .ok_or(Kind::Pax("the length of a record is not a number"))?;
    if length > data.len() || length < space + 2 {
        return Err(Kind::Pax("the length of a record does not fit"));
    }
    let (record, rest) = data.split_at(length);
    let Some((b'\n', body)) = record[space + 1..].split_last() else {
        return Err(Kind::Pax("a record does not end with a newline"));
    };
    match body.iter().position(|byte| *byte == b'=') {
        Some(0) => Err(Kind::Pax("a record has no keyword")),
        Some(equals) => Ok(((&body[..equals], &body[equals + 1..]), rest)),
        None => Err(Kind::Pax("a record has no \"=\"")),
    }
}

/// Decimal digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Seconds with any number of decimals, perhaps negative; what is below a nanosecond is cut.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.split_first() {
        Some((b'-', rest)) => (true, rest),
        _ => (false, text),
    };
    let point = text
        .iter()
        .position(|byte| *byte == b'.')
        .unwrap_or(text.len());
    let secs = i64::try_from(decimal(&text[..point])?).ok()?;
    let fraction = text.get(point + 1..).unwrap_or_default();
    let mut nanos = 0;
    for place in 0..fraction.len().max(9) {
        let digit = match fraction.get(place) {
            Some(digit @ b'0'..=b'9') => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        if place < 9 {
            nanos = nanos * 10 + digit;
        }
    }
    Some(match (negative, nanos) {
        (false, _) => Time { secs, nanos },
        (true, 0) => Time { secs: -secs, nanos },
        (true, _) => Time {
            secs: -secs - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times() {
        let at = |secs, nanos| Some(Time { secs, nanos });
        for (text, want) in [
            ("0", at(0, 0)),
            ("1700000000.123456789", at(1_700_000_000, 123_456_789)),
            ("1.5", at(1, 500_000_000)),
            ("1.", at(1, 0)),
            ("1.0000000019", at(1, 1)),
            ("-1", at(-1, 0)),
            ("-1.5", at(-2, 500_000_000)),
            ("-0.000000001", at(-1, 999_999_999)),
            ("9223372036854775807", at(i64::MAX, 0)),
            ("9223372036854775808", None),
            ("", None),
            ("-", None),
            (".5", None),
            ("1.x", None),
            ("1e3", None),
            ("+1", None),
        ] {
            assert_eq!(time(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn records() {
        let data = b"9 k=a=\nb\n5 e=\n\0\0";
        let all: Result<Vec<_>, _> = Records(data).collect();
        assert_eq!(all.unwrap(), [(&b"k"[..], &b"a=\nb"[..]), (b"e", b"")]);
        for bad in [
            &b"k=v\n"[..],
            b"5 k=v\n",
            b"7 k=v\n",
            b"99999999999999999999999 k=v\n",
            b"18446744073709551615 k=v\n",
            b"0 k=v\n",
            b"2 \n",
            b"3 \n\n",
            b"5 =v\n",
            b"5 kv\n",
            b"-6 k=v\n",
        ] {
            assert!(Records(bad).any(|record| record.is_err()), "{bad:?}");
        }
    }
}
