//! Certificates and keys in files.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::extensions::GeneralName;

use super::{Files, TlsError};

/// Longest file that is looked at, in bytes.
const FILE_MAX: u64 = 256 << 10;

/// What tells whether a file has changed.
type Mark = Option<(u64, u64, i64, i64)>;

/// What tells whether any of the files has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp([Mark; 3]);

impl Stamp {
    pub(super) fn of(files: &Files) -> Self {
        Self([&files.ca, &files.certificate, &files.key].map(|path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
        }))
    }
}

/// The content of the files.
pub(super) struct Pem {
    pub(super) ca: Vec<CertificateDer<'static>>,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Pem {
    pub(super) fn read(files: &Files) -> Result<Self, TlsError> {
        let ca = certificates(&files.ca)?;
        let chain = certificates(&files.certificate)?;
        // Looked at through the open file, so that it is the one whose bytes are taken.
        let (bytes, mode) = read(&files.key)?;
        if mode & 0o007 != 0 {
            return Err(TlsError::Exposed {
                path: files.key.clone(),
                mode: mode & 0o777,
            });
        }
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| TlsError::Content {
            path: files.key.clone(),
            reason: "holds no private key in PEM".into(),
        })?;
        Ok(Self { ca, chain, key })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (bytes, _) = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Content {
            path: path.into(),
            reason: "holds no certificate in PEM".into(),
        }),
    }
}

/// A file's bytes and its permission bits.
fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let fail = |source: io::Error| TlsError::Read {
        path: path.into(),
        source: Arc::new(source),
    };
    let file = File::open(path).map_err(fail)?;
    let mode = file.metadata().map_err(fail)?.mode();
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(fail)?;
    Ok((bytes, mode))
}

/// What a certificate says, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Common name of its subject.
    pub subject: String,
    /// Names and addresses that it is for.
    pub names: Vec<String>,
    /// Common name of its issuer.
    pub issuer: String,
    /// Valid from, in Unix seconds.
    pub from_unix: i64,
    /// Valid until, in Unix seconds.
    pub until_unix: i64,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// Serial number in hex.
    pub serial: String,
}

impl Certificate {
    /// The first certificate in a PEM file.
    ///
    /// # Errors
    /// [`TlsError`], which names the file.
    pub fn read(path: &Path) -> Result<Self, TlsError> {
        let first = certificates(path)?.into_iter().next();
        let malformed = || TlsError::Content {
            path: path.into(),
            reason: "holds no certificate that can be understood".into(),
        };
        let der = first.ok_or_else(malformed)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|_| malformed())?;
        let common = |name: &x509_parser::x509::X509Name<'_>| {
            let first = name.iter_common_name().next();
            let text = first.and_then(|part| part.as_str().ok());
            text.unwrap_or("no common name").to_owned()
        };
        let alternative = parsed.subject_alternative_name().map_err(|_| malformed())?;
        let names = alternative
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(name)
            .collect();
        Ok(Self {
            subject: common(parsed.subject()),
            names,
            issuer: common(parsed.issuer()),
            from_unix: parsed.validity().not_before.timestamp(),
            until_unix: parsed.validity().not_after.timestamp(),
            is_ca: parsed.is_ca(),
            serial: parsed
                .raw_serial()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect(),
        })
    }

    /// Whole days from `now_unix` until it ends; negative when it has ended.
    pub fn days_left(&self, now_unix: i64) -> i64 {
        self.until_unix.saturating_sub(now_unix).div_euclid(86_400)
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes)
                .ok()
                .map(|b| std::net::Ipv4Addr::from(b).to_string()),
            16 => <[u8; 16]>::try_from(*bytes)
                .ok()
                .map(|b| std::net::Ipv6Addr::from(b).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// The day of a time in Unix seconds, as 2027-03-01 (UTC).
pub fn date(unix: i64) -> String {
    // Days since 0000-03-01, so that a leap day is the last of its year.
    let days = unix.div_euclid(86_400) + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        for (unix, text) in [
            (0, "1970-01-01"),
            (951_782_399, "2000-02-28"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_795_564_800, "2026-11-25"),
            (4_102_444_799, "2099-12-31"),
            (-1, "1969-12-31"),
        ] {
            assert_eq!(date(unix), text);
        }
    }
}
