//! A certificate authority for tests, and directories of hosts as a user would have them.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use harbour_metad_client::{
    Trust,
    tls::{CA_FILE, CERTIFICATE_FILE, Identity, KEY_FILE},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

const DAY: Duration = Duration::from_secs(86_400);

pub(crate) struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            folder: tempfile::tempdir().unwrap(),
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// A host's directory, with a certificate for `names` that is good from and until so many days
    /// from now.
    pub(crate) fn dir(&self, host: &str, names: &[&str], from: i32, until: i32) -> PathBuf {
        let dir = self.folder.path().join(host);
        std::fs::create_dir_all(&dir).unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let at = |days: i32| {
            let base = rcgen::date_time_ymd(1970, 1, 1) + now;
            if days < 0 {
                base - DAY * days.unsigned_abs()
            } else {
                base + DAY * days.unsigned_abs()
            }
        };
        (params.not_before, params.not_after) = (at(from), at(until));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        write(&dir.join(CA_FILE), &self.pem, 0o644);
        write(&dir.join(KEY_FILE), &key.serialize_pem(), 0o600);
        write(&dir.join(CERTIFICATE_FILE), &certificate.pem(), 0o644);
        dir
    }

    pub(crate) fn identity(&self, host: &str, names: &[&str]) -> Arc<Identity> {
        Arc::new(Identity::load(&self.dir(host, names, -1, 30)).unwrap())
    }

    pub(crate) fn trust(&self, host: &str) -> Trust {
        Trust {
            identity: Some(self.identity(host, &[host])),
            plain: false,
        }
    }
}

pub(crate) fn write(path: &Path, text: &str, mode: u32) {
    // As a copy over the network would: another file under the same name.
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text).unwrap();
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(mode)).unwrap();
    std::fs::rename(&fresh, path).unwrap();
}
