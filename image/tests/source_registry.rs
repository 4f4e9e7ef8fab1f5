//! The real thing: images made by umoci, pushed by skopeo into Debian's `docker-registry`, over
//! HTTP and over HTTPS with a password, and back out through the sources.
//!
//! Needs docker-registry, skopeo, umoci, openssl and perl, and fails without them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    io::Read,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use harbour_image::{
    digest::Digest,
    manifest::Compression,
    source::{BlobError, ErrorKind, ResolvedImage, Source, SourceOptions, SourceSpec},
};
use tempfile::TempDir;

const USER: &str = "someone";
const PASSWORD: &str = "s3cret:with colon";

/// Runs a program to its end; its failure or absence is the test's.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{program} cannot be run, install it: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// An OCI layout with one image of two layers, tag `1`.
fn layout() -> &'static Path {
    static LAYOUT: OnceLock<TempDir> = OnceLock::new();
    LAYOUT
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let files = dir.path().join("files");
            std::fs::create_dir_all(files.join("usr/bin")).unwrap();
            let noise: Vec<u8> = (0..3_000_000u32)
                .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
                .collect();
            std::fs::write(files.join("usr/bin/app"), noise).unwrap();
            std::os::unix::fs::symlink("app", files.join("usr/bin/link")).unwrap();
            let more = dir.path().join("more");
            std::fs::create_dir(&more).unwrap();
            std::fs::write(more.join("hello"), "hello").unwrap();
            let layout = dir.path().join("layout").display().to_string();
            let image = format!("{layout}:1");
            run("umoci", &["init", "--layout", &layout]);
            run("umoci", &["new", "--image", &image]);
            run(
                "umoci",
                &[
                    "insert",
                    "--image",
                    &image,
                    &files.display().to_string(),
                    "/",
                ],
            );
            run(
                "umoci",
                &[
                    "insert",
                    "--image",
                    &image,
                    &more.display().to_string(),
                    "/etc",
                ],
            );
            run(
                "umoci",
                &[
                    "config",
                    "--image",
                    &image,
                    "--config.cmd",
                    "/usr/bin/app",
                    "--config.env",
                    "A=b",
                ],
            );
            dir
        })
        .path()
}

/// A `docker-registry` on a port of its own; killed when dropped.
struct Registry {
    child: Child,
    port: u16,
    dir: TempDir,
}

