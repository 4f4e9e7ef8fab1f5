//! OCI layouts in directories and tars.

use std::path::Path;

use harbour_image::{
    digest::Digest,
    manifest::media,
    source::{ErrorKind, SourceError, SourceSpec},
};

use crate::{
    fixture::{Image, descriptor, gzip},
    layer, open, resolve, whole,
};

/// Writes a layout of these entries: image, reference name, platform.
fn layout(dir: &Path, entries: &[(&Image, Option<&str>, Option<&str>)]) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
    let entries = entries.iter().map(|(image, name, platform)| {
        for blob in image.layers.iter().chain([&image.config, &image.manifest]) {
            std::fs::write(blobs.join(Digest::of(blob).hex()), blob).unwrap();
        }
        let mut entry = descriptor(media::OCI_MANIFEST, &image.manifest);
        if let Some(name) = name {
            entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        }
        if let Some(architecture) = platform {
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        }
        entry
    });
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries.collect::<Vec<_>>()});
    std::fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}

fn pack(dir: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir).unwrap();
    builder.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_a_tar_and_a_compressed_tar_are_the_same_image() {
    let image = Image::new("amd64", 3, 50_000);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("My Layout");
    layout(&root, &[(&image, Some("v1"), None)]);
    std::fs::write(dir.path().join("a.tar"), pack(&root)).unwrap();
    std::fs::write(dir.path().join("a.tar.gz"), gzip(&pack(&root))).unwrap();
    let base = dir.path().display();
    for (text, name) in [
        (format!("oci:{}", root.display()), "localhost/my-layout:v1"),
        (
            format!("oci:{}:v1", root.display()),
            "localhost/my-layout:v1",
        ),
        (root.display().to_string(), "localhost/my-layout:v1"),
        (format!("oci-archive:{base}/a.tar:v1"), "localhost/a:v1"),
        (format!("{base}/a.tar"), "localhost/a:v1"),
        (format!("{base}/a.tar.gz:v1"), "localhost/a:v1"),
    ] {
        let source = open(&text).await.unwrap();
        let resolved = source.resolve(None).await.unwrap();
        assert_eq!(resolved.manifest_digest, image.digest(), "{text}");
        assert_eq!(resolved.name.to_string(), name, "{text}");
        for (number, want) in image.layers.iter().enumerate() {
            assert!(&layer(&source, &resolved, number).await.unwrap() == want);
        }
        let again = SourceSpec::parse(&source.spec().to_string()).unwrap();
        assert_eq!(&again, source.spec());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_chosen_by_name_or_platform() {
    let (one, two) = (Image::new("amd64", 1, 10), Image::new("arm64", 1, 20));
    let dir = tempfile::tempdir().unwrap();
    let text = format!("oci:{}", dir.path().display());
    layout(
        dir.path(),
        &[
            (&one, Some("one"), None),
            (&two, Some("quay.io/org/app:two"), None),
        ],
    );
    for (tag, image, name) in [
        (":one", &one, None),
        (":two", &two, Some("quay.io/org/app:two")),
        (":quay.io/org/app:two", &two, Some("quay.io/org/app:two")),
    ] {
        let resolved = resolve(&format!("{text}{tag}")).await.unwrap();
        assert_eq!(resolved.manifest_digest, image.digest());
        if let Some(name) = name {
            assert_eq!(resolved.name.to_string(), name);
        }
    }
    for tag in ["", ":three"] {
        let error = resolve(&format!("{text}{tag}")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
        assert!(
            error.to_string().contains("one, quay.io/org/app:two"),
            "{error}"
        );
    }
    layout(
        dir.path(),
        &[
            (&one, Some("1"), Some("amd64")),
            (&two, Some("1"), Some("arm64")),
        ],
    );
    for (platform, image) in [("linux/amd64", &one), ("linux/arm64", &two)] {
        let source = open(&text).await.unwrap();
        let resolved = source
            .resolve(Some(&platform.parse().unwrap()))
            .await
            .unwrap();
        assert_eq!(resolved.manifest_digest, image.digest());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_and_links_out_are_named() {
    let image = Image::new("amd64", 1, 1000);
    let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = dir.path();
    let text = format!("oci:{}", root.display());
    let blob = |bytes: &[u8]| root.join("blobs/sha256").join(Digest::of(bytes).hex());
    let fresh = || layout(root, &[(&image, Some("v1"), None)]);

    fresh();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "do not show this").unwrap();
    for file in [
        blob(&image.config),
        root.join("index.json"),
        root.join("oci-layout"),
    ] {
        fresh();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&secret, &file).unwrap();
        let error = resolve(&text).await.unwrap_err();
        assert!(
            whole(&error).contains("leads out") && !whole(&error).contains("show this"),
            "{}",
            whole(&error)
        );
        std::fs::remove_file(&file).unwrap();
        let error = resolve(&text).await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Gone | ErrorKind::Corrupt),
            "{error}"
        );
    }
    fresh();
    std::fs::write(blob(&image.config), &image.manifest).unwrap();
    let error = resolve(&text).await.unwrap_err();
    assert!(matches!(error, SourceError::WrongDigest { .. }), "{error}");
    fresh();
    std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"9"}"#).unwrap();
    assert!(
        resolve(&text)
            .await
            .unwrap_err()
            .to_string()
            .contains("\"9\"")
    );
    fresh();
    std::fs::write(root.join("index.json"), vec![b' '; 5 << 20]).unwrap();
    assert!(matches!(
        resolve(&text).await.unwrap_err(),
        SourceError::TooLarge { .. }
    ));
    fresh();
    let fifo = blob(&image.layers[0]);
    std::fs::remove_file(&fifo).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let source = open(&text).await.unwrap();
    let resolved = source.resolve(None).await.unwrap();
    let error = layer(&source, &resolved, 0).await.unwrap_err();
    assert!(
        whole(&error).contains("not a regular file"),
        "{}",
        whole(&error)
    );
    std::fs::remove_file(&fifo).unwrap();
    std::fs::write(&fifo, "short").unwrap();
    let error = layer(&source, &resolved, 0).await.unwrap_err();
    assert!(
        matches!(error.cause(), SourceError::WrongSize { .. }),
        "{error:?}"
    );
}
