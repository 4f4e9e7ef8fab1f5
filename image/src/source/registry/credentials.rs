//! Credentials from Docker's `config.json` and the containers tools' `auth.json`, and from the
//! helper programs that they name.
//!
//! Helpers are run here and not by a library, so that one that hangs is killed at its deadline and
//! nothing it prints gets into an error.

use std::{collections::HashMap, ffi::OsStr, io, path::Path, process::Stdio, time::Duration};

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use crate::source::options::{AuthOptions, Credential};

/// Largest credential file, and most that a helper may print, in bytes.
const FILE_MAX: u64 = 1 << 20;
const HELPER_OUTPUT_MAX: u64 = 64 << 10;

/// Address under which Docker keeps the credentials of `docker.io`.
const DOCKER_IO_KEY: &str = "https://index.docker.io/v1/";

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: HashMap<String, AuthEntry>,
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// Looks for a credential of `registry` (host and port) and `repository` in `files`.
///
/// A file or helper that fails is logged and passed over, and named in the second value, because
/// many images need no credential; it then explains a denial.
pub(crate) async fn find(
    options: &AuthOptions,
    registry: &str,
    repository: &str,
    helper_deadline: Duration,
) -> (Option<Credential>, Option<String>) {
    let mut trouble = None;
    let helpers = Helpers {
        path: options.helper_path.as_deref(),
        deadline: helper_deadline,
    };
    for file in &options.files {
        match find_in(file, registry, repository, helpers).await {
            Ok(Some(credential)) => return (Some(credential), trouble),
            Ok(None) => {}
            Err(reason) => {
                let text = format!("{}: {reason}", file.display());
                tracing::warn!("credentials passed over: {text}");
                trouble = Some(text);
            }
        }
    }
    (None, trouble)
}

async fn find_in(
    path: &Path,
    registry: &str,
    repository: &str,
    helpers: Helpers<'_>,
) -> Result<Option<Credential>, String> {
    let Some(bytes) = read_file(path)
        .await
        .map_err(|e| format!("cannot be read: {e}"))?
    else {
        return Ok(None);
    };
    // The parser's own message could quote a secret, so only the place of the error is told.
    let file: AuthFile = serde_json::from_slice(&bytes).map_err(|e| {
        format!(
            "is not a credential file (line {}, column {})",
            e.line(),
            e.column()
        )
    })?;
    let server = if registry == "docker.io" {
        DOCKER_IO_KEY
    } else {
        registry
    };
    if let Some(helper) = file
        .cred_helpers
        .get(registry)
        .or_else(|| file.cred_helpers.get(server))
    {
        return helpers.ask(helper, server).await;
    }
    if let Some(credential) = file
        .entry(registry, repository)
        .and_then(|e| e.credential().transpose())
    {
        return credential.map(Some);
    }
    match &file.creds_store {
        Some(helper) if !helper.is_empty() => helpers.ask(helper, server).await,
        _ => Ok(None),
    }
}

async fn read_file(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "too large for a credential file",
        ));
    }
    Ok(Some(bytes))
}

impl AuthFile {
    /// The entry for the longest prefix of `registry/repository`, as containers tools look it up,
    /// else Docker's: by address, whose scheme and path do not count.
    fn entry(&self, registry: &str, repository: &str) -> Option<&AuthEntry> {
        let full = format!("{registry}/{repository}");
        let mut prefix = full.as_str();
        loop {
            if let Some(entry) = self.auths.get(prefix) {
                return Some(entry);
            }
            match prefix.rsplit_once('/') {
                Some((shorter, _)) => prefix = shorter,
                None => break,
            }
        }
        let names = if registry == "docker.io" {
            &["docker.io", "index.docker.io", "registry-1.docker.io"][..]
        } else {
            &[registry][..]
        };
        let host = |key: &str| {
            let rest = key
                .strip_prefix("https://")
                .or_else(|| key.strip_prefix("http://"));
            let host = rest.map_or(key, |rest| rest.split('/').next().unwrap_or_default());
            host.to_ascii_lowercase()
        };
        let mut keys: Vec<&String> = self
            .auths
            .keys()
            .filter(|key| names.contains(&host(key).as_str()))
            .collect();
        // The map has no order; the choice must not change from run to run.
        keys.sort();
        keys.first().and_then(|key| self.auths.get(*key))
    }
}

impl AuthEntry {
    fn credential(&self) -> Result<Option<Credential>, String> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let Some(auth) = filled(&self.auth) {
            return decode_auth(&auth)
                .map(Some)
                .ok_or_else(|| "an \"auth\" entry is damaged".to_owned());
        }
        let pair = filled(&self.username).zip(filled(&self.password));
        Ok(pair.map(|(user, password)| Credential::Password { user, password }))
    }
}

