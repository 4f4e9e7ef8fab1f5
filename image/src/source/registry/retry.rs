//! When to send a request again.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::source::options::RetryPolicy;

/// Waits between the tries of one request.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: RetryPolicy,
    attempts: u32,
    failures: u32,
}

impl Backoff {
    /// `attempts` tries in all, waiting as `policy` says.
    pub(crate) fn new(policy: RetryPolicy, attempts: u32) -> Self {
        Self {
            policy,
            attempts: attempts.max(1),
            failures: 0,
        }
    }

    /// Counts a failure and gives the wait before the next try; `None` when there is none left.
    pub(crate) fn failed(&mut self, asked: Option<Duration>) -> Option<Duration> {
        self.failures += 1;
        if self.failures >= self.attempts {
            return None;
        }
        Some(delay(&self.policy, self.failures, asked, random()))
    }

    /// Forgets earlier failures: there was progress.
    pub(crate) fn progress(&mut self) {
        self.failures = 0;
    }
}

/// The wait after `failures` failures: doubling, half of it random so that many clients do not
/// come back together; never less than the server asked for, never more than the policy allows.
fn delay(policy: &RetryPolicy, failures: u32, asked: Option<Duration>, random: u64) -> Duration {
    let full = policy
        .base
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(policy.max);
    let half = full / 2;
    let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX - 1);
    let wait = half + Duration::from_nanos(random % (nanos + 1));
    wait.max(asked.unwrap_or_default()).min(policy.max)
}

/// A number that differs between calls and processes; only good for spreading load.
fn random() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}

/// `Retry-After`: seconds, or a date in the preferred format of HTTP.
///
/// Source: RFC 9110, sections 10.2.3 and 5.6.7. The two obsolete date formats are not read.
pub(crate) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(seconds)));
    }
    let at = UNIX_EPOCH + Duration::from_secs(parse_http_date(value)?);
    Some(at.duration_since(now).unwrap_or_default())
}

/// Seconds since the epoch of a date like `Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words
        .next()?
        .parse()
        .ok()
        .filter(|day| (1..=31).contains(day))?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = words
        .next()?
        .parse()
        .ok()
        .filter(|year| (1970..=9999).contains(year))?;
    let mut clock = words
        .next()?
        .split(':')
        .map(|part| part.parse::<u64>().ok());
    let mut part = |limit| clock.next().flatten().filter(|part| *part < limit);
    let (hour, minute, second) = (part(24)?, part(60)?, part(61)?);
    if words.next() != Some("GMT") {
        return None;
    }
    // Days since 1970 with years that begin in March, so that the leap day is the last one.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    let days = days.checked_sub(719_468)?;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_stay_in_bounds() {
        let policy = RetryPolicy {
            base: Duration::from_millis(100),
            max: Duration::from_secs(3),
            ..RetryPolicy::default()
        };
        let cases = [
            (1, 50, 100),
            (2, 100, 200),
            (3, 200, 400),
            (10, 1500, 3000),
            (1000, 1500, 3000),
        ];
        for (failures, low, high) in cases {
            for random in [0, 1, 12_345_678, u64::MAX] {
                let wait = delay(&policy, failures, None, random).as_millis();
                assert!((low..=high).contains(&wait), "{failures}: {wait}");
            }
        }
        let asked = |seconds| delay(&policy, 1, Some(Duration::from_secs(seconds)), 0);
        assert_eq!(asked(2), Duration::from_secs(2));
        assert_eq!(asked(3600), Duration::from_secs(3));
        let mut backoff = Backoff::new(policy, 2);
        assert!(backoff.failed(None).is_some());
        assert!(backoff.failed(None).is_none());
        backoff.progress();
        assert!(backoff.failed(None).is_some());
        assert!(Backoff::new(policy, 0).failed(None).is_none());
    }

    #[test]
    fn retry_after_in_both_forms() {
        let epoch = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        for (value, now, want) in [
            ("120", 0, Some(120)),
            (" 0 ", 0, Some(0)),
            (date, 784_111_777 - 5, Some(5)),
            (date, 784_111_777 + 5, Some(0)),
            ("Thu, 01 Jan 1970 00:00:10 GMT", 0, Some(10)),
            ("Thu, 29 Feb 2024 00:00:00 GMT", 1_709_164_800, Some(0)),
            ("-1", 0, None),
            ("soon", 0, None),
            ("Sun, 06 Foo 1994 08:49:37 GMT", 0, None),
            ("Sun, 06 Nov 1994 25:49:37 GMT", 0, None),
            ("Sun, 06 Nov 1994 08:49:37 CET", 0, None),
            ("", 0, None),
        ] {
            let got = parse_retry_after(value, epoch(now)).map(|wait| wait.as_secs());
            assert_eq!(got, want, "{value}");
        }
    }
}
