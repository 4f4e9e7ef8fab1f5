//! Engines of other Debian suites: fetched and checked by apt, unpacked beside each other and run
//! from there. Nothing is installed, and apt's own lists and configuration stay as they are.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::NotHere;
use crate::{fixtures, shell};

/// Lists and packages of one suite, from a slow mirror too.
const FETCH_LIMIT: Duration = Duration::from_secs(400);
/// Asking apt or a package about itself, and unpacking.
const LOCAL_LIMIT: Duration = Duration::from_secs(120);
/// The keys of all suites, where the system keeps them.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What the unpacked packages are, one `name version` a line.
const VERSIONS: &str = "harbour-versions";

/// A suite of the Debian archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Docker 20.10, containerd 1.6.
    Bookworm,
    /// Docker 26.1, containerd 1.7.
    Trixie,
    /// Docker 28, containerd 2.1, or newer ones.
    Sid,
}

impl Suite {
    /// As the archive calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    fn wanted(self) -> &'static [&'static str] {
        match self {
            Self::Bookworm => &["docker.io", "containerd"],
            Self::Trixie | Self::Sid => &["docker.io", "docker-cli", "containerd"],
        }
    }

    /// The engines of this suite, fetched when they are not in the cache. They stay there as they
    /// are until somebody deletes them: a suite that moves on changes no test by itself.
    ///
    /// # Errors
    /// [`NotHere`] when this machine's archive has no such suite, or cannot run what it has.
    pub fn packages(self) -> Result<Packages> {
        let cache = fixtures::cache().join("engines");
        fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
        let _turn = turn(&cache.join(format!("{}.lock", self.name())))?;
        let current = cache.join(self.name());
        if !current.join(VERSIONS).exists() {
            self.fetch(&cache, &current)?;
        }
        let dir = current.canonicalize()?;
        let packages = Packages::read(&dir)?;
        for program in ["containerd", "dockerd", "docker"] {
            let said = shell::run(packages.command(program).arg("--version"), LOCAL_LIMIT)?;
            if !said.status.success() {
                let why = said.stderr.lines().next().unwrap_or_default();
                let suite = self.name();
                return Err(
                    NotHere(format!("{program} of {suite} does not run here: {why}")).into(),
                );
            }
        }
        Ok(packages)
    }

    fn fetch(self, cache: &Path, current: &Path) -> Result<()> {
        let work = tempfile::Builder::new()
            .prefix(".fetching.")
            .tempdir_in(cache)?;
        let debs = self.download(work.path())?;
        let tree = work.path().join("tree");
        fs::create_dir(&tree)?;
        let mut versions = BTreeMap::new();
        for deb in debs {
            let ask = [
                "--show".as_ref(),
                "--showformat=${Package} ${Version}".as_ref(),
                deb.as_os_str(),
            ];
            let said = shell::check("dpkg-deb", ask, LOCAL_LIMIT)?.text();
            let (package, version) = said
                .trim()
                .split_once(' ')
                .with_context(|| format!("dpkg-deb about {}: {said}", deb.display()))?;
            versions.insert(package.to_owned(), version.to_owned());
            let unpack = ["--extract".as_ref(), deb.as_os_str(), tree.as_os_str()];
            shell::check("dpkg-deb", unpack, LOCAL_LIMIT)?;
        }
        for package in self.wanted() {
            ensure!(versions.contains_key(*package), "apt gave no {package}");
        }
        let lines: Vec<_> = versions.iter().map(|(p, v)| format!("{p} {v}\n")).collect();
        fs::write(tree.join(VERSIONS), lines.concat())?;
        let named: Vec<_> = versions.iter().map(|(p, v)| format!("{p}_{v}")).collect();
        let name = format!("{}-{}", self.name(), named.join("-"));
        let target = cache.join(&name);
        if !target.exists() {
            fs::rename(&tree, &target)
                .with_context(|| format!("putting {} in place", target.display()))?;
        }
        let link = work.path().join("link");
        std::os::unix::fs::symlink(&name, &link)?;
        fs::rename(&link, current).with_context(|| format!("naming {}", current.display()))
    }

    /// Downloads into `work`, which has a configuration of apt with this suite alone.
    fn download(self, work: &Path) -> Result<Vec<PathBuf>> {
        let suite = self.name();
        let archive = archive()?;
        for dir in ["lists/partial", "cache/archives/partial", "debs"] {
            fs::create_dir_all(work.join(dir))?;
        }
        let keys = match Path::new(KEYS).exists() {
            true => format!("[signed-by={KEYS}] "),
            false => String::new(),
        };
        let sources = work.join("sources.list");
        fs::write(&sources, format!("deb {keys}{archive} {suite} main\n"))?;
        let apt = |words: &[&str]| {
            let mut command = Command::new("apt-get");
            for option in [
                format!("Dir::Etc::sourcelist={}", sources.display()),
                "Dir::Etc::sourceparts=/dev/null".to_owned(),
                format!("Dir::State::lists={}/lists", work.display()),
                format!("Dir::Cache={}/cache", work.display()),
                "APT::Sandbox::User=root".to_owned(),
                "APT::Update::Error-Mode=any".to_owned(),
                "Acquire::Languages=none".to_owned(),
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            ] {
                command.args(["-o", &option]);
            }
            command
                .args(words)
                .current_dir(work.join("debs"))
                .env("LC_ALL", "C");
            shell::run(&mut command, FETCH_LIMIT)
        };
        let updated = apt(&["-q", "update"])?;
        if !updated.status.success() {
            let said = updated.stderr.lines().find(|line| line.starts_with("E:"));
            let said = said.unwrap_or("apt-get update failed");
            let why = format!("the archive of this system gives no Debian {suite}: {said}");
            return Err(NotHere(why).into());
        }
        let wanted: Vec<_> = self
            .wanted()
            .iter()
            .map(|p| format!("{p}/{suite}"))
            .collect();
        let words: Vec<_> = ["-q", "download"]
            .into_iter()
            .chain(wanted.iter().map(String::as_str))
            .collect();
        apt(&words)?.ok()?;
        let debs = fs::read_dir(work.join("debs"))?;
        let debs = debs.map(|entry| entry.map(|e| e.path()));
        Ok(debs.collect::<Result<_, _>>()?)
    }
}