/// Base64 of `user:password`, with or without padding.
fn decode_auth(auth: &str) -> Option<Credential> {
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bytes = GeneralPurpose::new(&STANDARD, config)
        .decode(auth.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    // Some clients pad the text with NULs.
    let password = password.trim_end_matches('\0');
    Some(Credential::Password {
        user: user.to_owned(),
        password: password.to_owned(),
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperReply {
    username: String,
    secret: String,
}

/// How credential helpers are run.
#[derive(Clone, Copy)]
struct Helpers<'a> {
    path: Option<&'a OsStr>,
    deadline: Duration,
}

impl Helpers<'_> {
    /// Runs `docker-credential-<helper> get`; `None` when it knows nothing of the server.
    ///
    /// Source: the docker-credential-helpers project, "get" command.
    async fn ask(self, helper: &str, server: &str) -> Result<Option<Credential>, String> {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if helper.is_empty() || !helper.bytes().all(good) {
            return Err("it names a credential helper that is no program name".to_owned());
        }
        let program = format!("docker-credential-{helper}");
        let deadline = self.deadline;
        let (ok, output) = timeout(deadline, self.run(&program, server))
            .await
            .map_err(|_| format!("{program} gave no answer within {deadline:?} and was stopped"))?
            .map_err(|e| format!("{program} could not be run: {e}"))?;
        if !ok {
            // The one failure with a fixed text; everything else that helpers print may hold secrets.
            let text = String::from_utf8_lossy(&output);
            return if text.contains("credentials not found") {
                Ok(None)
            } else {
                Err(format!("{program} failed"))
            };
        }
        let reply: HelperReply =
            serde_json::from_slice(&output).map_err(|_| format!("{program} gave no credential"))?;
        Ok(Some(match reply.username.as_str() {
            "<token>" => Credential::IdentityToken(reply.secret),
            _ => Credential::Password {
                user: reply.username,
                password: reply.secret,
            },
        }))
    }

    /// Exit status and output of a helper; dropping the future kills it.
    async fn run(self, program: &str, server: &str) -> io::Result<(bool, Vec<u8>)> {
        let mut command = Command::new(program);
        if let Some(path) = self.path {
            command.env("PATH", path);
        }
        let mut child = command
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(server.as_bytes()).await {
                // A helper may answer without reading its question to the end.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                _ => {}
            }
        }
        let mut output = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout
                .take(HELPER_OUTPUT_MAX)
                .read_to_end(&mut output)
                .await?;
        }
        Ok((child.wait().await?.success(), output))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        }
    }

    async fn look(
        json: &str,
        registry: &str,
        repository: &str,
    ) -> (Option<Credential>, Option<String>) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("auth.json");
        std::fs::write(&file, json).unwrap();
        let missing = dir.path().join("missing.json");
        let options = AuthOptions {
            files: vec![missing, file],
            ..AuthOptions::default()
        };
        find(&options, registry, repository, Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn entries_are_found_as_docker_and_containers_write_them() {
        // "u:p" and "v:q:r" in base64, with and without padding.
        let json = r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"dTpw"},
            "quay.io":{"auth":"djpxOnI="},
            "quay.io/org":{"auth":"djpxOnI"},
            "https://Old.example:5000/v2/":{"username":"n","password":"m"},
            "token.example":{"auth":"dTpw","identitytoken":"id"},
            "empty.example":{},
            "localhost/deep/er":{"auth":"dTpw"}}}"#;
        for (registry, repository, want) in [
            ("docker.io", "library/x", Some(password("u", "p"))),
            ("quay.io", "other/x", Some(password("v", "q:r"))),
            ("quay.io", "org/x", Some(password("v", "q:r"))),
            ("old.example:5000", "x", Some(password("n", "m"))),
            (
                "token.example",
                "x",
                Some(Credential::IdentityToken("id".to_owned())),
            ),
            ("empty.example", "x", None),
            ("localhost", "deep/er/x", Some(password("u", "p"))),
            ("localhost", "deep", None),
            ("nowhere.example", "x", None),
        ] {
            let (got, trouble) = look(json, registry, repository).await;
            assert_eq!((got, trouble), (want, None), "{registry}/{repository}");
        }
    }

    #[tokio::test]
    async fn damaged_files_are_named_without_their_content() {
        for json in [
            r#"{"auths":{"r":{"auth":"!!secret!!"}}}"#,
            "secret",
            r#"{"auths":"secret"}"#,
        ] {
            let (got, trouble) = look(json, "r", "x").await;
            let trouble = trouble.expect("trouble");
            assert!(
                got.is_none() && trouble.contains("auth.json") && !trouble.contains("secret"),
                "{trouble}"
            );
        }
        let (_, trouble) = look(r#"{"credsStore":"../../bin/sh"}"#, "r", "x").await;
        assert!(trouble.unwrap().contains("no program name"));
        let (_, trouble) = look(r#"{"credHelpers":{"r":"harbour-none-such"}}"#, "r", "x").await;
        assert!(
            trouble
                .unwrap()
                .contains("docker-credential-harbour-none-such could not be run")
        );
    }
}
