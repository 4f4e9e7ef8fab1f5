//! What people type.

use std::path::Path;

use harbour_image::source::{ErrorKind, SourceSpec};

#[test]
fn texts_name_sources_and_print_back() {
    let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let digest = format!("docker://[::1]:5000/x@sha256:{hex}");
    for (text, canonical, name) in [
        (
            "debian",
            "docker://docker.io/library/debian:latest",
            "docker.io/library/debian:latest",
        ),
        (
            "docker://quay.io/a/b:1",
            "docker://quay.io/a/b:1",
            "quay.io/a/b:1",
        ),
        (&digest, &digest, &digest["docker://".len()..]),
        ("oci:/none/app", "oci:/none/app", "localhost/app:latest"),
        (
            "oci:/none/app:1.2",
            "oci:/none/app:1.2",
            "localhost/app:1.2",
        ),
        (
            "oci-archive:/none/My.tar.gz:x",
            "oci-archive:/none/My.tar.gz:x",
            "localhost/my:x",
        ),
        (
            "docker-archive:/none/a.tar",
            "docker-archive:/none/a.tar",
            "localhost/a:latest",
        ),
        (
            "docker-archive:/none/a.tar:b:2",
            "docker-archive:/none/a.tar:b:2",
            "localhost/b:2",
        ),
        (
            "docker-archive:/none/a.tar:quay.io/b:2",
            "docker-archive:/none/a.tar:quay.io/b:2",
            "quay.io/b:2",
        ),
    ] {
        let spec = SourceSpec::parse(text).unwrap();
        assert_eq!(spec.to_string(), canonical, "{text}");
        assert_eq!(spec.name().to_string(), name, "{text}");
        assert_eq!(SourceSpec::parse(&spec.to_string()).unwrap(), spec);
    }
}

#[test]
fn texts_that_name_nothing_are_refused() {
    let long = "a".repeat(10_000);
    for text in [
        "",
        "oci:",
        "oci::tag",
        "docker-archive:",
        "docker://",
        "docker://A b",
        "dir:/x",
        "https://quay.io/a",
        "containers-storage:x",
        "a\0b",
        &long,
    ] {
        let error = SourceSpec::parse(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{text}: {error}");
        assert!(error.to_string().len() < 1000);
    }
    for text in ["/no/such/path", "./no-such-path", "../no-such-path:tag"] {
        assert_eq!(
            SourceSpec::parse(text).unwrap_err().kind(),
            ErrorKind::Gone,
            "{text}"
        );
    }
}

#[test]
fn paths_may_hold_colons_and_be_relative() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("a:b");
    std::fs::create_dir(&odd).unwrap();
    let text = format!("oci:{}:tag", odd.display());
    let SourceSpec::OciLayout { dir: path, tag } = SourceSpec::parse(&text).unwrap() else {
        panic!("no layout")
    };
    assert_eq!(
        (path.file_name().unwrap().to_str(), tag.as_deref()),
        (Some("a:b"), Some("tag"))
    );
    let spec = SourceSpec::parse(&format!("oci:{}", odd.display())).unwrap();
    assert_eq!(SourceSpec::parse(&spec.to_string()).unwrap(), spec);

    let SourceSpec::OciLayout { dir: path, .. } = SourceSpec::parse("oci:src:x").unwrap() else {
        panic!("no layout")
    };
    assert!(
        path.is_absolute() && path.ends_with("src"),
        "{}",
        path.display()
    );
    // A plain directory that happens to be called like an image is not one.
    assert!(Path::new("src").is_dir());
    assert!(matches!(
        SourceSpec::parse("src").unwrap(),
        SourceSpec::Registry(_)
    ));
    let error = SourceSpec::parse("./src").unwrap_err();
    assert!(error.to_string().contains("no OCI layout"), "{error}");
}
