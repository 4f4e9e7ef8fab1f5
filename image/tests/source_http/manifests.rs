//! Manifests and configs: retries, lists, lies about size, type and digest.

use std::time::{Duration, Instant};

use harbour_image::{
    digest::Digest,
    manifest::{ManifestError, media},
    source::{ErrorKind, Proxy, Source, SourceError, SourceSpec},
};

use crate::{
    check,
    fixture::{Image, answer, descriptor},
    open, options, pull, resolve,
    server::{Reply, Server},
    whole,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_over_plain_http_when_that_is_allowed() {
    let image = Image::new("amd64", 3, 200_000);
    let own = image.clone();
    let server = Server::start(move |request, _| own.answer(request));
    pull(&server, &image, &options()).await;
    let mut strict = options();
    strict.insecure = false;
    strict.retry.attempts = 1;
    let error = resolve(&server, &strict).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    assert!(
        error.to_string().contains("allow it as insecure"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn names_come_from_the_reference() {
    let image = Image::new("amd64", 1, 10);
    let own = image.clone();
    let server = Server::start(move |request, _| own.answer(request));
    let resolved = resolve(&server, &options()).await.unwrap();
    assert_eq!(
        resolved.name.to_string(),
        format!("{}/org/app:1", server.host())
    );
    assert_eq!(resolved.config.run.cmd, ["/run"]);
    let by_digest = format!("docker://{}/org/app@{}", server.host(), image.digest());
    let source = Source::open(&SourceSpec::parse(&by_digest).unwrap(), &options())
        .await
        .unwrap();
    let resolved = source.resolve(None).await.unwrap();
    assert_eq!(resolved.name.tag, image.digest().to_string());
    assert_eq!(source.spec().to_string(), by_digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_sent_again_until_they_succeed_or_enough() {
    let image = Image::new("amd64", 2, 1000);
    for status in [408, 429, 500, 502, 503, 504] {
        let own = image.clone();
        let server = Server::start(move |request, before| match before {
            0 | 1 => Reply::new(status, "").with("Retry-After", "0"),
            _ => own.answer(request),
        });
        pull(&server, &image, &options()).await;
    }
    let broken = Server::start(|_, _| {
        Reply::new(503, r#"{"errors":[{"code":"UNAVAILABLE","message":"x"}]}"#)
            .with("Retry-After", "9999999")
    });
    let start = Instant::now();
    let error = resolve(&broken, &options()).await.unwrap_err();
    assert!(error.to_string().contains("503 (UNAVAILABLE)"), "{error}");
    assert_eq!((error.kind(), broken.seen().len()), (ErrorKind::Retry, 5));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "Retry-After is bounded"
    );
    for status in [400, 404, 405, 410, 501] {
        let server = Server::start(move |_, _| Reply::new(status, ""));
        let error = resolve(&server, &options()).await.unwrap_err();
        assert_eq!(server.seen().len(), 1, "{status} is final");
        let want = if status == 404 {
            ErrorKind::Gone
        } else {
            ErrorKind::Refused
        };
        assert_eq!(error.kind(), want, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_followed_to_the_platform() {
    let (amd, arm) = (Image::new("amd64", 2, 100), Image::new("arm64", 3, 100));
    let entry = |image: &Image, architecture: &str| {
        let mut entry = descriptor(media::OCI_MANIFEST, &image.manifest);
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        entry
    };
    let list = serde_json::json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX,
        "manifests": [entry(&amd, "amd64"), entry(&arm, "arm64")]});
    let outer = serde_json::to_vec(
        &serde_json::json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX,
        "manifests": [descriptor(media::OCI_INDEX, &serde_json::to_vec(&list).unwrap())]}),
    )
    .unwrap();
    let (list, images) = (
        serde_json::to_vec(&list).unwrap(),
        (amd.clone(), arm.clone()),
    );
    let server = Server::start(move |request, _| {
        let inner = request.path.ends_with(&Digest::of(&list).to_string());
        match request.path.ends_with("/manifests/1") || inner {
            true => Reply::new(200, if inner { &list[..] } else { &outer[..] })
                .with("Content-Type", media::OCI_INDEX),
            false => answer(&[&images.0, &images.1], request),
        }
    });
    let source = open(&server, &options()).await;
    for (platform, image) in [("linux/amd64", &amd), ("linux/arm64/v8", &arm)] {
        check(
            &source
                .resolve(Some(&platform.parse().unwrap()))
                .await
                .unwrap(),
            image,
        );
    }
    let error = source
        .resolve(Some(&"linux/s390x".parse().unwrap()))
        .await
        .unwrap_err();
    assert!(
        whole(&error).contains("linux/amd64, linux/arm64"),
        "{}",
        whole(&error)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_for_another_platform_is_refused_only_if_asked_for() {
    let image = Image::new("s390x", 1, 100);
    let own = image.clone();
    let server = Server::start(move |request, _| own.answer(request));
    let source = open(&server, &options()).await;
    check(&source.resolve(None).await.unwrap(), &image);
    let error = source
        .resolve(Some(&"linux/amd64".parse().unwrap()))
        .await
        .unwrap_err();
    let SourceError::Manifest {
        source: ManifestError::PlatformMismatch { .. },
        ..
    } = error
    else {
        panic!("{error:?}")
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_in_lists_end() {
    let level = |inner: &[u8]| {
        let list = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor(media::OCI_INDEX, inner)]});
        serde_json::to_vec(&list).unwrap()
    };
    let mut levels = vec![level(b"x")];
    for _ in 0..10 {
        levels.push(level(levels.last().unwrap()));
    }
    let server = Server::start(move |request, _| {
        let is_it = |list: &&Vec<u8>| request.path.ends_with(&Digest::of(list).to_string());
        let list = levels.iter().find(is_it).or(levels.last()).unwrap();
        Reply::new(200, list.clone()).with("Content-Type", media::OCI_INDEX)
    });
    let error = resolve(&server, &options()).await.unwrap_err();
    assert!(whole(&error).contains("nested deeper"), "{}", whole(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_answers_are_refused_in_bounded_time_and_memory() {
    let image = Image::new("amd64", 1, 100);
    let other = Image::new("amd64", 1, 101);
    let headers = format!(
        "HTTP/1.1 200 OK\r\n{}\r\n",
        "X-Pad: 0123456789\r\n".repeat(100_000)
    );
    let cases: Vec<(&str, Reply, &str)> = vec![
        ("not JSON", Reply::new(200, "<html>"), "not the JSON"),
        (
            "nested",
            Reply::new(200, "[".repeat(1 << 20)),
            "not the JSON",
        ),
        (
            "schema 1",
            Reply::new(200, r#"{"schemaVersion":1,"fsLayers":[]}"#),
            "schema 1",
        ),
        (
            "html",
            Reply::new(200, image.manifest.clone()).with("Content-Type", "text/html"),
            "text/html",
        ),
        ("large", Reply::new(200, vec![b' '; 8 << 20]), "larger than"),
        (
            "claims",
            Reply::new(200, "").with("Content-Length", "104857600"),
            "larger than",
        ),
        (
            "endless",
            Reply::new(200, vec![b' '; 65536]).endless(),
            "larger than",
        ),
        (
            "other bytes",
            Reply::new(200, other.manifest.clone())
                .with("Docker-Content-Digest", image.digest().to_string()),
            "has digest",
        ),
        ("headers", Reply::raw(headers), "could not be read"),
        (
            "garbage",
            Reply::raw("\0\u{1}garbage\r\n\r\n"),
            "could not be read",
        ),
        ("nothing", Reply::raw(""), "could not be read"),
        (
            "cut",
            Reply::new(200, image.manifest.clone()).cut_at(10),
            "could not be read",
        ),
    ];
    for (name, reply, why) in cases {
        let server = Server::start(move |_, _| reply.clone());
        let mut options = options();
        options.retry.attempts = 2;
        let start = Instant::now();
        let error = resolve(&server, &options).await.unwrap_err();
        assert!(whole(&error).contains(why), "{name}: {}", whole(&error));
        assert!(start.elapsed() < Duration::from_secs(10), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_and_sizes_of_small_documents_bind() {
    let (image, other) = (Image::new("amd64", 1, 100), Image::new("amd64", 1, 101));
    let wrong = other.clone();
    let server = Server::start(move |_, _| Reply::new(200, wrong.manifest.clone()));
    let by_digest = format!("docker://{}/org/app@{}", server.host(), image.digest());
    let source = Source::open(&SourceSpec::parse(&by_digest).unwrap(), &options())
        .await
        .unwrap();
    let error = source.resolve(None).await.unwrap_err();
    assert!(
        matches!(error, SourceError::WrongDigest { want, .. } if want == image.digest()),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Corrupt);

    let own = image.clone();
    let server = Server::start(move |request, _| match request.path.contains("/blobs/") {
        true => Reply::new(200, other.config.clone()),
        false => own.answer(request),
    });
    let error = resolve(&server, &options()).await.unwrap_err();
    assert!(matches!(error, SourceError::WrongDigest { .. }), "{error}");

    let size = image.config.len();
    let text = String::from_utf8(image.manifest.clone()).unwrap();
    let lying = text
        .replace(&format!("\"size\":{size}"), "\"size\":1")
        .into_bytes();
    assert_ne!(lying, image.manifest);
    let server = Server::start(move |request, _| match request.path.contains("/blobs/") {
        true => image.answer(request),
        false => Reply::new(200, lying.clone()),
    });
    let error = resolve(&server, &options()).await.unwrap_err();
    assert!(
        matches!(error, SourceError::WrongSize { want: 1, .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stalls_meets_the_deadline() {
    let long = Duration::from_secs(15);
    for (what, reply) in [
        ("answer", Reply::raw("")),
        ("data", Reply::new(200, vec![b' '; 100]).stalled(10, long)),
    ] {
        let server = Server::start(move |_, _| {
            if reply.raw.is_some() {
                std::thread::sleep(long);
            }
            reply.clone()
        });
        let mut options = options();
        options.retry.attempts = 2;
        options.deadlines.read = Duration::from_millis(300);
        options.deadlines.request = Duration::from_millis(600);
        let start = Instant::now();
        let error = resolve(&server, &options).await.unwrap_err();
        assert!(matches!(error, SourceError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fixed_proxy_is_used_but_not_for_loopback() {
    let image = Image::new("amd64", 1, 1000);
    let own = image.clone();
    let proxy = Server::start(move |request, _| own.answer(request));
    let mut options = options();
    options.proxy = Proxy::Fixed {
        http: Some(format!("http://user:s3cret@{}", proxy.host())),
        https: None,
        no_proxy: Some("direct.invalid".to_owned()),
    };
    assert!(!format!("{options:?}").contains("s3cret"));
    let of = |host: &str| SourceSpec::parse(&format!("docker://{host}/org/app:1")).unwrap();
    let source = Source::open(&of("registry.invalid"), &options)
        .await
        .unwrap();
    check(&source.resolve(None).await.unwrap(), &image);
    assert!(
        proxy.seen()[0]
            .path
            .starts_with("http://registry.invalid/v2/"),
        "{:?}",
        proxy.seen()[0]
    );
    assert!(proxy.seen()[0].header("proxy-authorization").is_some());
    let count = proxy.seen().len();
    options.retry.attempts = 1;
    for host in ["direct.invalid", "127.0.0.1:1", "localhost:1", "[::1]:1"] {
        let error = Source::open(&of(host), &options)
            .await
            .unwrap()
            .resolve(None)
            .await
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Transport { .. }),
            "{host}: {error}"
        );
    }
    assert_eq!(proxy.seen().len(), count);
}
