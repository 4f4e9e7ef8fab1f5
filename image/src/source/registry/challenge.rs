//! `WWW-Authenticate`: what a registry wants to see before it answers.
//!
//! Source: RFC 9110, section 11.6.1; the distribution project's token authentication page.

/// One challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Longest header that is looked at, in bytes, and most parameters of it.
const HEADER_MAX: usize = 8 << 10;
const PARAMETERS_MAX: usize = 64;

/// The challenges in `header` that we can answer; malformed parts are passed over.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = header
        .get(..header.len().min(HEADER_MAX))
        .unwrap_or_default();
    let mut scheme = "";
    let mut parameters: Vec<(String, String)> = Vec::new();
    while parameters.len() <= PARAMETERS_MAX {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            break;
        }
        let (word, after) = token(rest);
        if word.is_empty() {
            break;
        }
        match after.trim_start().strip_prefix('=') {
            Some(value) => {
                let Some((value, after)) = parameter_value(value.trim_start()) else {
                    break;
                };
                parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            // A word without a value is the scheme of the next challenge.
            None => {
                challenges.extend(build(scheme, std::mem::take(&mut parameters)));
                scheme = word;
                rest = after;
            }
        }
    }
    challenges.extend(build(scheme, parameters));
    challenges
}

fn build(scheme: &str, parameters: Vec<(String, String)>) -> Option<Challenge> {
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let get = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    Some(Challenge::Bearer {
        realm: get("realm")?,
        service: get("service"),
        scope: get("scope"),
    })
}

fn token(text: &str) -> (&str, &str) {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    text.split_at(text.find(|c| !is_token(c)).unwrap_or(text.len()))
}

/// A token or a quoted string, and what follows it.
fn parameter_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        // Servers write addresses without quotes, which the grammar of tokens does not allow.
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return Some((value, &quoted[at + 1..])),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: own(service),
            scope: own(scope),
        }
    }

    #[test]
    fn what_servers_send() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#;
        let cases = [
            (
                hub,
                vec![bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:a/b:pull"),
                )],
            ),
            (r#"Basic realm="x""#, vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (
                r#"BEARER Realm = "r" , SERVICE=s"#,
                vec![bearer("r", Some("s"), None)],
            ),
            (
                r#"Basic realm="a, b", Bearer realm="c""#,
                vec![Challenge::Basic, bearer("c", None, None)],
            ),
            (
                r#"Negotiate, Bearer realm=http://x/t,service="q\"uote\\""#,
                vec![bearer("http://x/t", Some("q\"uote\\"), None)],
            ),
            (r#"Bearer service="no realm""#, vec![]),
            (r#"Bearer realm="not closed"#, vec![]),
            ("", vec![]),
            (",,,", vec![]),
            ("=", vec![]),
            ("Digest realm=x", vec![]),
        ];
        for (header, want) in cases {
            assert_eq!(parse(header), want, "{header}");
        }
        assert!(parse(&format!("Bearer {}", "a=b,".repeat(100_000))).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_or_passed_over(header in "\\PC{0,300}") {
            let _ = parse(&header);
        }
    }
}
