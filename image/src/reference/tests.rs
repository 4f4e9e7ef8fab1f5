#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;

use super::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn normalises_what_people_type() {
    let digest = format!("sha256:{HEX}");
    let cases = [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("library/debian", "docker.io/library/debian:latest"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("quay.io/org/app:v1", "quay.io/org/app:v1"),
        ("Quay.IO/org/app", "quay.io/org/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        (
            "localhost:5000/a/b__c/d-e--f.g:T_1.-",
            "localhost:5000/a/b__c/d-e--f.g:T_1.-",
        ),
        ("127.0.0.1:5000/app:1", "127.0.0.1:5000/app:1"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("[2001:DB8::1]/x:2", "[2001:db8::1]/x:2"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
    ];
    for (text, want) in cases {
        assert_eq!(
            text.parse::<Reference>().unwrap().to_string(),
            want,
            "{text}"
        );
    }
    let by_digest: Reference = format!("quay.io/a@{digest}").parse().unwrap();
    assert_eq!(by_digest.to_string(), format!("quay.io/a@{digest}"));
    assert_eq!(by_digest.manifest_name(), digest);
    assert_eq!(by_digest.name().tag, digest);
    assert_eq!(by_digest.name().to_string(), by_digest.to_string());
    let both: Reference = format!("a:1@{digest}").parse().unwrap();
    assert_eq!(
        (both.tag(), both.manifest_name()),
        (Some("1"), digest.clone())
    );
    assert_eq!(both.name().tag, "1");
}

#[test]
fn refuses_what_is_no_reference() {
    let long = "a".repeat(256);
    let tag = format!("a:{}", "t".repeat(129));
    let sha512 = format!("a@sha512:{HEX}{HEX}");
    for text in [
        "",
        ":tag",
        "@",
        "a:",
        "a@",
        "a@sha256:12",
        &sha512,
        "localhost/",
        "a//b",
        "/a",
        "a/",
        "app:tag:tag",
        "App",
        "A/a",
        "me/App",
        "a b",
        "a\0b",
        "a/../b",
        "..",
        ".a",
        "a.",
        "-a",
        "a-",
        "a..b",
        "a___b",
        "a_.b",
        "a:-x",
        "a:.x",
        &tag,
        &long,
        "[::1/x",
        "[::1]x/y",
        "[zz::]/x",
        "host:/x",
        "host:99999/x",
        "host:0/x",
        "host:12x/y",
        "-h.x/y",
        "h..x/y",
        "ä.de/x",
        "a:é",
        HEX,
        "https://quay.io/a",
        "docker://a",
    ] {
        assert!(text.parse::<Reference>().is_err(), "{text:?}");
    }
}

#[test]
fn a_file_name_becomes_a_component() {
    for (text, want) in [
        ("My App (1).tar", "my-app-1-tar"),
        ("image.tar", "image.tar"),
        ("..", "image"),
        ("__x__", "x"),
        ("ärger", "rger"),
        ("", "image"),
    ] {
        let got = component_from(text);
        assert_eq!(got, want);
        assert!(is_component(&got), "{text:?} gave {got:?}");
    }
}

proptest! {
    #[test]
    fn any_text_is_refused_or_printed_back_to_itself(text in "\\PC{0,80}") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn text_near_the_grammar_too(text in "([a-zA-Z0-9.:\\[\\]-]{1,12}/)?[a-z0-9._/-]{1,20}(:[a-z0-9._-]{1,9})?") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn every_file_name_gives_a_component(text in "\\PC{0,300}") {
        prop_assert!(is_component(&component_from(&text)));
    }
}
