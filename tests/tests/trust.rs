//! A cluster whose parts meet over mutual TLS, with certificates made as a user makes them; who is
//! refused is told why; and no secret shows anywhere.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use harbour_tests::{
    cluster::{self, Cluster, Part},
    layers::{Entry, Layout},
    shell, web,
};

const LIMIT: Duration = Duration::from_secs(30);

fn certs(cluster: &Cluster, args: &[&str], dir: &Path) -> shell::Output {
    let mut command = cluster.command(["certs"]);
    command.args(args).arg("--dir").arg(dir);
    shell::run(&mut command, LIMIT).unwrap()
}

/// Lines of private keys, in base64: none of them may show anywhere.
fn secrets(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in walk(dir) {
        if entry.extension().is_some_and(|e| e == "key") {
            let mode = fs::metadata(&entry).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", entry.display());
            let text = fs::read_to_string(&entry).unwrap();
            let lines = text
                .lines()
                .filter(|line| !line.starts_with("---") && line.len() > 20);
            found.extend(lines.map(str::to_owned));
        }
    }
    found
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn parts_meet_over_tls_and_strangers_do_not() {
    let mut cluster = Cluster::empty("64MiB").unwrap();
    let (ca, other) = (cluster.dir().join("ca"), cluster.dir().join("other"));
    for dir in [&ca, &other] {
        certs(&cluster, &["init"], dir).ok().unwrap();
        certs(
            &cluster,
            &["issue", "alpha", "--san", "::1", "--san", "127.0.0.1"],
            dir,
        )
        .ok()
        .unwrap();
    }
    // Only one authority in a directory, and only keys that are ours to read.
    let again = certs(&cluster, &["init"], &ca);
    assert!(
        again.stderr.contains("ca.crt is there already"),
        "{}",
        again.stderr
    );
    let shown = certs(&cluster, &["show", "--json"], &ca).ok().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(
        shown[1]["names"],
        serde_json::json!(["alpha", "::1", "127.0.0.1"])
    );
    assert_eq!(
        (shown[0]["what"].as_str(), shown[1]["problem"].is_null()),
        (Some("authority"), true)
    );
    assert!((364..366).contains(&shown[1]["days_left"].as_i64().unwrap()));

    let (port, metrics) = (web::free_port().unwrap(), web::free_port().unwrap());
    let tls = ca.join("hosts/alpha");
    let config = |tls: &Path, url: &str| {
        let text = format!(
            "metad_url = '{url}'\ntls_dir = '{}'\n[metad]\nlisten = '[::1]:{port}'\nmetrics = '127.0.0.1:{metrics}'\n",
            tls.display()
        );
        cluster.configure(&text).unwrap();
    };
    let url = format!("https://[::1]:{port}");
    config(&tls, &url);
    let mut layout = Layout::create(&cluster.dir().join("layout")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    layout
        .image("w", &[vec![Entry::file("witness", bytes.clone())]])
        .unwrap();
    for part in Part::ALL {
        cluster.start_part(part, None).unwrap();
    }
    cluster.wait_ready().unwrap();
    let image = cluster.pull(&layout.reference("w")).unwrap();
    assert!(fs::read(cluster.rootfs(&image).unwrap().join("witness")).unwrap() == bytes);
    let doctor = cluster.run(["doctor"]).unwrap();
    assert!(doctor.text().contains("certificates"), "{}", doctor.text());

    let config = |tls: &Path, url: &str| {
        cluster
            .configure(&format!(
                "metad_url = '{url}'\ntls_dir = '{}'\n",
                tls.display()
            ))
            .unwrap();
        cluster.run(["donors", "--json"]).unwrap()
    };
    let said = |output: &shell::Output, code: i32, parts: &[&str]| {
        assert_eq!(output.status.code(), Some(code), "{}", output.stderr);
        for part in parts {
            assert!(
                output.stderr.contains(part),
                "{part:?} is not in {}",
                output.stderr
            );
        }
    };
    said(
        &config(&other.join("hosts/alpha"), &url),
        4,
        &["other/hosts/alpha/ca.crt", "certificates of one CA"],
    );
    said(
        &config(&cluster.dir().join("nowhere"), &url),
        1,
        &["nowhere/ca.crt", "harbour certs issue"],
    );
    said(
        &config(&tls, "http://192.0.2.1:7480"),
        2,
        &["192.0.2.1", "--insecure-metad"],
    );
    // metad does not listen beyond loopback without certificates either.
    let elsewhere = cluster.dir().join("elsewhere");
    let mut command = Command::new(cluster::binary());
    command.args(["metad", "--listen", "0.0.0.0:0", "--tls-dir", "/nowhere"]);
    command
        .arg("--run-dir")
        .arg(&elsewhere)
        .arg("--state-dir")
        .arg(&elsewhere);
    said(
        &shell::run(&mut command, LIMIT).unwrap(),
        1,
        &["/nowhere/ca.crt", "harbour certs issue"],
    );

    // Renewed, it is taken without a restart of anything.
    certs(
        &cluster,
        &[
            "issue",
            "alpha",
            "--san",
            "::1",
            "--san",
            "localhost",
            "--days",
            "20",
        ],
        &ca,
    )
    .ok()
    .unwrap();
    let renewed = config(&tls, &url);
    assert!(renewed.status.success(), "{}", renewed.stderr);
    let doctor = cluster.run(["doctor", "--json"]).unwrap();
    let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let finding = doctor
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["check"] == "certificates")
        .unwrap();
    assert_eq!(finding["grade"], "weak", "it ends in 20 days: {finding}");

    let mut shown = String::new();
    for listing in ["status", "donors", "images", "layers"] {
        shown += &cluster.json(listing).unwrap().to_string();
    }
    shown += &web::get(metrics, "/metrics").unwrap();
    for part in Part::ALL {
        shown += &cluster.log(part);
        let pid = cluster.pid(part).unwrap();
        shown += &String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap());
    }
    let secrets = secrets(&ca);
    assert!(secrets.len() >= 4, "{} lines of keys", secrets.len());
    for secret in &secrets {
        assert!(!shown.contains(secret.as_str()), "a private key shows");
    }
    // Nor does anything call itself a token.
    assert!(!shown.contains("token"), "a token shows");
    cluster.stop().unwrap();
}
