//! `docker save` archives, old and new.

use std::path::{Path, PathBuf};

use harbour_image::{
    digest::Digest,
    manifest::Compression,
    source::{ArchiveOptions, ErrorKind, Source, SourceError, SourceOptions, SourceSpec},
};

use crate::{
    fixture::{Image, gzip, tar},
    layer, open, resolve, whole,
};

/// Members of an archive in order: files, then links as (name, target).
pub(crate) struct Archive {
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) links: Vec<(String, String)>,
}

impl Archive {
    /// What Docker before 25 writes: `<id>/layer.tar` and `<digest>.json`.
    pub(crate) fn old(image: &Image, tags: &[&str]) -> Self {
        let names: Vec<String> = (0..image.tars.len())
            .map(|n| format!("{n:064x}/layer.tar"))
            .collect();
        let config = format!("{}.json", Digest::of(&image.config).hex());
        let mut files: Vec<(String, Vec<u8>)> =
            names.iter().cloned().zip(image.tars.clone()).collect();
        files.push((config.clone(), image.config.clone()));
        files.push(("manifest.json".to_owned(), list(&config, tags, &names)));
        Self {
            files,
            links: Vec::new(),
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, target) in &self.links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, name, target).unwrap();
        }
        for (name, content) in &self.files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder
                .append_data(&mut header, name, content.as_slice())
                .unwrap();
        }
        builder.into_inner().unwrap()
    }

    pub(crate) fn save(&self, dir: &Path) -> PathBuf {
        let path = dir.join("app.tar");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

pub(crate) fn list(config: &str, tags: &[&str], layers: &[String]) -> Vec<u8> {
    let tags = if tags.is_empty() {
        serde_json::Value::Null
    } else {
        serde_json::json!(tags)
    };
    serde_json::to_vec(&serde_json::json!([{"Config": config, "RepoTags": tags, "Layers": layers}]))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_old_shape_with_links_between_equal_layers() {
    let mut image = Image::new("amd64", 3, 5000);
    // The third layer equals the first; docker writes it as a link.
    image.tars[2] = image.tars[0].clone();
    let ids: Vec<String> = image
        .tars
        .iter()
        .map(|tar| Digest::of(tar).to_string())
        .collect();
    let config = serde_json::json!({"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":ids}});
    image.config = serde_json::to_vec(&config).unwrap();
    let mut archive = Archive::old(&image, &["org/app:2", "org/app:latest"]);
    archive.files.remove(2);
    archive.links = vec![(
        format!("{:064x}/layer.tar", 2),
        format!("../{:064x}/layer.tar", 0),
    )];
    let dir = tempfile::tempdir().unwrap();
    let path = archive.save(dir.path());
    let source = open(&format!("docker-archive:{}", path.display()))
        .await
        .unwrap();
    let resolved = source.resolve(None).await.unwrap();
    assert_eq!(resolved.name.to_string(), "localhost/org/app:2");
    assert_eq!(resolved.config_digest, Digest::of(&image.config));
    for (number, want) in image.tars.iter().enumerate() {
        let descriptor = &resolved.layers[number];
        assert_eq!(
            (descriptor.digest, descriptor.compression),
            (descriptor.diff_id, Compression::None)
        );
        assert!(&layer(&source, &resolved, number).await.unwrap() == want);
    }
    let again = resolve(&format!("{}:org/app:latest", path.display()))
        .await
        .unwrap();
    assert_eq!(
        again.manifest, resolved.manifest,
        "the manifest depends on the archive alone"
    );
    assert_eq!(again.name.tag, "latest");
    assert_eq!(Digest::of(&resolved.manifest), resolved.manifest_digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_new_shape_with_blobs_and_compressed_layers() {
    let image = Image::new("amd64", 2, 5000);
    for compressed in [false, true] {
        let blobs = if compressed {
            &image.layers
        } else {
            &image.tars
        };
        let name = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
        let layers: Vec<String> = blobs.iter().map(|blob| name(blob)).collect();
        let mut files: Vec<(String, Vec<u8>)> = layers.iter().cloned().zip(blobs.clone()).collect();
        files.push((name(&image.config), image.config.clone()));
        files.push((
            "manifest.json".to_owned(),
            list(&name(&image.config), &["quay.io/org/app:1"], &layers),
        ));
        files.push((
            "oci-layout".to_owned(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        ));
        let dir = tempfile::tempdir().unwrap();
        let path = Archive {
            files,
            links: Vec::new(),
        }
        .save(dir.path());
        let spec = SourceSpec::parse(&path.display().to_string()).unwrap();
        assert!(matches!(spec, SourceSpec::DockerArchive { .. }), "{spec}");
        let source = Source::open(&spec, &SourceOptions::default())
            .await
            .unwrap();
        let resolved = source.resolve(None).await.unwrap();
        assert_eq!(resolved.name.to_string(), "quay.io/org/app:1");
        for (number, want) in blobs.iter().enumerate() {
            assert_eq!(resolved.layers[number].digest, Digest::of(want));
            assert_eq!(
                resolved.layers[number].diff_id,
                Digest::of(&image.tars[number])
            );
            assert!(&layer(&source, &resolved, number).await.unwrap() == want);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_layers_under_old_names_are_hashed() {
    let image = Image::new("amd64", 1, 5000);
    let mut archive = Archive::old(&image, &[]);
    archive.files[0].1 = zstd::encode_all(image.tars[0].as_slice(), 3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let resolved = resolve(&format!(
        "docker-archive:{}",
        archive.save(dir.path()).display()
    ))
    .await
    .unwrap();
    assert_eq!(resolved.layers[0].compression, Compression::Zstd);
    assert_eq!(resolved.layers[0].digest, Digest::of(&archive.files[0].1));
    assert_eq!(resolved.name.to_string(), "localhost/app:latest");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_archive_is_unpacked_within_its_limit() {
    let image = Image::new("amd64", 2, 50_000);
    let bytes = Archive::old(&image, &["app:1"]).bytes();
    let (dir, temp) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (name, packed) in [
        ("a.tar.gz", gzip(&bytes)),
        ("a.tar.zst", zstd::encode_all(bytes.as_slice(), 1).unwrap()),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, &packed).unwrap();
        let spec = SourceSpec::parse(&path.display().to_string()).unwrap();
        assert!(matches!(spec, SourceSpec::DockerArchive { .. }));
        let archives = ArchiveOptions {
            temp_dir: temp.path().to_owned(),
            unpacked_max: bytes.len() as u64,
        };
        let mut options = SourceOptions {
            archives,
            ..SourceOptions::default()
        };
        let source = Source::open(&spec, &options).await.unwrap();
        let resolved = source.resolve(None).await.unwrap();
        assert!(layer(&source, &resolved, 1).await.unwrap() == image.tars[1]);
        options.archives.unpacked_max -= 1;
        let error = Source::open(&spec, &options).await.unwrap_err();
        assert!(matches!(error, SourceError::TooLarge { .. }), "{error}");
        std::fs::write(&path, &packed[..packed.len() / 2]).unwrap();
        assert!(
            Source::open(&spec, &SourceOptions::default())
                .await
                .is_err()
        );
        assert_eq!(
            std::fs::read_dir(temp.path()).unwrap().count(),
            0,
            "nothing is left behind"
        );
    }
    std::fs::write(dir.path().join("a.tar.xz"), b"\xfd7zXZ\0rest").unwrap();
    let error = SourceSpec::parse(&dir.path().join("a.tar.xz").display().to_string()).unwrap_err();
    assert!(error.to_string().contains("xz"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_images_is_chosen_by_name() {
    let (one, two) = (Image::new("amd64", 1, 100), Image::new("amd64", 1, 200));
    let mut archive = Archive::old(&one, &["one:1"]);
    let second = Archive::old(&two, &["localhost:5000/two:1"]);
    let mut lists: Vec<Vec<serde_json::Value>> = Vec::new();
    for archive in [&archive, &second] {
        lists.push(serde_json::from_slice(&archive.files.last().unwrap().1).unwrap());
    }
    lists[1][0]["Layers"] = serde_json::json!(["two.tar"]);
    archive.files.pop();
    archive
        .files
        .push(("two.tar".to_owned(), two.tars[0].clone()));
    archive.files.push(second.files[1].clone());
    archive.files.push((
        "manifest.json".to_owned(),
        serde_json::to_vec(&lists.concat()).unwrap(),
    ));
    let dir = tempfile::tempdir().unwrap();
    let path = archive.save(dir.path()).display().to_string();
    for (name, image) in [
        ("one:1", &one),
        ("localhost/one:1", &one),
        ("localhost:5000/two:1", &two),
    ] {
        let resolved = resolve(&format!("docker-archive:{path}:{name}"))
            .await
            .unwrap();
        assert_eq!(resolved.config_digest, Digest::of(&image.config), "{name}");
    }
    for name in ["", ":three:1", ":one:2"] {
        let error = resolve(&format!("docker-archive:{path}{name}"))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
        assert!(
            error.to_string().contains("one:1, localhost:5000/two:1"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_named() {
    let image = Image::new("amd64", 2, 5000);
    let dir = tempfile::tempdir().unwrap();
    let config = format!("{}.json", Digest::of(&image.config).hex());
    let names: Vec<String> = (0..2).map(|n| format!("{n:064x}/layer.tar")).collect();
    let with = |file: &str, content: &[u8]| {
        let mut archive = Archive::old(&image, &["a:1"]);
        archive
            .files
            .iter_mut()
            .find(|(name, _)| name == file)
            .unwrap()
            .1 = content.to_vec();
        archive
    };
    let no_rootfs = br#"{"os":"linux"}"#;
    for (archive, why) in [
        (with("manifest.json", b"nope"), "manifest.json is not"),
        (with("manifest.json", b"[]"), "holds no image"),
        (with("manifest.json", &vec![b' '; 5 << 20]), "larger than"),
        (
            with("manifest.json", &list(&config, &[], &names[..1])),
            "1 layers but the config has 2",
        ),
        (
            with("manifest.json", &list("gone.json", &[], &names)),
            "no gone.json",
        ),
        (
            with(
                "manifest.json",
                &list(
                    &config,
                    &[],
                    &["../../etc/passwd".to_owned(), names[1].clone()],
                ),
            ),
            "no ../..",
        ),
        (with(&config, b"{}"), "has digest"),
        (
            with("manifest.json", &list(&names[0], &[], &names)),
            "not the JSON",
        ),
    ] {
        let error = resolve(&format!(
            "docker-archive:{}",
            archive.save(dir.path()).display()
        ))
        .await
        .unwrap_err();
        assert!(whole(&error).contains(why), "{why}: {}", whole(&error));
    }
    let mut archive = with(&config, no_rootfs);
    archive.files[2].0 = "c.json".to_owned();
    archive.files[3].1 = list("c.json", &[], &names);
    let error = resolve(&format!(
        "docker-archive:{}",
        archive.save(dir.path()).display()
    ))
    .await
    .unwrap_err();
    assert!(whole(&error).contains("no rootfs"), "{}", whole(&error));

    // A layer that is not what the config says is found when it is read.
    let mut changed = image.tars[1].clone();
    *changed.last_mut().unwrap() ^= 1;
    let path = with(&names[1], &changed).save(dir.path());
    let source = open(&format!("docker-archive:{}", path.display()))
        .await
        .unwrap();
    let resolved = source.resolve(None).await.unwrap();
    let error = layer(&source, &resolved, 1).await.unwrap_err();
    assert!(
        matches!(error.cause(), SourceError::WrongDigest { .. }),
        "{error:?}"
    );

    std::fs::write(dir.path().join("other.tar"), tar(&[("x", b"y")])).unwrap();
    let other = dir.path().join("other.tar").display().to_string();
    for text in [
        format!("docker-archive:{other}"),
        format!("oci-archive:{other}"),
        other,
    ] {
        let error = resolve(&text).await.unwrap_err();
        assert!(matches!(error, SourceError::Archive { .. }), "{error}");
    }
}
