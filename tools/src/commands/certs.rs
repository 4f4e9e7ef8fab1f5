//! `harbour certs`: a small certificate authority for one cluster.
//!
//! The authority is a directory: `ca.crt` and `ca.key`, and below `hosts/` one directory for each
//! host, which holds what that host needs (see [`harbour_metad_client::tls`]). Whoever has `ca.key`
//! can be any host, so it stays where it was made.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use harbour_metad_client::tls::{self, CA_FILE, CERTIFICATE_FILE, Certificate, Identity, KEY_FILE};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};

use super::Context;
use crate::{
    cli::{Certs, CertsIssue, CertsShow},
    failure::{Code, failure},
    output::{self, Table},
};

/// The authority's private key.
const CA_KEY_FILE: &str = "ca.key";
/// How long an authority is good, in days.
const CA_DAYS: u32 = 3650;
/// Certificates begin this much before they are made, for hosts whose clocks are behind.
const SKEW: Duration = Duration::from_secs(3600);
/// Longest name of a host.
const NAME_MAX: usize = 253;

pub(super) fn run(context: &Context, command: &Certs) -> anyhow::Result<ExitCode> {
    match command {
        Certs::Init(at) => init(&at.dir),
        Certs::Issue(args) => issue(args),
        Certs::Show(args) => show(context, args),
    }
}

fn init(dir: &Path) -> anyhow::Result<ExitCode> {
    for file in [CA_FILE, CA_KEY_FILE] {
        let path = dir.join(file);
        if fs::symlink_metadata(&path).is_ok() {
            return Err(failure(
                Code::Failed,
                format!("{} is there already", path.display()),
                "use it: harbour certs issue NAME; or make another authority with --dir",
            ));
        }
    }
    make_dir(dir)?;
    let key = KeyPair::generate().context("cannot make a key")?;
    let mark = hex::encode(&blake3::hash(key.public_key_raw()).as_bytes()[..4]);
    let mut params = params(&format!("ImageHarbour CA {mark}"), &[], CA_DAYS, None)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params
        .self_signed(&key)
        .context("cannot sign the authority")?;
    // The key first: a certificate without its key could not be told from one that is in use.
    write(
        &dir.join(CA_KEY_FILE),
        key.serialize_pem().as_bytes(),
        0o600,
    )?;
    write(&dir.join(CA_FILE), certificate.pem().as_bytes(), 0o644)?;
    output::say(&format!(
        "authority made in {}; next, for each host: harbour certs issue NAME\n",
        dir.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn issue(args: &CertsIssue) -> anyhow::Result<ExitCode> {
    if args.names.len() > 1 && !args.sans.is_empty() {
        return Err(failure(
            Code::Usage,
            "--san is for one host, and several are named",
            "issue that host's certificate by itself",
        ));
    }
    for name in args.names.iter().chain(&args.sans) {
        check_name(name)?;
    }
    let dir = &args.at.dir;
    let (ca_path, key_path) = (dir.join(CA_FILE), dir.join(CA_KEY_FILE));
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            failure(
                Code::Failed,
                format!("{} cannot be read: {error}", path.display()),
                "make an authority with harbour certs init, or name its directory with --dir",
            )
        })
    };
    let (ca_pem, key_pem) = (read(&ca_path)?, read(&key_path)?);
    let ca = Certificate::read(&ca_path)?;
    let key = KeyPair::from_pem(&key_pem)
        .with_context(|| format!("{} holds no private key", key_path.display()))?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, key)
        .with_context(|| format!("{} holds no authority", ca_path.display()))?;
    for name in &args.names {
        let folder = dir.join("hosts").join(name);
        make_dir(&folder)?;
        let mut names = vec![name.clone()];
        names.extend(args.sans.iter().cloned());
        let mut params = params(name, &names, args.days, Some(ca.until_unix))?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("cannot make a key")?;
        let certificate = params
            .signed_by(&key, &issuer)
            .with_context(|| format!("cannot sign the certificate of {name}"))?;
        write(&folder.join(CA_FILE), ca_pem.as_bytes(), 0o644)?;
        write(
            &folder.join(KEY_FILE),
            key.serialize_pem().as_bytes(),
            0o600,
        )?;
        let path = folder.join(CERTIFICATE_FILE);
        write(&path, certificate.pem().as_bytes(), 0o644)?;
        // What was made is looked at as a daemon would.
        Identity::load(&folder)?;
        let until = tls::date(Certificate::read(&path)?.until_unix);
        output::say(&format!(
            "{}: for {}, until {until}\n",
            folder.display(),
            names.join(", ")
        ))?;
    }
    output::say("copy each directory to its host as /etc/harbour/tls\n")?;
    Ok(ExitCode::SUCCESS)
}

