//! How sources are read: trust, credentials, mirrors, proxies, deadlines, retries.

use std::{collections::BTreeMap, ffi::OsString, fmt, path::PathBuf, time::Duration};

/// Options of [`super::Source::open`].
///
/// [`Default`] reads nothing from the environment: no credentials, no proxies.
/// [`SourceOptions::from_env`] fills in what Docker and Podman users expect.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Allow plain HTTP and certificates that nobody vouches for, for every registry.
    pub insecure: bool,
    /// PEM files with further authorities, for every registry.
    pub ca_files: Vec<PathBuf>,
    /// Options of single registries, by host and port as in references (`docker.io`).
    pub registries: BTreeMap<String, RegistryOptions>,
    /// Where credentials come from.
    pub auth: AuthOptions,
    /// Which proxy is used.
    pub proxy: Proxy,
    /// How long anything may take.
    pub deadlines: Deadlines,
    /// How often and when requests are sent again.
    pub retry: RetryPolicy,
    /// What local archives may cost.
    pub archives: ArchiveOptions,
}

impl SourceOptions {
    /// Defaults, with credentials and proxies as the environment of this process names them.
    pub fn from_env() -> Self {
        Self {
            auth: AuthOptions::from_env(),
            proxy: Proxy::Environment,
            ..Self::default()
        }
    }
}

/// Options of one registry.
#[derive(Clone, Debug, Default)]
pub struct RegistryOptions {
    /// Allow plain HTTP and certificates that nobody vouches for.
    pub insecure: bool,
    /// PEM files with further authorities.
    pub ca_files: Vec<PathBuf>,
    /// Registries with the same content, tried in this order before the registry itself:
    /// `mirror.example`, `http://10.0.0.1:5000`, `https://cache.example/prefix`. A mirror's own
    /// entry in [`SourceOptions::registries`] says whether it may be insecure.
    pub mirrors: Vec<String>,
}

/// Where credentials come from.
#[derive(Clone, Default)]
pub struct AuthOptions {
    /// Used for the registry of the reference, before any file.
    pub credential: Option<Credential>,
    /// Docker `config.json` and containers `auth.json` files, asked in this order. Files that
    /// do not exist are passed over.
    pub files: Vec<PathBuf>,
    /// `PATH` that credential helpers are found by and run with; that of this process by default.
    pub helper_path: Option<OsString>,
}

impl AuthOptions {
    /// `$REGISTRY_AUTH_FILE` alone if it is set; else the `auth.json` of containers tools in
    /// `$XDG_RUNTIME_DIR`, then in `$XDG_CONFIG_HOME` or `~/.config`, then Docker's `config.json`
    /// in `$DOCKER_CONFIG` or `~/.docker`.
    pub fn from_env() -> Self {
        let var = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        if let Some(file) = var("REGISTRY_AUTH_FILE") {
            return Self {
                files: vec![file],
                ..Self::default()
            };
        }
        let home = var("HOME");
        let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
        let files = [
            var("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
            var("XDG_CONFIG_HOME")
                .or_else(|| below_home(".config"))
                .map(|dir| dir.join("containers/auth.json")),
            var("DOCKER_CONFIG")
                .or_else(|| below_home(".docker"))
                .map(|dir| dir.join("config.json")),
        ];
        Self {
            files: files.into_iter().flatten().collect(),
            ..Self::default()
        }
    }
}

impl fmt::Debug for AuthOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthOptions")
            .field("credential", &self.credential.is_some())
            .field("files", &self.files)
            .finish()
    }
}

/// A secret that a registry takes.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User and password, or an access token in the password's place.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A refresh token, which the token server changes for an access token.
    IdentityToken(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(hidden)",
            Self::IdentityToken(_) => "IdentityToken(hidden)",
        })
    }
}

/// Which proxy is used. Registries on the loopback interface never go through one.
#[derive(Clone, Default)]
pub enum Proxy {
    /// None.
    #[default]
    Direct,
    /// As `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` (either case) say.
    Environment,
    /// As given.
    Fixed {
        /// For `http://` addresses.
        http: Option<String>,
        /// For `https://` addresses.
        https: Option<String>,
        /// Hosts that are reached directly, in the form of `NO_PROXY`.
        no_proxy: Option<String>,
    },
}

// A proxy's address may hold a password.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "Direct",
            Self::Environment => "Environment",
            Self::Fixed { .. } => "Fixed(hidden)",
        })
    }
}

/// How long anything may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// A connection with its TLS handshake.
    pub connect: Duration,
    /// Time without a byte of an answer.
    pub read: Duration,
    /// One request for a manifest, config or token, from sending it to its last byte.
    pub request: Duration,
    /// One blob, all retries included, beyond what its size at [`Self::blob_rate`] takes.
    pub blob: Duration,
    /// The slowest rate in bytes per second at which a blob may come.
    pub blob_rate: u64,
    /// One call of a credential helper.
    pub helper: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(30),
            request: Duration::from_secs(60),
            blob: Duration::from_secs(600),
            blob_rate: 32 << 10,
            helper: Duration::from_secs(30),
        }
    }
}

impl Deadlines {
    /// The deadline of a blob of `size` bytes.
    pub fn for_blob(&self, size: u64) -> Duration {
        self.blob
            .saturating_add(Duration::from_secs(size / self.blob_rate.max(1)))
    }
}

/// How often and when requests are sent again.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Tries of a request, or of a blob without progress between them; at least 1.
    pub attempts: u32,
    /// Tries at a mirror, before the next one is asked; at least 1.
    pub mirror_attempts: u32,
    /// Wait before the second try; it doubles with each one. Half of every wait is random.
    pub base: Duration,
    /// The longest wait, also when the server asks for more.
    pub max: Duration,
    /// How often in all a blob may be resumed.
    pub resumes: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            mirror_attempts: 2,
            base: Duration::from_millis(200),
            max: Duration::from_secs(30),
            resumes: 100,
        }
    }
}

/// What local archives may cost.
#[derive(Clone, Debug)]
pub struct ArchiveOptions {
    /// Where a compressed archive is unpacked to, in a file without a name.
    pub temp_dir: PathBuf,
    /// Its largest size in bytes.
    pub unpacked_max: u64,
}

impl Default for ArchiveOptions {
    fn default() -> Self {
        Self {
            temp_dir: std::env::temp_dir(),
            unpacked_max: 64 << 30,
        }
    }
}