impl Registry {
    fn start(config: &str) -> Self {
        // Another process may take the port between here and the registry's start: then again.
        for _ in 0..5 {
            let dir = tempfile::tempdir().unwrap();
            let port = TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
                .port();
            let file = dir.path().join("config.yml");
            let data = dir.path().join("data").display().to_string();
            let text = format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {data}}}}}\n\
                 http:\n  addr: 127.0.0.1:{port}\n  secret: x\n{config}"
            );
            std::fs::write(&file, text).unwrap();
            let child = Command::new("docker-registry")
                .args(["serve", &file.display().to_string()])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("docker-registry cannot be run, install it");
            let mut registry = Self { child, port, dir };
            if registry.is_up() {
                return registry;
            }
        }
        panic!("docker-registry did not come up");
    }

    fn is_up(&mut self) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    fn name(&self, repository: &str) -> String {
        format!("127.0.0.1:{}/{repository}", self.port)
    }

    /// Pushes the image, in the manifest format given (`oci` or `v2s2`).
    fn push(&self, repository: &str, format: &str, more: &[&str]) {
        let from = format!("oci:{}:1", layout().join("layout").display());
        let to = format!("docker://{}", self.name(repository));
        let mut args = vec![
            "copy",
            "--insecure-policy",
            "--dest-tls-verify=false",
            "--format",
            format,
        ];
        args.extend(more);
        run(
            "skopeo",
            &[args.as_slice(), &[from.as_str(), to.as_str()]].concat(),
        );
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn resolve(text: &str, options: &SourceOptions) -> (Source, ResolvedImage) {
    let source = Source::open(&SourceSpec::parse(text).unwrap(), options)
        .await
        .unwrap();
    let image = source.resolve(None).await.unwrap();
    (source, image)
}

/// Reads every layer, checks the diff IDs, and gives the uncompressed tars.
async fn pull(text: &str, options: &SourceOptions) -> (ResolvedImage, Vec<Vec<u8>>) {
    let (source, image) = resolve(text, options).await;
    let mut tars = Vec::new();
    for layer in &image.layers {
        let (mut reader, compression) = (source.blob(layer), layer.compression);
        let read = tokio::task::spawn_blocking(move || {
            let mut tar = Vec::new();
            match compression {
                Compression::None => reader.read_to_end(&mut tar).map(drop),
                Compression::Gzip => flate2::bufread::MultiGzDecoder::new(&mut reader)
                    .read_to_end(&mut tar)
                    .map(drop),
                Compression::Zstd => zstd::stream::copy_decode(&mut reader, &mut tar),
            }
            .map_err(|error| BlobError::from_io(&error).expect("a typed error").clone())?;
            reader.finish().map(|_| tar)
        });
        let tar = read.await.unwrap().unwrap();
        assert_eq!(Digest::of(&tar), layer.diff_id);
        tars.push(tar);
    }
    (image, tars)
}

fn insecure() -> SourceOptions {
    SourceOptions {
        insecure: true,
        ..SourceOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_comes_out_of_every_source() {
    let registry = Registry::start("");
    registry.push("org/app:1", "oci", &[]);
    registry.push("org/app:docker", "v2s2", &[]);
    let (want, tars) = pull(&registry.name("org/app:1"), &insecure()).await;
    assert_eq!(want.layers.len(), 2);
    assert_eq!(want.name.to_string(), registry.name("org/app:1"));
    assert_eq!(
        (
            want.config.run.cmd.as_slice(),
            want.config.run.env.contains(&"A=b".to_owned())
        ),
        (&["/usr/bin/app".to_owned()][..], true)
    );
    let inspected = run(
        "skopeo",
        &[
            "inspect",
            "--tls-verify=false",
            &format!("docker://{}", registry.name("org/app:1")),
        ],
    );
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Digest"], want.manifest_digest.to_string());

    let by_digest = registry.name(&format!("org/app@{}", want.manifest_digest));
    assert_eq!(
        pull(&by_digest, &insecure()).await.0.manifest,
        want.manifest
    );
    let (docker, docker_tars) = pull(&registry.name("org/app:docker"), &insecure()).await;
    assert!(
        docker.media_type.contains("docker"),
        "{}",
        docker.media_type
    );
    assert!(docker_tars == tars);

    let dir = tempfile::tempdir().unwrap();
    let oci = format!("oci:{}:1", layout().join("layout").display());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (oci_tar, docker_tar) = (path("oci.tar"), path("docker.tar"));
    run(
        "skopeo",
        &[
            "copy",
            "--insecure-policy",
            &oci,
            &format!("oci-archive:{oci_tar}:1"),
        ],
    );
    run(
        "skopeo",
        &[
            "copy",
            "--insecure-policy",
            &oci,
            &format!("docker-archive:{docker_tar}:org/app:1"),
        ],
    );
    run("gzip", &["--keep", &docker_tar]);
    for (text, name) in [
        (oci, "localhost/layout:1"),
        (oci_tar.clone(), "localhost/oci:1"),
        (docker_tar.clone(), "docker.io/org/app:1"),
        (format!("{docker_tar}.gz"), "docker.io/org/app:1"),
    ] {
        let (image, got) = pull(&text, &SourceOptions::default()).await;
        assert!(got == tars, "{text}");
        assert_eq!(image.config.diff_ids, want.config.diff_ids, "{text}");
        assert_eq!(image.name.to_string(), name, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_gone() {
    let registry = Registry::start("");
    registry.push("org/app:1", "oci", &[]);
    for name in [
        "org/app:2",
        "org/other:1",
        &format!("org/app@{}", Digest::of(b"x")),
    ] {
        let spec = SourceSpec::parse(&registry.name(name)).unwrap();
        let source = Source::open(&spec, &insecure()).await.unwrap();
        assert_eq!(
            source.resolve(None).await.unwrap_err().kind(),
            ErrorKind::Gone,
            "{name}"
        );
    }
    // A blob that goes away, or is damaged, between the manifest and its reading.
    let (source, image) = resolve(&registry.name("org/app:1"), &insecure()).await;
    let digest = image.layers[0].digest.hex();
    let blob: PathBuf = [
        "data/docker/registry/v2/blobs/sha256",
        &digest[..2],
        &digest,
        "data",
    ]
    .iter()
    .collect();
    let blob = registry.dir.path().join(blob);
    let mut bytes = std::fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    let read = || {
        let reader = source.blob(&image.layers[0]);
        tokio::task::spawn_blocking(move || reader.finish())
    };
    assert_eq!(
        read().await.unwrap().unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    std::fs::remove_file(&blob).unwrap();
    assert_ne!(
        read().await.unwrap().unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

/// A CA and a certificate for 127.0.0.1 signed by it.
fn certificates(dir: &Path) {
    let at = |name: &str| dir.join(name).display().to_string();
    std::fs::write(
        dir.join("san"),
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ];
    let ca = [
        "req",
        "-x509",
        "-days",
        "2",
        "-subj",
        "/CN=ca",
        "-keyout",
        &at("ca.key"),
        "-out",
        &at("ca.pem"),
    ];
    run("openssl", &[ca.as_slice(), &key].concat());
    let request = [
        "req",
        "-new",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        &at("key.pem"),
        "-out",
        &at("csr"),
    ];
    run("openssl", &[request.as_slice(), &key].concat());
    let (csr, ca, ca_key, out, san) = (
        at("csr"),
        at("ca.pem"),
        at("ca.key"),
        at("cert.pem"),
        at("san"),
    );
    let sign = [
        "x509",
        "-req",
        "-days",
        "2",
        "-in",
        &csr,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-extfile",
        &san,
        "-out",
        &out,
    ];
    run("openssl", &sign);
}

#[tokio::test(flavor = "multi_thread")]
async fn https_with_a_ca_of_its_own_and_a_password() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    // The system's crypt(3) knows bcrypt, the only kind that the registry takes.
    let hash = run(
        "perl",
        &[
            "-e",
            "print crypt($ARGV[0], '$2b$05$abcdefghijklmnopqrstuu')",
            PASSWORD,
        ],
    );
    std::fs::write(dir.path().join("htpasswd"), format!("{USER}:{hash}\n")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let registry = Registry::start(&format!(
        "  tls: {{certificate: {}, key: {}}}\nauth:\n  htpasswd: {{realm: test, path: {}}}\n",
        at("cert.pem").display(),
        at("key.pem").display(),
        at("htpasswd").display()
    ));
    let (auth, credentials) = (
        at("auth.json").display().to_string(),
        format!("{USER}:{PASSWORD}"),
    );
    registry.push("org/app:1", "oci", &["--dest-creds", &credentials]);
    let login = format!("127.0.0.1:{}", registry.port);
    run(
        "skopeo",
        &[
            "login",
            "--tls-verify=false",
            "--authfile",
            &auth,
            "-u",
            USER,
            "-p",
            PASSWORD,
            &login,
        ],
    );

    let mut options = SourceOptions {
        ca_files: vec![at("ca.pem")],
        ..SourceOptions::default()
    };
    options.auth.files = vec![at("auth.json")];
    let (image, _) = pull(&registry.name("org/app:1"), &options).await;
    assert_eq!(image.layers.len(), 2);

    let spec = SourceSpec::parse(&registry.name("org/app:1")).unwrap();
    let denied = SourceOptions {
        ca_files: vec![at("ca.pem")],
        ..SourceOptions::default()
    };
    let error = Source::open(&spec, &denied)
        .await
        .unwrap()
        .resolve(None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");

    options.ca_files.clear();
    let start = Instant::now();
    let error = Source::open(&spec, &options)
        .await
        .unwrap()
        .resolve(None)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("certificate is not trusted"),
        "{error}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "a wrong certificate is not asked for again"
    );
    options.insecure = true;
    assert_eq!(
        pull(&registry.name("org/app:1"), &options).await.0.manifest,
        image.manifest
    );

    options.ca_files = vec![at("san")];
    let error = Source::open(&spec, &options).await.unwrap_err();
    assert!(error.to_string().contains("no certificate"), "{error}");
}