/// Where this system's packages come from, by its own configuration.
///
/// # Errors
/// [`NotHere`] when there is no apt, or it knows of no archive.
pub fn archive() -> Result<String> {
    let targets = ["indextargets", "--format", "$(SITE) $(RELEASE)"];
    let mut command = Command::new("apt-get");
    command.args(targets).arg("Created-By: Packages");
    let Ok(said) = shell::run(&mut command, LOCAL_LIMIT) else {
        return Err(NotHere("engines are fetched by apt-get, which is not here".into()).into());
    };
    let text = said.ok()?.text();
    let site = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, release)| !release.contains('-'));
    let Some((site, _)) = site else {
        return Err(NotHere("apt-get knows of no archive on this system".into()).into());
    };
    Ok(site.to_owned())
}

/// Unpacked packages of one suite.
#[derive(Clone, Debug)]
pub struct Packages {
    dir: PathBuf,
    versions: BTreeMap<String, String>,
}

impl Packages {
    fn read(dir: &Path) -> Result<Self> {
        let text = fs::read_to_string(dir.join(VERSIONS))?;
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        Ok(Self {
            dir: dir.to_owned(),
            versions: pairs.map(|(p, v)| (p.to_owned(), v.to_owned())).collect(),
        })
    }

    /// Version of a package as its authors count, like `1.7.24`.
    pub fn version(&self, package: &str) -> &str {
        let version = self.versions.get(package).map_or("", String::as_str);
        version.split(['+', '~', '-']).next().unwrap_or(version)
    }

    /// First two numbers of a package's version.
    pub fn major_minor(&self, package: &str) -> Result<(u32, u32)> {
        let version = self.version(package);
        let mut numbers = version.split('.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => bail!("what version of {package} is {version:?}?"),
        }
    }

    /// One of the programs; it finds the others first, and what this machine has after them.
    pub fn command(&self, program: &str) -> Command {
        let found = ["usr/bin", "usr/sbin"]
            .map(|dir| self.dir.join(dir).join(program))
            .into_iter()
            .find(|path| path.exists());
        let mut command = Command::new(found.unwrap_or_else(|| program.into()));
        command.env("PATH", self.path());
        command
    }

    /// Where programs are looked for.
    pub fn path(&self) -> OsString {
        let own = std::env::var_os("PATH").unwrap_or_default();
        let own: Vec<_> = std::env::split_paths(&own).collect();
        let dirs = ["usr/bin", "usr/sbin"].map(|dir| self.dir.join(dir));
        let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        std::env::join_paths(dirs.into_iter().chain(own).chain(system)).unwrap_or_default()
    }
}

/// One process at a time fetches a suite.
fn turn(path: &Path) -> Result<Flock<File>> {
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let deadline = Instant::now() + FETCH_LIMIT + LOCAL_LIMIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((back, _)) => file = back,
        }
        ensure!(
            Instant::now() < deadline,
            "another process holds {}",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}