/// A host's name becomes the name of a directory and a name in a certificate.
fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && !label.starts_with('-');
    let named = name.len() <= NAME_MAX && name.bytes().all(plain) && name.split('.').all(label);
    if named || name.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    Err(failure(
        Code::Usage,
        format!(
            "{:?} is not the name or address of a host",
            output::printable(name)
        ),
        "write a DNS name like alpha.example, or an address like 10.0.0.1 or fd00::1",
    ))
}

fn params(
    common: &str,
    names: &[String],
    days: u32,
    end_unix: Option<i64>,
) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(names.to_vec())
        .with_context(|| format!("cannot write {} into a certificate", names.join(", ")))?;
    params.distinguished_name = DistinguishedName::new();
    // A common name has 64 characters at most; the names that count are the alternative ones.
    let short: String = common.chars().take(64).collect();
    params.distinguished_name.push(DnType::CommonName, short);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = output::now_unix();
    let end = now.saturating_add(i64::from(days) * 86_400);
    let end = end_unix.map_or(end, |last| last.min(end));
    anyhow::ensure!(
        end > now,
        "the authority has ended: make a new one with harbour certs init --dir NEW"
    );
    let at = |unix: i64| epoch + Duration::from_secs(unix.unsigned_abs());
    params.not_before = at(now) - SKEW;
    params.not_after = at(end);
    Ok(params)
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot create {}", dir.display()))
}

/// Puts a file in place whole, with these permission bits from the beginning.
fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let put = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    put().map_err(|error| {
        let _ = fs::remove_file(&fresh);
        anyhow::Error::from(error).context(format!("cannot write {}", path.display()))
    })
}

fn show(context: &Context, args: &CertsShow) -> anyhow::Result<ExitCode> {
    let mut lines = Vec::new();
    let ca = args.at.dir.join(CA_FILE);
    if ca.exists() {
        lines.push(line("authority", &ca, None));
    }
    let mut hosts: Vec<PathBuf> = fs::read_dir(args.at.dir.join("hosts"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    hosts.sort();
    for host in hosts {
        lines.push(line("issued", &host.join(CERTIFICATE_FILE), Some(&host)));
    }
    let here = &context.places.tls;
    if here.join(CERTIFICATE_FILE).exists() {
        lines.push(line("this host", &here.join(CERTIFICATE_FILE), Some(here)));
    }
    if args.json {
        output::json(&json!(lines))?;
        return Ok(ExitCode::SUCCESS);
    }
    if lines.is_empty() {
        return Err(failure(
            Code::NotFound,
            format!(
                "no certificate in {} or {}",
                args.at.dir.display(),
                here.display()
            ),
            "make an authority with: harbour certs init",
        ));
    }
    let mut table = Table::new(&["WHAT", "SUBJECT", "NAMES", "UNTIL", "DAYS", "STATE", "FILE"]);
    for line in &lines {
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        let names = line["names"].as_array().into_iter().flatten();
        let names: Vec<&str> = names.filter_map(Value::as_str).collect();
        table.row(vec![
            text("what"),
            text("subject"),
            names.join(","),
            text("until"),
            line["days_left"].to_string(),
            line["problem"].as_str().unwrap_or("good").to_owned(),
            text("file"),
        ]);
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

/// One certificate, and what is wrong with the directory that a host would use it from.
fn line(what: &str, file: &Path, dir: Option<&Path>) -> Value {
    let problem = |error: tls::TlsError| crate::node::refill::chain(&error);
    let mut line = json!({ "what": what, "file": file.display().to_string() });
    match Certificate::read(file) {
        Ok(read) => {
            line["subject"] = json!(read.subject);
            line["names"] = json!(read.names);
            line["issuer"] = json!(read.issuer);
            line["serial"] = json!(read.serial);
            line["until"] = json!(tls::date(read.until_unix));
            line["until_unix"] = json!(read.until_unix);
            line["days_left"] = json!(read.days_left(output::now_unix()));
            let loaded = dir.and_then(|dir| Identity::load(dir).err());
            line["problem"] = json!(loaded.map(problem));
        }
        Err(error) => line["problem"] = json!(problem(error)),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_hosts_are_neither_paths_nor_patterns() {
        for name in [
            "alpha",
            "alpha.example",
            "a_b-c",
            "10.0.0.1",
            "fd00::1",
            "::1",
        ] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "-a",
            "a..b",
            "*.example",
            "a b",
            "a\u{1b}",
            "é",
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert!(check_name(&"a".repeat(64)).is_err());
    }
}
