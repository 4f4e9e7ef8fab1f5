//! Lists of tags: pages, and registries whose lists are none or do not end.

use std::fmt::Write as _;

use crate::{
    open, options,
    server::{Reply, Request, Server},
};

/// A page of at most two of `tags`, as a registry gives it that allows no more.
fn page(tags: &[&str], request: &Request) -> Reply {
    let last = request
        .query
        .split('&')
        .find_map(|part| part.strip_prefix("last="));
    let from = last.map_or(0, |last| {
        tags.iter()
            .position(|tag| *tag == last)
            .expect("a tag of ours")
            + 1
    });
    let shown = &tags[from..tags.len().min(from + 2)];
    let mut body = String::from("{\"name\": \"org/app\", \"tags\": ");
    write!(body, "{shown:?}}}").unwrap();
    let reply = Reply::new(200, body);
    match from + 2 < tags.len() {
        true => reply.with("Link", "</v2/org/app/tags/list?n=2&last=x>; rel=\"next\""),
        false => reply,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_pages_are_read() {
    const TAGS: [&str; 5] = ["1", "1.0", "2-rc.1", "_x", "latest"];
    let server = Server::start(|request, _| page(&TAGS, request));
    let tags = open(&server, &options()).await.tags().await.unwrap();
    let found: Vec<String> = tags.iter().map(ToString::to_string).collect();
    let wanted = TAGS.map(|tag| format!("{}/org/app:{tag}", server.host()));
    assert_eq!(found, wanted);
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    assert!(
        seen.iter().all(|r| r.path == "/v2/org/app/tags/list"),
        "{seen:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_may_have_no_tags() {
    for body in [r#"{"tags":null}"#, r#"{"tags":[]}"#, "{}"] {
        let server = Server::start(move |_, _| Reply::new(200, body));
        assert!(
            open(&server, &options())
                .await
                .tags()
                .await
                .unwrap()
                .is_empty()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_are_none_are_refused() {
    let endless = |tags: &'static str| {
        move |_: &Request, _: usize| Reply::new(200, tags).with("Link", "<x>; rel=\"next\"")
    };
    let once = |text: &'static str| move |_: &Request, _: usize| Reply::new(200, text);
    let servers = [
        (Server::start(endless(r#"{"tags":["a"]}"#)), "does not end"),
        (Server::start(endless(r#"{"tags":[]}"#)), "does not end"),
        (Server::start(once("<html>")), "is not one"),
        (
            Server::start(once(r#"{"tags":["a","../../b"]}"#)),
            "../../b",
        ),
        (Server::start(once(r#"{"tags":["a&n=1"]}"#)), "a&n=1"),
        (Server::start(once(r#"{"tags":7}"#)), "is not one"),
    ];
    for (server, wanted) in servers {
        let error = open(&server, &options()).await.tags().await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}, not {wanted}");
    }
    let long = format!("{{\"tags\":[\"{}\"]}}", "a".repeat(2 << 20));
    let server = Server::start(move |_, _| Reply::new(200, long.clone()));
    let error = open(&server, &options()).await.tags().await.unwrap_err();
    assert!(error.to_string().contains("larger than"), "{error}");
}
