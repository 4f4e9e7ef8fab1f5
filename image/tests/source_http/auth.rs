//! Who asks: tokens, passwords, helpers, redirects; and that no secret gets where it should not.

use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use harbour_image::source::{AuthOptions, Credential, ErrorKind, SourceError, SourceOptions};

use crate::{
    fixture::Image,
    options, pull, resolve,
    server::{Reply, Request, Server},
    whole,
};

const BASIC: &str = "Basic dXNlcjpzM2NyZXQ=";

fn with_password(options: SourceOptions) -> SourceOptions {
    let credential = Credential::Password {
        user: "user".to_owned(),
        password: "s3cret".to_owned(),
    };
    with(options, credential)
}

fn with(options: SourceOptions, credential: Credential) -> SourceOptions {
    SourceOptions {
        auth: AuthOptions {
            credential: Some(credential),
            ..AuthOptions::default()
        },
        ..options
    }
}

/// A registry that wants a token, and its token server under `/token` of the same address.
/// A token is good for `uses` requests.
fn token_registry(image: Image, uses: usize, allow: fn(&Request) -> bool) -> Server {
    let (issued, used) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let host: Arc<OnceLock<String>> = Arc::default();
    let own = Arc::clone(&host);
    let server = Server::start(move |request, _| {
        if request.path == "/token" {
            if !allow(request) {
                return Reply::new(401, r#"{"details":"s3cret"}"#);
            }
            let number = issued.fetch_add(1, Ordering::SeqCst) + 1;
            used.store(0, Ordering::SeqCst);
            return Reply::new(
                200,
                format!(r#"{{"token":"t0ken{number}","expires_in":300}}"#),
            );
        }
        let want = format!("Bearer t0ken{}", issued.load(Ordering::SeqCst));
        if request.header("authorization") != Some(&want)
            || used.fetch_add(1, Ordering::SeqCst) >= uses
        {
            let realm = format!("http://{}/token", own.get().unwrap());
            let challenge = format!(
                r#"Bearer realm="{realm}",service="reg, istry",scope="repository:org/app:pull""#
            );
            return Reply::new(401, "").with("WWW-Authenticate", challenge);
        }
        image.answer(request)
    });
    host.set(server.host()).unwrap();
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_once_with_the_scope_and_password() {
    let image = Image::new("amd64", 3, 10_000);
    let server = token_registry(image.clone(), usize::MAX, |request| {
        request.header("authorization") == Some(BASIC)
    });
    pull(&server, &image, &with_password(options())).await;
    let tokens = server.seen_at("/token");
    assert_eq!(tokens.len(), 1);
    assert_eq!(
        tokens[0].query,
        "service=reg%2C+istry&scope=repository%3Aorg%2Fapp%3Apull"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_tokens_and_tokens_that_run_out() {
    let image = Image::new("amd64", 4, 10_000);
    let server = token_registry(image.clone(), 2, |request| {
        request.header("authorization").is_none()
    });
    pull(&server, &image, &options()).await;
    assert!(server.seen_at("/token").len() >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_changed_for_a_token() {
    let image = Image::new("amd64", 1, 1000);
    let server = token_registry(image.clone(), usize::MAX, |request| {
        let body = &request.body;
        request.method == "POST"
            && [
                "grant_type=refresh_token",
                "refresh_token=s3cret%2Fid",
                "scope=repository%3Aorg%2Fapp%3Apull",
            ]
            .iter()
            .all(|part| body.contains(part))
    });
    pull(
        &server,
        &image,
        &with(options(), Credential::IdentityToken("s3cret/id".to_owned())),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authorisation() {
    let image = Image::new("amd64", 2, 1000);
    let own = image.clone();
    let server = Server::start(move |request, _| match request.header("authorization") {
        Some(BASIC) => own.answer(request),
        _ => Reply::new(401, "").with("WWW-Authenticate", r#"Basic realm="registry""#),
    });
    pull(&server, &image, &with_password(options())).await;
    let error = resolve(&server, &options()).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Denied { status: 401, .. }),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("log in"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_end_and_tell_no_secret() {
    let image = Image::new("amd64", 1, 1000);
    let refused = token_registry(image.clone(), usize::MAX, |_| false);
    let useless = token_registry(image, 0, |_| true);
    let forbidden = Server::start(|_, _| Reply::new(403, "s3cret"));
    let basic = Server::start(|_, _| Reply::new(401, "s3cret").with("WWW-Authenticate", "Basic"));
    let silent = Server::start(|_, _| Reply::new(401, "s3cret"));
    let failing = Server::start(|_, _| Reply::new(500, r#"{"errors":[{"code":"s3cret"}]}"#));
    for (name, server) in [
        ("refused", &refused),
        ("useless", &useless),
        ("forbidden", &forbidden),
        ("basic", &basic),
        ("silent", &silent),
        ("failing", &failing),
    ] {
        let options = with_password(options());
        let error = resolve(server, &options).await.unwrap_err();
        let text = whole(&error) + &format!("{options:?}");
        for secret in ["s3cret", "dXNlcjpzM2NyZXQ", "t0ken"] {
            assert!(!text.contains(secret), "{name}: {text}");
        }
        assert!(
            matches!(error.kind(), ErrorKind::Denied | ErrorKind::Retry),
            "{name}: {error}"
        );
        assert!(
            server.seen().len() < 20,
            "{name}: {} requests",
            server.seen().len()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn token_servers_that_are_refused() {
    for (realm, why) in [
        ("ftp://127.0.0.1/token", "not one of HTTP"),
        ("nothing", "no address"),
        ("http://user:s3cret@127.0.0.1/token", "a user"),
    ] {
        let challenge = format!(r#"Bearer realm="{realm}""#);
        let server = Server::start(move |_, _| {
            Reply::new(401, "").with("WWW-Authenticate", challenge.clone())
        });
        let error = resolve(&server, &options()).await.unwrap_err();
        let text = whole(&error);
        assert!(text.contains(why) && !text.contains("s3cret"), "{text}");
    }
    for body in [
        "",
        "{}",
        r#"{"token":""}"#,
        r#"{"token":"a\nb"}"#,
        "not json",
    ] {
        let host: Arc<OnceLock<String>> = Arc::default();
        let own = Arc::clone(&host);
        let server = Server::start(move |request, _| match request.path.as_str() {
            "/token" => Reply::new(200, body),
            _ => Reply::new(401, "").with(
                "WWW-Authenticate",
                format!(r#"Bearer realm="http://{}/token""#, own.get().unwrap()),
            ),
        });
        host.set(server.host()).unwrap();
        assert!(resolve(&server, &options()).await.is_err(), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_carry_no_authorisation_to_other_servers() {
    let image = Image::new("amd64", 2, 50_000);
    let store = image.clone();
    let storage = Server::start(move |request, _| {
        assert!(request.query.contains("signature=s3cret"));
        store.answer(request)
    });
    let (own, target) = (image.clone(), storage.host());
    let server = Server::start(move |request, _| match request.header("authorization") {
        Some(BASIC) if request.path.contains("/blobs/") => Reply::new(307, "").with(
            "Location",
            format!("http://{target}{}?signature=s3cret", request.path),
        ),
        Some(BASIC) => own.answer(request),
        _ => Reply::new(401, "").with("WWW-Authenticate", "Basic"),
    });
    pull(&server, &image, &with_password(options())).await;
    assert_eq!(storage.seen().len(), 3);
    assert!(
        storage
            .seen()
            .iter()
            .all(|request| request.header("authorization").is_none())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_that_are_refused_or_fail_tell_no_secret() {
    let storage = Server::start(|_, _| Reply::new(403, "<Error/>"));
    for (location, why) in [
        (
            Some("/v2/org/app/manifests/1?s3cret".to_owned()),
            "redirects more than",
        ),
        (Some("file:///etc/passwd".to_owned()), "not HTTP"),
        (
            Some("http://u:s3cret@127.0.0.1/".to_owned()),
            "a user in it",
        ),
        (Some("http://[bad".to_owned()), "no address"),
        (None, "without saying where"),
        (Some(format!("http://{}/x?s3cret", storage.host())), "403"),
        (
            Some("http://127.0.0.1:1/x?s3cret".to_owned()),
            "could not be read",
        ),
    ] {
        let server = Server::start(move |_, _| match &location {
            Some(location) => Reply::new(302, "").with("Location", location.clone()),
            None => Reply::new(302, ""),
        });
        let mut options = options();
        options.retry.attempts = 2;
        let error = resolve(&server, &options).await.unwrap_err();
        let text = whole(&error);
        assert!(text.contains(why) && !text.contains("s3cret"), "{text}");
    }
}

fn helper(dir: &Path, name: &str, script: &str) {
    let path = dir.join(format!("docker-credential-{name}"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn with_file(dir: &Path, json: &str) -> SourceOptions {
    let file = dir.join("config.json");
    std::fs::write(&file, json).unwrap();
    let mut path = dir.as_os_str().to_owned();
    path.push(":/usr/bin:/bin");
    let mut options = options();
    options.auth = AuthOptions {
        files: vec![file],
        helper_path: Some(path),
        ..AuthOptions::default()
    };
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_files_and_helpers() {
    let image = Image::new("amd64", 1, 1000);
    let own = image.clone();
    let server = Server::start(move |request, _| match request.header("authorization") {
        Some(BASIC) => own.answer(request),
        _ => Reply::new(401, "").with("WWW-Authenticate", "Basic"),
    });
    let (host, dir) = (server.host(), tempfile::tempdir().unwrap());
    helper(
        dir.path(),
        "good",
        r#"read server; echo "$1 $server" >> "$0.log"; echo '{"ServerURL":"x","Username":"user","Secret":"s3cret"}'"#,
    );
    helper(
        dir.path(),
        "unknown",
        "echo 'credentials not found in native keychain'; exit 1",
    );
    for json in [
        format!(r#"{{"auths":{{"{host}":{{"auth":"dXNlcjpzM2NyZXQ="}}}}}}"#),
        format!(
            r#"{{"auths":{{"{host}/org":{{"auth":"dXNlcjpzM2NyZXQ="}},"{host}":{{"auth":"dTpw"}}}}}}"#
        ),
        format!(r#"{{"credHelpers":{{"{host}":"good"}}}}"#),
        r#"{"credsStore":"good"}"#.to_owned(),
        format!(r#"{{"auths":{{"{host}":{{"auth":"dXNlcjpzM2NyZXQ="}}}},"credsStore":"unknown"}}"#),
    ] {
        pull(&server, &image, &with_file(dir.path(), &json)).await;
    }
    let log = std::fs::read_to_string(dir.path().join("docker-credential-good.log")).unwrap();
    assert_eq!(log, format!("get {host}\nget {host}\n"));

    helper(
        dir.path(),
        "failing",
        "echo s3cret; echo s3cret >&2; exit 1",
    );
    helper(dir.path(), "garbage", "echo s3cret");
    helper(dir.path(), "hanging", "exec sleep 1000");
    helper(dir.path(), "endless", "exec yes s3cret");
    for (name, why) in [
        ("failing", "docker-credential-failing failed"),
        ("garbage", "gave no credential"),
        ("hanging", "was stopped"),
        ("endless", "docker-credential-endless"),
        ("unknown", "log in"),
        ("missing", "could not be run"),
    ] {
        let mut options = with_file(dir.path(), &format!(r#"{{"credsStore":"{name}"}}"#));
        options.deadlines.helper = Duration::from_millis(500);
        let start = Instant::now();
        let error = resolve(&server, &options).await.unwrap_err();
        let text = whole(&error);
        assert!(text.contains(why) && !text.contains("s3cret"), "{text}");
        assert!(start.elapsed() < Duration::from_secs(10), "{name}");
    }
}
