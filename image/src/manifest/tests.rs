#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

fn sha(n: u8) -> String {
    Digest::of(&[n]).to_string()
}

fn image(layer_type: &str, layers: usize) -> String {
    let layer = |n| {
        format!(
            r#"{{"mediaType":"{layer_type}","digest":"{}","size":{n}}}"#,
            sha(n as u8)
        )
    };
    let layers: Vec<String> = (0..layers).map(layer).collect();
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{}","size":7}},"layers":[{}]}}"#,
        media::OCI_MANIFEST,
        media::OCI_CONFIG,
        sha(200),
        layers.join(",")
    )
}

fn config(diff_ids: &str) -> String {
    format!(
        r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":{diff_ids}}}}}"#
    )
}

fn index(platforms: &[&str]) -> Index {
    let entries: Vec<String> = platforms
        .iter()
        .enumerate()
        .map(|(n, platform)| {
            let mut parts = platform.split('/');
            let (os, arch) = (parts.next().unwrap(), parts.next().unwrap());
            let variant = parts.next().map(|v| format!(r#","variant":"{v}""#)).unwrap_or_default();
            format!(
                r#"{{"mediaType":"{}","digest":"{}","size":1,"platform":{{"os":"{os}","architecture":"{arch}"{variant}}}}}"#,
                media::OCI_MANIFEST,
                sha(n as u8)
            )
        })
        .collect();
    let text = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        entries.join(",")
    );
    match Manifest::parse(text.as_bytes(), Some(media::OCI_INDEX)).unwrap() {
        Manifest::Index(index) => index,
        Manifest::Image(_) => panic!("not an index"),
    }
}

fn parse_image(text: &str) -> Result<ImageManifest, ManifestError> {
    match Manifest::parse(text.as_bytes(), None)? {
        Manifest::Image(image) => Ok(image),
        Manifest::Index(_) => panic!("not an image"),
    }
}

#[test]
fn layers_are_joined_with_diff_ids() {
    let manifest = parse_image(&image("application/vnd.oci.image.layer.v1.tar+zstd", 2)).unwrap();
    let config =
        ImageConfig::parse(config(&format!(r#"["{}","{}"]"#, sha(9), sha(8))).as_bytes()).unwrap();
    let layers = manifest.layers(&config).unwrap();
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[1].compression, Compression::Zstd);
    assert_eq!(layers[1].digest.to_string(), sha(1));
    assert_eq!(layers[1].diff_id.to_string(), sha(8));
    assert_eq!(layers[1].size, 1);
}

#[test]
fn layer_types() {
    let good = [
        (media::OCI_LAYER, Compression::None),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Gzip,
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip; charset=x",
            Compression::Gzip,
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            Compression::Zstd,
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Compression::Gzip,
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            Compression::Zstd,
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar",
            Compression::None,
        ),
    ];
    for (kind, want) in good {
        assert_eq!(Compression::of_layer(kind), Ok(want), "{kind}");
        assert_eq!(Compression::of_layer(want.oci_layer_type()), Ok(want));
    }
    let named = |kind: &str| {
        let error = Compression::of_layer(kind).unwrap_err();
        assert!(error.to_string().contains(kind), "{error}");
        error
    };
    for kind in [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ] {
        assert!(matches!(named(kind), MediaTypeError::Foreign { .. }));
    }
    let encrypted = named("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
    assert!(matches!(encrypted, MediaTypeError::Encrypted { .. }));
    for kind in [
        "application/vnd.oci.image.layer.v1.tar+xz",
        "application/vnd.wasm.content.layer.v1+wasm",
        "",
    ] {
        assert!(matches!(named(kind), MediaTypeError::Unknown { .. }));
    }
}

#[test]
fn hostile_manifests_are_refused_by_name() {
    let nested = format!(
        "{}{}",
        r#"{"schemaVersion":2,"layers":"#,
        "[".repeat(100_000)
    );
    let both = image(media::OCI_LAYER, 1).replace(r#""layers""#, r#""manifests":[],"layers""#);
    let both_null =
        image(media::OCI_LAYER, 1).replace(r#""layers""#, r#""manifests":null,"layers""#);
    let twice = image(media::OCI_LAYER, 1).replace(r#""layers""#, r#""layers":[],"layers""#);
    let helm = image(media::OCI_LAYER, 1).replace(
        media::OCI_CONFIG,
        "application/vnd.cncf.helm.config.v1+json",
    );
    let negative = image(media::OCI_LAYER, 1).replace(r#""size":7"#, r#""size":-7"#);
    let sha512 = image(media::OCI_LAYER, 1).replace(&sha(200), "sha512:00");
    let unknown = image(media::OCI_LAYER, 1).replace(media::OCI_MANIFEST, "application/x-other");
    let wrong = image(media::OCI_LAYER, 1).replace(media::OCI_MANIFEST, media::OCI_INDEX);
    let version =
        image(media::OCI_LAYER, 1).replace(r#""schemaVersion":2"#, r#""schemaVersion":3"#);
    let cases: [(&str, &str); 15] = [
        ("not json", "Json"),
        ("", "Json"),
        ("[]", "Json"),
        (&nested, "Json"),
        (&twice, "Json"),
        (&negative, "Json"),
        ("{}", "SchemaVersion"),
        (&version, "SchemaVersion"),
        (r#"{"schemaVersion":2}"#, "Shapeless"),
        (&both, "Ambiguous"),
        (&both_null, "Ambiguous"),
        (&helm, "ConfigType"),
        (&sha512, "Digest"),
        (&unknown, "MediaType"),
        (&wrong, "MediaTypeConflict"),
    ];
    for (text, want) in cases {
        let error = Manifest::parse(text.as_bytes(), None).unwrap_err();
        let debug = format!("{error:?}");
        assert!(
            debug.starts_with(want),
            "{}: {debug}",
            &text[..text.len().min(80)]
        );
    }
    for old in [r#"{"schemaVersion":1}"#, r#"{"fsLayers":[]}"#] {
        let error = Manifest::parse(old.as_bytes(), None).unwrap_err();
        assert!(error.to_string().contains("schema 1"), "{error}");
    }
    let served = Manifest::parse(
        b"{}",
        Some("application/vnd.docker.distribution.manifest.v1+prettyjws"),
    );
    assert!(matches!(served, Err(ManifestError::Schema1 { .. })));
    let big = vec![b' '; 100 << 20];
    assert!(matches!(
        Manifest::parse(&big, None),
        Err(ManifestError::TooLarge { .. })
    ));
    assert!(matches!(
        ImageConfig::parse(&big),
        Err(ManifestError::TooLarge { .. })
    ));
}

#[test]
fn what_servers_say_about_the_type() {
    let text = image(media::OCI_LAYER, 1);
    let untyped = text.replace(&format!(r#""mediaType":"{}","#, media::OCI_MANIFEST), "");
    for served in [
        None,
        Some("application/json"),
        Some("text/plain; charset=utf-8"),
        Some(""),
    ] {
        assert_eq!(
            Manifest::parse(text.as_bytes(), served)
                .unwrap()
                .media_type(),
            media::OCI_MANIFEST
        );
    }
    let docker = Manifest::parse(untyped.as_bytes(), Some(media::DOCKER_MANIFEST)).unwrap();
    assert_eq!(docker.media_type(), media::DOCKER_MANIFEST);
    for served in [media::OCI_INDEX, media::DOCKER_MANIFEST] {
        let conflict = Manifest::parse(text.as_bytes(), Some(served)).unwrap_err();
        assert!(
            matches!(conflict, ManifestError::MediaTypeConflict { .. }),
            "{conflict:?}"
        );
    }
    let html = Manifest::parse(text.as_bytes(), Some("text/html")).unwrap_err();
    assert!(matches!(html, ManifestError::MediaType { .. }));
}

#[test]
fn configs() {
    for (text, want) in [
        ("{}", "NoRootfs"),
        (r#"{"rootfs":null}"#, "NoRootfs"),
        (r#"{"rootfs":{"type":"layers"}}"#, "NoRootfs"),
        (
            r#"{"rootfs":{"type":"layers","diff_ids":null}}"#,
            "NoRootfs",
        ),
        (
            r#"{"rootfs":{"type":"windows","diff_ids":[]}}"#,
            "RootfsType",
        ),
        (
            r#"{"rootfs":{"type":"layers","diff_ids":["md5:1"]}}"#,
            "Digest",
        ),
        (r#"{"rootfs":{"type":"layers","diff_ids":[5]}}"#, "Json"),
        ("\u{0}", "Json"),
    ] {
        let error = ImageConfig::parse(text.as_bytes()).unwrap_err();
        assert!(format!("{error:?}").starts_with(want), "{text}: {error:?}");
    }
    let text = r#"{"architecture":"arm64","variant":"v8","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
        "config":{"Env":["A=b"],"Entrypoint":null,"Cmd":"run","User":"1:2","WorkingDir":"/w","Labels":null}}"#;
    let config = ImageConfig::parse(text.as_bytes()).unwrap();
    assert_eq!(config.platform.to_string(), "linux/arm64");
    assert_eq!(config.run.env, ["A=b"]);
    assert_eq!(config.run.cmd, ["run"]);
    assert_eq!(
        (config.run.user.as_str(), config.run.working_dir.as_str()),
        ("1:2", "/w")
    );
}

#[test]
fn counts_must_agree() {
    let manifest = parse_image(&image(media::OCI_LAYER, 2)).unwrap();
    let one = ImageConfig::parse(config(&format!(r#"["{}"]"#, sha(1))).as_bytes()).unwrap();
    let error = manifest.layers(&one).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the manifest has 2 layers but the config has 1 diff IDs"
    );
    let many = parse_image(&image(media::OCI_LAYER, LAYERS_MAX + 1)).unwrap();
    let ids = vec![format!("\"{}\"", sha(1)); LAYERS_MAX + 1].join(",");
    let config = ImageConfig::parse(config(&format!("[{ids}]")).as_bytes()).unwrap();
    assert!(matches!(
        many.layers(&config),
        Err(ManifestError::TooManyLayers { .. })
    ));
    let foreign = parse_image(&image(
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        1,
    ))
    .unwrap();
    let error = foreign.layers(&one).unwrap_err();
    assert!(matches!(error, ManifestError::Layer { number: 0, .. }));
}

#[test]
fn a_list_gives_the_image_that_fits_best() {
    let list = [
        "linux/amd64/v3",
        "linux/amd64",
        "linux/arm/v5",
        "linux/arm/v6",
        "linux/arm64/v8",
        "windows/amd64",
        "unknown/unknown",
        "linux/s390x",
    ];
    let index = index(&list);
    for (wanted, want) in [
        ("linux/amd64", Some(1)),
        ("linux/amd64/v2", Some(1)),
        ("linux/amd64/v3", Some(0)),
        ("linux/amd64/v4", Some(0)),
        ("linux/x86_64", Some(1)),
        ("linux/arm", Some(3)),
        ("linux/arm/v5", Some(2)),
        ("linux/arm/6", Some(3)),
        ("linux/aarch64", Some(4)),
        ("linux/arm64/v8.2", Some(4)),
        ("windows/amd64", Some(5)),
        ("linux/s390x", Some(7)),
        ("linux/386", None),
        ("linux/riscv64", None),
        ("freebsd/amd64", None),
    ] {
        let got = index.select(&wanted.parse().unwrap());
        match want {
            Some(number) => assert_eq!(got.unwrap().digest.to_string(), sha(number), "{wanted}"),
            None => assert!(
                got.unwrap_err().to_string().contains("linux/arm/v6"),
                "{wanted}"
            ),
        }
    }
}

#[test]
fn entries_with_other_digests_do_not_spoil_a_list() {
    let text = format!(
        r#"{{"schemaVersion":2,"manifests":[
        {{"mediaType":"{m}","digest":"sha512:abc","size":1,"platform":{{"os":"linux","architecture":"386"}}}},
        {{"mediaType":"{m}","digest":"{}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}},
        {{"mediaType":"application/x","digest":"{}","size":1,"platform":{{"os":"linux","architecture":"arm64"}}}}]}}"#,
        sha(1),
        sha(2),
        m = media::OCI_MANIFEST
    );
    let Ok(Manifest::Index(index)) = Manifest::parse(text.as_bytes(), None) else {
        panic!("no index")
    };
    assert_eq!(
        index
            .select(&"linux/amd64".parse().unwrap())
            .unwrap()
            .digest
            .to_string(),
        sha(1)
    );
    let error = index.select(&"linux/386".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("sha512:abc"), "{error}");
    assert!(index.select(&"linux/arm64".parse().unwrap()).is_err());
}

#[test]
fn platforms() {
    for (text, want) in [
        ("linux/amd64", "linux/amd64"),
        ("Linux/X86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        ("linux/amd64/1", "linux/amd64"),
    ] {
        assert_eq!(
            text.parse::<Platform>().unwrap().to_string(),
            want,
            "{text}"
        );
    }
    for text in [
        "",
        "amd64",
        "linux/",
        "/amd64",
        "a/b/c/d",
        "linux/am d",
        "linux/ä",
    ] {
        assert!(text.parse::<Platform>().is_err(), "{text}");
    }
    assert_eq!(Platform::host().os, "linux");
}

#[test]
fn a_made_manifest_is_the_same_every_time_and_parses() {
    let descriptor = |kind: &str, n| Descriptor {
        media_type: kind.to_owned(),
        digest: Digest::of(&[n]),
        size: u64::from(n),
        platform: None,
        annotations: BTreeMap::new(),
    };
    let config = descriptor(media::OCI_CONFIG, 1);
    let layers = [descriptor(media::OCI_LAYER, 2)];
    let bytes = ImageManifest::to_oci_json(&config, &layers).unwrap();
    let want = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"{}","digest":"{}","size":1}},"layers":[{{"mediaType":"{}","digest":"{}","size":2}}]}}"#,
        media::OCI_MANIFEST,
        media::OCI_CONFIG,
        sha(1),
        media::OCI_LAYER,
        sha(2)
    );
    assert_eq!(String::from_utf8(bytes.clone()).unwrap(), want);
    assert_eq!(parse_image(&want).unwrap().layers, layers);
}
