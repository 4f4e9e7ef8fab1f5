//! Mirrors: asked in order, left when they fail, never given the registry's secrets.

use harbour_image::source::{AuthOptions, Credential, RegistryOptions, SourceError, SourceOptions};

use crate::{
    fixture::{Image, ranged},
    open, options, pull, read,
    server::{Reply, Server},
};

fn mirrored(origin: &Server, mirrors: &[String]) -> SourceOptions {
    let mut options = options();
    let own = RegistryOptions {
        mirrors: mirrors.to_vec(),
        ..RegistryOptions::default()
    };
    options.registries.insert(origin.host(), own);
    options
}

fn honest(image: &Image) -> Server {
    let own = image.clone();
    Server::start(move |request, _| own.answer(request))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_mirror_that_has_it_serves() {
    let image = Image::new("amd64", 2, 10_000);
    let (origin, second) = (honest(&image), honest(&image));
    let first = Server::start(|_, _| Reply::new(404, ""));
    let options = mirrored(&origin, &[first.url("/cache/"), second.host()]);
    pull(&origin, &image, &options).await;
    assert!(origin.seen().is_empty());
    assert!(
        first
            .seen()
            .iter()
            .all(|request| request.path.starts_with("/cache/v2/org/app/"))
    );
    assert_eq!(second.seen().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_mirrors_are_passed_over_and_then_asked_last() {
    let image = Image::new("amd64", 3, 10_000);
    let origin = honest(&image);
    let failing = Server::start(|_, _| Reply::new(500, ""));
    let lying = {
        let other = Image::new("amd64", 1, 5);
        let digest = image.digest().to_string();
        Server::start(move |_, _| {
            Reply::new(200, other.manifest.clone()).with("Docker-Content-Digest", digest.clone())
        })
    };
    let options = mirrored(
        &origin,
        &["127.0.0.1:1".to_owned(), lying.host(), failing.host()],
    );
    pull(&origin, &image, &options).await;
    assert_eq!(
        lying.seen().len(),
        1,
        "a mirror that lied is not asked again"
    );
    assert_eq!(origin.seen().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_begun_at_a_mirror_ends_at_the_registry() {
    let image = Image::new("amd64", 1, 1_000_000);
    let origin = honest(&image);
    let own = image.clone();
    let mirror = Server::start(move |request, before| {
        let reply = own.answer(request);
        match (
            request.path.contains("/blobs/") && reply.body.len() > 100_000,
            before,
        ) {
            (true, 0) => ranged(&own.layers[0], request).cut_at(400_000),
            (true, _) => Reply::new(500, ""),
            _ => reply,
        }
    });
    pull(&origin, &image, &mirrored(&origin, &[mirror.host()])).await;
    assert_eq!(origin.seen().len(), 1);
    assert_eq!(origin.seen()[0].range_start(), Some(400_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_wrong_bytes_of_a_mirror_the_next_try_goes_to_the_registry() {
    let image = Image::new("amd64", 1, 100_000);
    let origin = honest(&image);
    let own = image.clone();
    let mirror = Server::start(move |request, _| {
        let mut reply = own.answer(request);
        if reply.body.len() > 50_000 {
            reply.body[60_000 % own.layers[0].len()] ^= 1;
        }
        reply
    });
    let source = open(&origin, &mirrored(&origin, &[mirror.host()])).await;
    let resolved = source.resolve(None).await.unwrap();
    let error = read(&source, &resolved.layers[0]).await.unwrap_err();
    assert!(
        error.cause().to_string().contains(&mirror.host()),
        "{}",
        error.cause()
    );
    assert!(read(&source, &resolved.layers[0]).await.unwrap() == image.layers[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_gets_no_credential_of_the_registry() {
    let image = Image::new("amd64", 1, 1000);
    let own = image.clone();
    let origin = Server::start(move |request, _| match request.header("authorization") {
        Some("Basic dXNlcjpzM2NyZXQ=") => own.answer(request),
        _ => Reply::new(401, "").with("WWW-Authenticate", "Basic"),
    });
    let mirror = Server::start(|_, _| Reply::new(401, "").with("WWW-Authenticate", "Basic"));
    let mut options = mirrored(&origin, &[mirror.host()]);
    let credential = Credential::Password {
        user: "user".to_owned(),
        password: "s3cret".to_owned(),
    };
    options.auth = AuthOptions {
        credential: Some(credential),
        ..AuthOptions::default()
    };
    pull(&origin, &image, &options).await;
    assert!(!mirror.seen().is_empty());
    assert!(
        mirror
            .seen()
            .iter()
            .all(|request| request.header("authorization").is_none())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_that_are_no_addresses_are_refused_without_their_secrets() {
    let origin = honest(&Image::new("amd64", 1, 10));
    let spec = harbour_image::source::SourceSpec::parse(&format!("{}/a", origin.host())).unwrap();
    for mirror in ["ftp://x", "", "http://", "https://user:s3cret@x", "a b"] {
        let options = mirrored(&origin, &[mirror.to_owned()]);
        let error = harbour_image::source::Source::open(&spec, &options)
            .await
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Option { .. }),
            "{mirror}: {error}"
        );
        assert!(!error.to_string().contains("s3cret"));
    }
}
